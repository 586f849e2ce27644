"""A class's annotated fields are its constructor; what is written out by hand is left alone."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import pytest
import torch

import hbcore
from hb_adam import AdamW, SparseAdam
from hb_psgd import PSGDKron
from hb_soap import SOAP
from hbcore.api import Momentum, Optimizer, ScaleByAdam
from hbcore.errors import OptionError, RuleError
from hbcore.introspect import describe


class Declared(Optimizer):
    """One line.

    Args:
        lr: learning rate.
    """

    lr: float = 0.1
    momentum: float = 0.9
    beta: float | None = None
    note: ClassVar[str] = "no parameter"
    weight_decay = 0.25

    def normalise(self, h: dict[str, Any]) -> dict[str, Any]:
        beta = h.pop("beta")
        return h if beta is None else {**h, "momentum": beta}

    def after_init(self) -> None:
        self.finished = True

    @staticmethod
    def chain(h: Any):
        return (Momentum(h.momentum),)


class WrittenOut(Optimizer):
    def __init__(self, params, lr=0.1, delayed=False, **options):
        super().__init__(params, {"lr": lr, "delayed": delayed}, options)

    @staticmethod
    def chain(h: Any):
        return (ScaleByAdam(),)


def params():
    return [torch.nn.Parameter(torch.ones(3, 2))]


def test_fields_are_parameters_in_order_and_options_are_keywords():
    signature = inspect.signature(Declared).parameters
    assert list(signature)[:4] == ["params", "lr", "momentum", "beta"]
    assert signature["caution"].kind is inspect.Parameter.KEYWORD_ONLY
    assert signature["weight_decay"].default == 0.25
    [group] = Declared(params(), 0.5, 0.8, caution=True).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.8, 0.25)
    assert "beta" not in group and "note" not in group


def test_fields_are_translated_and_the_last_word_is_the_classs():
    optimizer = Declared(params(), beta=0.5)
    assert optimizer.param_groups[0]["momentum"] == 0.5
    assert optimizer.finished


def test_a_field_is_no_attribute():
    """A group's value is in its dict; the class's default would be shown for it."""
    assert not hasattr(Declared(params()), "lr") and not hasattr(Declared, "weight_decay")
    assert Declared.note == "no parameter"


def test_a_subclass_changes_defaults_and_adds_fields():
    class Delayed(PSGDKron):
        delayed = True
        weight_decay = 0.5

    class More(Declared):
        extra: float = 2.0

    [group] = Delayed(params()).param_groups
    assert (group["delayed"], group["weight_decay"]) == (True, 0.5)
    assert PSGDKron(params()).param_groups[0]["delayed"] is False
    assert list(inspect.signature(More).parameters)[:5] == ["params", "lr", "momentum", "beta", "extra"]


def test_fields_of_several_bases_merge():
    class Other(Optimizer):
        eps: float = 1e-8

    class Both(Declared, Other):
        """Nothing of its own."""

    assert {"lr", "momentum", "eps"} <= set(inspect.signature(Both).parameters)
    assert Both(params(), eps=1e-3).param_groups[0]["eps"] == 1e-3


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((1, 2, 3, 4), {}, TypeError, "3 more positional arguments, not 4"),
        ((1,), {"lr": 2}, TypeError, "multiple values for argument 'lr'"),
        ((), {"wieght_decay": 0.1}, OptionError, "did you mean 'weight_decay'"),
        ((), {"note": "x"}, OptionError, "no option 'note'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        Declared(params(), *arguments, **keywords)


def test_a_field_needs_a_default():
    with pytest.raises(RuleError, match=r"Lacking\.lr has no default"):

        class Lacking(Optimizer):
            lr: float


def test_a_constructor_written_out_stays_as_it_is_and_takes_the_fields_of_a_subclass():
    assert list(inspect.signature(WrittenOut).parameters)[:3] == ["params", "lr", "delayed"]
    assert WrittenOut(params(), delayed=True, weight_decay=0.5).param_groups[0]["delayed"] is True

    class Inherits(WrittenOut):
        """Nothing of its own."""

    class Changes(WrittenOut):
        delayed = True
        extra: float = 2.0
        weight_decay = 0.5

        def normalise(self, h: dict[str, Any]) -> dict[str, Any]:
            return {**h, "extra": h["extra"] + 1}

    assert Inherits(params(), lr=0.5).param_groups[0]["lr"] == 0.5
    assert list(inspect.signature(Changes).parameters)[:4] == ["params", "lr", "delayed", "extra"]
    [group] = Changes(params(), 0.5, caution=True).param_groups
    assert [group[key] for key in ("lr", "delayed", "extra", "weight_decay")] == [0.5, True, 3.0, 0.5]
    with pytest.raises(OptionError, match="did you mean 'extra'"):
        Changes(params(), extr=1.0)


def test_a_constructor_written_over_declared_fields_takes_no_more_of_them():
    class Fewer(Declared):
        def __init__(self, params, lr=0.1, **options):
            super().__init__(params, lr, momentum=0.5, **options)

    class Inherits(Fewer):
        """Nothing of its own."""

    assert Inherits(params(), 0.25).param_groups[0]["momentum"] == 0.5
    with pytest.raises(RuleError, match="Fewer writes __init__ over a class that declares fields"):

        class More(Fewer):
            extra: float = 2.0


def test_a_subclass_of_an_alias_keeps_its_preset():
    class Mine(hbcore.get("PaLMSFAdamW")):
        extra: float = 2.0

    class Rarer(hbcore.get("PrecondScheduleSOAP")):
        lr = 0.5

    assert Mine(params()).settings.palm and not Mine(params(), palm=False).settings.palm
    assert inspect.signature(Mine).parameters["palm"].default is True
    [group] = Rarer(params()).param_groups
    assert (group["lr"], group["use_precond_schedule"]) == (0.5, True)


@pytest.mark.parametrize("cls", [AdamW, SOAP, Declared])
def test_help_ends_with_what_holds_for_all(cls):
    doc = inspect.getdoc(cls)
    assert doc is not None
    for text in ("params: parameters", "**options:", "HyperparameterError:", "ParameterError:"):
        assert doc.count(text) == 1, text


DEFAULTS = [
    (SOAP, "weight_decay", 0.01),
    (PSGDKron, "update_clipping", "trust_region_clip_"),
    (SparseAdam, "division_backend", "eps_add"),
]


@pytest.mark.parametrize(("cls", "option", "default"), DEFAULTS)
def test_a_class_shows_its_own_defaults(cls, option, default):
    assert inspect.signature(cls).parameters[option].default == default
    assert {o["name"]: o["default"] for o in describe(cls)["options"]}[option] == default
