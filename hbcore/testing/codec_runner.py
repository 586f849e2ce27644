"""Runs the checks of codecs, with or without pytest."""

from __future__ import annotations

from typing import Any

from hbcore.testing.checks_codecs import CODEC_CHECKS
from hbcore.testing.codec_subject import Bound, codec_subjects
from hbcore.testing.runner import Finding


def check_codec(codec: str | Any, bound: Bound | None = None) -> list[Finding]:
    """Run every check of codecs and return the failures.

    Args:
        codec, bound: see :func:`hbcore.testing.codec_subjects`.

    Raises:
        RegistryError: see :func:`hbcore.testing.codec_subjects`.
    """
    findings = []
    for subject in codec_subjects(codec, bound):
        for check in CODEC_CHECKS:
            try:
                check(subject)
            except AssertionError as error:
                findings.append(Finding(check.__name__, str(subject), str(error)))
            except Exception as error:  # an exception is a finding like any other
                findings.append(Finding(check.__name__, str(subject), f"it raised {type(error).__name__}: {error}"))
    return findings


def assert_codec_conforms(codec: str | Any, bound: Bound | None = None) -> None:
    """Raise an AssertionError that lists all findings, if there are any.

    ::

        assert_codec_conforms("bf16+8", bound=lambda x: 2**-16 * x.abs())

    Args:
        codec, bound: see :func:`hbcore.testing.codec_subjects`.

    Raises:
        RegistryError: see :func:`hbcore.testing.codec_subjects`.
    """
    findings = check_codec(codec, bound)
    if findings:
        raise AssertionError("\n".join([f"{len(findings)} checks failed:", *map(str, findings)]))
