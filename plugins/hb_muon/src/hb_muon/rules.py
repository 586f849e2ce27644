"""The rules that Muon's family shares: its momentum, and the replacement of an update by its orthogonal factor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hb_muon.orthogonalize import METHODS, Coefficients, fastest_method, frobenius, orthogonalize_stacks, table
from hbcore.api import (
    Block,
    Context,
    Domain,
    HyperparameterError,
    Slot,
    State,
    Transform,
    at_least,
    ema,
    hyper,
    matrix_view,
    zeros,
)

SCALE_MODES = ("none", "scale", "graft")
ADJUST_LR = (None, "original", "match_rms_adamw")
TOGETHER = 2**29
"""How many elements are orthogonalized together; their float16 temporaries take two to three gigabytes."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class MuonMomentum(Transform):
    r"""The momentum that Muon orthogonalizes, in torch.optim.Muon's form or, with ``heavyball_momentum``, in HeavyBall's.

    .. math::
        \text{torch:}\quad b_t = \mu b_{t-1} + (1 - \mu) g_t \qquad
        u_t = b_t \;\text{ or, with Nesterov, }\; (1 - \mu) g_t + \mu b_t \\
        \text{HeavyBall:}\quad b_t = \mu b_{t-1} + g_t \qquad
        u_t = b_t \;\text{ or, with Nesterov, }\; g_t + \mu b_t

    The second is :math:`1 / (1 - \mu)` times the first while :math:`\mu` is constant. An orthogonal factor does not depend
    on the norm of its matrix, so the two differ only in ``momentum_buffer``, and in the step if ``scale_mode="graft"``.
    """

    momentum: float = hyper(0.9, ge=0, lt=1, role="first_moment")
    nesterov: bool = True
    heavyball_momentum: bool = False
    name = "muon_momentum"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"momentum_buffer": zeros(param, "rotate")}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        old, mu = s["momentum_buffer"], self.momentum
        if self.heavyball_momentum:
            buffer = mu * old + u
            ahead = u + mu * buffer
        else:
            buffer = ema(old, u, mu)
            ahead = ema(buffer, u, mu)
        return ahead if self.nesterov else buffer, {"momentum_buffer": buffer}


