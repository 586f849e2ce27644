r"""Orthogonal factors of stacks of matrices, ``[..., m, n]``. Pure and batched: matrices are independent.

A matrix :math:`X = U \Sigma V^T` has the polar factor :math:`U V^T`, the nearest matrix whose singular values are all 1.
:func:`exact` computes it. The iterations of :mod:`hb_muon.newton_schulz` approximate it with matrix products only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hb_muon.coefficients import GRAM, MINIMAX, TABLES, YOU, Coefficients, Table, polar_express, steps_of, table
from hb_muon.minimax import minimax
from hb_muon.newton_schulz import gram_newton_schulz, newton_schulz
from hb_muon.passes import frobenius
from hbcore.api import HyperparameterError, Scalar, compute_dtype

__all__ = (
    "METHODS",
    "TABLES",
    "Coefficients",
    "Method",
    "exact",
    "fastest_method",
    "frobenius",
    "orthogonalize",
    "orthogonalize_stacks",
    "polar_express",
    "table",
)


class Method(NamedTuple):
    """A method for orthogonal factors, and its defaults.

    Attributes:
        coefficients: the rows.
        dtype: the iteration's.
        steps: the number of steps.
        iterate: called with stacks, rows of coefficients, eps, a dtype and a scale for each stack; None for the exact factor.
    """

    coefficients: Table
    dtype: torch.dtype
    steps: int
    iterate: Callable[[Sequence[Tensor], Table, Scalar, torch.dtype, Sequence[float]], Iterable[Tensor]] | None


def one_by_one(iterate: Callable[[Tensor, Table, Scalar, torch.dtype, float], Tensor]) -> Any:
    """An iteration on one stack as an iteration on several."""

    def of_stacks(
        stacks: Sequence[Tensor], rows: Table, eps: Scalar, dtype: torch.dtype, scales: Sequence[float]
    ) -> Iterator[Tensor]:
        return (iterate(x, rows, eps, dtype, scale) for x, scale in zip(stacks, scales, strict=True))

    return of_stacks


METHODS: dict[str, Method] = {
    "newton_schulz": Method(YOU, torch.bfloat16, 5, one_by_one(newton_schulz)),
    "gram_newton_schulz": Method(GRAM, torch.float16, 5, one_by_one(gram_newton_schulz)),
    "minimax": Method(MINIMAX, torch.float16, 4, minimax),
    "exact": Method((), torch.float32, 0, None),
}
"""The methods by name."""


def fastest_method(device: torch.device) -> str:
    """The method that ``method="auto"`` selects on a kind of device.

    On GPUs it is the fastest of those that keep singular values within [0.68, 1.3] for condition numbers up to 100. CPUs have
    no fast float16 products, and take the plain iteration, as torch.optim.Muon does.
    """
    return "minimax" if device.type == "cuda" else "newton_schulz"


def orthogonalize(
    x: Tensor,
    method: str = "newton_schulz",
    ns_steps: int | None = None,
    ns_coefficients: Coefficients = None,
    dtype: torch.dtype | None = None,
    eps: Scalar = 1e-7,
    scale: float = 1.0,
) -> Tensor:
    """The orthogonal factor of each matrix of a stack, by the given method.

    Args:
        x: ``[..., m, n]``, any floating dtype and scale. A zero matrix gives zeros; zero singular values stay zero.
        method: one of :data:`METHODS`: ``"newton_schulz"``, ``"gram_newton_schulz"``, ``"minimax"`` or ``"exact"``.
        ns_steps: the number of steps, at least 1; None for the method's own.
        ns_coefficients: see :func:`table`; None for the method's own.
        dtype: the iteration's and the result's. By default float64 for float64, and the method's own for all else: bfloat16
            for ``newton_schulz``, float16 for the other iterations. ``exact`` always computes in float32 or float64.
        eps: the least Frobenius norm that a matrix is divided by.
        scale: a factor of the result.

    Returns:
        ``[..., m, n]`` in ``dtype``.

    Raises:
        HyperparameterError: the method, the table or the number of steps does not exist.
    """
    flat = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    [factor] = orthogonalize_stacks([flat], method, ns_steps, ns_coefficients, dtype, eps, [scale])
    return factor.reshape(x.shape)


def orthogonalize_stacks(
    stacks: Sequence[Tensor],
    method: str = "newton_schulz",
    ns_steps: int | None = None,
    ns_coefficients: Coefficients = None,
    dtype: torch.dtype | None = None,
    eps: Scalar = 1e-7,
    scales: Sequence[float] | None = None,
) -> Iterable[Tensor]:
    """:func:`orthogonalize` for several stacks ``[B, m, n]`` of one dtype, on one device, with a scale each.

    ``"minimax"`` processes all of them together; the other methods compute each result when it is iterated to.
    """
    if method not in METHODS:
        raise HyperparameterError(f"method={method!r} does not exist; pass one of {', '.join(METHODS)}.")
    how, scales = METHODS[method], [1.0] * len(stacks) if scales is None else scales
    if dtype is None:
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in stacks) else how.dtype
    if how.iterate is None:
        return (exact(x).mul_(scale).to(dtype) for x, scale in zip(stacks, scales, strict=True))
    steps = how.steps if ns_steps is None else ns_steps
    if steps < 1:
        raise HyperparameterError(f"ns_steps={ns_steps!r} must be at least 1.")
    rows = how.coefficients if ns_coefficients is None else table(ns_coefficients)
    return how.iterate(stacks, steps_of(rows, steps), eps, dtype, scales)


def exact(x: Tensor) -> Tensor:
    r"""The polar factor :math:`U V^T` of each matrix, from its singular value decomposition.

    The factor is not unique in directions whose singular value is zero to the precision of the dtype; there the result is
    zero.

    Args:
        x: ``[..., m, n]``; computed in float32, or float64 for float64.

    Returns:
        ``[..., m, n]`` in the dtype of the computation.

    Raises:
        torch.linalg.LinAlgError: a matrix has entries that are not finite.
    """
    x = x.to(compute_dtype(x.dtype))
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    present = s > s[..., :1] * (max(x.shape[-2:]) * torch.finfo(x.dtype).eps)
    factor: Tensor = (u * present.unsqueeze(-2).to(x.dtype)) @ vt
    return factor
