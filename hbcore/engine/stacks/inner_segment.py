"""An elementwise rule within a matrix rule, compiled like the segments around it: ``c.apply(inner, u, s)``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hbcore.engine.backends.base import Backend, Batch, Executable
from hbcore.engine.backends.select import candidates, compile_first, fell_back
from hbcore.engine.graph.program import NONFINITE, STACK, Program
from hbcore.engine.graph.segment_spec import Chain, SegmentSpec
from hbcore.engine.graph.trace import trace
from hbcore.engine.options import Settings
from hbcore.engine.report import Report
from hbcore.engine.stacks.stack import Stack
from hbcore.errors import CompileError, TraceError
from hbcore.rules.transform import Domain, Transform
from hbcore.state.codec_choice import fitting

COMPUTED = (torch.float32, torch.float64)
"""The dtypes that segments compute in."""

Place = tuple["str | int", ...]
"""The fields, and places in tuples, that lead from a rule to one within it."""


@dataclass(frozen=True)
class Within:
    """The chain of one rule that is a part of another."""

    chain: Chain
    index: int
    place: Place

    def __call__(self, h: Any, branches: tuple[bool, ...], step: Any = None) -> tuple[Transform, ...]:
        part: Any = self.chain(h, branches, step)[self.index]
        for key in self.place:
            part = getattr(part, key) if isinstance(key, str) else part[key]
        return (part,)


def place_of(rule: Transform, inner: Transform) -> Place | None:
    """Where ``inner`` is in ``rule``; None if the rule made it on the way."""
    for f in fields(rule):
        value = getattr(rule, f.name)
        for key, part in (
            ((f.name,), value),
            *(((f.name, i), v) for i, v in enumerate(value if isinstance(value, tuple) else ())),
        ):
            if part is inner:
                return key
            if isinstance(part, Transform) and (rest := place_of(part, inner)) is not None:
                return (*key, *rest)
    return None


class Run:
    """So many rows of one stack as a backend sees them; between steps it holds no tensor."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.executable: Executable | None = None
        self._addresses: list[int] = []
        self._nothing = {name: column[0].new_empty(0) for name, column in batch.tensors.items()}

    def take(self, columns: Mapping[str, Tensor]) -> Batch:
        """The batch with this step's tensors."""
        addresses = [t.data_ptr() for t in columns.values()]
        if addresses != self._addresses:
            self._addresses = addresses
            self.batch.moves += 1
        for name, t in columns.items():
            self.batch.tensors[name][0] = t
        return self.batch

    def let_go(self) -> None:
        """Keep nothing of a step."""
        self.batch.lend()
        self.batch.model.clear()
        for name, column in self.batch.tensors.items():
            column[0] = self._nothing[name]


