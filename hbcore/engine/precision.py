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
    before, wanted = _legacy(), "high" if precision == "tf32" else "highest"
    if before == wanted:
        yield
        return
    kept = [(setting, _own(setting)) for setting in _settings()]
    try:
        if before is not None:
            torch.set_float32_matmul_precision(wanted)
        for setting, _ in kept if before is None else ():
            setting.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        yield
    finally:
        if before is not None:
            torch.set_float32_matmul_precision(before)
        for setting, own in kept:  # the legacy setting would leave other values here than it found
            setting.fp32_precision = own


def _legacy() -> str | None:
    """torch's older setting; None where torch 2.9's ``fp32_precision`` was set, since the two do not mix."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _settings() -> list[Any]:
    """What has an ``fp32_precision`` for matrix products; nothing before torch 2.9."""
    backends = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [backend for backend in backends if hasattr(backend, "fp32_precision")]


def _own(setting: Any) -> str:
    """The value of an ``fp32_precision``; ``"none"`` if it follows ``torch.backends``, as it shall go on doing."""
    value: str = setting.fp32_precision
    setting.fp32_precision = "none"
    inherited = setting.fp32_precision == value
    setting.fp32_precision = value
    return "none" if inherited else value
