"""Options that HeavyBall removed in 3.0 are refused by every optimizer, with a TypeError that names what takes their place."""

from __future__ import annotations

import pytest
import torch

import hbcore
from hbcore.engine.shared_options import REMOVED
from hbcore.errors import OptionError

REPLACEMENTS = {
    "stochastic_schedule": ["precondition_frequency", "precond_scheduler"],
    "normalize_grads": ["gradient_clipping='l2_clip_'"],
    "correct_bias": ["always corrected"],
    "inverse_free": ["precond_rule='quad'", "PSGDPRO"],
    "adaptive": ["gradient_clipping='adaptive_gradient_clipping_'"],
}
NAMES = hbcore.list_optimizers()
OWN = {("SAMWrapper", "adaptive")}
"""Options that an optimizer of ours has under a name that HeavyBall's lost: adaptive SAM is another thing."""


def param() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3, 2))


def test_the_list_is_the_release_notes():
    assert REMOVED.keys() == REPLACEMENTS.keys()


@pytest.mark.parametrize("option", REPLACEMENTS)
@pytest.mark.parametrize("name", [*NAMES, "PurePSGD", "PaLMForeachSOAP"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_removed_option_is_refused_with_what_takes_its_place(name, option):
    cls = hbcore.get(name)
    if (name, option) in OWN:
        assert cls([param()], **{option: True})
        return
    for value in (True, False, None) if name == "AdamW" else (True,):
        with pytest.raises(TypeError, match=rf"{option}.* was removed in HeavyBall 3\.0") as raised:
            cls([param()], **{option: value})
        assert isinstance(raised.value, OptionError)
        assert all(word in str(raised.value) for word in REPLACEMENTS[option])


@pytest.mark.parametrize("option", REPLACEMENTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["AdamW", "SOAP", "PSGDKron", "MuonAdamW", "SAMWrapper", "SparseAdam"])
def test_a_group_may_not_have_it_either(name, option):
    with pytest.raises(TypeError, match=rf"{option}.* was removed in HeavyBall 3\.0"):
        hbcore.get(name)([{"params": [param()], option: True}])
    optimizer = hbcore.get(name)([param()])
    with pytest.raises(TypeError, match=rf"{option}.* was removed in HeavyBall 3\.0"):
        optimizer.add_param_group({"params": [param()], option: True})
    assert len(optimizer.param_groups) == 1


def test_what_takes_their_place_exists():
    hbcore.get("PSGDKron")([param()], precond_rule="quad")
    hbcore.get("SOAP")([param()], precondition_frequency=3)
    hbcore.get("SOAP")([param()], precond_scheduler=(1 / 3, 9))
    for clip in ("l2_clip_", "adaptive_gradient_clipping_"):
        hbcore.get("AdamW")([param()], gradient_clipping=clip)
    assert "PSGDPRO" in NAMES
