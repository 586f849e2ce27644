"""Measures one shape set at one precision, with all contenders interleaved.

Each contender has its own parameters, with equal initial values. They all share the same gradient tensors, which none may
change. Contenders alternate by window and by step, so that clock drift affects all of them equally.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hbcore.cli.bench import memory
from hbcore.cli.bench.contenders import Contender, Precision
from hbcore.cli.bench.record import Row
from hbcore.cli.bench.shapes import Shape, count, names_of

PARAM_SCALE, GRAD_SCALE = 0.02, 0.01
"""Standard deviations of the noise used as parameters and gradients, as after a typical initialisation."""
STATE_COPIES = 4
"""Assumed memory of a contender, in float32 copies of the parameters: two moments, and temporaries."""


@dataclass(frozen=True)
class Pace:
    """How much to measure.

    Attributes:
        windows: number of measured windows; ``warmup`` windows precede them.
        steps: steps per window.
        singles: number of synchronized steps with still gradients, and of those with moving ones.
    """

    windows: int = 6
    steps: int = 10
    warmup: int = 3
    singles: int = 60


class Stopwatch:
    """Times steps on one device, in milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.wait: Callable[[], None] = getattr(torch, device.type).synchronize

    def window(self, step: Callable[[], Any], steps: int) -> float:
        """Milliseconds per step, back to back. On CUDA by events, so that host time counts only where it is the bottleneck."""
        with _no_collector():
            self.wait()
            if self._cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                begin.record()
                for _ in range(steps):
                    step()
                end.record()
                end.synchronize()
                return float(begin.elapsed_time(end)) / steps
            start = time.perf_counter()
            for _ in range(steps):
                step()
            self.wait()
            return (time.perf_counter() - start) * 1e3 / steps

    def single(self, step: Callable[[], Any]) -> tuple[float, float]:
        """Milliseconds of one step on an idle device: until ``step()`` returned, and until the device finished."""
        with _no_collector():
            self.wait()
            start = time.perf_counter()
            step()
            returned = time.perf_counter()
            self.wait()
            done = time.perf_counter()
        return (returned - start) * 1e3, (done - start) * 1e3


@contextmanager
def _no_collector() -> Iterator[None]:
    """Disable Python's garbage collector, which would scan every contender's objects while one of them is timed."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Noise:
    """Initial parameters, and two sets of gradients."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device=device).manual_seed(seed)

        def draw(scale: float) -> list[Tensor]:
            return [torch.randn(s, dtype=dtype, device=device, generator=generator).mul_(scale) for s in shapes]

        self.params, self.grads = draw(PARAM_SCALE), (draw(GRAD_SCALE), draw(GRAD_SCALE))


class Subject:
    """A contender while it runs: its parameters, its optimizer, and its row of results."""

    def __init__(self, contender: Contender, precision: Precision, noise: Noise, watch: Stopwatch, row: Row) -> None:
        self.row, self.params, self.grads = row, [nn.Parameter(p.clone()) for p in noise.params], noise.grads
        cls = contender.load()
        row.kwargs = contender.arguments(cls, precision)
        watch.wait()
        start = time.perf_counter()
        named = zip(names_of([tuple(p.shape) for p in self.params]), self.params, strict=True)
        self.optimizer: Any = cls(list(named) if contender.source == "hbcore" else self.params, **row.kwargs)
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # schedulefree requires it before a step
        self.attach(0)
        self.optimizer.step()
        watch.wait()
        row.setup_seconds = time.perf_counter() - start
        self._check_that_it_works(noise)

    def _check_that_it_works(self, noise: Noise) -> None:
        """Detect steps that are fast because they do nothing: without gradients, or without moving a parameter."""
        if any(p.grad is None for p in self.params):
            raise RuntimeError("its step clears the gradients, so a window would time steps without gradients")
        largest = max(range(len(self.params)), key=lambda i: self.params[i].numel())
        if torch.equal(self.params[largest], noise.params[largest]):
            self.row.notes.append("its first step did not change the largest parameter")

    def attach(self, which: int) -> None:
        """Assign a set of gradients to the parameters."""
        for p, grad in zip(self.params, self.grads[which], strict=True):
            p.grad = grad

    def facts(self, device: torch.device) -> None:
        """Record what is known only after a step: memory, and hbcore's report."""
        row, report = self.row, getattr(self.optimizer, "report", None)
        row.state_bytes = memory.state_bytes(self.optimizer)
        row.traffic_bytes = memory.traffic_bytes(self.params, row.state_bytes)
        row.peak_bytes = memory.peak_bytes(device, self.optimizer.step)
        if report is not None:
            row.backend, row.compiles = report.backend, report.compiles
            row.launches = report.launches or None  # backends that do not count launches report 0
            row.notes += [*report.reasons, *report.notes]


