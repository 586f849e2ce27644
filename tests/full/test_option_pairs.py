"""Every pair of shared options, on every registered optimizer: refused by name when it is built, or trained with.

Optimizers come from the registry, so that a new one joins by itself. What an option does is tested elsewhere; here two of them
meet.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import hbcore
from hbcore.engine.shared_options import OPTIONS
from hbcore.errors import HyperparameterError, OptionError
from hbcore.testing import Subject

pytestmark = pytest.mark.full

STEPS = 3
SHAPES = ((4, 3), (5,), ())

VALUES: dict[str, dict[str, Any]] = {
    "weight_decay": {  # alike for every chain: tried as one
        "weight_decay": 0.1, "warmup_steps": 2, "maximize": True, "promote": True, "consume_grad": False,
    },
    "caution": {"caution": True},
    "cautious_weight_decay": {"cautious_weight_decay": True, "weight_decay": 0.1},
    "division_backend": {"division_backend": "atan2", "atan2_scale": 4.0},
    "storage_dtype": {"storage_dtype": "bfloat16"},
    "ecc": {"ecc": "bf16+8"},
    "param_ecc": {"param_ecc": "bf16+8"},
    "stochastic_rounding": {"stochastic_rounding": True, "seed": 1},
    "mars": {"mars": True, "mars_gamma": 0.025},
    "palm": {"palm": True, "beta2_scale": 0.7},
    "use_ema": {"use_ema": True, "ema_decay": 0.1},
    "gradient_clipping": {"gradient_clipping": "l2_clip_"},
    "update_clipping": {"update_clipping": "trust_region_clip_"},
    "multi_tensor": {"multi_tensor": False},
    "skip_nonfinite": {"skip_nonfinite": True},
    "capturable": {"capturable": True},
    "matmul_precision": {"matmul_precision": "split"},
    "report_norms": {"report_norms": True},
}  # fmt: skip
"""Option -> a value that is not its default, with what that needs to mean anything."""

LEFT_OUT = {
    "compile": "which backend runs is no part of the result; here all run eagerly",
    "compile_step": "another spelling of compile",
    "foreach": "another spelling of multi_tensor",
    "fused": "another spelling of multi_tensor",
    "offload": "for parameters on a GPU; tests/core/test_offloaded.py",
}


def test_every_option_is_in_the_pairs():
    assert {name for given in VALUES.values() for name in given} | set(LEFT_OUT) == set(OPTIONS)
    assert all(given[name] != OPTIONS[name].default for given in VALUES.values() for name in given)


@pytest.mark.parametrize("option", VALUES)
@pytest.mark.parametrize("name", hbcore.list_optimizers())
def test_an_option_goes_with_each_other_one_or_is_refused(name, option):
    """The option by itself, then with each that follows it in the table."""
    subject = Subject(hbcore.get(name), hbcore.info(name).spec.capabilities, {"compile": "eager"})
    names = list(VALUES)
    wrong = {}
    for other in names[names.index(option) :]:
        fault = trained_with(subject, {**VALUES[option], **VALUES[other]})
        if fault:
            wrong[other] = fault
    assert not wrong, "\n".join(f"{option} with {other}: {fault}" for other, fault in wrong.items())


def trained_with(subject: Subject, options: dict[str, Any]) -> str | None:
    """What is wrong with three steps with ``options``, or with their refusal; None if nothing is.

    A bfloat16 parameter with param_ecc moves in what the codec keeps beside it first.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # AdamC says that it has no max_lr
        try:
            trial = subject.loose(*SHAPES, **options)
        except (OptionError, HyperparameterError) as error:
            return None if any(option in str(error) for option in options) else f"a refusal that names neither: {error}"
        start = trial.values()
        try:
            trial.train(STEPS)
            trained = trial.values()
            trial.optimizer.eval()
            tensors = {"parameter": trained, "state": trial.state(), "parameter after eval()": trial.values()}
            if options.get("use_ema"):
                with trial.optimizer.ema_weights():
                    tensors["average"] = trial.values()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    for what, found in tensors.items():
        for key, value in found.items():
            if isinstance(value, torch.Tensor) and not value.isfinite().all():
                return f"{what} {key} is {value.flatten()[:4].tolist()}"
    held = {key.rpartition(" ")[2] for key, value in tensors["state"].items() if key.startswith("param#") and value.any()}
    still = [key for key, value in start.items() if key not in held and torch.equal(value.float(), trained[key].float())]
    return f"{', '.join(still)} did not move" if still else None
