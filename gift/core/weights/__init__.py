"""Adapted weights: the record of one, the mixin of its module, and what others read as it."""
