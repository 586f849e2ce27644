"""Checks of parameters of every shape that occurs in models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hbcore.errors import OptionError, ParameterError
from hbcore.testing import expect
from hbcore.testing.subject import Check, Loose, Subject, drawn

SHAPES: dict[str, tuple[int, ...]] = {
    "a scalar": (),
    "one element": (1,),
    "an empty matrix": (0, 4),
    "one row": (1, 64),
    "one column": (50, 1),
    "a 1-d convolution": (4, 3, 5),
    "a 2-d convolution": (4, 3, 3, 3),
    "a 3-d convolution": (3, 2, 2, 3, 2),
    "a stack of matrices": (8, 64, 64),
}


def every_shape_trains_or_is_refused_when_built(subject: Subject) -> None:
    """If this fails, a model with such a layer fails during training, or the layer does not train."""
    taken = []
    for what, shape in SHAPES.items():
        if _trains(subject, f"{what}, shape {shape}", drawn(what, shape)):
            taken.append(shape)
    weight = drawn("channels last", (4, 3, 3, 3)).to(memory_format=torch.channels_last)
    _trains(subject, "a convolution in channels_last, shape (4, 3, 3, 3)", weight)
    if taken:
        together = subject.loose(*taken)
        before = together.values()
        with expect.working(f"three steps of parameters with the shapes {taken} together"):
            together.train(3)
        expect.finite(together.values(), "three steps of all shapes together")
        expect.moved(before, together.values(), "three steps of all shapes together")


def _trains(subject: Subject, what: str, weight: Tensor) -> bool:
    """Take three steps with one parameter; False if the constructor rejects it by name."""
    model = Loose(())
    model.register_parameter("odd_one", nn.Parameter(weight))
    try:
        trial = subject.trial(model)
    except ParameterError as error:
        assert "odd_one" in str(error), f"{what}: expected the error to name 'odd_one', found: {error}"
        return False
    before = trial.values()
    with expect.working(f"three steps of {what}"):
        trial.train(3)
    expect.finite(trial.values(), f"three steps of {what}")
    expect.moved(before, trial.values(), f"three steps of {what}")
    strides = trial.params["odd_one"].stride()
    assert strides == weight.stride(), f"{what}: expected the strides to stay {weight.stride()}, found {strides}"
    return True


def batching_changes_nothing(subject: Subject) -> None:
    """If this fails, multi_tensor=False changes the result, or an option may apply only to the first parameter."""
    variants: tuple[dict[str, Any], ...] = ({}, {"weight_decay": 0.1, "caution": True})
    for options in variants:
        shapes = ((6, 4), (6, 4), (5,))
        try:
            together, alone = subject.loose(*shapes, **options), subject.loose(*shapes, **options, multi_tensor=False)
        except OptionError:
            continue  # the optimizer does not have one of the options
        for t in (together, alone):
            t.train(3)
        expect.close(alone.values(), together.values(), 1e-6, f"three steps with multi_tensor=False and {options}")


CHECKS = (
    Check(every_shape_trains_or_is_refused_when_built, stored=True),
    Check(batching_changes_nothing, excludes=frozenset({"joint"}), stored=True),
)
