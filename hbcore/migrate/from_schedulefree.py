"""schedulefree 1.2 to 1.4: https://github.com/facebookresearch/schedule_free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hbcore.migrate.forms import Form, Group, Shape, names, source
from hbcore.migrate.plain import number

COMMON = names("lr r k train_mode weight_sum lr_max weight_lr_power weight_decay")
OPTIONAL = names("scheduled_lr foreach")
EVERY = names("lr betas eps weight_decay r weight_lr_power")


def settings(group: Group, shapes: Sequence[Shape]) -> dict[str, Any]:
    """A group's entries as SFAdamW has them: its warm-up divides by one more step than ``warmup_steps``."""
    warmup = max(int(number(group["warmup_steps"])) - 1, 0)
    return {**{k: group[k] for k in EVERY}, "warmup_steps": warmup, "division_backend": "eps_add"}


def z_minus_y(entry: Mapping[str, Any], weights: Tensor, group: Group) -> dict[str, Tensor]:
    r"""The difference that SFAdamW keeps: the weights are :math:`y` in training and :math:`x` in evaluation, where
    :math:`z - x = (z - y) / \beta_1`."""
    z = entry["z"].to(weights.device, weights.dtype)
    share = 1.0 if group["train_mode"] else float(number(group["betas"][0]))
    return {"z_minus_y": share * (z - weights)}


def progress(group: Group, steps: str = "k") -> dict[str, float]:
    """What a group carries: before the first step its largest rate is -1 there and 0 here."""
    k, weight_sum, largest = (float(number(group[key])) for key in (steps, "weight_sum", "lr_max"))
    return {"step": k, "k": k, "weight_sum": weight_sum, "lr_max": max(largest, 0.0)}


BECOMES = {
    "warmup_steps": "warmup_steps, one less: hbcore divides by it plus one",
    "weight_sum": "the group's weight_sum",
    "lr_max": "the group's lr_max",
    "train_mode": "the mode in which the optimizer is loaded",
    "z": "'z_minus_y', its difference from the weights to train with",
}

FORMS = (
    Form(
        "AdamWScheduleFree",
        (COMMON | names("betas eps warmup_steps"),),
        (names("z exp_avg_sq"),),
        lambda groups: "SFAdamW",
        optional=OPTIONAL,
        settings=settings,
        renamed=lambda entry: {"z": None},
        relative=z_minus_y,
        steps=lambda group, entry: group["k"],
        progress=progress,
        training=lambda group: bool(group["train_mode"]),
        becomes={**BECOMES, "k": "the counts of steps"},
        assumed=(
            "it is not AdamWScheduleFreePaper, which saves the same entries and has another rule",
            "every parameter with state has had a gradient in every step",
        ),
    ),
    Form(
        "SGDScheduleFree",
        (COMMON | names("momentum warmup_steps"),),
        (names("z"),),
        differs="hbcore's schedule-free rules, SFAdamW and SFSOAP, divide by a second moment, and it does not",
        optional=OPTIONAL,
    ),
    Form(
        "RAdamScheduleFree",
        (COMMON | names("betas eps silent_sgd_phase"),),
        (names("z exp_avg_sq"),),
        differs="it rectifies the second moment's first steps, which hbcore's SFAdamW does not",
        optional=OPTIONAL,
    ),
    Form(
        "AdamWScheduleFreeReference",
        (COMMON | names("betas eps warmup_steps decay_at_z"),),
        (names("z exp_avg_sq x y"),),
        differs="it is a form for study; train with AdamWScheduleFree, whose state can be converted",
        optional=OPTIONAL,
    ),
)

SCHEDULEFREE = source("schedulefree", FORMS)
