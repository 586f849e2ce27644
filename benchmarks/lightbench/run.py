"""Searches a learning rate for every problem and optimizer, in hbcore and in HeavyBall; see README.md.

python benchmarks/lightbench/run.py --out result.json [--only AdamW SOAP] [--problems beale powers]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from problems import PROBLEMS, Problem
from table import cells_of

import hbcore

NAMES = (
    *("AdamW", "NAdam", "RMSprop", "ADOPT", "AdEMAMix", "LaProp", "SignLaProp", "SFAdamW", "SGD"),
    *("Muon", "MuonLaProp", "OrthoLaProp", "Scion"),
    *("SOAP", "SOLP", "SOAPNAdam", "KLSOAP"),
    *("PSGDKron", "PSGDLRA"),
)

FACTORS = tuple(10.0**k for k in (0, 0.5, 1, 1.5, 2, 2.5, -0.5, -1))
"""Of an optimizer's default learning rate, which is the same in both libraries. A search ends with the first that passes."""

REPEATS = (1, 2)
"""Seeds on which is repeated what only one library passed on seed 0, to tell luck from a difference."""

EVERY = 5
"""Steps between two looks at the error."""

Make = Callable[[str, list[torch.Tensor], float, int], Any]


def ours(name: str, params: list[torch.Tensor], lr: float, seed: int) -> Any:
    """hbcore's optimizer, without generated kernels."""
    return hbcore.get(name)(params, lr=lr, weight_decay=0.0, seed=seed, compile="eager")


def theirs(name: str, params: list[torch.Tensor], lr: float, seed: int) -> Any:
    """HeavyBall's, without compiling and without Scion's new drawing of the weights, which would be another start."""
    import heavyball  # type: ignore[import-untyped]

    heavyball.utils.compile_mode = None
    heavyball.utils.scion_auto_init_param_ = lambda param, scale, seed=0: None
    return getattr(heavyball, name)(params, lr=lr, weight_decay=0.0)


LIBRARIES: dict[str, Make] = {"hbcore": ours, "heavyball": theirs}


def attempt(make: Make, name: str, problem: Problem, level: str, lr: float, seed: int) -> tuple[float, int]:
    """One run: the lowest error that was seen, and the step at which the run ended.

    A run ends once its error is at the threshold, once it is not finite, or after the problem's steps.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    generator = torch.Generator().manual_seed(seed)
    instance, best = problem.make(problem.levels[level], generator), math.inf
    optimizer = make(name, instance.params, lr, seed)
    for t in range(problem.steps):
        instance.loss(t, generator).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if (t + 1) % EVERY == 0:
            error = _error(optimizer, instance.error, t)
            if not math.isfinite(error):
                return best, t + 1
            best = min(best, error)
            if best <= problem.threshold:
                return best, t + 1
    return best, problem.steps


@torch.no_grad()
def _error(optimizer: Any, error: Callable[[int], torch.Tensor], t: int) -> float:
    """At the weights to evaluate: schedule-free optimizers have others to train with."""
    modes = hasattr(optimizer, "eval")
    if modes:
        optimizer.eval()
    found = error(t).item()
    if modes:
        optimizer.train()
    return float(found)


def search(make: Make, name: str, problem: Problem, level: str, seed: int) -> dict[str, Any]:
    """The trials of one optimizer at one level, until one passes. Trial ``k`` has a start of its own."""
    centre = float(hbcore.get(name)([torch.zeros(2, 2, requires_grad=True)]).param_groups[0]["lr"])
    best, began = math.inf, time.process_time()
    found: dict[str, Any] = {"passed": False}
    for k, factor in enumerate(FACTORS):
        try:
            error, steps = attempt(make, name, problem, level, centre * factor, 100 * seed + k)
        except Exception as failure:  # one optimizer's failure is a finding, and not the end of the study
            found["exception"] = f"{failure!r:.300}"
            continue
        best = min(best, error)
        if error <= problem.threshold:
            found |= {"passed": True, "lr": centre * factor, "trials": k + 1, "steps": steps}
            break
    return {**found, "best": best if math.isfinite(best) else None, "seconds": round(time.process_time() - began, 3)}


def study(pairs: Iterable[tuple[str, str]], seed: int, runs: Path) -> None:
    """The searches of optimizers on problems, added to the file ``runs`` one by one; those that it has are not repeated.

    A harder level is tried only if the one before it was passed.
    """
    done = {_key(r): r for r in held(runs)}
    if runs.exists() and not runs.read_text().endswith("\n"):
        with runs.open("a") as file:  # an interruption cut the last line off: the next one begins on its own
            file.write("\n")
    for name, title in pairs:
        for library, make in LIBRARIES.items():
            for level in PROBLEMS[title].levels:
                who = {"optimizer": name, "problem": title, "library": library, "level": level, "seed": seed}
                result = done.get(_key(who))
                if result is None:
                    result = {**who, **search(make, name, PROBLEMS[title], level, seed)}
                    with runs.open("a") as file:
                        file.write(json.dumps(result) + "\n")
                if not result["passed"]:
                    break


def _key(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run[k] for k in ("optimizer", "problem", "library", "level", "seed"))


def held(runs: Path) -> list[dict[str, Any]]:
    """The searches that are done; a line that an interruption cut off is left out."""
    found = []
    for line in runs.read_text().splitlines() if runs.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def main() -> None:
    """Run the study and write its result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(NAMES), help="names of optimizers")
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    runs = given.out.with_suffix(given.out.suffix + ".runs")
    study(itertools.product(given.only, given.problems), 0, runs)
    differing = [(name, title) for name, row in cells_of(held(runs)).items() for title, cell in row.items() if cell.differs]
    for seed in REPEATS:
        study(differing, seed, runs)
    found = held(runs)
    result = {
        "device": f"{platform.machine()}, one thread",
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "hbcore", "heavyball")}},
        "command": " ".join(["python", *sys.argv]),
        "factors": FACTORS,
        "problems": {n: {"threshold": p.threshold, "steps": p.steps, "levels": dict(p.levels)} for n, p in PROBLEMS.items()},
        "seconds": round(sum(r["seconds"] for r in found), 1),
        "runs": found,
    }
    given.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
