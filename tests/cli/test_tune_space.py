"""Where ``hbcore tune`` looks: what specs declare, and what follows from roles."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest
import torch

import hbcore
from hbcore import introspect, registry
from hbcore.api import Choice, Decay, LogUniform, OptimizerSpec, Uniform
from hbcore.cli.compare import rates
from hbcore.errors import OptionError, RegistryError

optuna = pytest.importorskip("optuna")

space = pytest.importorskip("hbcore.cli.tune.space")

NAMES = hbcore.list_optimizers()


class Ends:
    """Proposes one end of each range."""

    def __init__(self, high: bool) -> None:
        self.high = high

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        assert low < high and (low > 0 or not log)
        return high if self.high else low

    def suggest_categorical(self, name: str, values: Any) -> Any:
        return values[-1 if self.high else 0]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of what an optimizer says of its defaults
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_has_a_space_whose_ends_it_accepts(name):
    cls, spec = hbcore.get(name), registry.info(name).spec
    model = torch.nn.Linear(4, 4)
    factory: Any = rates.with_lr(cls, {}, spec.small_lr)[0]
    searched = space.space_of(cls, spec.search, rates.lr_of(factory(model.named_parameters())), {})
    assert "lr" in searched or spec.search
    signature = inspect.signature(cls).parameters
    for high in (False, True):
        arguments = space.suggest(Ends(high), searched)  # type: ignore[arg-type]
        group = factory(model.named_parameters(), **arguments).param_groups[0]
        for key, value in arguments.items():
            assert key in signature, f"{name} has no {key}"
            assert group.get(key, value) == value
    guess = space.first_guess(searched, {**factory(model.named_parameters()).defaults, "lr": spec.small_lr})
    assert set(guess) <= {*space.ranges(searched), *(f"1 - {key}" for key in space.ranges(searched))}


def test_a_space_follows_from_the_learning_rate_and_the_roles():
    assert space.space_of(hbcore.get("AdamW"), {}, 0.0025, {"weight_decay": 0}) == {
        "lr": LogUniform(0.00025, 0.025),
        "betas": (Decay(0.8, 0.98), Decay(0.9, 0.999)),
    }
    assert space.space_of(hbcore.get("SFSOAP"), {}, None, {})["betas"] == (0.9, Decay(0.9, 0.999)), "the first has no role"
    assert introspect.roles(hbcore.get("RMSprop"))["alpha"] == "second_moment"
    assert "momentum" not in space.space_of(hbcore.get("RMSprop"), {}, 0.1, {}), "it is off by default"
    assert set(space.space_of(torch.optim.AdamW, {}, 0.1, {})) == {"lr", "weight_decay"}, "of others only names are known"
    declared = {"ball": Uniform(0, 1)}
    assert space.space_of(hbcore.get("AdamW"), declared, 0.1, {}) == declared, "a declared space is the whole space"
    with pytest.raises(OptionError, match="nothing to search"):
        space.space_of(hbcore.get("AdamW"), declared, 0.1, {"ball": 1})


def test_what_is_tried_is_short_and_within_the_range():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    searched = {"lr": LogUniform(1e-4, 1e-1), "betas": (Decay(0.8, 0.98), 0.5), "mode": Choice("a", None), "x": Uniform(-1, 1)}
    for _ in range(50):
        found = space.suggest(study.ask(), searched)
        assert 1e-4 <= found["lr"] <= 1e-1 and 0.8 <= found["betas"][0] <= 0.98 and found["betas"][1] == 0.5
        assert found["mode"] in ("a", None) and -1 <= found["x"] <= 1
        assert len(repr(found["betas"][0])) <= 8 and found["lr"] == float(f"{found['lr']:.3g}")


@pytest.mark.parametrize(
    ("search", "says"),
    [
        ({"lr": 0.1}, "lr=0.1 is no range"),
        ({"betas": (0.9, 0.99)}, "is no range"),
        ({"0": Uniform(0, 1)}, "names as keys"),
        ({3: Uniform(0, 1)}, "names as keys"),
        ([Uniform(0, 1)], "must be a mapping"),
        (None, "must be a mapping"),
    ],
)
def test_a_search_that_is_none_is_refused(search, says):
    with pytest.raises(RegistryError, match=says):
        OptimizerSpec("A", "m:A", "", search=search)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LogUniform(0, 1), "must be positive"),
        (lambda: LogUniform(1, 1), "below the second"),
        (lambda: Uniform(2, 1), "below the second"),
        (lambda: Uniform("0", 1), "finite numbers"),
        (lambda: Uniform(True, 2), "finite numbers"),
        (lambda: Uniform(0, float("nan")), "finite numbers"),
        (lambda: Uniform(0, float("inf")), "finite numbers"),
        (lambda: Decay(0.9, 1.0), "below 1"),
        (lambda: Decay(-0.1, 0.5), "at least 0"),
        (lambda: Choice(1), "at least two"),
        (lambda: Choice(1, [2]), "no number"),
    ],
)
def test_a_range_that_is_none_is_refused(make, says):
    with pytest.raises(RegistryError, match=says):
        make()


def test_specs_with_a_search_are_data():
    given = {"lr": LogUniform(1e-4, 1e-1), "mode": Choice(1, 2)}
    spec = OptimizerSpec("A", "m:A", "", search=given)
    assert pickle.loads(pickle.dumps(spec)) == spec and hash(spec)
    given["lr"] = Uniform(0, 1)
    assert spec.search["lr"] == LogUniform(1e-4, 1e-1), "the mapping is copied"
    with pytest.raises(TypeError):
        spec.search["lr"] = Uniform(0, 1)
