"""What comes of checks: one result for each check and subject."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unittest import SkipTest

from hbcore.testing import levels
from hbcore.testing.ranks import Pool
from hbcore.testing.subject import Check

Status = Literal["passed", "failed", "skipped", "expected", "unexpected pass"]


@dataclass(frozen=True)
class Finding:
    """A check that an optimizer or a codec fails.

    Attributes:
        check: the name of the check.
        subject: the optimizer and its options, ``"Lion(ecc='bf16+8')"``.
        message: what was expected and what was found.
    """

    check: str
    subject: str
    message: str

    def __str__(self) -> str:
        return f"{self.subject} fails {self.check}: {self.message}"


@dataclass(frozen=True)
class Result:
    """What came of one check of one optimizer or codec.

    Attributes:
        check: the name of the check.
        subject: the optimizer and its options, ``"Lion(ecc='bf16+8')"``.
        status: ``"passed"``, ``"failed"``, ``"skipped"`` if it cannot be checked on this machine; of a check that is listed in
            ``expected_failures``, ``"expected"`` if it failed and ``"unexpected pass"`` if not.
        message: what was expected and what was found, or why it was skipped; the listed reason of an unexpected pass. Empty if
            it passed.
        seconds: how long it took.
    """

    check: str
    subject: str
    status: Status
    message: str = ""
    seconds: float = 0.0

    @property
    def red(self) -> bool:
        """Whether :func:`hbcore.testing.assert_conforms` raises for it."""
        return self.status in ("failed", "unexpected pass")

    def __str__(self) -> str:
        if self.status == "unexpected pass":
            return (
                f"{self.subject} passes {self.check}, which was expected to fail ({self.message}); remove it from "
                "expected_failures."
            )
        verb = {"passed": "passes", "skipped": "skips"}.get(self.status, "fails")
        return f"{self.subject} {verb} {self.check}" + (f": {self.message}" if self.message else "")


OnResult = Callable[[Result], object]
"""Called with each result as it comes."""


@dataclass(frozen=True)
class Case:
    """One check of one optimizer or codec; a call runs it, and raises what the check does.

    Attributes:
        check: the check.
        subject: a :class:`hbcore.testing.Subject`, or a :class:`hbcore.testing.CodecSubject`.
        ranks: on how many processes; None for a check of one process.
        compiled: see :func:`hbcore.testing.run_checks`.
    """

    check: Check
    subject: Any
    ranks: int | None = None
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.subject}-{self.check.name}"

    def __call__(self) -> None:
        """Run the check, on processes of its own if it needs several."""
        if self.ranks is None:
            self.check.run(self.subject, compiled=self.compiled)
            return
        with Pool() as pool:
            self.on(pool)

    def on(self, pool: Pool) -> None:
        """Run the check, on the processes of ``pool`` if it needs several."""
        ranked = () if self.ranks is None else (pool, self.ranks)
        self.check.run(self.subject, *ranked, compiled=self.compiled)


def reasons(cases: Sequence[Case], expected_failures: Mapping[str, str] | None, every: Iterable[str]) -> list[str]:
    """Why each of the cases is expected to fail; an empty string for those that are not.

    Args:
        cases: what is run.
        expected_failures: the name of a check, or ``"Lion(ecc='bf16+8')-name"`` for one variant -> the reason.
        every: the names of all checks of the kind, of any level.

    Raises:
        ValueError: there is no such check or variant, or a reason is empty.
    """
    every, variants, expected = list(every), sorted({str(case.subject) for case in cases}), dict(expected_failures or {})
    for key, reason in expected.items():
        variant, _, name = str(key).rpartition("-")
        levels.known(name, every)
        if variant and variant not in variants:
            raise ValueError(f"expected_failures has {key!r}, but what is checked is {', '.join(variants)}.")
        if not str(reason or "").strip():
            raise ValueError(f"expected_failures needs a reason for {key!r}, such as a link; got {reason!r}.")
    return [str(expected.get(str(case), expected.get(case.check.name, ""))) for case in cases]


def run(cases: Sequence[Case], reasons: Sequence[str], on_result: OnResult | None = None) -> list[Result]:
    """Run cases one after the other; checks of several processes share them.

    Args:
        cases, on_result: see :func:`hbcore.testing.run_checks`.
        reasons: see :func:`reasons`.
    """
    results = []
    with Pool() as pool:
        for case, reason in zip(cases, reasons, strict=True):
            results.append(_run(case, pool, reason))
            if on_result is not None:
                on_result(results[-1])
    return results


def raise_if_red(results: Iterable[Result]) -> None:
    """Raise an AssertionError that lists the results that are red, if there are any."""
    if red := [result for result in results if result.red]:
        raise AssertionError("\n".join([f"{len(red)} checks failed:", *map(str, red)]))


def findings(results: Iterable[Result]) -> list[Finding]:
    """The failures that were not expected."""
    return [Finding(r.check, r.subject, r.message) for r in results if r.status == "failed"]


def _run(case: Case, pool: Pool, reason: str) -> Result:
    status: Status = "passed"
    message, start = "", time.perf_counter()
    try:
        case.on(pool)
    except SkipTest as skip:
        status, message = "skipped", str(skip)
    except AssertionError as error:
        status, message = "failed", str(error)
    except Exception as error:  # an exception is a finding like any other
        status, message = "failed", f"it raised {type(error).__name__}: {error}"
    if reason and status == "failed":
        status, message = "expected", f"{reason}: {message}"
    elif reason and status == "passed":
        status, message = "unexpected pass", reason
    return Result(case.check.name, str(case.subject), status, message, time.perf_counter() - start)
