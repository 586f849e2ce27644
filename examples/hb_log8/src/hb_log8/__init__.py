"""Optimizer state as 8-bit logarithms for hbcore: ``ecc="log8"``."""

__all__ = ["__version__"]

__version__ = "0.1.0"
