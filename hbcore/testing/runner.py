"""Runs the checks on an optimizer, with or without pytest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import SkipTest

from hbcore import registry
from hbcore.testing.catalog import CHECKS
from hbcore.testing.checks_ranks import RANK_CHECKS
from hbcore.testing.ranks import Pool
from hbcore.testing.subject import Check, Subject

COMPRESSED = "bf16+8"
"""The codec with which every optimizer is tested too, if it is installed."""


@dataclass(frozen=True)
class Finding:
    """A check that an optimizer fails.

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


def subjects(optimizer: str | type[Any], ecc: Sequence[str] | None = None) -> list[Subject]:
    """The variants to check: the optimizer with plain state, and with state that codecs compress.

    Args:
        optimizer: a registered name, or a class. A class has the capabilities of the registered optimizer that it is or
            derives from, if any.
        ecc: the codecs, your own among them; by default ``bf16+8`` if hb_ecc is installed.

    Raises:
        RegistryError: the name is unknown or ambiguous, or its plugin is broken.
    """
    cls = registry.resolve(optimizer) if isinstance(optimizer, str) else optimizer
    if ecc is None:
        ecc = [COMPRESSED] if COMPRESSED in [c.name for c in registry.codecs()] else []
    variants: list[dict[str, Any]] = [{}, *({"ecc": codec} for codec in ecc)]
    return [Subject(cls, _capabilities(cls), options) for options in variants]


def check(
    optimizer: str | type[Any],
    only: Iterable[str] | None = None,
    ecc: Sequence[str] | None = None,
    ranks: int | None = None,
    compiled: bool = False,
) -> list[Finding]:
    """Run every applicable check, or those named in ``only``, and return the failures.

    Compressed state is checked for what a codec can be at fault for, and for everything if you name its codec or the check.

    Args:
        optimizer, ecc: see :func:`subjects`.
        only: names of checks.
        ranks: also run :data:`RANK_CHECKS`, on that many processes under FSDP2.
        compiled: compile the graphs of checks that train with Inductor, which takes longer than all checks together.

    Raises:
        RegistryError: see :func:`subjects`.
        ValueError: a name in ``only`` is unknown, or names a check of ranks without ``ranks``; ``ranks`` is less than 1.
    """
    if ranks is not None and ranks < 1:
        raise ValueError(f"ranks={ranks!r} is no number of processes; pass 2, or None for the checks of one process.")
    every = CHECKS if ranks is None else (*CHECKS, *RANK_CHECKS)
    chosen = every if only is None else [_named(name, every) for name in only]
    whole = ecc is not None or only is not None
    findings = []
    with ExitStack() as stack:
        extra = () if ranks is None else (stack.enter_context(Pool()), ranks)
        for subject in subjects(optimizer, ecc):
            for c in chosen:
                if c.applies(subject.capabilities) and (whole or c.stored or "ecc" not in subject.options):
                    findings += _run(c, subject, *(extra if c in RANK_CHECKS else ()), compiled=compiled)
    return findings


def assert_conforms(
    optimizer: str | type[Any], ecc: Sequence[str] | None = None, ranks: int | None = None, compiled: bool = False
) -> None:
    """Raise an AssertionError that lists all findings, if there are any.

    Args:
        optimizer, ecc: see :func:`subjects`.
        ranks: also check it on that many processes under FSDP2, see :func:`check`. Scripts then need the usual
            ``if __name__ == "__main__":``, because the processes import them.
        compiled: see :func:`check`.

    Raises:
        RegistryError: see :func:`subjects`.
        ValueError: ``ranks`` is less than 1.
    """
    findings = check(optimizer, ecc=ecc, ranks=ranks, compiled=compiled)
    if findings:
        raise AssertionError("\n".join([f"{len(findings)} checks failed:", *map(str, findings)]))


def _run(c: Check, subject: Subject, *ranked: Any, compiled: bool) -> list[Finding]:
    try:
        c.run(subject, *ranked, compiled=compiled)
    except SkipTest:
        return []
    except AssertionError as error:
        return [Finding(c.name, str(subject), str(error))]
    except Exception as error:  # an exception is a finding like any other
        return [Finding(c.name, str(subject), f"it raised {type(error).__name__}: {error}")]
    return []


def _named(name: str, every: Sequence[Check]) -> Check:
    for c in every:
        if c.name == name:
            return c
    raise ValueError(f"no check is named {name!r}; choose from {', '.join(c.name for c in every)}")


def _capabilities(cls: type[Any]) -> frozenset[str]:
    declared = {spec.target: spec.capabilities for spec in (registry.info(n).spec for n in registry.list_optimizers())}
    for base in cls.__mro__:
        if (target := f"{base.__module__}:{base.__qualname__}") in declared:
            return declared[target]
    return frozenset()
