"""The options that every optimizer shares, stated once: their types, defaults, meaning, and what became of removed ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from typing_extensions import TypedDict

from hbcore import registry
from hbcore.engine.backends import select as fallback
from hbcore.errors import OptionError, RuleError
from hbcore.rules import clipping, division, roles, route, stages
from hbcore.rules.mars import Mars
from hbcore.rules.transform import Domain, Transform
from hbcore.state.codec import StateCodec, cast_codec
from hbcore.warn import warn_at_caller


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
    ecc: str | None
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
    consume_grad: bool
    multi_tensor: bool
    capturable: bool
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
    "promote": Option(False, "hand matrix rules their updates in float32; elementwise rules always compute so"),
    "maximize": Option(False, "ascend the gradient instead of descending it"),
    "division_backend": Option(division.DEFAULT, f"how to divide by what may be zero: {', '.join(division.BACKENDS)}"),
    "atan2_scale": Option(16.0, "the scale of division_backend='atan2'"),
    "storage_dtype": Option("float32", "the dtype that state is stored in; float64 parameters keep float64 state"),
    "ecc": Option(None, "the codec that state is stored with: bf16+8, bf16+16; comes with hb_ecc"),
    "param_ecc": Option(None, "the codec that parameters are stored with; float32 parameters become bfloat16"),
    "stochastic_rounding": Option(False, "round bfloat16 parameters and state, and the last bit of bf16+8, stochastically"),
    "seed": Option(0, "what all random numbers of the optimizer are drawn from; the global generators are never used"),
    "mars": Option(False, "correct the gradient by how it changed since the last step"),
    "mars_gamma": Option(0.0025, "the strength of mars; 0.025 in the paper"),
    "palm": Option(False, "let the decay of the second moment rise with the step, 1 - t^-beta2_scale"),
    "beta2_scale": Option(0.8, "how fast it rises, in (0, 1]"),
    "use_ema": Option(False, "keep a moving average of the parameters, for `with optimizer.ema_weights():`"),
    "ema_decay": Option(0.001, "how much of the newest parameters that average takes"),
    "gradient_clipping": Option(None, f"{', '.join(clipping.CLIPS)}, (name, threshold) or a function; before the rule"),
    "update_clipping": Option(None, "the same, after the rule"),
    "consume_grad": Option(True, "step() clears p.grad once it is used"),
    "multi_tensor": Option(True, "run many parameters together; False runs one at a time, with the same results"),
    "capturable": Option(False, "keep step counters and scalars on the device, so that a CUDA graph can hold a step"),
    "compile": Option("auto", f"the backend: {', '.join(fallback.CHOICES)}"),
    "compile_step": Option(None, "HeavyBall's spelling; True means compile='inductor'"),
    "foreach": Option(None, "torch's spelling; maps to multi_tensor, with a warning"),
    "fused": Option(None, "torch's spelling; maps to multi_tensor, with a warning"),
}

SCHEDULED = ("weight_decay", "warmup_steps", "mars_gamma", "beta2_scale", "ema_decay")
"""The shared options that live in the param groups, where schedulers may change them, whether a rule reads them or not."""

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
    param_codec: StateCodec | None
    stochastic_rounding: bool
    seed: int
    mars: bool
    palm: bool
    use_ema: bool
    clips: tuple[Transform, ...]
    consume_grad: bool
    multi_tensor: bool
    capturable: bool
    compile: str

    def stages(self, h: Any, rule: Iterable[Transform]) -> tuple[Transform, ...]:
        """The transforms that the options insert around ``rule``, given a group's hyperparameters ``h``."""
        rule = tuple(rule)
        held = [t.name for t in route.every(rule) if self.capturable and (t.domain == Domain.MATRIX or t.scalars())]
        if held:
            raise OptionError(f"capturable=True is not to be had for {', '.join(held)} yet; pass capturable=False.")
        decays = any(True for _ in roles.values(rule, "weight_decay"))
        inserted = list(self.clips)
        if self.mars:
            inserted.append(Mars(h.mars_gamma, first_beta(rule)))
        if self.caution:
            inserted.append(stages.Caution())
        if decays and self.cautious_weight_decay:
            raise OptionError(
                "cautious_weight_decay=True needs decoupled weight decay, and this optimizer, as set up, couples it."
            )
        if not decays:
            inserted.append(stages.DecayWeights(h.weight_decay, self.cautious_weight_decay))
        if not any(t.owns_apply for t in rule):
            inserted += [stages.ScaleByLr(h.lr, h.warmup_steps), stages.Apply()]
        if self.use_ema:
            inserted.append(stages.ParameterEMA(h.ema_decay))
        check_slots((*rule, *inserted))
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
    _translate(optimizer, values)
    if values["compile"] not in fallback.CHOICES:
        raise OptionError(f"{optimizer}: compile={values['compile']!r} is not one of {', '.join(fallback.CHOICES)}.")
    if values["stochastic_rounding"] and values["capturable"]:
        raise OptionError(
            f"{optimizer}: stochastic_rounding=True draws by the step, which a captured step does not tell the host; "
            "pass capturable=False, or round to nearest."
        )
    settings = Settings(
        caution=bool(values["caution"]),
        cautious_weight_decay=bool(values["cautious_weight_decay"]),
        promote=bool(values["promote"]),
        divide=division.resolve(values["division_backend"], values["atan2_scale"]),
        codec=_codec(optimizer, values),
        param_codec=registry.load_codec(values["param_ecc"])() if values["param_ecc"] else None,
        stochastic_rounding=bool(values["stochastic_rounding"]),
        seed=int(values["seed"]),
        mars=bool(values["mars"]),
        palm=bool(values["palm"]),
        use_ema=bool(values["use_ema"]),
        clips=tuple(
            clip
            for option, stage in (("gradient_clipping", "clip_gradient"), ("update_clipping", "clip_update"))
            if (clip := clipping.resolve(values[option], stage)) is not None
        ),
        consume_grad=bool(values["consume_grad"]),
        multi_tensor=bool(values["multi_tensor"]),
        capturable=bool(values["capturable"]),
        compile=values["compile"],
    )
    return settings, {name: values[name] for name in (*SCHEDULED, "maximize")}


