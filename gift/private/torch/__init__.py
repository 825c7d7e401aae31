"""Private parts of torch: what each tells, why no public name does, and the fallback.

One file for each thing of torch that is asked. See `gift.private` for the rules. `PARTS` of a file
lists the dotted paths that every version of torch has; others are attributes of instances, or exist
in some builds only, and the tests of the functions check these.
"""
