"""A demo on real images, ``python -m gift.demo``. No other module may use it."""
