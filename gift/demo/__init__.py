"""A demonstration on real pictures: ``python -m gift.demo``."""
