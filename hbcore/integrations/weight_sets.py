"""The switch between two sets of weights, as trainers see it: a list of optimizers, some of which have two."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def with_two_sets(optimizers: Iterable[Any]) -> list[Any]:
    """The optimizers whose parameters hold other weights in training than in evaluation.

    Their groups say in ``"train_mode"`` which of the two; those of the schedulefree library do too.
    """
    return [optimizer for optimizer in optimizers if any("train_mode" in group for group in optimizer.param_groups)]


def put(optimizers: Iterable[Any], *, training: bool) -> None:
    """Put the weights to train with, or those to evaluate with, into the parameters. Idempotent.

    Args:
        optimizers: any; those with one set of weights are left alone.
        training: which of the two.
    """
    for optimizer in with_two_sets(optimizers):
        if training:
            optimizer.train()
        else:
            optimizer.eval()
