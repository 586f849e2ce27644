"""A warning names the line of the user's code that led to it, however deep in the library it is issued."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable

import pytest
import torch

import hbcore
from hb_adam import AdamC, AdamW
from hb_muon import MuonAdamW
from hbcore.errors import FallbackWarning, StateWarning


def params(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(4, 3, dtype=dtype))]


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def falls_back() -> None:
    stepped(AdamW(params(), gradient_clipping=lambda u: u / u.sum(), compile="eager"))


def falls_back_behind_a_hook() -> None:
    optimizer = AdamW(params(), gradient_clipping=lambda u: u / u.sum(), compile="eager")
    optimizer.register_step_pre_hook(lambda *_: None)
    stepped(optimizer)


def converts_state() -> None:
    saved = stepped(AdamW(params(), storage_dtype="bfloat16", compile="eager")).state_dict()
    AdamW(params(), compile="eager").load_state_dict(saved)


def leaves_state_out() -> None:
    saved = stepped(AdamW(params(), amsgrad=True, compile="eager")).state_dict()
    AdamW(params(), compile="eager").load_state_dict(saved)


def narrows_parameters() -> None:
    AdamW(params(), param_ecc="bf16+8")


def narrows_by_name() -> None:
    hbcore.create("AdamW", params(), param_ecc="bf16+8")


def narrows_a_group() -> None:
    AdamW(params(torch.bfloat16), param_ecc="bf16+8").add_param_group({"params": params()})


def narrows_for_several() -> None:
    hbcore.SplitOpt(params(), [{"optimizer": "SGD", "param_ecc": "bf16+8"}])


def narrows_within() -> None:
    hbcore.get("SAMWrapper")(params(), AdamW, param_ecc="bf16+8")


def narrows_on_a_device() -> None:
    with torch.device("cpu"):
        AdamW(params(), param_ecc="bf16+8")


@torch.no_grad()
def narrows_behind_a_decorator() -> None:
    AdamW(params(), param_ecc="bf16+8")


def narrows_partially() -> None:
    functools.partial(AdamW, param_ecc="bf16+8")(params())


def narrows_in_a_plugin() -> None:
    """A class in another module, with a constructor of its own."""
    plugin = types.ModuleType("somebodys_plugin")
    code = (
        "from hb_adam import AdamW\n"
        "class Theirs(AdamW):\n"
        "    def __init__(self, params):\n"
        "        super().__init__(params, param_ecc='bf16+8')\n"
    )
    exec(compile(code, "somebodys_plugin.py", "exec"), vars(plugin))
    plugin.Theirs(params())


def leaves_parameters_alone() -> None:
    AdamW(params(torch.float16), param_ecc="bf16+8")


def drops_corrections() -> None:
    p = params()
    optimizer = AdamW(p, param_ecc="bf16+8", compile="eager")
    for _ in range(3):
        stepped(optimizer)
        with torch.no_grad():
            p[0].fill_(1.0)


def finds_other_weights() -> None:
    saved = stepped(AdamW(params(), param_ecc="bf16+8", compile="eager")).state_dict()
    other = AdamW(params(), param_ecc="bf16+8", compile="eager")
    other.load_state_dict(saved)
    stepped(other)


def translates_an_option() -> None:
    AdamW(params(), fused=True)


def creates_by_name() -> None:
    hbcore.create("AdamC", params())


def lacks_max_lr() -> None:
    AdamC(params())


def leaves_muon_nothing() -> None:
    MuonAdamW([("head.weight", params()[0])])


CASES: list[tuple[Callable[[], None], type[Warning]]] = [
    (falls_back, FallbackWarning),
    (falls_back_behind_a_hook, FallbackWarning),
    (converts_state, StateWarning),
    (leaves_state_out, StateWarning),
    (narrows_parameters, StateWarning),
    (narrows_by_name, StateWarning),
    (narrows_a_group, StateWarning),
    (narrows_for_several, StateWarning),
    (narrows_within, StateWarning),
    (narrows_on_a_device, StateWarning),
    (narrows_behind_a_decorator, StateWarning),
    (narrows_partially, StateWarning),
    (narrows_in_a_plugin, StateWarning),
    (leaves_parameters_alone, StateWarning),
    (drops_corrections, StateWarning),
    (finds_other_weights, StateWarning),
    (translates_an_option, FutureWarning),
    (creates_by_name, UserWarning),
    (lacks_max_lr, UserWarning),
    (leaves_muon_nothing, UserWarning),
]


@pytest.mark.parametrize(("act", "category"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_warning_names_the_users_line(act, category):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    ours = [w for w in caught if issubclass(w.category, category) and w.category is not DeprecationWarning]
    assert ours
    assert {w.filename for w in ours} == {__file__}
