"""What an optimizer says of how it runs: ``optimizer.report``."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """How the last step ran, and why so.

    Attributes:
        backend: the backend that runs the lanes, or several joined by ``+``.
        reasons: why a backend that was asked for, or would have been preferred, does not run.
        notes: what the engine did that a user may want to know (a parameter walked element by element, ...).
        programs: how many chains were traced so far.
        compiles: how many kernels or graphs were compiled so far.
        launches: kernels launched by the last step; 0 where a backend does not count them.
    """

    backend: str = "none yet"
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    programs: int = 0
    compiles: int = 0
    launches: int = 0

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self.notes:
            self.notes.append(text)

    def __str__(self) -> str:
        lines = [f"backend {self.backend}, {self.programs} programs, {self.compiles} compiles, {self.launches} launches"]
        return "\n".join([*lines, *(f"  because {r}" for r in self.reasons), *(f"  note: {n}" for n in self.notes)])
