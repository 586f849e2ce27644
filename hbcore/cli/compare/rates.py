"""Which learning rate each run trains with, and who chose it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from hbcore.cli.compare.record import Origin, Run, Trial
from hbcore.cli.compare.task import Task
from hbcore.cli.compare.train import Hooks, OptimizerFactory, train
from hbcore.errors import RegistryError

SPACING = 10**0.5  # a step this far from the best learning rate costs little; a grid finer than the noise would find nothing
SHARE = 4  # a trial is a quarter of a run


def small_lr(name: str) -> float | None:
    """The learning rate that the optimizer's plugin declares for small models; None if it declares none.

    An alias that presets a learning rate keeps it.
    """
    from hbcore import registry

    try:
        info = registry.info(name)
    except RegistryError:  # a class of the core's, which has no spec
        return None
    return None if info.alias is not None and "lr" in info.alias.preset else info.spec.small_lr


def lr_of(optimizer: torch.optim.Optimizer) -> float | None:
    """The learning rate of the first parameter group."""
    lr = optimizer.param_groups[0].get("lr")
    return None if lr is None else float(lr)


def with_lr(
    cls: Callable[..., torch.optim.Optimizer], kwargs: Mapping[str, Any], small: float | None
) -> tuple[OptimizerFactory, Origin]:
    """The constructor with its arguments, and with the learning rate for small models where none is given."""
    if "lr" in kwargs:
        return partial(cls, **kwargs), "given"
    if small is None:
        return partial(cls, **kwargs), "default"
    return partial(cls, **{"lr": small, **kwargs}), "small models"


def grid(centre: float, count: int) -> list[float]:
    """``count`` learning rates around ``centre``, which is one of them, in steps of :data:`SPACING`; two digits each."""
    lowest = -((count - 1) // 2)
    return [float(f"{centre * SPACING**power:.2g}") for power in range(lowest, lowest + count)]


def tune(
    factory: Callable[..., torch.optim.Optimizer], task: Task, run: Run, count: int, say: Callable[[str], None]
) -> OptimizerFactory:
    """Train briefly with each of ``count`` learning rates around ``run.lr``; returns the factory with the best.

    Fills in ``run.trials``, ``run.lr`` and ``run.lr_from``. A run whose learning rate was given, or that has none, stays as it
    is, and so does one of which all trials diverge.
    """
    if run.lr_from == "given" or not run.lr:
        return factory
    steps = max(1, task.steps // SHARE)
    short = replace(task, steps=steps, eval_every=steps, norms_every=0)
    for lr in grid(run.lr, count):
        trial = Run(run.label, run.optimizer)
        train(partial(factory, lr=lr), short, trial, Hooks())
        run.trials.append(Trial(lr, trial.final_val_loss))
        say(
            f"lr {lr:g}, {steps} steps: "
            + ("diverged" if trial.final_val_loss is None else f"val loss {trial.final_val_loss:.4f}")
        )
    best = min(run.trials, key=lambda trial: math.inf if trial.loss is None else trial.loss)
    if best.loss is None:
        return factory
    run.lr, run.lr_from = best.lr, "tuned"
    return partial(factory, lr=best.lr)
