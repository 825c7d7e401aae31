"""A demonstration on real pictures, ``python -m gift.demo``. Nothing else may use it."""