def _translate(optimizer: str, values: dict[str, Any]) -> None:
    """Map other libraries' spellings to ours, in place; torch's with a warning."""
    for spelling in ("foreach", "fused"):
        if values[spelling] is not None:
            values["multi_tensor"] = bool(values[spelling])
            warn_at_caller(
                f"{optimizer}: {spelling}={values[spelling]} is torch's spelling; pass multi_tensor="
                f"{bool(values[spelling])}. Kernels are always fused where a backend can.",
                FutureWarning,
            )
    if values["compile_step"]:
        values["compile"] = "inductor"


def check_slots(transforms: Iterable[Transform]) -> None:
    """Raise :class:`RuleError` unless every slot has one owner."""
    owners: dict[str, str] = {}
    blank = torch.empty(0, device="meta")
    for t in transforms:
        for slot in t.slots(blank):
            if slot in owners:
                raise RuleError(f"{owners[slot]!r} and {t.name!r} both claim the slot {slot!r}; rename one of them.")
            owners[slot] = t.name


def first_beta(rule: Iterable[Transform]) -> Any:
    """The decay rate of a rule's first moment; of several, the one that the gradient meets first.

    Raises:
        OptionError: no hyperparameter is declared as one.
    """
    for value in roles.values(rule, "first_moment"):
        return value
    raise OptionError(
        "mars=True corrects by the decay rate of the first moment, and no hyperparameter of this rule is declared as one with "
        "hyper(..., role='first_moment'); pass mars=False."
    )


def _codec(optimizer: str, values: Mapping[str, Any]) -> StateCodec:
    if values["ecc"] is None:
        return cast_codec(values["storage_dtype"])
    if values["storage_dtype"] not in ("float32", torch.float32):
        raise OptionError(
            f"{optimizer}: ecc={values['ecc']!r} and storage_dtype={values['storage_dtype']!r} both say how state is stored; "
            "pass one of them."
        )
    codec: StateCodec = registry.load_codec(values["ecc"])()
    return codec


def unknown(optimizer: str, name: str, own: Iterable[str]) -> str:
    """What to say about an option that does not exist."""
    if name in REMOVED:
        return f"{optimizer}: option {name!r} was removed in HeavyBall 3.0; {REMOVED[name]}."
    known = sorted({*own, *OPTIONS})
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"it takes {', '.join(known)}."
    return f"{optimizer} has no option {name!r}; {hint}"
