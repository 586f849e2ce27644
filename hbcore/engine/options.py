"""Validation of an optimizer's shared options, and the transforms they insert around its rule."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hbcore import registry
from hbcore.engine.backends import select as fallback
from hbcore.engine.offload import TARGETS
from hbcore.engine.shared_options import OPTIONS, REMOVED, SCHEDULED
from hbcore.errors import OptionError, RuleError, StateWarning
from hbcore.rules import clipping, division, roles, route, stages
from hbcore.rules.mars import Mars
from hbcore.rules.products import PRECISIONS
from hbcore.rules.transform import Domain, Transform
from hbcore.state.codec import StateCodec, cast_codec
from hbcore.state.codec_choice import PerSlot, per_block_of
from hbcore.warn import warn_at_caller


@dataclass(frozen=True)
class Settings:
    """The resolved structural options of one optimizer. Options that may be scheduled live in its param groups."""

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
    skip_nonfinite: bool = False  # options newer than 0.1.0 have a default, which its pickles lack
    matmul_precision: str | None = None
    offload: str | None = None
    report_norms: bool = False

    def stages(self, h: Any, rule: Iterable[Transform]) -> tuple[Transform, ...]:
        """``rule`` with the transforms the options insert, in order, for a group's hyperparameters ``h``."""
        rule = tuple(rule)
        every = [*route.every(rule), *self.clips]
        held = [t.name for t in every if self.capturable and (t.domain == Domain.MATRIX or t.scalars() or t.draws)]
        if held:
            raise OptionError(f"capturable=True is not supported by {', '.join(held)} yet; pass capturable=False.")
        decays = any(True for _ in roles.values(rule, "weight_decay"))
        inserted = list(self.clips)
        if self.mars:
            inserted.append(Mars(h.mars_gamma, first_beta(rule)))
        if self.caution:
            inserted.append(stages.Caution())
        if decays and self.cautious_weight_decay:
            raise OptionError(
                "cautious_weight_decay=True requires decoupled weight decay, but this optimizer, as configured, couples it."
            )
        if not decays:
            inserted.append(stages.DecayWeights(h.weight_decay, self.cautious_weight_decay))
        owners = [t.name for t in rule if t.owns_apply]
        if len(owners) > 1:
            raise RuleError(
                f"{' and '.join(map(repr, owners))} both apply the step (owns_apply = True); a chain has one that does."
            )
        if not owners:
            inserted += [stages.ScaleByLr(h.lr, h.warmup_steps), stages.Apply()]
        if self.use_ema:
            inserted.append(stages.ParameterEMA(h.ema_decay))
        return stages.arrange((*rule, *inserted))