@dataclass(frozen=True)
class Orthogonalize(Transform):
    r"""Replace each :math:`m \times n` matrix of the update by its orthogonal factor times a scale.

    .. math:: u \leftarrow s \cdot \mathrm{orthogonalize}(u)

    ==================================  =========================  =================================================
    setting                             :math:`s`                  source
    ==================================  =========================  =================================================
    ``scale_mode="none"``               1                          the factor as it is
    ``scale_mode="scale"``              sqrt(max(1, m / n))        Jordan et al. 2024
    ``scale_mode="graft"``              norm(u) / norm(factor)     HeavyBall: the update keeps its own norm
    ``adjust_lr_fn="original"``         sqrt(max(1, m / n))        torch.optim.Muon's name for it
    ``adjust_lr_fn="match_rms_adamw"``  0.2 sqrt(max(m, n))        Liu et al. 2025 (arXiv:2502.16982), section 2.2
    ==================================  =========================  =================================================

    Args:
        eps: the least norm to divide by.
        method, ns_steps, ns_coefficients, dtype: see :func:`hb_muon.orthogonalize.orthogonalize`.
        scale_mode: one of :data:`SCALE_MODES`.
        adjust_lr_fn: one of :data:`ADJUST_LR`; any but None replaces ``scale_mode``.
        flatten: treat a weight of more than two dimensions as one matrix ``(o, i h w)``; otherwise as a batch of matrices,
            its last two dimensions.
        split: the row counts of the matrices that each matrix is split into; empty for no split.

    Raises:
        HyperparameterError: a setting does not exist, or contradicts another one.
    """

    eps: float = hyper(1e-8, ge=0)
    method: str = "auto"
    ns_steps: int | None = None
    ns_coefficients: Coefficients = None
    dtype: torch.dtype | None = None
    scale_mode: str = "scale"
    adjust_lr_fn: str | None = None
    flatten: bool = True
    split: tuple[int, ...] = ()
    name = "orthogonalize"
    domain = Domain.MATRIX

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("method", ("auto", *METHODS)), ("scale_mode", SCALE_MODES), ("adjust_lr_fn", ADJUST_LR)):
            if getattr(self, name) not in known:
                raise HyperparameterError(
                    f"{name}={getattr(self, name)!r} does not exist; pass one of {', '.join(map(repr, known))}."
                )
        if self.ns_steps is not None and self.ns_steps not in range(1, 100):
            raise HyperparameterError(f"ns_steps={self.ns_steps!r} must be a whole number from 1 to 99.")
        if self.ns_coefficients is not None:
            table(self.ns_coefficients)
        if self.scale_mode == "graft" and self.adjust_lr_fn is not None:
            raise HyperparameterError(
                f"scale_mode='graft' and adjust_lr_fn={self.adjust_lr_fn!r} both set the scale; pass one of them."
            )

    def blocks(self, shape: torch.Size) -> tuple[Block, ...]:
        return matrix_view(shape, split=self.split, batch_dims=0 if self.flatten else max(len(shape) - 2, 0))

    def working_dtype(self, param: Tensor) -> torch.dtype:
        dtype = self.iterate_in(param.dtype, param.device)
        return torch.bfloat16 if dtype == torch.float16 else dtype  # float16's range is too small before normalising

    def chosen(self, device: torch.device) -> str:
        """The method for updates on ``device``; coefficients or a dtype, if given, select the plain iteration."""
        if self.method != "auto":
            return self.method
        plain = self.ns_coefficients is not None or self.dtype is not None
        return "newton_schulz" if plain else fastest_method(device)

    def iterate_in(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """The dtype of the iteration for an update of ``dtype``."""
        return torch.float64 if dtype == torch.float64 else self.dtype or METHODS[self.chosen(device)][1]

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        [result] = self.update_stacks([(u, s, c)])
        return result

    def update_stacks(self, stacks: Sequence[tuple[Tensor, State, Context]]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for some in portions([u for u, _, _ in stacks]):
            device, scales = some[0].device, [self.scale(*u.shape[-2:]) for u in some]
            dtype = self.iterate_in(some[0].dtype, device)
            settings = (self.chosen(device), self.ns_steps, self.ns_coefficients, dtype, self.eps, scales)
            for u, factor in zip(some, orthogonalize_stacks(some, *settings), strict=True):
                yield self.grafted(factor, u) if self.scale_mode == "graft" else factor, {}

    def grafted(self, factor: Tensor, u: Tensor) -> Tensor:
        """The factor with the norm of ``u``."""
        return factor * (frobenius(u) / at_least(frobenius(factor), self.eps)).to(factor.dtype)

    def scale(self, m: int, n: int) -> float:
        """The factor that multiplies the orthogonal factor of an ``m`` by ``n`` matrix."""
        if self.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(m, n))
        if self.adjust_lr_fn == "original" or self.scale_mode == "scale":
            return math.sqrt(max(1, m / n))
        return 1.0


def portions(stacks: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The stacks in order, in lists of at most :data:`TOGETHER` elements, or of a single stack."""
    portion: list[Tensor] = []
    for x in stacks:
        if portion and sum(y.numel() for y in portion) + x.numel() > TOGETHER:
            yield portion
            portion = []
        portion.append(x)
    if portion:
        yield portion


def as_data(h: dict[str, Any]) -> dict[str, Any]:
    """``h`` with the settings that have several spellings in the one that param groups and checkpoints hold."""
    rows, dtype, sizes = h["ns_coefficients"], h["ns_dtype"], h["split_sizes"]
    return {
        **h,
        "ns_coefficients": rows if rows is None or isinstance(rows, str) else table(rows),
        "ns_dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "split_sizes": None if sizes is None else tuple(sizes),
    }


def orthogonalizer(h: Any, scale_mode: str = "none", adjust_lr_fn: str | None = None) -> Orthogonalize:
    """The rule for a group's hyperparameters ``h``, with the given scale."""
    return Orthogonalize(
        eps=h.eps,
        method=h.method,
        ns_steps=h.ns_steps,
        ns_coefficients=h.ns_coefficients,
        dtype=dtype_of(h.ns_dtype),
        scale_mode=scale_mode,
        adjust_lr_fn=adjust_lr_fn,
        flatten=h.flatten,
        split=h.split_sizes or (),
    )


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype called ``name``.

    Raises:
        HyperparameterError: the iteration does not run in it.
    """
    if name is not None and name not in DTYPES:
        raise HyperparameterError(f"ns_dtype={name!r} does not exist; pass one of {', '.join(DTYPES)}, or None.")
    return None if name is None else DTYPES[name]
