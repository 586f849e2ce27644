"""Settings of the model's precision that must not reach an optimizer's step: autocast, and TF32 products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

AUTOCAST = ("cuda", "cpu")
"""Device types whose autocast is turned off within a step."""


def autocasting() -> bool:
    """Whether a step would run under ``torch.autocast``."""
    return torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")


@contextmanager
def autocast_off() -> Iterator[None]:
    """No autocast inside: it multiplies float32 matrices in half precision, whatever the rule asked for."""
    with ExitStack() as stack:
        for device in AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def products_as(precision: str | None) -> Iterator[None]:
    """Products of float32 matrices in TF32 if ``precision`` is ``"tf32"``, and otherwise in float32, whatever the model asked
    torch for: TF32 would spoil a basis."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch 2.9's fp32_precision was set, and the two do not mix
        with _fp32_precision("tf32" if precision == "tf32" else "ieee"):
            yield
        return
    wanted = "high" if precision == "tf32" else "highest"
    if before == wanted:
        yield
        return
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _fp32_precision(wanted: str) -> Iterator[None]:
    """The same in terms of ``fp32_precision``."""
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = wanted
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