class InnerSegment:
    """One inner rule's program, and what runs it on each stack.

    Args:
        spec: describes it as a segment that starts from what the matrix rule hands over.
        program: its graph, of one phase.
        settings, report, numel: what decides on the backend.
    """

    def __init__(self, spec: SegmentSpec, program: Program, settings: Settings, report: Report, numel: int) -> None:
        self.spec, self.program = spec, program
        self._settings, self._report, self._numel = settings, report, numel
        self._shared: Executable | None = None
        self._backend = ""
        self._own: WeakKeyDictionary[Stack, dict[int, Run]] = WeakKeyDictionary()

    def run(self, stack: Stack, u: Tensor, stored: Mapping[str, Tensor], row: list[float], nonfinite: Tensor | None) -> Tensor:
        """The rule's update from ``u``; the new values of its slots are written to ``stored``.

        Args:
            stack: whose rows these are.
            u: ``[rows, *block]``, contiguous.
            stored: the slots as the codec stores them, ``[rows, ...]``.
            row: this step's numbers, as in ``spec.scalar_names``.
            nonfinite: 0-d; above 0, nothing is written.
        """
        out = torch.empty_like(u)
        kept = {name: stored[name] for name in self.kept(stored)}
        columns = {"param": u, "grad": u, "update": u, f"{STACK}update": out, **kept}
        runs = self._own.setdefault(stack, {})
        if len(u) not in runs:
            runs[len(u)] = Run(Batch({name: [t] for name, t in columns.items()}, [0], [row]))
        run = runs[len(u)]
        batch = run.take(columns)
        batch.values = [row]
        if nonfinite is not None:
            batch.model[NONFINITE] = nonfinite
        try:
            executable = self._prepared(run)
            executable.run(0, batch)
            executable.forget()
        finally:
            run.let_go()
        return out

    def kept(self, stored: Iterable[str]) -> list[str]:
        """Which of a stack's tensors are slots of the inner rule."""
        return [name for name in stored if name in self.program.dtypes]

    def _prepared(self, run: Run) -> Executable:
        """What runs on a stack, ready for this step's tensors."""
        executable = self._shared or run.executable
        compiled = 0 if executable is None else executable.compiles
        executable = executable or self._compiled(run, self._backends(run))
        try:
            executable.prepare(run.batch)
        except CompileError as error:  # a size or an alignment that no stack had before
            backends = self._backends(run)
            rest = backends[[b.name for b in backends].index(self._backend) + 1 :]
            fell_back(self._report, f"{self._backend} does not run here: {error}. {rest[0].name} runs instead")
            compiled, executable = 0, self._compiled(run, rest)
            executable.prepare(run.batch)
        self._report.compiles += executable.compiles - compiled
        return executable

    def _backends(self, run: Run) -> list[Backend]:
        """Those to try, in order."""
        return candidates(self._settings.compile, run.batch.tensors["param"][0].device, self._numel)

    def _compiled(self, run: Run, backends: list[Backend]) -> Executable:
        """Compile for a stack. A graph serves all stacks; a generated function has a table of addresses for each."""
        self._backend, executable = compile_first(backends, self.program, run.batch, self._report)
        if self._backend in ("triton", "cpp"):
            run.executable = executable
        else:
            self._shared = executable
        return executable


class InnerSegments:
    """Those of one optimizer, each traced once.

    Args:
        settings, report, numel: what decides on the backend.
    """

    def __init__(self, settings: Settings, report: Report, numel: int) -> None:
        self._settings, self._report, self._numel = settings, report, numel
        self._known: dict[tuple[SegmentSpec, int, Place, torch.dtype], InnerSegment | None] = {}

    def find(self, spec: SegmentSpec, index: int, place: Place, inner: Transform, like: Tensor) -> InnerSegment | None:
        """The segment for ``inner``, which is at ``place`` in rule ``index`` of a chain, on blocks like ``like``.

        None if it has to run as it is written: it sees more than an element, draws, carries numbers, or reads the parameter or
        the gradient.
        """
        if inner.domain != Domain.ELEMENTWISE or inner.draws or inner.scalars() or like.dtype not in COMPUTED:
            return None
        key = (spec, index, place, like.dtype)
        if key not in self._known:
            self._known[key] = self._made(spec, index, place, inner, like)
        return self._known[key]

    def _made(self, spec: SegmentSpec, index: int, place: Place, inner: Transform, like: Tensor) -> InnerSegment | None:
        slots = inner.slots(like)
        if any(slot.shape != like.shape or (spec.stochastic and not slot.exact) for slot in slots.values()):
            return None
        own = replace(
            spec, chain=Within(spec.chain, index, place), span=(0, 1), takes=like.dtype, feeds=(("update", like.dtype),),
            slots=(tuple(slots.items()),), draws=(), maximize=False, param_codec=None, codec=fitting(spec.codec, like.shape),
        )  # fmt: skip
        try:
            dtypes = own.dtypes(like, like.dtype, slots)
            program = trace(own, dtypes, f"{inner.name} in a matrix rule", own.per_block(slots))
        except TraceError:
            return None
        read = {name for phase in program.phases for name in phase.tensors}
        if len(program.phases) > 1 or program.reductions or read & {"param", "grad"}:
            return None
        self._report.programs += 1
        return InnerSegment(own, program, self._settings, self._report, self._numel)