def resolve(optimizer: str, own: Iterable[str], given: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """Validate shared options and split them into structural settings and param group entries.

    Args:
        optimizer: the optimizer's name, for messages.
        own: the names of the optimizer's own arguments, for suggestions.
        given: the options passed by the user.

    Raises:
        OptionError: an option is unknown, was removed, or has an invalid value.
    """
    for name in given:
        if name not in OPTIONS:
            raise OptionError(unknown(optimizer, name, own))
    values = {name: given.get(name, option.default) for name, option in OPTIONS.items()}
    _translate(optimizer, values)
    _check_choices(optimizer, values)
    if values["stochastic_rounding"] and values["capturable"]:
        raise OptionError(
            f"{optimizer}: stochastic_rounding=True seeds its noise with the step count, which the host does not know in a "
            "captured step; pass capturable=False or stochastic_rounding=False."
        )
    settings = Settings(
        caution=bool(values["caution"]),
        cautious_weight_decay=bool(values["cautious_weight_decay"]),
        promote=bool(values["promote"]),
        divide=division.resolve(values["division_backend"], values["atan2_scale"]),
        codec=_codec(optimizer, values),
        param_codec=_param_codec(optimizer, values["param_ecc"]),
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
        skip_nonfinite=bool(values["skip_nonfinite"]),
        matmul_precision=values["matmul_precision"],
        offload=values["offload"],
        report_norms=bool(values["report_norms"]),
        consume_grad=bool(values["consume_grad"]),
        multi_tensor=bool(values["multi_tensor"]),
        capturable=bool(values["capturable"]),
        compile=values["compile"],
    )
    return settings, {name: values[name] for name in (*SCHEDULED, "maximize")}


def without_options(group: Mapping[str, Any], settings: Settings, keys: Collection[str], where: str) -> dict[str, Any]:
    """A param group without options that hold for the whole optimizer, if it only repeats them, as wrappers' groups do.

    Args:
        group: as given.
        settings: the optimizer's.
        keys: the entries that a group may have of its own.
        where: what the message begins with.

    Raises:
        OptionError: an option has another value than the optimizer's, or was removed.
    """
    if gone := [key for key in group if key in REMOVED and key not in keys]:
        raise OptionError(removed(where, gone[0]))
    spelled: dict[str, Any] = {"foreach": settings.multi_tensor, "fused": settings.multi_tensor, "ecc": settings.codec.name}
    if isinstance(settings.codec, PerSlot):
        spelled["ecc"] = {slot: codec.name for slot, codec in settings.codec.codecs.items()}
    if settings.param_codec is not None:
        spelled["param_ecc"] = settings.param_codec.name
    kept = dict(group)
    for key in [k for k in group if k in OPTIONS and k not in keys]:
        value = kept.pop(key)
        held = spelled.get(key, getattr(settings, key, None))
        if value is not None and (type(value) is not type(held) or value != held):
            raise OptionError(
                f"{where}: {key}={value!r} would hold for the whole optimizer and cannot be set for one group; pass it to the "
                "constructor."
            )
    return kept


def _translate(optimizer: str, values: dict[str, Any]) -> None:
    """Map other libraries' option names to ours, in place; torch's with a warning."""
    for spelling in ("foreach", "fused"):
        if values[spelling] is not None:
            values["multi_tensor"] = bool(values[spelling])
            warn_at_caller(
                f"{optimizer}: {spelling}={values[spelling]} is torch's name for it; pass multi_tensor="
                f"{bool(values[spelling])}. Kernels are always fused where the backend supports it.",
                FutureWarning,
            )
    if values["compile_step"]:
        values["compile"] = "inductor"


def first_beta(rule: Iterable[Transform]) -> Any:
    """The decay rate of a rule's first moment; if there are several, the first in chain order.

    Raises:
        OptionError: no hyperparameter is declared with that role.
    """
    for value in roles.values(rule, "first_moment"):
        return value
    raise OptionError(
        "mars=True needs the decay rate of the first moment, but no hyperparameter of this rule is declared with "
        "hyper(..., role='first_moment'); pass mars=False."
    )


def _check_choices(optimizer: str, values: Mapping[str, Any]) -> None:
    """Raise :class:`OptionError` for an option that is none of its choices."""
    if values["compile"] not in fallback.CHOICES:
        raise OptionError(f"{optimizer}: compile={values['compile']!r} is not one of {', '.join(fallback.CHOICES)}.")
    if values["matmul_precision"] not in (None, *PRECISIONS):
        raise OptionError(
            f"{optimizer}: matmul_precision={values['matmul_precision']!r} is not one of {', '.join(PRECISIONS)}, or None."
        )
    if values["offload"] not in (None, *TARGETS):
        raise OptionError(f"{optimizer}: offload={values['offload']!r} is not one of {', '.join(TARGETS)}, or None.")
    if values["offload"] is not None and values["capturable"]:
        raise OptionError(
            f"{optimizer}: offload={values['offload']!r} waits for copies at the end of a step, which a CUDA graph cannot do; "
            "pass capturable=False or offload=None."
        )
    if values["offload"] is not None and values["param_ecc"]:
        raise OptionError(
            f"{optimizer}: offload={values['offload']!r} does not support param_ecc, whose corrections belong to weights on "
            "the device; pass ecc to store state in fewer bits, or offload=None."
        )


def _codec(optimizer: str, values: Mapping[str, Any]) -> StateCodec:
    if values["ecc"] is None:
        return cast_codec(values["storage_dtype"])
    if values["storage_dtype"] not in ("float32", torch.float32):
        raise OptionError(
            f"{optimizer}: ecc={values['ecc']!r} and storage_dtype={values['storage_dtype']!r} both set how state is stored; "
            "pass only one of them."
        )
    if isinstance(values["ecc"], Mapping):
        return PerSlot({slot: _loaded(optimizer, name) for slot, name in values["ecc"].items()})
    return _loaded(optimizer, values["ecc"])


DTYPES = ("float32", "bfloat16", "float16")
"""What a slot may be stored as without a codec: ``ecc={"exp_avg": "bfloat16"}``."""


def _loaded(optimizer: str, name: str) -> StateCodec:
    """The codec called ``name``; or a floating dtype, as in ``storage_dtype``."""
    if name in DTYPES:
        return cast_codec(name)
    codec: StateCodec = registry.load_codec(name)()
    caveat = getattr(codec, "caveat", None)
    if caveat is not None:
        warn_at_caller(f"{optimizer}: ecc={name!r}: {caveat}.", StateWarning)
    return codec


def _param_codec(optimizer: str, name: str | None) -> StateCodec | None:
    if not name:
        return None
    codec: StateCodec = registry.load_codec(name)()
    if per_block_of(codec):
        raise OptionError(f"{optimizer}: param_ecc={name!r} stores state alone: blocks of it share a scale; pass ecc={name!r}.")
    return codec


def removed(where: str, name: str) -> str:
    """The error message for an option that HeavyBall once had, with what takes its place."""
    return f"{where}: option {name!r} was removed in HeavyBall 3.0; {REMOVED[name]}."


def unknown(optimizer: str, name: str, own: Iterable[str]) -> str:
    """The error message for an unknown option."""
    if name in REMOVED:
        return removed(optimizer, name)
    known = sorted({*own, *OPTIONS})
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"it takes {', '.join(known)}."
    return f"{optimizer} has no option {name!r}; {hint}"
