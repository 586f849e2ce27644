"""Run every test, the long ones included, and write what came out to ``tests/full/result.json``.

The file is committed. It holds

* the counts, the slowest tests, where they ran, and the hash of the code they ran on (see ``code_hash.py``); CI says so when
  that code has changed since;
* how the numeric tests did at each vector width that torch has kernels for and this processor has, with one thread and two:
  sums differ in their order, and tolerances have to hold for all;
* how many of a sample of mutants of the engine the tests killed, and which survived (see ``mutants.py``);
* what came of each script of the folder that the variable CASES names, if it names one (see ``run_cases.py``).

Arguments go to pytest; a run that has any ends after it and writes nothing, because they may narrow it.
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
from collections.abc import Sequence
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

SLOWEST = 25
"""How many of the slowest tests the result names."""

MUTANTS = 40
"""How many mutants are tried."""

CAPABILITIES = ("default", "avx2", "avx512")
"""What ATEN_CPU_CAPABILITY may be on x86, each above the one before."""

THREADS = (1, 2)

NUMERIC = (
    *("tests/adam", "tests/muon", "tests/psgd", "tests/soap", "tests/ecc", "tests/core/test_oracles.py"),
    *("tests/core/test_against_torch.py", "tests/core/test_backends.py"),
    *("-k", "not inductor and not outside_the_vocabulary and not machine_code"),  # which compile, for other widths than torch's
)
"""What pytest gets: the tests that compare numbers with oracles, and nothing that takes a compiler."""


class Outcomes:
    """A pytest plugin that counts each test's outcome once, and how long each test took."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(passed=0, failed=0, skipped=0, xfailed=0)
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the call, and set-up or tear-down only where it went wrong or skipped the test; time all three."""
        self.seconds[report.nodeid] += report.duration
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


def cases_run(folder: str | None) -> dict[str, dict[str, Any]]:
    """Case -> its exit status, None for one that took too long, and its seconds. Only the names within the folder are kept."""
    cases = run_all(Path(folder)) if folder else []
    return {case.name: {"status": case.status, "seconds": round(case.seconds, 1)} for case in cases}


def main(arguments: list[str]) -> int:
    """Run pytest on everything, then the numeric tests, the mutants and the cases; returns 0 if all passed."""
    folder = os.environ.get("CASES")
    folder = folder and os.path.abspath(folder)
    os.chdir(ROOT)
    tested = code_hash()
    outcomes = Outcomes()
    started = time.monotonic()
    status = int(pytest.main(["-m", "full or not full", "-n", JOBS, *arguments], plugins=[outcomes]))
    seconds = round(time.monotonic() - started)
    if arguments:
        print(f"{RESULT.relative_to(ROOT)}: not written, because arguments may narrow a run: {' '.join(arguments)}")
        return status
    numeric = numeric_runs()
    mutants = mutants_killed()
    cases = cases_run(folder)
    if code_hash() != tested:
        print(f"{RESULT.relative_to(ROOT)}: not written, because the sources changed while the tests ran")
        return status or 1
    if (
        any(run.get("status") for run in numeric.values())
        or "error" in mutants
        or any(case["status"] != 0 for case in cases.values())
    ):
        status = status or 1
    result = {
        "code": tested,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "status": status,
        **outcomes.counts,
        "seconds": seconds,
        **where(),
        "slowest": outcomes.slowest(),
        "numeric": numeric,
        "mutants": mutants,
        "cases": cases,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {RESULT.relative_to(ROOT)}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
