"""One generated kernel for all tensors of all groups."""
