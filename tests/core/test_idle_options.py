"""An option that is asked for changes what a step does, or is refused, or ``optimizer.report`` says that it does nothing."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from core.kit import one_of_each
from torch import nn

import hbcore
from hb_adam import SGD, AdamW
from hb_muon import Muon
from hbcore.engine.shared_options import OPTIONS
from hbcore.errors import HyperparameterError, OptionError
from hbcore.testing import Subject

SHAPES = ((4, 3), (5,))

VALUES = {
    "weight_decay": {"weight_decay": 0.3},
    "warmup_steps": {"warmup_steps": 2},
    "caution": {"caution": True},
    "cautious_weight_decay": {"cautious_weight_decay": True},
    "promote": {"promote": True},
    "maximize": {"maximize": True},
    "atan2_scale": {"atan2_scale": 4.0},
    "storage_dtype": {"storage_dtype": "bfloat16"},
    "ecc": {"ecc": "bf16+8"},
    "param_ecc": {"param_ecc": "bf16+8"},
    "stochastic_rounding": {"stochastic_rounding": True},
    "mars": {"mars": True},
    "mars_gamma": {"mars_gamma": 0.5},
    "palm": {"palm": True},
    "beta2_scale": {"beta2_scale": 0.5},
    "use_ema": {"use_ema": True},
    "ema_decay": {"ema_decay": 0.5},
    "gradient_clipping": {"gradient_clipping": ("l2_clip_", 0.1)},
    "update_clipping": {"update_clipping": ("l2_clip_", 0.1)},
}
"""Option -> a value that is not its default, alone: what it needs besides is not given."""

HOW = {
    "division_backend": "about what may be zero; whether a rule divides, only its code tells",
    "matmul_precision": "how a GPU multiplies; a CPU has one way",
    "offload": "where state lives; the same on a CPU, see test_offloaded.py",
    "report_norms": "about what a step did",
    "seed": "other random numbers of the same kind",
    "skip_nonfinite": "acts where a gradient is not finite",
    "consume_grad": "about gradients after the step",
    "multi_tensor": "how a step runs",
    "capturable": "how a step runs",
    "compile": "how a step runs",
    "compile_step": "how a step runs",
    "foreach": "how a step runs",
    "fused": "how a step runs",
}
"""Options whose results are the same by intention."""


ALLOWED = {
    ("Adafactor", "caution"): "its rule for matrices scales each element, but matrix rules turn updates",
    ("RMSprop", "caution"): "its momentum is 0, and may be scheduled",
}
"""What is silent by default, and why it stays so."""


def outcome(name, dtype=torch.float32, **options):
    """What three steps make of parameters and state, and the optimizer."""
    subject = Subject(hbcore.get(name), hbcore.info(name).spec.capabilities, {"compile": "eager"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial = subject.loose(*SHAPES, dtype=dtype, **options)
        trial.train(3)
    return {**trial.values(), **{f"state {k}": t for k, t in trial.state().items()}}, trial.optimizer


def alike(a, b):
    return a.keys() == b.keys() and all(
        x.dtype == b[k].dtype and torch.equal(x, b[k]) if isinstance(x, torch.Tensor) else x == b[k] for k, x in a.items()
    )


def test_every_option_is_looked_at():
    assert VALUES.keys() | HOW.keys() == OPTIONS.keys() and not VALUES.keys() & HOW.keys()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.broad)], ids=str)
@pytest.mark.parametrize("name", one_of_each(hbcore.list_optimizers()))
def test_no_option_is_silently_ignored(name, dtype):
    plain, _ = outcome(name, dtype)
    silent = []
    for option, given in VALUES.items():
        try:
            found, optimizer = outcome(name, dtype, **given)
        except (OptionError, HyperparameterError) as error:
            assert option in str(error), error
            continue
        noted = any(re.match(rf"{option}=.* (does nothing|leaves \d+ parameters)", note) for note in optimizer.report.notes)
        if alike(found, plain) != noted and (name, option) not in ALLOWED:
            silent.append((option, "noted, and acts" if noted else "is ignored"))
    assert not silent


CASES = [
    (SGD, {"matmul_precision": "ieee"}, "no rule multiplies"),
    (Muon, {"matmul_precision": "ieee"}, None),
    (Muon, {"promote": True}, None),
    (AdamW, {"ecc": "bf16+8", "stochastic_rounding": True}, None),
    (AdamW, {"ecc": "bf16+16", "stochastic_rounding": True}, "neither parameters nor state"),
    (AdamW, {"mars": True, "mars_gamma": 0.1}, None),
    (AdamW, {"storage_dtype": "float32"}, None),
    (AdamW, {"caution": False, "promote": False}, None),
]


@pytest.mark.parametrize(("cls", "options", "text"), CASES, ids=str)
def test_what_is_said(cls, options, text):
    optimizer = cls([nn.Parameter(torch.ones(4, 3))], compile="eager", **options)
    said = [note for note in optimizer.report.notes if "does nothing" in note]
    assert (len(said) == 1 and text in said[0]) if text else not said
    assert not text or text in repr(optimizer)
