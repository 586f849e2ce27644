"""Storage codecs for optimizer state and parameters for hbcore: ``bf16+8`` and ``bf16+16``."""

__all__ = ["__version__"]

__version__ = "0.1.0"
