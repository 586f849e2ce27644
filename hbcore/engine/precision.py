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
def exact_products() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever precision the model asked torch for: TF32 would spoil a basis."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch 2.9's fp32_precision was set, and the two do not mix
        with _ieee_products():
            yield
        return
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _ieee_products() -> Iterator[None]:
    """The same in terms of ``fp32_precision``."""
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
