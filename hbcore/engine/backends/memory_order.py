"""How a parameter lies in memory."""

from __future__ import annotations

from torch import Tensor


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor as one dimension, in its own memory order, sharing its memory.

    Not a view to autograd: torch.compile guards on the shape of a view's base, and would compile anew for each number of
    dimensions.
    """
    storage = tensor.untyped_storage()
    return tensor.new_empty(0).set_(storage, tensor.storage_offset(), (tensor.numel(),), (1,))


def is_dense(tensor: Tensor) -> bool:
    """Whether every element has its own place and no place is skipped, in whatever order of dimensions."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda d: (d[1], d[0])):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
