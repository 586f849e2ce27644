"""What runs a program: generated Triton kernels, torch.compile or plain torch."""
