"""One run of one strategy over one network: enable, plan, disable, and the report.

This package names no method and no layer type; caps bring these.
"""
