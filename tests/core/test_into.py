"""``c.into``: memory where a matrix rule may write new values at once."""

from __future__ import annotations

import pytest
import torch
from core.kit import normal, same
from core.rules import matrix, optimizer_with

from hbcore.rules.transform import Slot, zeros


def averaging(given, seen):
    """A rule that averages its gradients, in the memory that it is given if ``given``; ``seen`` is what it was given."""

    def update(self, u, s, c):
        places = [c.into(name) if given else None for name in ("m", "exact", "update")]
        seen.append(places)
        values = [torch.lerp(s["m"], u, 0.25), torch.lerp(s["exact"], u, 0.5), 2 * u - s["m"]]
        new = [value if place is None else place.copy_(value) for place, value in zip(places, values, strict=True)]
        return new[2].view(new[2].shape), {"m": new[0], "exact": new[1]}

    return matrix(update, slots=lambda self, p: {"m": zeros(p), "exact": Slot(p.shape, exact=True)})


def trained(rule, dtype=torch.float32, skipping=(), **options):
    p = torch.nn.Parameter(torch.ones(4, 3, dtype=dtype))
    optimizer = optimizer_with(lambda h: (rule(h.beta),))([p], **options)
    for k in range(4):
        p.grad = normal(4, 3, seed=k).to(dtype)
        if k in skipping:
            p.grad[1, 2] = float("nan")
        optimizer.step()
    return [p.detach(), *optimizer.state[p].values()]


CASES = {
    "plain": ({}, (True, True, True)),
    "a codec": ({"ecc": "bf16+8"}, (False, True, True)),
    "bfloat16 parameters": ({"dtype": torch.bfloat16}, (True, True, True)),
    "steps that are skipped": ({"skip_nonfinite": True, "skipping": (2,)}, (False, False, False)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_at_once_is_what_would_have_been_copied(case):
    options, wanted = CASES[case]
    seen = []
    assert same(trained(averaging(True, seen), **options), trained(averaging(False, []), **options))
    assert [tuple(place is not None for place in places) for places in seen[1:]] == [wanted] * 3
    assert seen[0] == [None] * 3, "a rule is watched in its first step, and writes to nothing"
