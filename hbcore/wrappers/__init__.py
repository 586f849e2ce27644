"""Composite optimizers and gradient release."""
