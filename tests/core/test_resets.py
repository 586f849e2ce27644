"""The ways in which people reset an optimizer make it as a fresh one; hooks see one step, whatever the optimizer is made of."""

from __future__ import annotations

from collections import defaultdict

import pytest
from core.kit import backward, mlp, same, split
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import hbcore

FAMILIES = ["AdamW", "SGD", "SFAdamW", "Muon", "SOAP", "PSGDKron", "AdEMAMix"]


BUILD = {name: lambda m, n=name: hbcore.get(n)(m.named_parameters(), lr=0.01) for name in FAMILIES} | {"SplitOpt": split}
RESET = {
    "opt.state = defaultdict(dict)": lambda o: setattr(o, "state", defaultdict(dict)),
    "__setstate__ with a state": lambda o: o.__setstate__({"state": defaultdict(dict)}),
    "__setstate__ with groups too": lambda o: o.__setstate__({"state": {}, "param_groups": o.param_groups}),
}


def train(model, optimizer, steps):
    for t in steps:
        backward(model, t)
        optimizer.step()


@pytest.mark.parametrize("how", RESET)
@pytest.mark.parametrize("name", BUILD)
def test_a_reset_optimizer_is_as_a_fresh_one(name, how):
    model, other = mlp(), mlp()
    optimizer = BUILD[name](model)
    train(model, optimizer, range(4))
    other.load_state_dict(model.state_dict())
    RESET[how](optimizer)
    assert not any(optimizer.state.values())
    train(model, optimizer, range(4, 8))
    train(other, BUILD[name](other), range(4, 8))
    assert same(model.parameters(), other.parameters())


@pytest.mark.parametrize("build", [split, lambda m: hbcore.get("SAMWrapper")(m.parameters())], ids=["SplitOpt", "SAMWrapper"])
def test_global_hooks_see_one_step_and_a_childs_own_hooks_its_own(build):
    model, seen = mlp(), []
    optimizer = build(model)
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: seen.append(("global pre", o))),
        register_optimizer_step_post_hook(lambda o, *_: seen.append(("global post", o))),
        optimizer.children[0].register_step_post_hook(lambda o, *_: seen.append(("own", o))),
    ]
    optimizer.step(lambda: backward(model, 0))
    for handle in handles:
        handle.remove()
    assert seen == [("global pre", optimizer), ("own", optimizer.children[0]), ("global post", optimizer)]
