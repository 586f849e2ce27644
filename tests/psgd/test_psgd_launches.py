"""How many launches PSGD's rules take on a GPU."""

from __future__ import annotations

import pytest
from launches import Launches, stack_of

from hb_psgd.rule import PreconditionByKron
from hbcore.rules.products import Split, Triple

pytest.importorskip("hb_psgd.fitting_kernel", reason="needs Triton", exc_type=ImportError)

GPT2 = [(12, 768, 2304), (12, 768, 768), (12, 768, 3072), (12, 3072, 768)]
"""The stacks of GPT-2's hidden matrices: five dense factors and three diagonal ones."""

MOST = {("split", True): 180, ("split", False): 28, ("ieee", True): 106, ("ieee", False): 11}


@pytest.mark.parametrize(("how", "refresh"), MOST, ids=str)
def test_a_step_takes_few_launches(how, refresh, monkeypatch):
    products = Split(Triple()) if how == "split" else Triple()
    rule = PreconditionByKron()
    stacks = [stack_of(rule, products, shape, refresh) for shape in GPT2]
    with Launches(monkeypatch) as launches:
        updates = [update.shape for update, _ in rule.update_stacks(stacks)]
    assert updates == [update.shape for update, _, _ in stacks]
    assert MOST[how, refresh] // 2 < sum(launches.found.values()) <= MOST[how, refresh], launches.found


def test_more_stacks_of_one_size_take_few_more(monkeypatch):
    """What fits factors does not depend on how many there are; what differs by stack is what lies around it."""
    rule, counts = PreconditionByKron(), []
    for stacks in (1, 2, 3):
        given = [stack_of(rule, Triple(), (4, 64, 64), True) for _ in range(stacks)]
        with Launches(monkeypatch) as launches:
            list(rule.update_stacks(given))
        counts.append(sum(launches.found.values()))
    assert counts[2] - counts[1] <= 16 < counts[0] - 16
