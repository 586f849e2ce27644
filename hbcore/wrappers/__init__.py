"""Optimizers made of optimizers, and gradient release."""
