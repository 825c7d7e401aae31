"""Adapting modules and networks in place.

This package holds generated classes, deltas, effective weights, state dicts and undo. It names no
strategy, file format or method. Strategies and file formats are above it, methods are below.
"""
