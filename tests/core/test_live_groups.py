"""Param groups say what the optimizer is at that moment: whoever saves or rebuilds from them loses nothing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from core.kit import backward, mlp, same, split

import hbcore
from hb_adam import SGD, AdamW
from hbcore import SplitOpt

FAMILIES = ["AdamW", "SGD", "SFAdamW", "AdEMAMix", "Muon", "SOAP", "PSGDKron"]


BUILD = {name: lambda m, n=name: hbcore.get(n)(m.named_parameters(), lr=0.01) for name in FAMILIES} | {"SplitOpt": split}


def train(model, optimizer, steps):
    for t in steps:
        backward(model, t)
        optimizer.step()


@pytest.mark.parametrize("name", BUILD)
def test_what_is_saved_from_the_groups_resumes_exactly(name):
    """As torch's ZeroRedundancyOptimizer does, which takes the state from state_dict() and the groups from param_groups."""
    model, resumed = mlp(), mlp()
    optimizer, other = BUILD[name](model), BUILD[name](resumed)
    train(model, optimizer, range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    for group, live in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        group.update({k: v for k, v in live.items() if k != "params"})
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(saved)
    train(model, optimizer, range(5, 9))
    train(resumed, other, range(5, 9))
    assert same(model.parameters(), resumed.parameters())


OPTIONS = [{"caution": True}, {"maximize": True}, {"ecc": "bf16+8"}, {"update_clipping": ("l2_clip_", 0.5)}, {"mars": True}]


@pytest.mark.parametrize(
    "way", [lambda o: o, copy.copy, lambda o: pickle.loads(pickle.dumps(o))], ids=["same", "copy", "pickle"]
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_optimizer_made_of_anothers_groups_has_its_options(options, way):
    """``type(o)(o.param_groups)``, as wrappers that make classes at run time do (Horovod)."""
    model, plain = mlp(), mlp()
    source = way(AdamW(model.named_parameters(), lr=0.01, **options))
    source.param_groups[0]["params"] = list(model.parameters())  # a pickle has its own
    optimizer = type(source)(source.param_groups)
    train(model, optimizer, range(4))
    train(plain, AdamW(plain.named_parameters(), lr=0.01, **options), range(4))
    assert same(model.parameters(), plain.parameters())


def test_another_class_takes_no_options_from_the_groups():
    model = mlp()
    groups = AdamW(model.named_parameters(), caution=True).param_groups
    assert not SGD(groups).settings.caution
    assert not AdamW(groups, caution=False).settings.caution


@pytest.mark.parametrize("options", [{}, {"ecc": "bf16+8"}, {"param_ecc": "bf16+8"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["SFAdamW", "MSAMLaProp", "SplitOpt"])
@pytest.mark.filterwarnings("ignore:.*param_ecc:hbcore.errors.StateWarning")
def test_what_is_saved_while_evaluating_resumes_bit_for_bit(name, dtype, options):
    """Computing one set of weights from the other is not exact in low precision, so both are saved."""

    def build(model):
        if name != "SplitOpt":
            return hbcore.get(name)(model.named_parameters(), lr=0.05, **options)
        specs = [{"optimizer": "SFAdamW", "when": lambda p: p.ndim > 1}, {"optimizer": "AdamW"}]
        return SplitOpt(model.named_parameters(), specs, lr=0.05, **options)

    (model, optimizer), (resumed, other) = ((m := mlp().to(dtype), build(m)) for _ in range(2))
    train(model, optimizer, range(4))
    optimizer.eval()
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not any(str(key).startswith("train.") for slots in other.state.values() for key in slots)
    for o in (optimizer, other):
        o.train()
    assert same(model.parameters(), resumed.parameters())
    train(model, optimizer, range(4, 8))
    train(resumed, other, range(4, 8))
    assert same(model.parameters(), resumed.parameters())
