"""Steps that changed nothing because a gradient was not finite: what the host counted is taken back once that is known.

Whether a step is skipped is known on the device alone. The kernels there write back old values, so nothing waits for the host,
and the host counts the step as taken. The flag follows by an asynchronous copy, right after the first kernel, and is read where
it matters: before the next step, or when somebody asks for the state. By then the device has long passed that kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hbcore.distributed.exchange import all_reduce
from hbcore.distributed.placement import Shards, local, shards_of
from hbcore.engine.graph.scalar_inputs import capturing


class Skipping:
    """How many steps were skipped, and the last step while nobody knows whether it was.

    Attributes:
        elsewhere: above 0 if a gradient is not finite in another part of a composed optimizer, 0-d; None where there is none.
        pending: the last step's flag, the event after its copy, and what takes the step back; None once that is settled.
    """

    def __init__(self) -> None:
        self.elsewhere: Tensor | None = None
        self._settled = 0
        self._captured: Tensor | None = None
        self._sent: tuple[Tensor, Any] | None = None
        self.pending: tuple[Tensor, Any, Callable[[], None]] | None = None

    @property
    def count(self) -> int:
        """The steps skipped so far. Waits for the last step's flag; not allowed in a capture."""
        self.settle()
        return self._settled + (0 if self._captured is None else int(self._captured))

    def send(self, flag: Tensor) -> None:
        """Send a step's flag to the host, before the kernels that depend on it: the host waits for no more than this.

        Args:
            flag: above 0 if the step changes nothing, 0-d, on any device.
        """
        self._sent = (flag, None)
        if flag.device.type == "cuda":
            host = torch.empty((), dtype=flag.dtype, device="cpu", pin_memory=True)
            host.copy_(flag, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(flag.device))
            self._sent = (host, event)

    def expect(self, undo: Callable[[], None]) -> None:
        """Note a step that the host counted, whose flag was sent; ``undo`` takes back what it counted."""
        assert self._sent is not None
        self.pending = (*self._sent, undo)
        if self._sent[1] is None:
            self.settle()

    def add(self, flag: Tensor) -> None:
        """Note a step whose counters are on the device, where it may be part of a capture."""
        if self._captured is None or self._captured.device != flag.device:
            if capturing():
                return  # the step before the capture made it, unless the plan was made anew on another device
            self._captured = torch.tensor(self.count, dtype=torch.int64).to(flag.device)
            self._settled = 0
        self._captured += flag > 0

    def settle(self, wait: bool = True) -> bool:
        """Take back what the last step counted, if it was skipped; without ``wait``, only if that is known. Returns whether
        it is."""
        if self.pending is None:
            return True
        flag, event, undo = self.pending
        if event is not None:
            if not (wait or event.query()):
                return False
            event.synchronize()
        self.pending = None
        if float(flag) > 0:
            self._settled += 1
            undo()
        return True


def nonfinite(params: Iterable[Tensor]) -> Tensor | None:
    """Whether a gradient of some parameter holds an inf or a NaN: 1 or 0, 0-d float64, the same on all ranks.

    None where no parameter has a gradient. Collective for sharded parameters.
    """
    parts: dict[Any, tuple[Shards | None, list[Tensor]]] = {}
    for p in params:
        if p.grad is not None:
            shards = shards_of(p)
            grad = local(p.grad.coalesce().values() if p.grad.is_sparse else p.grad)
            key = (None if shards is None else shards.mesh, grad.device, grad.dtype)
            parts.setdefault(key, (shards, []))[1].append(grad)
    found: Tensor | None = None
    for shards, grads in parts.values():
        largest = torch._foreach_norm([g for g in grads if g.numel()], math.inf) if any(g.numel() for g in grads) else []
        flag = torch.zeros((), dtype=torch.float64, device=grads[0].device)
        if largest:
            flag = (torch.stack(list(largest)) < math.inf).logical_not().any().double()
        if shards is not None:
            all_reduce(flag, "amax", shards)
        found = flag if found is None else torch.maximum(found, flag.to(found.device))
    return found
