"""``param_ecc``: parameters that are stored in fewer bits, with the missing bits kept in the state."""

from __future__ import annotations

import torch
from torch import Tensor

from hbcore.distributed.placement import is_dtensor
from hbcore.engine.core import OptimizerCore
from hbcore.errors import OptionError, StateWarning
from hbcore.warn import warn_at_caller


@torch.no_grad()
def narrow(core: OptimizerCore, params: list[Tensor]) -> None:
    """Store float32 parameters as ``param_ecc`` says: the tensor itself becomes narrower, the missing bits go to the state.

    Raises:
        OptionError: a parameter is sharded.
    """
    codec = core.settings.param_codec
    wide = [p for p in params if codec is not None and p.dtype == torch.float32]
    if codec is None or not wide:
        return
    if any(map(is_dtensor, wide)):
        raise OptionError(
            f"param_ecc={codec.name!r} changes the parameters' dtype, which FSDP fixes; it does not support sharded parameters."
        )
    for p in wide:
        parts = {name: torch.empty_like(p, dtype=dtype) for name, dtype in codec.parts("param", p.dtype).items()}
        for name, value in codec.write(parts, "param", p.detach()).items():
            parts[name].copy_(value)
        grad, p.grad = p.grad, None  # torch holds a gradient to its parameter's dtype, before the change and after it
        p.data = parts.pop("param")
        p.grad = None if grad is None else grad.to(p.dtype)
        core.state[p].update(parts)
    core.report.note(f"param_ecc={codec.name!r} stores float32 parameters as {wide[0].dtype}")
    warn_at_caller(
        f"{core.name}: param_ecc turned {len(wide)} float32 parameters into {wide[0].dtype}; the model now computes in that "
        "dtype, and the optimizer keeps the bits that are missing.",
        StateWarning,
    )
