"""The options that every optimizer takes besides its own hyperparameters: their types, defaults and meaning, stated once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, InitVar
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import TypedDict, dataclass_transform

from hbcore.engine.backends import select
from hbcore.rules import clipping, division
from hbcore.rules.products import PRECISIONS


class Option(NamedTuple):
    """Default and meaning of one option."""

    default: Any
    doc: str


def option(*, default: Any, doc: str) -> Any:
    """Declare a shared option; type checkers take its default for the field's."""
    return Option(default, doc)


@dataclass_transform(eq_default=False, field_specifiers=(option,))
class Declared:
    """Base of classes whose annotated fields are their constructor's parameters; type checkers read them as a dataclass's."""


class SharedOptions(Declared):
    """Keyword arguments of every optimizer. :data:`OPTIONS` has them as data; no instance has them as attributes."""

    params: InitVar[ParamsT]
    _: KW_ONLY
    weight_decay: float = option(default=0.0, doc="decoupled weight decay; each step subtracts lr * weight_decay * p")
    warmup_steps: int = option(
        default=0, doc="N: the learning rate is multiplied by min(1, t / (N + 1)) at a parameter's step t"
    )
    caution: bool = option(default=False, doc="keep only the elements of the update whose sign agrees with the gradient")
    cautious_weight_decay: bool = option(default=False, doc="decay only where the update and the parameter agree in sign")
    promote: bool = option(default=False, doc="hand matrix rules their updates in float32; elementwise rules always compute so")
    maximize: bool = option(default=False, doc="ascend the gradient instead of descending it")
    division_backend: str = option(
        default=division.DEFAULT, doc=f"how to divide by what may be zero: {', '.join(division.BACKENDS)}"
    )
    atan2_scale: float = option(default=16.0, doc="the scale of division_backend='atan2'")
    storage_dtype: str | torch.dtype = option(
        default="float32", doc="the dtype that state is stored in; float64 parameters keep float64 state"
    )
    ecc: str | Mapping[str, str] | None = option(
        default=None, doc="the codec that state is stored with, or one for each slot: bf16+8, int8, ...; comes with hb_ecc"
    )
    param_ecc: str | None = option(
        default=None, doc="the codec that parameters are stored with; float32 parameters become bfloat16"
    )
    stochastic_rounding: bool = option(
        default=False, doc="round 16-bit parameters and state, and the last bit of bf16+8 and fp16+8, stochastically"
    )
    seed: int = option(
        default=0, doc="what all random numbers of the optimizer are drawn from; the global generators are never used"
    )
    mars: bool = option(default=False, doc="correct the gradient by how it changed since the last step")
    mars_gamma: float = option(default=0.0025, doc="the strength of mars; 0.025 in the paper")
    palm: bool = option(default=False, doc="let the decay of the second moment rise with the step, 1 - t^-beta2_scale")
    beta2_scale: float = option(default=0.8, doc="how fast it rises, in (0, 1]")
    use_ema: bool = option(default=False, doc="keep a moving average of the parameters, for `with optimizer.ema_weights():`")
    ema_decay: float = option(default=0.001, doc="the weight of the newest parameters in that average")
    gradient_clipping: Any = option(
        default=None, doc=f"{', '.join(clipping.CLIPS)}, (name, threshold) or a function; before the rule"
    )
    update_clipping: Any = option(default=None, doc="the same, after the rule")
    skip_nonfinite: bool = option(
        default=False, doc="a step in which any gradient holds an inf or a NaN changes nothing; counted in optimizer.report"
    )
    matmul_precision: str | None = option(
        default=None,
        doc=f"how matrix rules multiply float32: {', '.join(PRECISIONS)}; None is split on GPUs for data centers, else ieee",
    )
    offload: str | None = option(
        default=None, doc='"cpu" keeps state in pinned host memory, from where it visits the GPU during a step'
    )
    report_norms: bool = option(
        default=False, doc="optimizer.norms() has the root mean squares of each parameter's last change, and of its weights"
    )
    consume_grad: bool = option(default=True, doc="step() clears p.grad once it is used")
    multi_tensor: bool = option(
        default=True, doc="run many parameters together; False runs one at a time, with the same results but for flat rules"
    )
    capturable: bool = option(
        default=False, doc="keep step counters and scalars on the device, so that a CUDA graph can hold a step"
    )
    compile: str = option(default="auto", doc=f"the backend: {', '.join(select.CHOICES)}")
    compile_step: bool | None = option(default=None, doc="HeavyBall's spelling; True means compile='inductor'")
    foreach: bool | None = option(default=None, doc="torch's spelling; maps to multi_tensor, with a warning")
    fused: bool | None = option(default=None, doc="torch's spelling; maps to multi_tensor, with a warning")


OPTIONS: Mapping[str, Option] = {name: value for name, value in vars(SharedOptions).items() if isinstance(value, Option)}
"""Option -> its default and meaning."""

for _name in OPTIONS:
    delattr(SharedOptions, _name)  # else an optimizer would have an attribute `compile`, of no value to anybody

SCHEDULED = ("weight_decay", "warmup_steps", "mars_gamma", "beta2_scale", "ema_decay")
"""The options that live in the param groups, where schedulers may change them, whether a rule reads them or not."""

REMOVED: Mapping[str, str] = {
    "stochastic_schedule": "refreshes follow a deterministic schedule; pass precondition_frequency or precond_scheduler",
    "normalize_grads": "pass gradient_clipping='l2_clip_'",
    "correct_bias": "moments are always corrected; use the optimizer whose rule leaves it out",
    "inverse_free": "pass precond_rule='quad', or use PSGDPRO",
    "adaptive": "pass gradient_clipping='adaptive_gradient_clipping_'",
}


class Options(TypedDict, total=False):
    """:class:`SharedOptions` as keyword arguments, for constructors written out by hand: ``**options: Unpack[Options]``.

    A test holds it to the same names and types.
    """

    weight_decay: float
    warmup_steps: int
    caution: bool
    cautious_weight_decay: bool
    promote: bool
    maximize: bool
    division_backend: str
    atan2_scale: float
    storage_dtype: str | torch.dtype
    ecc: str | Mapping[str, str] | None
    param_ecc: str | None
    stochastic_rounding: bool
    seed: int
    mars: bool
    mars_gamma: float
    palm: bool
    beta2_scale: float
    use_ema: bool
    ema_decay: float
    gradient_clipping: Any
    update_clipping: Any
    skip_nonfinite: bool
    matmul_precision: str | None
    offload: str | None
    report_norms: bool
    consume_grad: bool
    multi_tensor: bool
    capturable: bool
    compile: str
    compile_step: bool | None
    foreach: bool | None
    fused: bool | None
