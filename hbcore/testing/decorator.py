"""The decorator that makes a pytest test of each check. Imports pytest, torch and the optimizer when it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hbcore.testing.codec_subject import Bound
    from hbcore.testing.results import Case


def conformance(
    *optimizers: str | type[Any],
    codec: str | Any = None,
    only: Sequence[str] | None = None,
    ecc: Sequence[str] | None = None,
    ranks: int | None = None,
    compiled: bool = False,
    bound: Bound | None = None,
    level: str | None = None,
    expected_failures: Mapping[str, str] | None = None,
    marks: Callable[[Case], Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a pytest test of each check that applies to optimizers, or to a codec.

    ::

        @conformance("Lion", level="api-1", expected_failures={"memory_is_as_described": "keeps a copy until 2.0"})
        def test_lion_conforms(check):
            check()

        @conformance(codec="log8", bound=lambda x: 0.05 * x.abs())
        def test_log8_conforms(check):
            check()

    The tests are called like ``test_lion_conforms[Lion(ecc='bf16+8')-resuming_changes_no_bit]``. A check that is listed in
    ``expected_failures`` is a strict xfail: it is reported with its reason, and fails if it passes.

    Args:
        optimizers: registered names or classes; one or more, or none and a ``codec``.
        codec: a codec's registered name, or a codec.
        only, ecc, ranks, compiled: of optimizers, see :func:`hbcore.testing.run_checks`.
        bound: of a codec, see :func:`hbcore.testing.codec_subjects`.
        level, expected_failures: see :func:`hbcore.testing.run_checks`.
        marks: what pytest marks each case's test with, by its ``check`` and ``subject``: one mark, several, or ``()``.

    Raises:
        RegistryError: a name is unknown or ambiguous, or its plugin is broken.
        TypeError: neither optimizers nor a codec is given, or both; or it decorates no function.
        ValueError: a name of a check or a level is unknown, ``ranks`` is less than 1, or a reason is empty.
    """
    import pytest

    from hbcore.testing import results

    if bool(optimizers) == (codec is not None) or any(not isinstance(o, (str, type)) for o in optimizers):
        raise TypeError(
            "conformance takes optimizers, names or classes, or a codec: @conformance('Lion') or @conformance(codec='log8'), "
            "above def test_it_conforms(check)."
        )
    if codec is not None:
        from hbcore.testing.codec_runner import EVERY, codec_cases

        found = codec_cases(codec, bound, level)
    else:
        from hbcore.testing.runner import EVERY, cases

        found = [c for one in optimizers for c in cases(one, only, ecc, ranks, compiled, level)]
    reasons = results.reasons(found, expected_failures, EVERY)
    owned = [marks(case) if marks is not None else () for case in found]
    return pytest.mark.parametrize("check", list(map(_param, found, reasons, owned)))


def _param(case: Case, reason: str, marks: Any) -> Any:
    """A case as pytest takes it, with an author's marks and the reason if it is expected to fail."""
    import pytest

    own = list(marks) if isinstance(marks, (list, tuple)) else [marks]
    if reason:
        own.append(pytest.mark.xfail(reason=reason, strict=True))
    return pytest.param(case, id=str(case), marks=own)
