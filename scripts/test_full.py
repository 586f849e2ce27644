"""Run every test, the long ones included, and write what came out to ``tests/full/result.json``.

The file is committed. It holds

* the counts, the slowest tests, those that failed, where they ran, and the hash of the code they ran on (see
  ``code_hash.py``); CI says so when that code has changed since;
* how the numeric tests did at each vector width that torch has kernels for and this processor has, with one thread and two:
  sums differ in their order, and tolerances have to hold for all;
* how many of a sample of mutants of the engine the tests killed, and which survived (see ``mutants.py``);
* what came of each script of the folder that the variable CASES names, if it names one (see ``run_cases.py``).

The parts take hours together, and may run one at a time, also on several machines: ``--part numeric`` runs one of "tests",
"long", "numeric", "mutants" and "cases", and keeps what came out in ``build/full``. The result is written once all parts of
the present code are there, and says where each ran. Other arguments go to pytest; such a run ends after it and keeps nothing,
because they may narrow it.

``--part again`` runs the tests that failed once more, for when the tests were at fault and were mended: the hash is of the
code. How many passed then is in the result.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from code_hash import RESULT, ROOT, code_hash
from mutants import survey
from run_cases import run_all

JOBS = os.environ.get("JOBS", "2")
"""Processes that run tests, and mutants that are tried at a time."""

KEPT = ROOT / "build" / "full"
"""Where the parts of a result wait for one another."""

CASES = Path(os.environ["CASES"]).absolute() if os.environ.get("CASES") else None
"""The folder of case scripts, if there is one."""

SLOWEST = 25
"""How many of the slowest tests the result names."""

MUTANTS = int(os.environ.get("MUTANTS", "40"))
"""How many mutants are tried; a smaller sample is the beginning of a larger one."""

CAPABILITIES = ("default", "avx2", "avx512")
"""What ATEN_CPU_CAPABILITY may be on x86, each above the one before."""

THREADS = (1, 2)

NUMERIC = (
    *("tests/adam", "tests/muon", "tests/psgd", "tests/soap", "tests/ecc", "tests/core/test_oracles.py"),
    *("tests/core/test_against_torch.py", "tests/core/test_backends.py"),
    *("-k", "not inductor and not outside_the_vocabulary and not machine_code"),  # which compile, for other widths than torch's
)
"""What pytest gets: the tests that compare numbers with oracles, and nothing that takes a compiler."""


LONG = (
    "tests/ecc/test_every_code.py",
    "tests/test_compare_and_tune_page.py",
    "tests/core/test_registers.py",
    "tests/testing/test_damage.py",
    *(f"tests/full/test_{name}.py" for name in ("learns", "ecc_learns", "psgd_drift")),
    *("tests/cli/test_compare_all.py", "tests/full/test_option_pairs.py"),
)
"""Tests that train, compile or go through every float for minutes, more than half of all the time: a part of their own, which
begins with the longest."""


class Outcomes:
    """A pytest plugin that counts each test's outcome once, and how long each test took; it says at once what failed."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(passed=0, failed=0, skipped=0, xfailed=0)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the call, and set-up or tear-down only where it went wrong or skipped the test; time all three."""
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failures.append(report.nodeid)
            print(f"\nFAILED {report.nodeid}\n{report.longreprtext[-2000:]}", flush=True)
        if hasattr(report, "wasxfail") and report.skipped:
            self.counts["xfailed"] += 1
        elif report.when == "call" or report.failed or report.skipped:
            self.counts[report.outcome] += 1

    def slowest(self, number: int = SLOWEST) -> dict[str, float]:
        """Test -> seconds, of those that took longest; the slowest first."""
        tests = sorted(self.seconds, key=lambda test: -self.seconds[test])
        return {test: round(self.seconds[test], 2) for test in tests[:number]}


