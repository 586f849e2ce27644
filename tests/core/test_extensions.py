"""An extension over any optimizer has all that the optimizer has and what it adds, whether users or authors choose the base."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from core.kit import gradients, one_of_each, parameters, run, same
from torch import Tensor

import hbcore
from hb_adam import SGD, Adams, AdamW
from hb_adam.sam import SAMWrapper
from hbcore.api import Context, Extension, Optimizer, Slot, State, Transform, hyper, zeros
from hbcore.errors import HyperparameterError, OptionError, RuleError, UnknownOptimizerError
from hbcore.introspect import describe


@dataclass(frozen=True)
class Leaky(Transform):
    """Parameters leak a share of what they gained, and remember it."""

    leak: float = hyper(0.25, ge=0, lt=1)
    name = "leaky"
    stage = "after"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"leaked": zeros(param)}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        gained = self.leak * (u - c.param)
        return u - gained, {"leaked": s["leaked"] + gained}


class Leak(Extension):
    """Leaks.

    Args:
        leak: the share, in [0, 1).
    """

    leak: float = 0.25
    default_base = "AdamW"

    @classmethod
    def chain(cls, h: Any) -> tuple[Transform, ...]:
        return (*super().chain(h), Leaky(h.leak))

    def after_init(self) -> None:
        super().after_init()
        self.ready = True


class LeakSGD(Leak, SGD):
    """SGD that leaks, in two lines."""


class Twice(Extension):
    """Leaks by another name, to be nested."""

    second: float = 0.5

    @classmethod
    def chain(cls, h: Any) -> tuple[Transform, ...]:
        return (*super().chain(h), Second(h.second))


@dataclass(frozen=True)
class Second(Leaky):
    """The same rule once more."""

    name = "second"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"second": zeros(param)}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        u, new = super().update(u, {"leaked": s["second"]}, c)
        return u, {"second": new["leaked"]}


NAMES = [n for n in hbcore.list_optimizers() if not hbcore.info(n).spec.capabilities & {"closure", "sparse"}]
every_base = pytest.mark.parametrize("name", one_of_each(NAMES))


def defaults(cls: Any) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(cls).parameters.items()}


@every_base
def test_the_bases_hyperparameters_are_shown_and_taken(name: str) -> None:
    base, cls = hbcore.get(name), Leak.over(name)
    assert issubclass(cls, Leak) and issubclass(cls, base) and cls is Leak.over(base)
    assert defaults(cls) == {**defaults(base), "leak": 0.25}
    assert list(defaults(cls))[1 : len(base.own) + 1][:1] == list(defaults(base))[1:2]
    [rows, more] = [{row["name"] for row in describe(each)["hyperparameters"]} for each in (base, cls)]
    assert more - rows == {"leak"} and rows < more
    doc = inspect.getdoc(cls) or ""
    for part in (f"Leak over {name}.", "leak: the share", (inspect.getdoc(base) or "").split("\n")[0]):
        assert part in doc
    optimizer = Leak(parameters(), base=name, lr=0.125, leak=0.5, weight_decay=0.75)
    assert type(optimizer) is cls and optimizer.ready
    for group in optimizer.param_groups:
        assert (group["lr"], group["leak"], group["weight_decay"]) == (0.125, 0.5, 0.75)
        assert {key for key in group if key not in base(parameters()).param_groups[0]} == {"leak"}
    with pytest.raises(HyperparameterError, match="leak"):
        Leak(parameters(), base=name, leak=1.0)
    with pytest.raises(OptionError, match="did you mean 'leak'"):
        Leak(parameters(), base=name, laek=0.5)


@every_base
def test_an_extended_optimizer_is_copied_rebuilt_and_resumed_bit_for_bit(name: str) -> None:
    params, steps = parameters(), list(gradients(6))
    optimizer = Leak(params, base=name, lr=0.01, leak=0.5, caution=True)
    run(optimizer, params, steps[:3])
    fresh = {p: torch.nn.Parameter(p.detach().clone()) for p in params}
    rebuilt = type(optimizer)([{**g, "params": [fresh[p] for p in g["params"]]} for g in optimizer.param_groups])
    rebuilt.load_state_dict(optimizer.state_dict())
    copied, copies = copy.deepcopy((optimizer, params))
    pickled, unpickled = pickle.loads(pickle.dumps((optimizer, params)))
    assert type(rebuilt) is type(copied) is type(pickled) is type(optimizer)
    assert rebuilt.settings.caution and all("leaked" in s for s in rebuilt.state.values())
    for each, its in ((optimizer, params), (rebuilt, [*fresh.values()]), (copied, copies), (pickled, unpickled)):
        run(each, its, steps[3:])
        assert same(its, params)


def test_the_base_is_adamw_where_none_is_passed_and_the_signature_says_so() -> None:
    assert type(Leak(parameters(), betas=(0.5, 0.5))) is Leak.over(AdamW)
    assert defaults(Leak) == {**defaults(AdamW), "leak": 0.25, "base": "AdamW"}
    assert inspect.signature(Leak).parameters["base"].kind is inspect.Parameter.KEYWORD_ONLY


def test_the_class_written_out_does_the_same() -> None:
    ours, theirs = parameters(), parameters()
    assert LeakSGD(ours, 0.5, 0.25, leak=0.5).param_groups[0]["momentum"] == 0.25
    run(LeakSGD(ours, momentum=0.5), ours, gradients(3))
    run(Leak(theirs, base="SGD", momentum=0.5), theirs, gradients(3))
    assert same(ours, theirs) and defaults(LeakSGD) == defaults(Leak.over(SGD))
    assert pickle.loads(pickle.dumps(LeakSGD)) is LeakSGD and pickle.loads(pickle.dumps(Leak)) is Leak


def test_extensions_nest() -> None:
    params = parameters()
    optimizer = Twice(params, base=Leak.over("SGD"), momentum=0.5)
    run(optimizer, params, gradients(2))
    assert {"leaked", "second", "momentum_buffer"} < {*optimizer.state[params[0]]}
    assert type(Twice(params, base=Leak)) is Twice.over(Leak.over("AdamW"))  # Leak has a default base


def test_a_base_that_writes_its_constructor_out_runs_it() -> None:
    [group] = Leak(parameters(), base=Adams, master_dtype=torch.bfloat16, leak=0.5).param_groups
    assert (group["leak"], group["weight_decay"]) == (0.5, 0.1) and "master_dtype" not in group
    with pytest.raises(OptionError, match="division_backend"):
        Leak(parameters(), base=Adams, division_backend="eps_add")


def test_a_preset_is_a_base_too() -> None:
    optimizer = Leak(parameters(), base="PaLMSFAdamW")
    assert optimizer.settings.palm and "palm=True" in str(inspect.signature(type(optimizer)))


class Clashing(Optimizer):
    """Has a hyperparameter of the extension's name."""

    lr: float = 0.1
    leak: float = 0.1


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Leak(parameters(), base=Clashing), RuleError, "LeakClashing.*Clashing both have a hyperparameter 'leak'"),
        (lambda: type("Both", (Leak, Clashing), {}), RuleError, "Both.*both have a hyperparameter 'leak'"),
        (lambda: Leak(parameters(), base=SAMWrapper), OptionError, "cannot extend SAMWrapper; pass an optimizer"),
        (lambda: Leak(parameters(), base=torch.optim.SGD), OptionError, "cannot extend SGD; pass an optimizer"),
        (lambda: Leak(parameters(), base=7), OptionError, "cannot extend 7; pass an optimizer"),
        (lambda: Leak(parameters(), base="AdamV"), UnknownOptimizerError, "AdamV"),
        (lambda: Twice(parameters()), OptionError, "Twice needs a base; pass"),
        (lambda: LeakSGD.over("AdamW"), OptionError, "LeakSGD already extends SGD"),
        (lambda: LeakSGD(parameters(), base="AdamW"), OptionError, "LeakSGD has no option 'base'"),
    ],
)
def test_a_base_that_cannot_be_extended_is_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_the_class_is_found_again_by_the_names_of_what_it_is_made_of() -> None:
    """In a process that never made it."""
    code = (
        "import pickle, sys; cls = pickle.loads(bytes.fromhex(sys.argv[1])); "
        "print(cls.__name__, [c.__name__ for c in cls.__bases__])"
    )
    blob = pickle.dumps(WithoutMore.over("SGD")).hex()
    done = subprocess.run([sys.executable, "-c", code, blob], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "ExtensionSGD ['Extension', 'SGD']", done.stderr


WithoutMore = Extension
"""The one extension that another process can import: tests are no package."""
