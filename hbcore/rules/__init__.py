"""Optimizer rules as pure functions. Nothing here imports the engine or mutates a tensor."""
