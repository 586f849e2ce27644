"""Runs the checks of codecs, with or without pytest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hbcore.testing import levels, results
from hbcore.testing.checks_codecs import CODEC_CHECKS
from hbcore.testing.codec_subject import Bound, codec_subjects
from hbcore.testing.results import Case, Finding, OnResult, Result
from hbcore.testing.subject import Check

EVERY = tuple(function.__name__ for function in CODEC_CHECKS)
"""The names of all checks of codecs."""


def codec_cases(codec: str | Any, bound: Bound | None = None, level: str | None = None) -> list[Case]:
    """The checks of a codec; see :func:`run_codec_checks`."""
    names = levels.names_of(level)
    chosen = [Check(function) for function in CODEC_CHECKS if function.__name__ in names]
    return [Case(check, subject) for subject in codec_subjects(codec, bound) for check in chosen]


def run_codec_checks(
    codec: str | Any,
    bound: Bound | None = None,
    *,
    level: str | None = None,
    expected_failures: Mapping[str, str] | None = None,
    on_result: OnResult | None = None,
) -> list[Result]:
    """Run every check of codecs of a level, and return a result for each.

    Args:
        codec, bound: see :func:`hbcore.testing.codec_subjects`.
        level, expected_failures, on_result: see :func:`hbcore.testing.run_checks`.

    Raises:
        RegistryError: see :func:`hbcore.testing.codec_subjects`.
        ValueError: a name of a check or a level is unknown, or a reason is empty.
    """
    chosen = codec_cases(codec, bound, level)
    return results.run(chosen, results.reasons(chosen, expected_failures, EVERY), on_result)


def check_codec(codec: str | Any, bound: Bound | None = None, level: str | None = None) -> list[Finding]:
    """Run every check of codecs of a level, and return the failures.

    Args, raises: see :func:`run_codec_checks`.
    """
    return results.findings(run_codec_checks(codec, bound, level=level))


def assert_codec_conforms(
    codec: str | Any,
    bound: Bound | None = None,
    *,
    level: str | None = None,
    expected_failures: Mapping[str, str] | None = None,
    on_result: OnResult | None = None,
) -> None:
    """Raise an AssertionError that lists the checks that fail, and those that pass and were expected to fail, if there are any.

    ::

        assert_codec_conforms("bf16+8", bound=lambda x: 2**-16 * x.abs())

    Args, raises: see :func:`run_codec_checks`.
    """
    results.raise_if_red(run_codec_checks(codec, bound, level=level, expected_failures=expected_failures, on_result=on_result))
