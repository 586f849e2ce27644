"""Backend selection, and the warning issued when the requested backend is unavailable."""

from __future__ import annotations

import torch

from hbcore.engine.backends.base import Backend, Batch, Executable
from hbcore.engine.backends.compiler import compiler_on_path
from hbcore.engine.backends.cpp import philox
from hbcore.engine.backends.cpp.backend import CppBackend
from hbcore.engine.backends.cpp.build import cpp_compiler
from hbcore.engine.backends.eager import EagerBackend
from hbcore.engine.backends.inductor import InductorBackend
from hbcore.engine.backends.triton.backend import TritonBackend
from hbcore.engine.graph.program import Program
from hbcore.engine.report import Report
from hbcore.errors import CompileError, FallbackWarning, OptionError
from hbcore.rules.row_noise import Philox, words
from hbcore.warn import warn_at_caller

WORTH_COMPILING = 4_000_000
"""Model size from which ``compile="auto"`` compiles with Inductor on a CPU: below it, that outlasts a short training."""

WORTH_GENERATING = 300_000
"""The same for generated C++, which takes a fifth of a second to compile: AdamW makes up for it in a hundred steps."""

BACKENDS: tuple[type[Backend], ...] = (TritonBackend, CppBackend, InductorBackend, EagerBackend)
"""Fastest first; each falls back to the next, but C++ runs on CPUs only."""

CHOICES = ("auto", *(backend.name for backend in BACKENDS))


def candidates(choice: str, device: torch.device, numel: int) -> list[Backend]:
    """The backends to try, in order, for a model of ``numel`` elements on ``device``.

    Raises:
        OptionError: ``choice`` is not one of :data:`CHOICES`.
    """
    if choice not in CHOICES:
        raise OptionError(f"compile={choice!r} does not exist; pass one of {', '.join(CHOICES)}.")
    if choice == "auto":
        choice = "triton" if device.type == "cuda" else _on_a_cpu(numel)
    chosen = [backend for backend in BACKENDS if backend.name == choice]
    later = BACKENDS[BACKENDS.index(chosen[0]) + 1 :]
    without = set() if device.type == "cpu" else {"cpp"}
    if device.type == "cpu" and not compiler_on_path():
        without = {"cpp", "inductor"}  # the chosen one says so
    return [backend() for backend in (*chosen, *(b for b in later if b.name not in without))]


def _on_a_cpu(numel: int) -> str:
    if numel >= WORTH_GENERATING and cpp_compiler():
        return "cpp"
    return "inductor" if numel >= WORTH_COMPILING else "eager"


def philox_of(choice: str, numel: int) -> Philox:
    """What makes random words on a CPU: C++ where the segments are C++ too, with the same results."""
    return philox.words if candidates(choice, torch.device("cpu"), numel)[0].name == CppBackend.name else words


def compile_first(backends: list[Backend], program: Program, batch: Batch, report: Report) -> tuple[str, Executable]:
    """Compile with the first backend that works; warn once about each that does not."""
    for backend, following in zip(backends, [*backends[1:], None], strict=True):
        try:
            executable = backend.compile(program, batch)
        except CompileError as error:
            if following is None:
                raise
            fell_back(report, f"{backend.name} does not run here: {error}. {following.name} runs instead")
            continue
        return backend.name, executable
    raise CompileError("no backends left to try")


def fell_back(report: Report, reason: str, meaning: str = "with the same results") -> None:
    """Record a reason in the report and warn about it and what it means, once per optimizer."""
    if reason not in report.reasons:
        report.reasons.append(reason)
        warn_at_caller(f"{reason}, {meaning}.", FallbackWarning)
