"""Damaged state dicts: what a truncated, edited or converted checkpoint may look like, drawn from a random generator."""

from __future__ import annotations

import copy
from random import Random

from hbcore.testing.damage_groups import GROUP_KINDS
from hbcore.testing.damage_state import STATE_KINDS, Damage, Kind, Saved

KINDS: tuple[Kind, ...] = (*STATE_KINDS, *GROUP_KINDS)
"""All kinds."""


def damaged(saved: Saved, random: Random) -> tuple[Saved, list[Damage]]:
    """A copy of a state dict with one or two faults, and what they are. Some are harmless, such as another order of keys.

    Args:
        saved: an optimizer's state dict, of named parameters.
        random: decides; the same seed damages the same state dict in the same way.
    """
    spoiled, found = copy.deepcopy(saved), []
    for _ in range(random.choice((1, 1, 2))):
        damage = random.choice(KINDS)(spoiled, random)
        if damage is not None:
            found.append(damage)
        if not _whole(spoiled):  # nothing to damage further
            break
    return spoiled, found


def _whole(saved: Saved) -> bool:
    state, groups = saved.get("state"), saved.get("param_groups")
    return (
        isinstance(state, dict)
        and isinstance(groups, list)
        and bool(groups)
        and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
        and any(isinstance(entry, dict) and entry for entry in state.values())
    )
