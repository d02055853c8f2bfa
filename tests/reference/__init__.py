"""Slow, dense, obvious float64 versions of every algorithm, written from the formulas alone."""
