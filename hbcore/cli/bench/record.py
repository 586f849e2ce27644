"""The record of one measurement: one optimizer, shape set and precision. Plain numbers, without torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Row:
    """One row of results. Times are milliseconds per step unless named seconds; sizes are bytes for the whole set.

    Attributes:
        label, family, source, optimizer: as in :class:`~hbcore.cli.bench.contenders.Contender`.
        kwargs: the constructor's arguments, once it has been called.
        shapes, dtype, tensors, parameters: the shape set, precision, and number of tensors and of elements.
        status: ``"ok"`` or ``"failed"``; ``error`` has the reason.
        windows_ms: one value per window of back-to-back steps, all with the same gradient tensors.
        still_ms: single synchronized steps, including host time, with the same gradient tensors.
        moving_ms: the same, with gradient tensors at a different address in every step.
        host_ms: time until ``step()`` returns, for moving gradients and an empty device queue. Empty on a CPU.
        setup_seconds: constructor and first step in this process, where earlier contenders may have compiled already.
        first_step: ``{"cold": {...}, "warm": {...}}`` from fresh processes.
        state_bytes: size of all storages in ``optimizer.state``.
        peak_bytes: temporary allocation of a step. None on a CPU.
        traffic_bytes: minimum traffic of a step: parameters twice, gradients once, state twice.
        floor_ms: time to move ``traffic_bytes`` at the copy bandwidth of the run.
        check: errors against float64, relative to the norm of the parameters and of their displacement.
    """

    label: str
    family: str
    source: str
    optimizer: str
    kwargs: dict[str, Any]
    shapes: str
    dtype: str
    tensors: int
    parameters: int
    status: str = "ok"
    error: str | None = None
    notes: list[str] = field(default_factory=list)
    windows_ms: list[float] = field(default_factory=list)
    still_ms: list[float] = field(default_factory=list)
    moving_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    setup_seconds: float | None = None
    first_step: dict[str, dict[str, Any]] | None = None
    state_bytes: int | None = None
    peak_bytes: int | None = None
    traffic_bytes: int | None = None
    floor_ms: float | None = None
    backend: str | None = None
    compiles: int | None = None
    launches: int | None = None
    check: dict[str, float] | None = None

    def fail(self, error: BaseException) -> None:
        """Record the failure; the values measured so far are kept."""
        self.status, self.error = "failed", f"{type(error).__name__}: {error}".strip()

    def floor_at(self, bytes_per_second: float) -> None:
        """Set the floor from the bandwidth measured in this run."""
        self.floor_ms = None if self.traffic_bytes is None else self.traffic_bytes / bytes_per_second * 1e3

    def summary(self) -> dict[str, Any]:
        """The numbers of the table: medians, deciles of the windows, bytes per parameter."""
        window = median(self.windows_ms)
        p10, p90 = deciles(self.windows_ms)
        return {
            "window_ms": window,
            "window_p10_ms": p10,
            "window_p90_ms": p90,
            "still_ms": median(self.still_ms),
            "moving_ms": median(self.moving_ms),
            "host_ms": median(self.host_ms),
            "floor_fraction": None if window is None or self.floor_ms is None else self.floor_ms / window,
            "first_step_cold_seconds": self._first("cold"),
            "first_step_warm_seconds": self._first("warm"),
            "state_bytes_per_param": self._per_parameter(self.state_bytes),
            "peak_bytes_per_param": self._per_parameter(self.peak_bytes),
        }

    def _first(self, caches: str) -> float | None:
        return None if self.first_step is None else self.first_step.get(caches, {}).get("seconds")

    def _per_parameter(self, amount: int | None) -> float | None:
        return None if amount is None else amount / self.parameters


def median(values: Sequence[float]) -> float | None:
    """The median; None if there are no values."""
    return statistics.median(values) if values else None


def deciles(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The first and ninth decile, interpolated; None if there are no values."""
    if len(values) < 2:
        return median(values), median(values)
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[0], cuts[-1]


def baseline(rows: Sequence[Row]) -> Row | None:
    """The row that the others are compared with: torch fused, else another of torch's, else the first that worked."""
    done = [row for row in rows if row.windows_ms]
    torch_rows = [row for row in done if row.source == "torch"]
    fused = [row for row in torch_rows if row.kwargs.get("fused")]
    return next(iter([*fused, *torch_rows, *done]), None)
