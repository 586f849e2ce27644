"""The conformance kit: checks of what users expect from any optimizer, for plugin authors to run on their own.

::

    from hbcore.testing import assert_conforms

    def test_lion_conforms():
        assert_conforms("Lion")

``pytest --pyargs hbcore.testing.suite --hbcore-optimizer Lion`` runs each check as a separate test. The capabilities that the
optimizer declares select the checks, see :class:`hbcore.api.OptimizerSpec`. They run on the CPU and take less than a minute.

Everything is imported on first use: pytest loads :mod:`hbcore.testing.plugin` in every run, which must not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hbcore.testing.catalog import CHECKS
    from hbcore.testing.runner import Finding, assert_conforms, check, subjects
    from hbcore.testing.subject import Check, Subject

__all__ = ["CHECKS", "Check", "Finding", "Subject", "assert_conforms", "check", "subjects"]

_LAZY = {
    "CHECKS": "hbcore.testing.catalog",
    "Check": "hbcore.testing.subject",
    "Finding": "hbcore.testing.runner",
    "Subject": "hbcore.testing.subject",
    "assert_conforms": "hbcore.testing.runner",
    "check": "hbcore.testing.runner",
    "subjects": "hbcore.testing.runner",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
