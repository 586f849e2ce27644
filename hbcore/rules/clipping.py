r"""Bounds on a gradient or an update: what ``gradient_clipping`` and ``update_clipping`` insert.

===============================  ====================================================  ==================================
name                             the gradient or update ``x`` becomes                  parameters and their defaults
===============================  ====================================================  ==================================
``l2_clip_``                     ``x * min(1, threshold / norm(x))``                   ``threshold`` 1
``rmsnorm_clip_``                ``x * min(1, threshold / rms(x))``                    ``threshold`` 1
``global_l2norm_clip``           the same, the norm over the whole model               ``threshold`` 1
``global_rmsnorm_clip``          the same, the rms over the whole model                ``threshold`` 1
``adaptive_gradient_clipping_``  ``x * min(1, threshold * norm(p) / norm(x))``         ``threshold`` 0.1
``trust_region_clip_``           a blend of ``tanh(x)`` and ``log(1 + x)``, clamped    ``bound`` 2, ``scale`` 1.5, ``lerp`` 0.9
``a_law_compress``               the A-law of telephony                                ``a`` 87.6
``mu_law_compress``              ``sgn(x) log(1 + mu |x|) / log(1 + mu)``              ``mu`` 127
``softsign_compress``            ``bound * x / (1 + |x|)``                             ``bound`` 2
===============================  ====================================================  ==================================

The first five scale a whole tensor down and never up: what is within the threshold comes back bit for bit. The others squash
each element by itself. NaN stays NaN, and an infinite norm makes NaN of infinite elements: a clip hides no overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from hbcore.errors import OptionError
from hbcore.rules.transform import Bounds, Context, Domain, State, Transform, check_bounds

STAGES = {"clip_gradient": "gradient_clipping", "clip_update": "update_clipping"}
"""Where a clip may stand, and the option that puts it there."""


@dataclass(frozen=True)
class Clip(Transform):
    """Base of the clips. ``at`` is the stage; the other fields are numbers above zero, and structure: the graph holds them."""

    at: str = field(default="clip_update", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for f in fields(self):
            if f.name not in ("at", "function"):
                check_bounds(f"{self.name}: {f.name}", getattr(self, f.name), Bounds(gt=0))
        # One formula serves before the rule and after it, even in one chain: stage and name are the instance's own.
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
    """:class:`L2Clip` by the norm of the whole model, all of its groups and dtypes, as ``torch.nn.utils.clip_grad_norm_``."""

    name = "global_l2norm_clip"
    domain = Domain.MODEL


@dataclass(frozen=True)
class GlobalRmsClip(RmsClip):
    """:class:`RmsClip` by the root mean square over the whole model, all of its groups and dtypes."""

    name = "global_rmsnorm_clip"
    domain = Domain.MODEL


@dataclass(frozen=True)
class AdaptiveClip(Clip):
    r""":math:`x \min(1, T \max(\lVert p \rVert_2, 10^{-3}) / \lVert x \rVert_2)`, :math:`p` the parameter.

    Brock et al. 2021, High-Performance Large-Scale Image Recognition Without Normalization (arXiv:2102.06171), section 4. The
    norms are whole tensors', as in HeavyBall; the paper takes one for each unit (a row of a weight).
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
    r"""The A-law of ITU-T G.711, with its logarithmic branch carried on beyond :math:`|x| = 1`.

    .. math:: \frac{\mathrm{sgn}(x)}{1 + \ln A} \begin{cases} A |x| & A |x| < 1 \\ 1 + \ln(A |x|) & \text{otherwise} \end{cases}
    """

    a: float = 87.6
    name = "a_law_compress"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(f"{type(self).name}: a", self.a, Bounds(gt=math.exp(-1)))  # where 1 + ln A is above zero

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.a * u.abs()
        return torch.sign(u) * torch.where(x < 1, x, 1 + torch.log(x)) / (1 + math.log(self.a)), {}


@dataclass(frozen=True)
class MuLawCompress(Clip):
    r""":math:`\mathrm{sgn}(x) \ln(1 + \mu |x|) / \ln(1 + \mu)`: the mu-law of ITU-T G.711, carried on beyond 1."""

    mu: float = 127.0
    name = "mu_law_compress"

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.sign(u) * torch.log1p(self.mu * u.abs()) / math.log1p(self.mu), {}


@dataclass(frozen=True)
class SoftsignCompress(Clip):
    r""":math:`b\, x / (1 + |x|)`: never as far from zero as the bound :math:`b`."""

    bound: float = 2.0
    name = "softsign_compress"

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return self.bound * u / (1 + u.abs()), {}


@dataclass(frozen=True)
class CustomClip(Clip):
    """A user's own elementwise function of the gradient or the update, traced like a rule."""

    function: Callable[[Tensor], Tensor]
    name = "custom_clip"

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return self.function(u), {}


def shrink(x: Tensor, norm: Tensor, threshold: Tensor | float) -> Tensor:
    """``x * min(1, threshold / norm)``. A norm of zero gives a ratio of inf, hence ``x`` itself."""
    return x * (threshold / norm).clamp(max=1)


CLIPS: Mapping[str, type[Clip]] = {
    clip.name: clip
    for clip in (L2Clip, RmsClip, GlobalL2Clip, GlobalRmsClip, AdaptiveClip, TrustRegionClip, ALawCompress, MuLawCompress,
                 SoftsignCompress)
}  # fmt: skip
"""Name to class; names as in HeavyBall."""


def resolve(value: Any, stage: str) -> Transform | None:
    """The clip that an option's value asks for, or None for None.

    Args:
        value: a name from :data:`CLIPS`; ``(name, number)``, which sets the clip's first parameter; ``(name, {parameter:
            number})``; a :class:`Clip`; or an elementwise function of one tensor.
        stage: ``"clip_gradient"`` or ``"clip_update"``.

    Raises:
        OptionError: there is no such clip, or it has no such parameter.
        HyperparameterError: a parameter is no number, or out of its bounds.
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
            f"{STAGES[stage]}={value!r} is no clipping; pass one of {', '.join(CLIPS)}, a pair such as ('l2_clip_', 0.5), "
            "or an elementwise function of a tensor."
        )
    allowed = [f.name for f in fields(clip) if f.name != "at"]
    given = given if isinstance(given, Mapping) else {allowed[0]: given}
    if unknown := sorted(set(given) - set(allowed)):
        raise OptionError(f"{STAGES[stage]}: {name} has no parameter {unknown[0]!r}; it has {', '.join(allowed)}.")
    return clip(**given, at=stage)
