"""Every registered optimizer passes every check that applies to it, with plain and with compressed state."""

from __future__ import annotations

import pytest

import hbcore
from hbcore.testing import CHECKS, Subject

VARIANTS = {"plain": {}, "ecc": {"ecc": "bf16+8"}}

CASES = [
    pytest.param(check, name, options, id=f"{name}-{variant}-{check.name}")
    for name in hbcore.list_optimizers()
    for variant, options in VARIANTS.items()
    for check in CHECKS
    if check.applies(hbcore.info(name).spec.capabilities)
]


@pytest.mark.parametrize(("check", "name", "options"), CASES)
def test_every_optimizer_conforms(check, name, options):
    check.function(Subject(hbcore.get(name), hbcore.info(name).spec.capabilities, options))
