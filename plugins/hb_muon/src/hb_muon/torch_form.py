"""Param groups of torch.optim.Muon in the forms of :class:`hb_muon.Muon`, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hb_muon.orthogonalize import METHODS, table

STEPS = METHODS["newton_schulz"].steps


def from_torch(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """torch's group in our forms; a setting that ours spells in another way, with the same effect, as ours spells it.

    Raises:
        HyperparameterError: its coefficients are no table.
    """
    read = dict(theirs)
    if ours["momentum"] is None and "momentum" in read:
        read["betas"] = (read.pop("momentum"), ours["betas"][1])
    if "ns_coefficients" in read:
        read["ns_coefficients"] = table(read["ns_coefficients"])
        if set(table(ours["ns_coefficients"] or "you")) == {*read["ns_coefficients"]}:
            read["ns_coefficients"] = ours["ns_coefficients"]
    if read.get("ns_steps") == STEPS and ours["ns_steps"] is None:
        read["ns_steps"] = None
    scaled = read.get("adjust_lr_fn") or "original"
    read["adjust_lr_fn"] = ours["adjust_lr_fn"] if scaled == scale(ours) else scaled
    read["method"] = ours["method"] if ours["method"] == "auto" else "newton_schulz"
    read["ns_dtype"] = ours["ns_dtype"] and "bfloat16"
    return {**read, "split_sizes": None}


def to_torch(ours: Mapping[str, Any]) -> dict[str, Any]:
    """Our group in torch's forms, without a scale or a table of coefficients that it cannot express."""
    written = {**ours, "ns_steps": STEPS if ours["ns_steps"] is None else ours["ns_steps"], "adjust_lr_fn": scale(ours)}
    if ours["momentum"] is None:
        written["momentum"] = ours["betas"][0]
    rows = () if ours["ns_coefficients"] is None else table(ours["ns_coefficients"])
    written["ns_coefficients"] = rows[0] if rows else None
    if len(set(rows)) != 1:
        del written["ns_coefficients"]
    if written["adjust_lr_fn"] is None:
        del written["adjust_lr_fn"]
    return written


def scale(ours: Mapping[str, Any]) -> str | None:
    """What torch calls our scale of an orthogonal factor; None if it has none such."""
    named: str | None = ours["adjust_lr_fn"]
    return named or ("original" if ours["scale_mode"] == "scale" else None)
