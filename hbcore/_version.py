"""The version of hbcore; what plugins may rely on has one of its own, ``hbcore.api.API_VERSION``."""

__version__ = "0.1.0"
