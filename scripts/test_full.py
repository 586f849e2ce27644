"""Run every test, the long ones included, and write what came out to ``tests/full/result.json``.

The file is committed. It holds the counts, where the tests ran, and the hash of the code they ran on (see
``code_hash.py``); CI says so when that code has changed since. Arguments go to pytest; a run that has any
writes nothing, because they may narrow it.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections import Counter
from datetime import datetime, timezone

import pytest
from code_hash import RESULT, ROOT, code_hash

JOBS = os.environ.get("JOBS", "2")
"""Processes that run tests."""


class Outcomes:
    """A pytest plugin that counts each test's outcome once."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(passed=0, failed=0, skipped=0, xfailed=0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the call, and set-up or tear-down only where it went wrong or skipped the test."""
        if hasattr(report, "wasxfail") and report.skipped:
            self.counts["xfailed"] += 1
        elif report.when == "call" or report.failed or report.skipped:
            self.counts[report.outcome] += 1


def where() -> dict[str, str | None]:
    """The versions and the device that the result speaks of."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def main(arguments: list[str]) -> int:
    """Run pytest on everything; returns its exit status."""
    os.chdir(ROOT)
    tested = code_hash()
    outcomes = Outcomes()
    started = time.monotonic()
    status = int(pytest.main(["-m", "full or not full", "-n", JOBS, *arguments], plugins=[outcomes]))
    seconds = round(time.monotonic() - started)
    if arguments:
        print(f"{RESULT.relative_to(ROOT)}: not written, because arguments may narrow a run: {' '.join(arguments)}")
        return status
    if code_hash() != tested:
        print(f"{RESULT.relative_to(ROOT)}: not written, because the sources changed while the tests ran")
        return status or 1
    result = {
        "code": tested,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "status": status,
        **outcomes.counts,
        "seconds": seconds,
        **where(),
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {RESULT.relative_to(ROOT)}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
