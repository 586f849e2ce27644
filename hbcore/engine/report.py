"""How an optimizer runs: ``optimizer.report``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class Reported(NamedTuple):
    """Root mean squares of some parameters' last changes, and of their weights: vectors with an element for each."""

    params: Sequence[Tensor]
    update: Tensor
    weight: Tensor


@dataclass
class Report:
    """How the last step ran, and why.

    Attributes:
        backend: the backend that runs the segments; several are joined by ``+``.
        reasons: why a requested or preferred backend does not run.
        notes: other engine decisions worth knowing (a parameter processed element by element, ...).
        programs: number of chains traced so far.
        compiles: number of kernels or graphs compiled so far.
        launches: number of kernels launched by the last step; 0 if the backend does not count them.
        skipped: number of steps that ``skip_nonfinite=True`` skipped since the optimizer was built.
        norms: what ``report_norms=True`` says of the last step, on its devices; ``optimizer.norms()`` reads it.
    """

    backend: str = "none yet"
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    programs: int = 0
    compiles: int = 0
    launches: int = 0
    skipped: int = 0
    norms: list[Reported] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def joined(cls, reports: Sequence[Report]) -> Report:
        """One report of several optimizers that step together."""
        return cls(
            backend="+".join(sorted({part for r in reports for part in r.backend.split("+")})),
            reasons=list(dict.fromkeys(reason for r in reports for reason in r.reasons)),
            notes=list(dict.fromkeys(note for r in reports for note in r.notes)),
            programs=sum(r.programs for r in reports),
            compiles=sum(r.compiles for r in reports),
            launches=sum(r.launches for r in reports),
            skipped=max(r.skipped for r in reports),
            norms=[norms for r in reports for norms in r.norms],
        )

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self.notes:
            self.notes.append(text)

    def __str__(self) -> str:
        lines = [f"backend {self.backend}, {self.programs} programs, {self.compiles} compiles, {self.launches} launches"]
        lines += [f"  {self.skipped} steps skipped: a gradient was not finite"] if self.skipped else []
        return "\n".join([*lines, *(f"  because {r}" for r in self.reasons), *(f"  note: {n}" for n in self.notes)])