def where() -> dict[str, str | None]:
    """The versions and the device that the result speaks of."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def capabilities() -> tuple[str, ...]:
    """Those of CAPABILITIES that this processor has. torch does not look whether it has what the variable names."""
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    command = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"]
    best = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip().lower()
    return CAPABILITIES[: CAPABILITIES.index(best) + 1] if best in CAPABILITIES else CAPABILITIES[:1]


def numeric_run(capability: str, threads: int, arguments: Sequence[str] = NUMERIC) -> dict[str, int]:
    """Run tests with torch's kernels for one vector width, on that many threads and without a GPU."""
    environment = {
        **os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", JOBS, f"--junit-xml={report}", *arguments]
        status = subprocess.run(command, env=environment).returncode
        suites = ElementTree.parse(report).iter("testsuite") if report.exists() else ()
        counts = {"passed": 0, "failed": 0}
        for suite in suites:
            failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
            counts["failed"] += failed
            counts["passed"] += int(suite.attrib["tests"]) - int(suite.attrib["skipped"]) - failed
    return {**counts, "status": status}


def numeric_runs(arguments: Sequence[str] = NUMERIC) -> dict[str, dict[str, Any]]:
    """Run the numeric tests with every vector width and number of threads; what the processor does not have says so."""
    there = capabilities()
    results: dict[str, dict[str, Any]] = {}
    for capability in CAPABILITIES:
        for threads in THREADS:
            name = f"{capability}, {threads} thread{'s' * (threads > 1)}"
            if capability in there:
                results[name] = numeric_run(capability, threads, arguments)
            else:
                results[name] = {"skipped": f"this processor has no {capability}"}
            print(f"numeric tests, {name}: {results[name]}", flush=True)
    return results


def mutants_killed(count: int = MUTANTS) -> dict[str, Any]:
    """What came of a sample of mutants, or why there is nothing to say."""
    try:
        return survey(count, seed=0, jobs=int(JOBS))
    except RuntimeError as error:
        print(error)
        return {"error": "the tests fail without a mutant"}


def cases_run(folder: Path | None) -> dict[str, dict[str, Any]]:
    """Case -> its exit status, None for one that took too long, and its seconds. Only the names within the folder are kept."""
    cases = run_all(folder) if folder else []
    return {case.name: {"status": case.status, "seconds": round(case.seconds, 1)} for case in cases}


def tests_run(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Run pytest on everything; its counts, the slowest tests, and those that failed."""
    outcomes = Outcomes()
    started = time.monotonic()
    status = int(pytest.main(["-m", "full or not full", "-n", JOBS, *arguments], plugins=[outcomes]))
    seconds = round(time.monotonic() - started)
    return {
        "status": status, **outcomes.counts, "seconds": seconds, "slowest": outcomes.slowest(), "failures": outcomes.failures
    }  # fmt: skip


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "tests": lambda: tests_run(["--dist=worksteal", *(f"--ignore={path}" for path in LONG)]),
    "long": lambda: tests_run(["--dist=load", "--maxschedchunk=1", *LONG]),
    "numeric": numeric_runs,
    "mutants": mutants_killed,
    "cases": lambda: cases_run(CASES),
}
"""Part of the result -> what makes it."""

AGAIN = "again"
"""A part for when only tests were at fault: the tests that failed last run once more, on the same code."""


def run_part(part: str) -> None:
    """Run one part, and keep it beside those that ran before, if the sources did not change meanwhile."""
    tested = code_hash()
    content = tests_run(["--last-failed"]) if part == AGAIN else PARTS[part]()
    if code_hash() != tested:
        print(f"{part}: not kept, because the sources changed while it ran")
        return
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{part}.json").write_text(json.dumps({"code": tested, "where": where(), "content": content}, indent=2) + "\n")


def combined(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The result that the parts make."""
    contents = {part: parts[part]["content"] for part in PARTS}
    tests = added(contents.pop("tests"), contents.pop("long"))
    again = parts[AGAIN]["content"] if AGAIN in parts else {"passed": 0, "failed": 0}
    if tests["failed"] and again["passed"] + again["failed"] == tests["failed"]:
        tests |= {"status": again["status"], "failed": again["failed"], "passed": tests["passed"] + again["passed"]}
        tests |= {"failures": again["failures"], AGAIN: again["passed"]}
    red = any(run.get("status") for run in contents["numeric"].values()) or "error" in contents["mutants"]
    red = red or any(case["status"] != 0 for case in contents["cases"].values())
    return {
        "code": parts["tests"]["code"],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        **tests,
        "status": tests["status"] or int(red),
        **parts["tests"]["where"],
        **contents,
        "ran": {part: parts[part]["where"] for part in ("long", *contents)},
    }


def added(tests: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """What came of tests that ran in two parts."""
    counts = {name: tests[name] + more[name] for name in ("passed", "failed", "skipped", "xfailed", "seconds")}
    slowest = sorted([*tests["slowest"].items(), *more["slowest"].items()], key=lambda item: -item[1])[:SLOWEST]
    failures = [*tests["failures"], *more["failures"]]
    return {"status": tests["status"] or more["status"], **counts, "slowest": dict(slowest), "failures": failures}


def main(arguments: list[str]) -> int:
    """Run all parts, or the one named after ``--part``; write the result once all of the present code are there.

    Returns:
        0 if all that is there passed.
    """
    os.chdir(ROOT)
    chosen = arguments[1:2] if arguments[:1] == ["--part"] else list(PARTS)
    if arguments and arguments[0] != "--part":
        print(f"{RESULT.relative_to(ROOT)}: not written, because arguments may narrow a run: {' '.join(arguments)}")
        return int(tests_run(arguments)["status"])
    for part in chosen:
        run_part(part)
    kept = {part: json.loads(path.read_text()) for part in (*PARTS, AGAIN) if (path := KEPT / f"{part}.json").exists()}
    kept = {part: made for part, made in kept.items() if made["code"] == code_hash()}
    if missing := [part for part in PARTS if part not in kept]:
        print(f"{RESULT.relative_to(ROOT)}: not written; of this code there is no result yet of: {', '.join(missing)}")
        return 1 if set(missing) & set(chosen) else 0
    result = combined(kept)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {RESULT.relative_to(ROOT)}")
    return int(result["status"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
