"""The table of a study; see README.md.

python benchmarks/lightbench/table.py result.json [--disagreements]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

LIBRARIES = ("hbcore", "heavyball")
MARKS = {1: ("-", "✓"), 3: ("-", "e", "m", "h")}
"""For a problem's number of levels: what stands for so many of them passed."""


class Cell(NamedTuple):
    """How many levels of a problem an optimizer passed in each library."""

    hbcore: int
    heavyball: int

    @property
    def differs(self) -> bool:
        """Whether one library passed more."""
        return self.hbcore != self.heavyball


def cells_of(runs: list[dict[str, Any]], seed: int = 0) -> dict[str, dict[str, Cell]]:
    """The cells of every optimizer by problem, of one seed, in the order in which they ran."""
    passed: dict[tuple[str, str, str], int] = {}
    for run in runs:
        if run["seed"] == seed:
            key = (run["optimizer"], run["problem"], run["library"])
            passed[key] = passed.get(key, 0) + bool(run["passed"])
    found: dict[str, dict[str, Cell]] = {}
    for name, problem, _ in passed:
        found.setdefault(name, {})[problem] = Cell(*(passed.get((name, problem, library), 0) for library in LIBRARIES))
    return found


def markdown(result: dict[str, Any]) -> str:
    """The table for people: hbcore before the slash, HeavyBall behind it, and the levels that each passed in total."""
    cells, problems = cells_of(result["runs"]), result["problems"]
    lines = ["| optimizer | " + " | ".join(name.replace("_", " ") for name in problems) + " | total |"]
    lines.append("|---" * (len(problems) + 2) + "|")
    for name, row in cells.items():
        texts = [_text(row.get(problem, Cell(0, 0)), len(about["levels"])) for problem, about in problems.items()]
        lines.append(f"| `{name}` | {' | '.join(texts)} | {_total(row.values())} |")
    everywhere = [_total([row[problem] for row in cells.values() if problem in row]) for problem in problems]
    lines.append(f"| total | {' | '.join(everywhere)} | {_total([c for row in cells.values() for c in row.values()])} |")
    return "\n".join(lines)


def _text(cell: Cell, levels: int) -> str:
    text = "/".join(MARKS[levels][n] for n in cell)
    return f"**{text}**" if cell.differs else text


def _total(cells: Any) -> str:
    counts = list(cells)
    return f"{sum(c.hbcore for c in counts)}/{sum(c.heavyball for c in counts)}"


def disagreements(result: dict[str, Any]) -> str:
    """The table of what only one library passed on seed 0: the lowest errors there, and the levels passed on every seed."""
    runs, seeds = result["runs"], sorted({run["seed"] for run in result["runs"]})
    lines = ["| optimizer | problem | level | threshold | hbcore's lowest error | HeavyBall's | levels passed, by seed |"]
    lines.append("|---|---|---|---|---|---|---|")
    by_seed = {seed: cells_of(runs, seed) for seed in seeds}
    for name, row in by_seed[0].items():
        for problem, cell in row.items():
            if cell.differs:
                about = result["problems"][problem]
                level = list(about["levels"])[min(cell)]
                who = {"optimizer": name, "problem": problem, "level": level, "seed": 0}
                best = {r["library"]: r["best"] for r in runs if who.items() <= r.items()}
                errors = ["none" if best.get(library) is None else f"{best[library]:.2g}" for library in LIBRARIES]
                counts = [by_seed[s][name][problem] for s in seeds if problem in by_seed[s].get(name, {})]
                texts = [name, problem.replace("_", " "), level, f"{about['threshold']:g}", *errors]
                lines.append(f"| {' | '.join(texts)} | {', '.join(f'{c.hbcore}/{c.heavyball}' for c in counts)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("result", type=Path)
    parser.add_argument("--disagreements", action="store_true", help="list what only one library passed instead")
    given = parser.parse_args()
    result = json.loads(given.result.read_text())
    print(disagreements(result) if given.disagreements else markdown(result))


if __name__ == "__main__":
    main()
