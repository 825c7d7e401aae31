"""Adapted weights: their record, the mixin of their module, and the effective weight."""
