"""One run of one strategy over one network: enabling, planning, disabling, and their report.

It knows no method and no layer; caps bring these.
"""
