"""Optimizer state: slots and their codecs, and step counters."""
