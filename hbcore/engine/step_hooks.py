"""What torch does around a step: hooks, the profiler's record, and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import optimizer as hooks

# torch.compiler.disable would import the compiler right here, which takes a second.
_disable: Callable[[Callable[..., Any]], Callable[..., Any]] = torch._disable_dynamo  # type: ignore[attr-defined]


@_disable
def step_outside_graphs(optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None) -> Any:
    """``optimizer.step(closure)``, not traced: a step's kernels are compiled already, and its Python is not for a graph."""
    return optimizer.step(closure)


def observed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks or a profiler want to see the step. Asking takes a tenth of the time that torch's wrapper takes."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or hooks._global_optimizer_pre_hooks
        or hooks._global_optimizer_post_hooks
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    )
