"""Storage codecs for hbcore.

For optimizer state (``ecc=``) and parameters (``param_ecc=``): ``bf16+8``, ``bf16+16``, ``fp16+8`` and ``fp16+16``, of three or
four bytes an element. For state alone: ``int8`` and ``uint8``, of 1.06 and 1.125 bytes.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
