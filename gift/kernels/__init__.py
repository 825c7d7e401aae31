"""Fast paths: compute a layer's output without its effective weight.

This package refers to no method and no adapted module by name.
"""
