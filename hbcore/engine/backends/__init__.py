"""Backends that run a program: generated Triton kernels, torch.compile or eager torch."""
