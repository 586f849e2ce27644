"""Muon of Microsoft's dion: https://github.com/microsoft/dion, with its AdamW for other groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hbcore.errors import CheckpointError
from hbcore.migrate.forms import Form, Group, Shape, names, require, source
from hbcore.migrate.from_muon import FLAGS

SAFETY = 1.02
"""What it divides a matrix by, besides its norm."""

ROWS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Its coefficients, by the method of The Polar Express (arXiv:2505.16932)."""

COEFFICIENTS = (tuple(c / SAFETY**power for c, power in zip(ROWS[0], (1, 3, 5), strict=True)), *ROWS[1:])
"""The same with the safety factor in the first row, for a matrix that is divided by its norm alone."""

ENTRIES = names("lr mu beta1 beta2 weight_decay cautious_wd algorithm step epsilon nesterov flatten adjust_lr")


def settings(group: Group, shapes: Sequence[Shape]) -> dict[str, Any]:
    """A group's entries as Muon or MuonAdamW has them.

    Raises:
        CheckpointError: it is of another rule.
    """
    shared = {"lr": group["lr"], "weight_decay": group["weight_decay"], "eps": group["epsilon"]}
    shared["betas"] = (group["beta1"], group["beta2"])
    shared |= {"division_backend": "eps_add", "cautious_weight_decay": bool(group["cautious_wd"])}
    if group["algorithm"] == "adamw":
        return {**shared, "use_muon": False}
    if group["algorithm"] != "muon":
        raise CheckpointError(
            f"dion's algorithm {group['algorithm']!r:.40} is not supported beside Muon: no optimizer of hbcore joins the two."
        )
    require("dion's Muon", group, num_heads=None)
    split = group.get("split_sizes")
    own = {"momentum": group["mu"], "nesterov": bool(group["nesterov"]), "flatten": bool(group["flatten"])}
    own |= {"split_sizes": None if split is None else tuple(split), "heavyball_momentum": True, "use_muon": True}
    own |= {"method": "newton_schulz", "ns_coefficients": COEFFICIENTS, "ns_steps": len(COEFFICIENTS)}
    return {**shared, **own, **scale(group, shapes)}


def scale(group: Group, shapes: Sequence[Shape]) -> dict[str, Any]:
    """The scale of an update; dion's ``"spectral_norm"`` shrinks those of wide matrices, hbcore's does not."""
    if group["adjust_lr"] == "rms_norm":
        return {"scale_mode": "scale", "adjust_lr_fn": "match_rms_adamw"}
    if group["adjust_lr"] is None:
        return {"scale_mode": "none", "adjust_lr_fn": None}
    for shape in (s for s in shapes if s is not None and len(s) > 1):
        rows, columns = shape[-2:] if not group["flatten"] else (shape[0], math.prod(shape[1:]))
        if rows < columns:
            raise CheckpointError(
                f"dion's Muon with adjust_lr='spectral_norm' scales the update of {shape} by sqrt({rows} / {columns}), and "
                "hbcore's has no scale below 1; adjust_lr='rms_norm' and None can be converted."
            )
    return {"scale_mode": "scale", "adjust_lr_fn": None}


def renamed(entry: Mapping[str, Any]) -> dict[str, str | None]:
    """hbcore's names of a parameter's slots: AdamW's, if there is a second moment."""
    first = "exp_avg" if "variance" in entry else "momentum_buffer"
    return {"momentum": first, "variance": "exp_avg_sq", "step_dev": None}


def ours(groups: Sequence[Group]) -> str:
    """Muon, or with groups for AdamW MuonAdamW."""
    return "Muon" if all(group["algorithm"] == "muon" for group in groups) else "MuonAdamW"


FORMS = (
    Form(
        "Muon",
        (ENTRIES,),
        (names("momentum"), names("momentum variance"), names("momentum variance step_dev")),
        ours,
        optional=names("split_sizes num_heads"),
        settings=settings,
        renamed=renamed,
        steps=lambda group, entry: entry.get("step_dev", group["step"]),
        becomes={
            "mu": "momentum", "beta1": "betas", "beta2": "betas", "epsilon": "eps", "cautious_wd": "cautious_weight_decay",
            "algorithm": "use_muon", "adjust_lr": "scale_mode and adjust_lr_fn", "step": "AdamW's counts of steps",
            "step_dev": "the count of steps",
        },
        assumed=(FLAGS, "it iterates with its default, use_polar_express=True, on one device or more"),
    ),
)  # fmt: skip


def recognises(group: Group) -> bool:
    """Whether some optimizer of dion's saved the group."""
    return {"algorithm", "step"} <= {*group}


DION = source("dion", FORMS, recognises)
