"""The layout of a state dict, checked before anything of it is read."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from hbcore.errors import CheckpointError


def check(name: str, state_dict: Mapping[str, Any], count: int) -> None:
    """Refuse what has not torch's layout, or another number of param groups.

    Args:
        name: the optimizer's, for messages.
        state_dict: what is to be loaded.
        count: the number of param groups that the optimizer has.

    Raises:
        CheckpointError: it has not; the message names the entry.
    """
    state, saved = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(saved, (list, tuple)):
        raise CheckpointError(
            f"{name}: a state dict needs 'state', a dict, and 'param_groups', a list; got "
            f"{', '.join(f'{key!r}: {type(value).__name__}' for key, value in state_dict.items()) or 'an empty one'}."
        )
    if len(saved) != count:
        raise CheckpointError(
            f"{name}: the checkpoint has {len(saved)} param groups, the optimizer {count}; "
            "build the optimizer with the same groups."
        )
    owners: dict[Hashable, int] = {}
    for g, group in enumerate(saved):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise CheckpointError(f"{name}: param group {g} of the checkpoint has no list of 'params'.")
        where = f"{name}: param group {g} of the checkpoint has"
        for key in group["params"]:
            if not _is_hashable(key):
                raise CheckpointError(f"{where} {key!r:.60} among its 'params'; expected the keys of 'state'.")
            if key in owners:
                raise CheckpointError(f"{where} the parameter {key!r}, which is in group {owners[key]} already.")
            owners[key] = g
        _check_names(where, group)


def _is_hashable(key: object) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


def _check_names(where: str, group: Mapping[str, Any]) -> None:
    names = group.get("param_names")
    if not names and isinstance(names, (type(None), list, tuple)):
        return
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        raise CheckpointError(f"{where} {names!r:.80} as 'param_names'; expected a list of strings.")
    if len(names) != len(group["params"]):
        raise CheckpointError(f"{where} {len(group['params'])} parameters and {len(names)} 'param_names'.")
