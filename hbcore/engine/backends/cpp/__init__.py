"""The C++ backend: one generated function for all tensors of all groups, for CPUs."""
