"""gift inside libraries that train, save and load networks: one file for each.

What has to be true in all of them is in `_properties.py`. A library that is not installed leaves
its file out, with that reason; the extra `clients` brings all.
"""
