"""Assertions for checks, whose messages name the tensor, the expected and the found value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hbcore.testing.subject import Trial


def same(ours: Mapping[str, Any], theirs: Mapping[str, Any], what: str) -> None:
    """Expect the same names with the same values: same type, dtype, device and shape, and bitwise equal."""
    lacks, extra = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    assert not lacks and not extra, f"{what}: expected the same tensors; missing: {lacks}, added: {extra}"
    for name, wanted in theirs.items():
        found = ours[name]
        if not (isinstance(found, Tensor) and isinstance(wanted, Tensor)):
            assert found == wanted, f"{what}: expected {name} to be {wanted!r}, found {found!r}"
            continue
        for fact in ("dtype", "device", "shape"):
            a, b = getattr(found, fact), getattr(wanted, fact)
            assert a == b, f"{what}: expected {name} to have {fact} {b}, found {a}"
        assert torch.equal(found, wanted), f"{what}: expected {name} bit for bit, found {_difference(found, wanted)}"


def close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float, what: str) -> None:
    """Expect each tensor's relative error, in norm, to be at most ``tolerance``."""
    for name, wanted in theirs.items():
        a, b = ours[name].double(), wanted.double()
        error = float((a - b).norm() / b.norm().clamp(min=1e-30))
        assert error <= tolerance, f"{what}: expected {name} within {tolerance:g} of its norm, found {error:g}"


def finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Expect finite values only."""
    for name, value in tensors.items():
        assert bool(torch.isfinite(value).all()), f"{what}: expected finite values in {name}, found {_few(value)}"


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor], what: str) -> None:
    """Expect every non-empty tensor to have changed."""
    for name, value in before.items():
        if value.numel():
            assert not torch.equal(value, after[name]), f"{what}: expected {name} to change, but it did not"


def same_trial(ours: Trial, theirs: Trial, what: str) -> None:
    """Expect parameters, state and param groups to agree bit for bit."""
    same(ours.values(), theirs.values(), what)
    same(ours.state(), theirs.state(), what)
    for g, (found, wanted) in enumerate(zip(ours.numbers(), theirs.numbers(), strict=True)):
        same(found, wanted, f"{what}, param group {g}")


@contextmanager
def working(what: str) -> Iterator[None]:
    """Turn an exception into an AssertionError that says what failed."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{what}: expected this to work; it raised {type(error).__name__}: {error}") from error


def _difference(found: Tensor, wanted: Tensor) -> str:
    gap = (found.double() - wanted.double()).abs()
    return f"{int((found != wanted).sum())} of {found.numel()} elements off by up to {float(gap.max()):g}"


def _few(value: Tensor) -> str:
    return f"{value.flatten()[:4].tolist()}"
