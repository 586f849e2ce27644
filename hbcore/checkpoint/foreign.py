"""State dicts that look like torch's and are another library's: they would load wrongly, without an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hbcore.checkpoint import schema

HEAVYBALL = ("caution", "mars", "storage_dtype")
"""Entries that every param group of every HeavyBall release from 1.7 on has, and hbcore's have not together."""


def is_heavyball(state_dict: Any) -> bool:
    """Whether a state dict is that of a HeavyBall optimizer. Never raises."""
    if not isinstance(state_dict, Mapping):
        return False
    groups = unwrapped(state_dict).get("param_groups")
    if not isinstance(groups, (list, tuple)) or not groups:
        return False
    return all(isinstance(g, Mapping) and schema.KEY not in g and all(k in g for k in HEAVYBALL) for g in groups)


def unwrapped(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """HeavyBall's SAMWrapper keeps the optimizer's state dict within its own."""
    inner = state_dict.get("wrapped")
    return inner if isinstance(inner, Mapping) else state_dict


def remedy(name: str) -> str:
    """What to do with a HeavyBall state dict that was passed to an optimizer of this name."""
    return (
        "this state dict is HeavyBall's, whose moments and names differ; convert the file with "
        f"'hbcore migrate IN OUT --to {name}', or the dict with hbcore.convert_checkpoint(state_dict, optimizer)"
    )
