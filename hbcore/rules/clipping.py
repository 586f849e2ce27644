r"""Gradient and update clipping: the transforms inserted by ``gradient_clipping`` and ``update_clipping``.

===============================  ====================================================  ==================================
name                             the gradient or update ``x`` becomes                  parameters and defaults
===============================  ====================================================  ==================================
``l2_clip_``                     ``x * min(1, threshold / norm(x))``                   ``threshold`` 1
``rmsnorm_clip_``                ``x * min(1, threshold / rms(x))``                    ``threshold`` 1
``global_l2norm_clip``           the same with the norm over the whole model           ``threshold`` 1
``global_rmsnorm_clip``          the same with the rms over the whole model            ``threshold`` 1
``adaptive_gradient_clipping_``  ``x * min(1, threshold * norm(p) / norm(x))``         ``threshold`` 0.1
``trust_region_clip_``           a blend of ``tanh(x)`` and ``log(1 + x)``, clamped    ``bound`` 2, ``scale`` 1.5, ``lerp`` 0.9
``a_law_compress``               the A-law of ITU-T G.711                              ``a`` 87.6
``mu_law_compress``              ``sgn(x) log(1 + mu |x|) / log(1 + mu)``              ``mu`` 127
``softsign_compress``            ``bound * x / (1 + |x|)``                             ``bound`` 2
===============================  ====================================================  ==================================

The first five only ever scale a whole tensor down; tensors within the threshold are returned bit for bit. The others compress
each element independently. NaN stays NaN, and an infinite norm turns infinite elements into NaN: clipping never hides an
overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from hbcore.errors import OptionError
from hbcore.rules.bounds import Bounds, check_bounds
from hbcore.rules.transform import Context, Domain, State, Transform

STAGES = {"clip_gradient": "gradient_clipping", "clip_update": "update_clipping"}
"""Stage of a clip -> the option that inserts it there."""


@dataclass(frozen=True)
class Clip(Transform):
    """Base class of clips. ``at`` is the stage; the other fields are positive numbers, and constants of the graph."""

    at: str = field(default="clip_update", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for f in fields(self):
            if f.name not in ("at", "function"):
                check_bounds(f"{self.name}: {f.name}", getattr(self, f.name), Bounds(gt=0))
        # One chain may clip before and after the rule with the same formula, so stage and name are set per instance.
        object.__setattr__(self, "stage", self.at)
        object.__setattr__(self, "name", f"{self.at}_{type(self).name}".rstrip("_"))


@dataclass(frozen=True)
class L2Clip(Clip):
    r""":math:`x \min(1, T / \lVert x \rVert_2)` for each tensor: Pascanu et al. 2013 (arXiv:1211.5063), Algorithm 1."""

    threshold: float = 1.0
    name = "l2_clip_"
    domain = Domain.TENSOR

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return shrink(u, c.norm(u), self.threshold), {}


@dataclass(frozen=True)
class RmsClip(Clip):
    r""":math:`x \min(1, T / \mathrm{rms}(x))` for each tensor: Shazeer and Stern 2018, Adafactor (arXiv:1804.04235), section 6.

    :math:`\mathrm{rms}(x) = \lVert x \rVert_2 / \sqrt{n}` makes one threshold fit tensors of every size.
    """

    threshold: float = 1.0
    name = "rmsnorm_clip_"
    domain = Domain.TENSOR

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return shrink(u, c.mean(u * u).sqrt(), self.threshold), {}


@dataclass(frozen=True)
class GlobalL2Clip(L2Clip):
    """:class:`L2Clip` with the norm over the whole model (all groups and dtypes), like ``torch.nn.utils.clip_grad_norm_``."""

    name = "global_l2norm_clip"
    domain = Domain.MODEL


@dataclass(frozen=True)
class GlobalRmsClip(RmsClip):
    """:class:`RmsClip` with the root mean square over the whole model (all groups and dtypes)."""

    name = "global_rmsnorm_clip"
    domain = Domain.MODEL


@dataclass(frozen=True)
class AdaptiveClip(Clip):
    r""":math:`x \min(1, T \max(\lVert p \rVert_2, 10^{-3}) / \lVert x \rVert_2)`, :math:`p` the parameter.

    Brock et al. 2021, High-Performance Large-Scale Image Recognition Without Normalization (arXiv:2102.06171), section 4.
    Norms are per tensor, as in HeavyBall; the paper uses one per unit (a row of a weight).
    """

    threshold: float = 0.1
    name = "adaptive_gradient_clipping_"
    domain = Domain.TENSOR

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return shrink(u, c.norm(u), self.threshold * c.norm(c.param).clamp(min=1e-3)), {}


@dataclass(frozen=True)
class TrustRegionClip(Clip):
    r"""A blend of tanh and a logarithm, clamped: the update clipping of PSGD Kron in HeavyBall.

    .. math:: s \left((1 - l)\, \mathrm{sgn}(x) \log(1 + |x / s|) + l \tanh(x / s)\right) \quad\text{clamped to } [-b, b]

    Its slope at zero is 1. ``bound`` is b, ``scale`` s, ``lerp`` l.
    """

    bound: float = 2.0
    scale: float = 1.5
    lerp: float = 0.9
    name = "trust_region_clip_"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(f"{type(self).name}: lerp", self.lerp, Bounds(gt=0, le=1))

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        x = u / self.scale
        blend = (1 - self.lerp) * torch.sign(x) * torch.log1p(x.abs()) + self.lerp * torch.tanh(x)
        return (self.scale * blend).clamp(min=-self.bound, max=self.bound), {}


@dataclass(frozen=True)
class ALawCompress(Clip):
    r"""The A-law of ITU-T G.711, with its logarithmic branch extended beyond :math:`|x| = 1`.

    .. math:: \frac{\mathrm{sgn}(x)}{1 + \ln A} \begin{cases} A |x| & A |x| < 1 \\ 1 + \ln(A |x|) & \text{otherwise} \end{cases}
    """

    a: float = 87.6
    name = "a_law_compress"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(f"{type(self).name}: a", self.a, Bounds(gt=math.exp(-1)))  # keeps 1 + ln A positive

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.a * u.abs()
        return torch.sign(u) * torch.where(x < 1, x, 1 + torch.log(x)) / (1 + math.log(self.a)), {}


@dataclass(frozen=True)
class MuLawCompress(Clip):
    r""":math:`\mathrm{sgn}(x) \ln(1 + \mu |x|) / \ln(1 + \mu)`: the mu-law of ITU-T G.711, extended beyond 1."""

    mu: float = 127.0
    name = "mu_law_compress"

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.sign(u) * torch.log1p(self.mu * u.abs()) / math.log1p(self.mu), {}


@dataclass(frozen=True)
class SoftsignCompress(Clip):
    r""":math:`b\, x / (1 + |x|)`: magnitudes stay below :math:`b`."""

    bound: float = 2.0
    name = "softsign_compress"

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return self.bound * u / (1 + u.abs()), {}


@dataclass(frozen=True)
class CustomClip(Clip):
    """A user-defined elementwise function of the gradient or update, traced like a rule."""

    function: Callable[[Tensor], Tensor]
    name = "custom_clip"

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return self.function(u), {}


def shrink(x: Tensor, norm: Tensor, threshold: Tensor | float) -> Tensor:
    """``x * min(1, threshold / norm)``. A zero norm gives an infinite ratio, so ``x`` is returned unchanged."""
    return x * (threshold / norm).clamp(max=1)


CLIPS: Mapping[str, type[Clip]] = {
    clip.name: clip
    for clip in (L2Clip, RmsClip, GlobalL2Clip, GlobalRmsClip, AdaptiveClip, TrustRegionClip, ALawCompress, MuLawCompress,
                 SoftsignCompress)
}  # fmt: skip
"""Name -> class. Names follow HeavyBall."""


def resolve(value: Any, stage: str) -> Transform | None:
    """The clip selected by an option's value; None if the value is None.

    Args:
        value: a name from :data:`CLIPS`; ``(name, number)``, which sets the clip's first parameter; ``(name, {parameter:
            number})``; a :class:`Clip`; or an elementwise function of one tensor.
        stage: ``"clip_gradient"`` or ``"clip_update"``.

    Raises:
        OptionError: the clip or its parameter does not exist.
        HyperparameterError: a parameter is not a number, or is out of bounds.
    """
    if value is None:
        return None
    if isinstance(value, Clip):
        return replace(value, at=stage)
    if callable(value) and not isinstance(value, type):
        return CustomClip(value, at=stage)
    name, given = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, {})
    clip = CLIPS.get(name) if isinstance(name, str) else None
    if clip is None:
        raise OptionError(
            f"{STAGES[stage]}={value!r} is not a clip; pass one of {', '.join(CLIPS)}, a pair such as ('l2_clip_', 0.5), "
            "or an elementwise function of a tensor."
        )
    allowed = [f.name for f in fields(clip) if f.name != "at"]
    given = given if isinstance(given, Mapping) else {allowed[0]: given}
    if unknown := sorted(set(given) - set(allowed)):
        raise OptionError(f"{STAGES[stage]}: {name} has no parameter {unknown[0]!r}; it has {', '.join(allowed)}.")
    return clip(**given, at=stage)
