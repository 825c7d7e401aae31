"""Fast paths: a layer's output without its effective weight.

No method and no adapted module by name.
"""
