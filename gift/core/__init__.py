"""What happens to one module, or to one network, that is fine-tuned in place.

Here are generated classes, deltas, effective weights, states, and the way back. No strategy, no
file format and no method by its name: those are above and below.
"""