@dataclass(frozen=True)
class Bench:
    """Measures shape sets on one device.

    Attributes:
        say: called with progress messages.
    """

    device: torch.device
    pace: Pace
    seed: int
    say: Callable[[str], None]

    def measure(self, name: str, shapes: Sequence[Shape], precision: Precision, contenders: Sequence[Contender]) -> list[Row]:
        """A row for each contender, in the given order. A contender that raises fails only its own row."""
        rows = [_row(one, name, shapes, precision) for one in contenders]
        noise = Noise(shapes, getattr(torch, precision.param), self.device, self.seed)
        pairs = list(zip(contenders, rows, strict=True))
        together = self._fit_together(shapes, precision, len(pairs))
        for batch in [pairs] if together else [[pair] for pair in pairs]:
            if not together:
                batch[0][1].notes.append("measured on its own, because all contenders together do not fit into memory")
            self._measure(batch, precision, noise)
            _forget()
        return rows

    def _fit_together(self, shapes: Sequence[Shape], precision: Precision, contenders: int) -> bool:
        free = memory.free_bytes(self.device)
        each = getattr(torch, precision.param).itemsize + STATE_COPIES * torch.float32.itemsize
        return free is None or contenders == 1 or contenders * each * count(shapes) < 0.9 * free

    def _measure(self, pairs: Sequence[tuple[Contender, Row]], precision: Precision, noise: Noise) -> None:
        watch = Stopwatch(self.device)
        subjects: list[Subject] = []
        for contender, row in pairs:
            with _alone(row):
                subjects.append(Subject(contender, precision, noise, watch, row))
            took = row.error or f"first step in {row.setup_seconds:.1f} s"
            self.say(f"{row.shapes} {row.dtype}: {row.label}: {took}")
        for turn in range(self.pace.warmup + self.pace.windows):
            for subject in _turns(subjects, turn):
                with _alone(subject.row):
                    ms = watch.window(subject.optimizer.step, self.pace.steps)
                    if turn >= self.pace.warmup:
                        subject.row.windows_ms.append(ms)
        for turn in range(self.pace.singles):
            for subject in _turns(subjects, turn):
                with _alone(subject.row):
                    _single(watch, subject, 0, [], subject.row.still_ms)
        for turn in range(self.pace.singles):
            for subject in _turns(subjects, turn):
                host = subject.row.host_ms if self.device.type == "cuda" else []
                with _alone(subject.row):
                    _single(watch, subject, 1 - turn % 2, host, subject.row.moving_ms)
        for subject in _turns(subjects, 0):
            with _alone(subject.row):
                subject.facts(self.device)


def _single(watch: Stopwatch, subject: Subject, which: int, host: list[float], total: list[float]) -> None:
    """Time a synchronized step, without attaching the gradients: in training, the backward pass does that."""
    subject.attach(which)
    returned, done = watch.single(subject.optimizer.step)
    host.append(returned)
    total.append(done)


def _turns(subjects: Sequence[Subject], turn: int) -> list[Subject]:
    """The working subjects, starting with a different one each turn, since each runs with caches left by the previous one."""
    running = [subject for subject in subjects if subject.row.status == "ok"]
    first = turn % len(running) if running else 0
    return running[first:] + running[:first]


@contextmanager
def _alone(row: Row) -> Iterator[None]:
    """Turn an exception into a failure of this row only."""
    try:
        yield
    except Exception as error:  # a library may raise anything
        row.fail(error)


def _row(one: Contender, name: str, shapes: Sequence[Shape], precision: Precision) -> Row:
    kwargs, parameters = dict(one.kwargs), count(shapes)
    return Row(one.label, one.family, one.source, one.target, kwargs, name, precision.name, len(shapes), parameters)


def _forget() -> None:
    """Free memory and reset torch.compile's recompilation counters for the next set."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
