"""Muon as its author publishes it: https://github.com/KellerJordan/Muon, with and without the auxiliary Adam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hbcore.errors import CheckpointError
from hbcore.migrate.forms import Form, Group, Shape, names, source

JORDAN = {"method": "newton_schulz", "ns_coefficients": "jordan", "ns_steps": 5, "scale_mode": "scale"}
"""The iteration and the scale of the author's update."""

ADAM = {"division_backend": "eps_add", "use_muon": False}


def muon(group: Group, shapes: Sequence[Shape]) -> dict[str, Any]:
    """A group of matrices.

    The author's scale is that of the last two dimensions, which for a convolution's kernels are not the matrix's that is
    orthogonalized: they agree where both scales are 1.

    Raises:
        CheckpointError: a convolution with more outputs than inputs, or weights of three dimensions beside some of four.
    """
    ranks = {len(shape) for shape in shapes if shape is not None}
    for shape in (s for s in shapes if s is not None and len(s) == 4):
        rows, columns = shape[0], shape[1] * shape[2] * shape[3]
        if max(rows / columns, 1) != max(shape[2] / shape[3], 1):
            raise CheckpointError(
                f"Muon's update of a convolution of shape {shape} is scaled by its kernel's sides there, and by the matrix's "
                "here; train it with another group."
            )
    if 3 in ranks and 4 in ranks:
        raise CheckpointError("a group has weights of three and of four dimensions, which hbcore's Muon treats alike.")
    shared = {k: group[k] for k in ("lr", "weight_decay", "momentum")}
    view = {"flatten": 4 in ranks} if {3, 4} & ranks else {}
    return {**shared, **JORDAN, **view, "nesterov": True, "eps": 1e-7, "use_muon": True}


def either(group: Group, shapes: Sequence[Shape]) -> dict[str, Any]:
    """A group with the flag ``use_muon``."""
    if group["use_muon"]:
        return {**muon(group, shapes), "division_backend": "eps_add"}
    return {**{k: group[k] for k in ("lr", "betas", "eps", "weight_decay")}, **ADAM}


IDLE = ("every parameter has had a gradient in every step: without one, its author's code decays it all the same",)

FLAGS = "MuonAdamW is constructed with the same groups, each with its use_muon"

FORMS = (
    Form(
        "Muon",
        (names("lr weight_decay momentum"),),
        (names("momentum_buffer"),),
        lambda groups: "Muon",
        settings=muon,
        assumed=IDLE,
    ),
    Form(
        "MuonWithAuxAdam",
        (names("lr weight_decay momentum use_muon"), names("lr betas eps weight_decay use_muon")),
        (names("momentum_buffer"), names("exp_avg exp_avg_sq step")),
        lambda groups: "MuonAdamW",
        settings=either,
        steps=lambda group, entry: entry.get("step", 1),
        assumed=(*IDLE, FLAGS),
    ),
)

MUON = source("muon", FORMS)
