"""The Triton backend: one generated kernel for all tensors of all groups."""
