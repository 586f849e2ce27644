"""The PSGD family of optimizers for hbcore. Provides nothing yet."""

__all__ = ["__version__"]

__version__ = "0.1.0"
