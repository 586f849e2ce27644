"""Traces segments and compiles them, falling back from backend to backend before anything of a step is written."""

from __future__ import annotations

from dataclasses import replace

from hbcore.engine.backends.base import Backend, Executable
from hbcore.engine.backends.eager import DirectExecutable
from hbcore.engine.backends.select import candidates, compile_first, fell_back, philox_of
from hbcore.engine.core import OptimizerCore
from hbcore.engine.graph.program import Program
from hbcore.engine.graph.scalar_inputs import capturing
from hbcore.engine.graph.trace import trace
from hbcore.engine.planning.segment_batch import SegmentBatch
from hbcore.engine.planning.segments import Segment, SegmentKey
from hbcore.engine.stacks.inner_segment import InnerSegments
from hbcore.engine.stacks.tools import Tools
from hbcore.errors import CompileError, RuleError, TraceError
from hbcore.rules.transform import Domain

SLOWER = "which is slower, and not supported on sharded parameters"
"""What running one parameter at a time means. It promises no results: no other way to run such a rule exists."""


class Compiler:
    """Traces and compiles the segments of one optimizer.

    Args:
        core: the optimizer's; its options say which backend is preferred, and its report is told what ran.
        numel: the model's elements, by which ``compile="auto"`` decides whether compiling is worth it.

    Attributes:
        tools: what calls of matrix rules share; it compiles the rules within them.
    """

    def __init__(self, core: OptimizerCore, numel: int) -> None:
        self._settings, self._report, self._numel = core.settings, core.report, numel
        inner = InnerSegments(self._settings, self._report, numel)
        self.tools = Tools(self._settings.matmul_precision, inner, philox_of(self._settings.compile, numel))
        self._programs: dict[SegmentKey, Program] = {}

    def trace(self, segment: Segment) -> None:
        """Trace a segment that is new. One that cannot be traced runs eagerly, one parameter at a time.

        Raises:
            TraceError: it cannot be traced, and running it parameter by parameter would be wrong.
            RuleError: it writes to what it was given, or returns something else than an update and its slots; or it cannot be
                traced, and its parameters are sharded.
        """
        if segment.program is not None or segment.executable is not None:
            return
        key = replace(segment.key, share=0)
        if key in self._programs:
            segment.program = self._programs[key]
            return
        try:
            label = " -> ".join(t.name for t in segment.transforms)
            segment.program = trace(segment.key.spec, segment.dtypes, label, segment.per_block, segment.noise)
            self._programs[key] = segment.program
            self._report.programs += 1
        except TraceError as error:
            if segment.key.shards is not None:
                raise RuleError(
                    f"{error} A rule that cannot be fused is not supported on sharded parameters, of which a rank sees a part."
                ) from error
            if self._settings.skip_nonfinite:
                raise RuleError(
                    f"{error} skip_nonfinite=True needs rules that can be fused: one that runs parameter by parameter would "
                    "change some before the rest are looked at."
                ) from error
            if self._settings.report_norms:
                raise RuleError(
                    f"{error} report_norms=True needs rules that can be fused, in whose passes it adds up squares."
                ) from error
            if any(t.domain == Domain.MODEL or t.scalars() for t in segment.transforms):
                raise  # one parameter at a time sees no model, nor carries what all of them share
            fell_back(self._report, f"the chain cannot be fused: {error} It runs one parameter at a time", SLOWER)
            segment.executable, segment.backend = DirectExecutable(segment.key.spec), "eager"

    def prepare(self, batch: SegmentBatch) -> bool:
        """Make a batch's executable ready for this step; True if it is another than in the step before.

        Raises:
            CompileError: in a capture, something would have to be compiled.
        """
        segment = batch.segment
        if not batch.members:
            return False
        before = segment.executable
        if before is None:
            executable = self._compile(batch, self._backends(batch))
        else:
            executable = before
        compiled = before.compiles if before is not None else 0
        try:
            executable.prepare(batch)
        except CompileError as error:  # a size or an alignment that no gradient had before
            if capturing():
                raise
            backends = self._backends(batch)
            rest = backends[[b.name for b in backends].index(segment.backend) + 1 :]
            fell_back(self._report, f"{segment.backend} does not run here: {error}. {rest[0].name} runs instead")
            compiled, executable = 0, self._compile(batch, rest)
            executable.prepare(batch)
        self._report.compiles += executable.compiles - compiled
        return executable is not before

    def _compile(self, batch: SegmentBatch, backends: list[Backend]) -> Executable:
        segment = batch.segment
        assert segment.program is not None
        segment.backend, executable = compile_first(backends, segment.program, batch, self._report)
        segment.executable = executable
        return executable

    def _backends(self, batch: SegmentBatch) -> list[Backend]:
        """The backends to try for a batch, in order."""
        key = batch.segment.key
        backends = candidates(self._settings.compile if key.dense else "eager", key.device, self._numel)
        if not key.dense:
            self._report.note(
                "parameters that are not dense in memory, in the order that the rule needs, run eagerly one by one"
            )
        if batch.shards is not None and (_sees_a_tensor(batch) or any(start % 4 for start in batch.starts or ())):
            # the Triton backend counts and reduces a tensor's elements over one rank's part alone, and draws for four at once
            backends = [b for b in backends if b.name != "triton"]
        return backends


def _sees_a_tensor(batch: SegmentBatch) -> bool:
    """Whether a program needs to know of the whole of each tensor: its size, or something reduced over it."""
    phases = batch.segment.program.phases if batch.segment.program else ()
    return any(p.needs_numel or any(r.domain == Domain.TENSOR for r in p.reduces) for p in phases)
