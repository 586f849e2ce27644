"""What rows must share to lie in one stack."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hbcore.engine.graph.segment_spec import SegmentSpec


@dataclass(frozen=True)
class StackKey:
    """What blocks must share to lie in one stack.

    Blocks of several groups may. A rule is handed rows whose numbers and step are the same, so those that differ when the stack
    is made have stacks of their own: otherwise each call would have to gather its rows.

    Attributes:
        index: the rule's place in the chain.
        numbers: those of the group that the rule read when the stack was made.
        step: the parameter's step then.
        offloaded: whether the rule's state lives in host memory.
    """

    spec: SegmentSpec
    index: int
    numbers: tuple[float, ...]
    step: float
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offloaded: bool = False
