"""Fitting the factors of several stacks at once, and what is stored of them: as few launches for sixty factors as for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hb_psgd.factor_rules import Factor, FactorRule, Settings, is_multiple
from hb_psgd.kron import add_identity, balance, has_kernels, per_block
from hb_psgd.norms import largest, norm_bound

TOGETHER = 2**26
"""How many elements of factors are fitted at once. Three times as many are needed in between."""

MOVED = 2**24
"""How many elements of factors are moved at once, which bounds the memory for the products."""


class Portion(NamedTuple):
    """Rows of factors of one size that were fitted together.

    Attributes:
        parts: which rows of which factors, ``(k, rows)``, one after the other.
        old: the factors as they begin, ``[B, n, n]`` or ``[B, n]``.
        new: what they are fitted to.
        bound: their new bounds, ``[B]``.
    """

    parts: Sequence[tuple[int, slice]]
    old: Tensor
    new: Tensor
    bound: Tensor


def all_fitted(rule: FactorRule, factors: list[Factor], settings: Settings) -> list[Portion]:
    """Fit factors of several stacks, those of one size and dtype at once, up to :data:`TOGETHER` elements.

    ``factors`` is emptied, so that nothing is held longer than it is needed.
    """
    waiting, made = dict(enumerate(factors)), list[Portion]()
    factors.clear()
    alike = dict[tuple[object, ...], list[int]]()
    for k, factor in [*waiting.items()]:
        if (alone := _diagonal(rule, factor, settings)) is not None:
            made.append(Portion([(k, slice(0, factor.q.shape[0]))], *alone))
            continue
        ndim = factor.second.ndim if isinstance(factor.second, Tensor) else 1
        alike.setdefault((factor.q.shape[1:], factor.q.dtype, ndim), []).append(k)
        del factor
    for same in alike.values():
        most = max(1, TOGETHER // max(1, waiting[same[0]].q[0].numel()))
        portions = list(_portions([(k, waiting[k].q.shape[0]) for k in same], most))
        for parts in portions:
            joined = _joined([waiting[k].rows(part) for k, part in parts])
            if parts is portions[-1]:
                for k in same:
                    del waiting[k]
            made.append(Portion(parts, joined.q, *fitted(rule, joined, settings)))
            del joined  # its evidence is as large as the factors
    return made


def settle(portions: Sequence[Portion], stacks: Sequence[Sequence[int]], bounds: Sequence[Tensor]) -> list[Tensor]:
    """Make fitted factors ready to be stored, in place: see :func:`hb_psgd.kron.balance`. Blocks where a product overflowed get
    their old factors and bounds.

    Args:
        portions: what :func:`all_fitted` returned.
        stacks: for each stack of blocks the indices of its factors.
        bounds: the factors' old bounds, ``[B]`` each.

    Returns:
        The new bounds, for each factor.
    """
    sizes, risen = collected(portions, lambda p: largest(p.new)), collected(portions, lambda p: p.bound)
    kept = dict[int, Tensor]()
    share, good = dict[int, Tensor](), dict[int, Tensor]()
    groups = dict[tuple[int, torch.dtype], list[Sequence[int]]]()
    for stack in stacks:
        groups.setdefault((len(stack), sizes[stack[0]].dtype), []).append(stack)
    for (d, _), group in groups.items():
        order = [stack[i] for i in range(d) for stack in group]
        new = torch.cat([risen[k] for k in order]).view(d, -1)
        shares, fine = balance(torch.cat([sizes[k] for k in order]).view(d, -1), new)
        new = torch.where(fine, new, torch.cat([bounds[k] for k in order]).view(d, -1))
        counts = [len(bounds[stack[0]]) for stack in group]
        each = (new.split_with_sizes(counts, 1), shares.split_with_sizes(counts, 1), fine.split_with_sizes(counts))
        for stack, own, by, ok in zip(group, *each, strict=True):
            kept.update(zip(stack, own, strict=True))
            share.update(zip(stack, by, strict=True))
            good.update(dict.fromkeys(stack, ok))
    for p in portions:
        by, fine = (_cat([of[k][rows] for k, rows in p.parts]) for of in (share, good))
        if has_kernels(p.new, p.old, by):
            from hb_psgd import fitting_kernel  # Triton is slow to import, and not everywhere

            fitting_kernel.settled(p.new, p.old, by, fine)
            continue
        p.new.mul_(per_block(by, p.new))
        torch.where(per_block(fine, p.new), p.new, p.old, out=p.new)
    return [kept[k] for k in range(len(bounds))]


def collected(portions: Sequence[Portion], what: Callable[[Portion], Tensor]) -> dict[int, Tensor]:
    """Something of each portion, ``[B, ...]``, by factor."""
    found: dict[int, list[Tensor]] = {}
    for p in portions:
        lengths = [rows.stop - rows.start for _, rows in p.parts]
        for (k, _), piece in zip(p.parts, what(p).split_with_sizes(lengths), strict=True):
            found.setdefault(k, []).append(piece)
    return {k: _cat(pieces) for k, pieces in found.items()}


def _diagonal(rule: FactorRule, factor: Factor, settings: Settings) -> tuple[Tensor, Tensor, Tensor] | None:
    """A diagonal factor as it begins, fitted, and its bound, by one kernel; None where there is none for it."""
    q, share, bound, first, second, _ = factor
    if q.ndim != 2 or isinstance(second, Tensor) or not has_kernels(q, bound, first):
        return None
    from hb_psgd import fitting_kernel  # Triton is slow to import, and not everywhere

    return fitting_kernel.diagonal(q, share, bound, first, float(settings.lr), float(settings.beta), second, rule.halves)


def _portions(stacks: Sequence[tuple[int, int]], most: int) -> Iterator[list[tuple[int, slice]]]:
    """Rows of stacks ``(k, count)`` in order, in portions of equal length, at most ``most``, as slices of each stack."""
    total = sum(count for _, count in stacks)
    length = -(-total // -(-total // most)) if total else 1
    portion, room = list[tuple[int, slice]](), length
    for k, count in stacks:
        first = 0
        while first < count:
            last = min(count, first + room)
            portion.append((k, slice(first, last)))
            room -= last - first
            first = last
            if not room:
                yield portion
                portion, room = [], length
    if portion:
        yield portion


def _joined(factors: Sequence[Factor]) -> Factor:
    """The rows of several stacks as one, which have begun; the multiple of the identity as a tensor."""
    q, bound, first = map(_cat, zip(*((factor.q, factor.bound, factor.first) for factor in factors), strict=True))
    shares = [factor.share for factor in factors if factor.share is not None]
    if shares:
        q = add_identity(q.clone() if len(factors) == 1 else q, _cat(shares))  # a stack's own factors stay as they are
    start = _cat([factor.start for factor in factors]) if q.ndim == 3 else factors[0].start
    seconds = [factor.second for factor in factors]
    levels = tuple(second for second in seconds if not isinstance(second, Tensor))
    if levels:
        second = _levels(levels, tuple(factor.q.shape[0] for factor in factors), q.device, q.dtype)
    else:
        second = _cat([second for second in seconds if isinstance(second, Tensor)])
    return Factor(q, None, bound, first, second, start)


@lru_cache(maxsize=64)
def _levels(levels: tuple[float, ...], counts: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Each number as often as its count says; kept, because sending them at every refresh would wait for the device."""
    numbers = [level for level, count in zip(levels, counts, strict=True) for _ in range(count)]
    return torch.tensor(numbers, dtype=dtype, device=device)


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def fitted(rule: FactorRule, factor: Factor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The factor, which has begun, after one step of ``rule``, and its new bound. The evidence may be overwritten."""
    bound, step = _bounded(factor, settings)
    return _moved_by_parts(rule, factor, step, settings), bound


def _bounded(factor: Factor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The new bound, and the step that follows from it, ``[B]`` each."""
    first, second = factor.first, factor.second
    if first.ndim == 3 and is_multiple(second) and has_kernels(first, second, factor.bound, factor.start):
        from hb_psgd import norm_kernel  # Triton is slow to import, and not everywhere

        numbers = float(settings.lr), float(settings.beta), settings.iterations
        return norm_kernel.bounded(first, factor.start, second, factor.bound, *numbers)
    norm = _norm(factor, settings.iterations)
    bound = torch.maximum(torch.lerp(norm, factor.bound, float(settings.beta)), norm)
    return bound, settings.lr / bound


def _moved_by_parts(rule: FactorRule, factor: Factor, step: Tensor, settings: Settings) -> Tensor:
    """The moved factor, in the evidence's memory if it is moved by several parts."""
    q, first = factor.q, factor.first
    parts = -(-q.numel() // MOVED)
    if parts < 2 or q.ndim == 2 or first.dtype != q.dtype:
        return rule.move(factor, step, settings)
    length = -(-q.shape[0] // parts)
    for rows in (slice(begin, begin + length) for begin in range(0, q.shape[0], length)):
        moved = rule.move(factor.rows(rows), step[rows], settings)
        if moved.data_ptr() != first[rows].data_ptr():
            first[rows] = moved
    return first


def _norm(factor: Factor, iterations: int) -> Tensor:
    """A bound of the norm of the evidence's sum, ``[B]``."""
    first, second = factor.first, factor.second
    total = first if is_multiple(second) else first + second
    norm = total.amax(-1) if total.ndim == 2 else norm_bound(total, factor.start, iterations)
    return norm + second if is_multiple(second) else norm
