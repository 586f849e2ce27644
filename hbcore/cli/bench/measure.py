"""One shape set at one precision, all contenders taking turns.

Each contender has its own parameters, equal at the start. The gradients are the same tensors for all of them, which none
may change. They take turns window by window and step by step, so that a clock that drifts drifts for all.
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
"""Standard deviations of the noise that stands for parameters and gradients; those of a usual initialisation."""
STATE_COPIES = 4
"""Copies of the parameters, in float32, that a contender is taken to need: two moments, and temporaries."""


@dataclass(frozen=True)
class Pace:
    """How much to measure.

    Attributes:
        windows: how many windows count, and ``warmup`` how many go before them.
        steps: steps in a window.
        singles: synchronized steps with still gradients, and as many with moving ones.
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
        """Milliseconds a step, back to back. By the device's own clock on CUDA: host time shows only where it is longer."""
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
        """One step with nothing before it in the queue: until ``step()`` returned, and until the device was done."""
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
    """Python's garbage collector walks everything that every contender made, in the middle of whosever turn it is."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Noise:
    """Parameters to start from, and two sets of gradients."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device=device).manual_seed(seed)

        def draw(scale: float) -> list[Tensor]:
            return [torch.randn(s, dtype=dtype, device=device, generator=generator).mul_(scale) for s in shapes]

        self.params, self.grads = draw(PARAM_SCALE), (draw(GRAD_SCALE), draw(GRAD_SCALE))


class Subject:
    """A contender at work: its parameters, its optimizer, and the row it fills in."""

    def __init__(self, contender: Contender, precision: Precision, noise: Noise, watch: Stopwatch, row: Row) -> None:
        self.row, self.params, self.grads = row, [nn.Parameter(p.clone()) for p in noise.params], noise.grads
        cls = contender.load()
        row.kwargs = contender.arguments(cls, precision)
        watch.wait()
        start = time.perf_counter()
        named = zip(names_of([tuple(p.shape) for p in self.params]), self.params, strict=True)
        self.optimizer: Any = cls(list(named) if contender.source == "hbcore" else self.params, **row.kwargs)
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # schedulefree's does not step otherwise
        self.attach(0)
        self.optimizer.step()
        watch.wait()
        row.setup_seconds = time.perf_counter() - start
        self._check_that_it_works(noise)

    def _check_that_it_works(self, noise: Noise) -> None:
        """A step that does nothing is fast: one without gradients, one that moves no parameter."""
        if any(p.grad is None for p in self.params):
            raise RuntimeError("its step clears the gradients, so that a window would time steps without any")
        largest = max(range(len(self.params)), key=lambda i: self.params[i].numel())
        if torch.equal(self.params[largest], noise.params[largest]):
            self.row.notes.append("its first step left the largest parameter as it was")

    def attach(self, which: int) -> None:
        """Hand a set of gradients to the parameters."""
        for p, grad in zip(self.params, self.grads[which], strict=True):
            p.grad = grad

    def facts(self, device: torch.device) -> None:
        """What is known once it runs: bytes, and what hbcore reports of itself."""
        row, report = self.row, getattr(self.optimizer, "report", None)
        row.state_bytes = memory.state_bytes(self.optimizer)
        row.traffic_bytes = memory.traffic_bytes(self.params, row.state_bytes)
        row.peak_bytes = memory.peak_bytes(device, self.optimizer.step)
        if report is not None:
            row.backend, row.compiles = report.backend, report.compiles
            row.launches = report.launches or None  # 0 is what a backend says that does not count
            row.notes += [*report.reasons, *report.notes]


@dataclass(frozen=True)
class Bench:
    """Measures shape sets on one device.

    Attributes:
        say: called with a line of text as the work goes on.
    """

    device: torch.device
    pace: Pace
    seed: int
    say: Callable[[str], None]

    def measure(self, name: str, shapes: Sequence[Shape], precision: Precision, contenders: Sequence[Contender]) -> list[Row]:
        """A row for each contender, in the order given. One that raises fails alone."""
        rows = [_row(one, name, shapes, precision) for one in contenders]
        noise = Noise(shapes, getattr(torch, precision.param), self.device, self.seed)
        pairs = list(zip(contenders, rows, strict=True))
        together = self._fit_together(shapes, precision, len(pairs))
        for batch in [pairs] if together else [[pair] for pair in pairs]:
            if not together:
                batch[0][1].notes.append("measured on its own: all contenders together do not fit into memory")
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
    """A synchronized step. Gradients are attached outside the time: in training, the backward pass does it."""
    subject.attach(which)
    returned, done = watch.single(subject.optimizer.step)
    host.append(returned)
    total.append(done)


def _turns(subjects: Sequence[Subject], turn: int) -> list[Subject]:
    """Those that still run, another one first each time: whoever follows a given neighbour finds its traces in the cache."""
    running = [subject for subject in subjects if subject.row.status == "ok"]
    first = turn % len(running) if running else 0
    return running[first:] + running[:first]


@contextmanager
def _alone(row: Row) -> Iterator[None]:
    """An exception fails the row, and nobody else's."""
    try:
        yield
    except Exception as error:  # whatever a library raises
        row.fail(error)


def _row(one: Contender, name: str, shapes: Sequence[Shape], precision: Precision) -> Row:
    kwargs, parameters = dict(one.kwargs), count(shapes)
    return Row(one.label, one.family, one.source, one.target, kwargs, name, precision.name, len(shapes), parameters)


def _forget() -> None:
    """Leave nothing to the next set: neither memory, nor a place on torch.compile's list of what it compiled too often."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
