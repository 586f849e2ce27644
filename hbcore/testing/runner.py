"""Runs the checks on an optimizer, with or without pytest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hbcore import registry
from hbcore.testing import levels, results
from hbcore.testing.catalog import CHECKS
from hbcore.testing.checks_ranks import RANK_CHECKS
from hbcore.testing.results import Case, Finding, OnResult, Result
from hbcore.testing.subject import Subject

COMPRESSED = "bf16+8"
"""The codec with which every optimizer is tested too, if it is installed."""

EVERY = tuple(c.name for c in (*CHECKS, *RANK_CHECKS))
"""The names of all checks of optimizers."""


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


def cases(
    optimizer: str | type[Any],
    only: Iterable[str] | None = None,
    ecc: Sequence[str] | None = None,
    ranks: int | None = None,
    compiled: bool = False,
    level: str | None = None,
) -> list[Case]:
    """The checks that apply to an optimizer and its variants; see :func:`run_checks`."""
    if ranks is not None and ranks < 1:
        raise ValueError(f"ranks={ranks!r} is no number of processes; pass 2, or None for the checks of one process.")
    every = {c.name: c for c in (CHECKS if ranks is None else (*CHECKS, *RANK_CHECKS))}
    names = levels.names_of(level)
    chosen = [c for c in every.values() if c.name in names]
    if only is not None:
        chosen = [every[levels.known(name, every)] for name in only]
    whole = ecc is not None or only is not None
    return [
        Case(c, subject, ranks if c in RANK_CHECKS else None, compiled)
        for subject in subjects(optimizer, ecc)
        for c in chosen
        if c.applies(subject.capabilities) and (whole or c.stored or "ecc" not in subject.options)
    ]


def run_checks(
    optimizer: str | type[Any],
    only: Iterable[str] | None = None,
    ecc: Sequence[str] | None = None,
    ranks: int | None = None,
    compiled: bool = False,
    *,
    level: str | None = None,
    expected_failures: Mapping[str, str] | None = None,
    on_result: OnResult | None = None,
) -> list[Result]:
    """Run every applicable check of a level, or those named in ``only``, and return a result for each.

    Compressed state is checked for what a codec can be at fault for, and for everything if you name its codec or the check.

    Args:
        optimizer, ecc: see :func:`subjects`.
        only: names of checks, of any level.
        ranks: also run :data:`RANK_CHECKS`, on that many processes under FSDP2. Scripts then need the usual
            ``if __name__ == "__main__":``, because the processes import them.
        compiled: compile the graphs of checks that train with Inductor, which takes longer than all checks together.
        level: ``"api-1"``: exactly the checks of that level, whatever later releases of hbcore add; by default the newest.
        expected_failures: the name of a check -> the reason why it fails. A key ``"Lion(ecc='bf16+8')-name"`` is of that
            variant alone.
        on_result: called with each :class:`Result` as it comes.

    Raises:
        RegistryError: see :func:`subjects`.
        ValueError: a name of a check or a level is unknown, a check of ranks is named in ``only`` without ``ranks``, ``ranks``
            is less than 1, or a reason is empty.
    """
    chosen = cases(optimizer, only, ecc, ranks, compiled, level)
    return results.run(chosen, results.reasons(chosen, expected_failures, EVERY), on_result)


def check(
    optimizer: str | type[Any],
    only: Iterable[str] | None = None,
    ecc: Sequence[str] | None = None,
    ranks: int | None = None,
    compiled: bool = False,
    level: str | None = None,
) -> list[Finding]:
    """Run every applicable check of a level, or those named in ``only``, and return the failures.

    Args, raises: see :func:`run_checks`.
    """
    return results.findings(run_checks(optimizer, only, ecc, ranks, compiled, level=level))


def assert_conforms(
    optimizer: str | type[Any],
    ecc: Sequence[str] | None = None,
    ranks: int | None = None,
    compiled: bool = False,
    *,
    level: str | None = None,
    expected_failures: Mapping[str, str] | None = None,
    on_result: OnResult | None = None,
) -> None:
    """Raise an AssertionError that lists the checks that fail, and those that pass and were expected to fail, if there are any.

    Args, raises: see :func:`run_checks`.
    """
    results.raise_if_red(
        run_checks(optimizer, None, ecc, ranks, compiled, level=level, expected_failures=expected_failures, on_result=on_result)
    )


def _capabilities(cls: type[Any]) -> frozenset[str]:
    declared = {spec.target: spec.capabilities for spec in (registry.info(n).spec for n in registry.list_optimizers())}
    for base in cls.__mro__:
        if (target := f"{base.__module__}:{base.__qualname__}") in declared:
            return declared[target]
    return frozenset()
