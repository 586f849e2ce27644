"""How an optimizer runs: ``optimizer.report``."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    """

    backend: str = "none yet"
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    programs: int = 0
    compiles: int = 0
    launches: int = 0
    skipped: int = 0

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self.notes:
            self.notes.append(text)

    def __str__(self) -> str:
        lines = [f"backend {self.backend}, {self.programs} programs, {self.compiles} compiles, {self.launches} launches"]
        lines += [f"  {self.skipped} steps skipped: a gradient was not finite"] if self.skipped else []
        return "\n".join([*lines, *(f"  because {r}" for r in self.reasons), *(f"  note: {n}" for n in self.notes)])
