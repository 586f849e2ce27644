"""The conformance kit: what every optimizer owes its users, as checks that a plugin's author runs over their own.

::

    from hbcore.testing import assert_conforms

    def test_lion_conforms():
        assert_conforms("Lion")

Under pytest, ``pytest --pyargs hbcore.testing.suite --hbcore-optimizer Lion`` runs each check as a test of its own. Which
checks apply is decided by the capabilities that the optimizer declares, see :class:`hbcore.api.OptimizerSpec`. They need a
CPU, no GPU, and take some ten seconds.

Everything here is imported on first use: pytest loads :mod:`hbcore.testing.plugin` in every run, which must not import torch.
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
