"""The options that every optimizer shares, stated once: their types, defaults, meaning, and what became of removed ones."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from typing_extensions import TypedDict

from hbcore.engine import fallback
from hbcore.errors import OptionError
from hbcore.rules import division, stages
from hbcore.rules.transform import Transform
from hbcore.state.codec import StateCodec, cast_codec


class Options(TypedDict, total=False):
    """Keyword arguments that every optimizer takes besides its own; :data:`OPTIONS` has their defaults and meaning."""

    weight_decay: float
    warmup_steps: int
    caution: bool
    cautious_weight_decay: bool
    promote: bool
    maximize: bool
    division_backend: str
    atan2_scale: float
    storage_dtype: str | torch.dtype
    consume_grad: bool
    multi_tensor: bool
    compile: str
    compile_step: bool | None
    foreach: bool | None
    fused: bool | None


class Option(NamedTuple):
    """Default and meaning of one option."""

    default: Any
    doc: str


OPTIONS: Mapping[str, Option] = {
    "weight_decay": Option(0.0, "decoupled weight decay; each step subtracts lr * weight_decay * p"),
    "warmup_steps": Option(0, "N: the learning rate is multiplied by min(1, t / (N + 1)) at a parameter's step t"),
    "caution": Option(False, "keep only the elements of the update whose sign agrees with the gradient"),
    "cautious_weight_decay": Option(False, "decay only where the update and the parameter agree in sign"),
    "promote": Option(False, "hand the gradient to every rule in float32; elementwise rules always compute so"),
    "maximize": Option(False, "ascend the gradient instead of descending it"),
    "division_backend": Option(division.DEFAULT, f"how to divide by what may be zero: {', '.join(division.BACKENDS)}"),
    "atan2_scale": Option(16.0, "the scale of division_backend='atan2'"),
    "storage_dtype": Option("float32", "the dtype that state is stored in; float64 parameters keep float64 state"),
    "consume_grad": Option(True, "step() clears p.grad once it is used"),
    "multi_tensor": Option(True, "run many parameters together; False runs one at a time, with the same results"),
    "compile": Option("auto", f"the backend: {', '.join(fallback.CHOICES)}"),
    "compile_step": Option(None, "HeavyBall's spelling; True means compile='inductor'"),
    "foreach": Option(None, "torch's spelling; maps to multi_tensor, with a warning"),
    "fused": Option(None, "torch's spelling; maps to multi_tensor, with a warning"),
}

SCHEDULED = ("weight_decay", "warmup_steps")
"""The shared options that live in the param groups, where schedulers may change them."""

REMOVED: Mapping[str, str] = {
    "stochastic_schedule": "refreshes follow a deterministic schedule; pass precondition_frequency or precond_scheduler",
    "normalize_grads": "pass gradient_clipping='l2_clip_'",
    "correct_bias": "moments are always corrected; use the optimizer whose rule leaves it out",
    "inverse_free": "pass precond_rule='quad', or use PSGDPRO",
    "adaptive": "pass gradient_clipping='adaptive_gradient_clipping_'",
}


@dataclass(frozen=True)
class Settings:
    """The structural options of one optimizer, resolved. Whatever may be scheduled is in its param groups instead."""

    caution: bool
    cautious_weight_decay: bool
    promote: bool
    divide: division.Divide
    codec: StateCodec
    consume_grad: bool
    multi_tensor: bool
    compile: str

    def stages(self, h: Any, rule: Iterable[Transform]) -> tuple[Transform, ...]:
        """The transforms that the options insert around ``rule``, given a group's hyperparameters ``h``."""
        rule = tuple(rule)
        decays = any(name == "weight_decay" for t in rule for name, _, _ in t.hypers())
        inserted: list[Transform] = []
        if self.caution:
            inserted.append(stages.Caution())
        if not decays:
            inserted.append(stages.DecayWeights(h.weight_decay, self.cautious_weight_decay))
        if not any(t.owns_apply for t in rule):
            inserted += [stages.ScaleByLr(h.lr, h.warmup_steps), stages.Apply()]
        return stages.arrange((*rule, *inserted))


def resolve(optimizer: str, own: Iterable[str], given: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """Check shared options and split them into structure and what lives in the param groups.

    Args:
        optimizer: its name, for messages.
        own: the names of its own parameters, for suggestions.
        given: the options as the user passed them.

    Raises:
        OptionError: an option does not exist, was removed, or has a value that does not exist.
    """
    for name in given:
        if name not in OPTIONS:
            raise OptionError(unknown(optimizer, name, own))
    values = {name: given.get(name, option.default) for name, option in OPTIONS.items()}
    for spelling in ("foreach", "fused"):
        if values[spelling] is not None:
            values["multi_tensor"] = bool(values[spelling])
            warnings.warn(
                f"{optimizer}: {spelling}={values[spelling]} is torch's spelling; pass multi_tensor="
                f"{bool(values[spelling])}. Kernels are always fused where a backend can.",
                FutureWarning,
                stacklevel=4,
            )
    if values["compile_step"]:
        values["compile"] = "inductor"
    if values["compile"] not in fallback.CHOICES:
        raise OptionError(f"{optimizer}: compile={values['compile']!r} is not one of {', '.join(fallback.CHOICES)}.")
    settings = Settings(
        caution=bool(values["caution"]),
        cautious_weight_decay=bool(values["cautious_weight_decay"]),
        promote=bool(values["promote"]),
        divide=division.resolve(values["division_backend"], values["atan2_scale"]),
        codec=cast_codec(values["storage_dtype"]),
        consume_grad=bool(values["consume_grad"]),
        multi_tensor=bool(values["multi_tensor"]),
        compile=values["compile"],
    )
    return settings, {name: values[name] for name in (*SCHEDULED, "maximize")}


def unknown(optimizer: str, name: str, own: Iterable[str]) -> str:
    """What to say about an option that does not exist."""
    if name in REMOVED:
        return f"{optimizer}: option {name!r} was removed in HeavyBall 3.0; {REMOVED[name]}."
    known = sorted({*own, *OPTIONS})
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"it takes {', '.join(known)}."
    return f"{optimizer} has no option {name!r}; {hint}"
