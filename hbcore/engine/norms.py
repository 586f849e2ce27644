"""What ``report_norms=True`` tells of a step: how far each parameter moved, and how large it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbcore.engine.core import OptimizerCore
from hbcore.errors import OptionError


class Norms(NamedTuple):
    """Root mean squares over one parameter's elements.

    Attributes:
        update: of the last step's change, learning rate and decay included.
        weight: of the weights that it led to.
    """

    update: float
    weight: float


def read(cores: Sequence[OptimizerCore], groups: Iterable[Mapping[str, Any]]) -> dict[str | int, Norms]:
    """The norms of each parameter that the last step changed, by its name, or by its place in all groups if it has none.

    One copy from each device, for which the host waits.

    Raises:
        OptionError: no optimizer reports any.
    """
    if not any(core.settings.report_norms for core in cores):
        raise OptionError(f"{cores[0].name} reports no norms; pass report_norms=True.")
    reported = [r for core in cores for r in core.report.norms]
    found: dict[Tensor, Norms] = {}
    for device in dict.fromkeys(r.update.device for r in reported):
        here = [r for r in reported if r.update.device == device]
        values = torch.cat([torch.stack([r.update, r.weight], 1).double() for r in here]).cpu().tolist()
        found.update(zip((p for r in here for p in r.params), (Norms(*pair) for pair in values), strict=True))
    named: dict[str | int, Norms] = {}
    place = 0
    for group in groups:
        names = group.get("param_names") or range(place, place + len(group["params"]))
        named.update({name: found[p] for name, p in zip(names, group["params"], strict=True) if p in found})
        place += len(group["params"])
    return named
