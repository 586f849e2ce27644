"""What a checkpoint says of itself: one JSON string in each param group, the only place that survives every trainer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from hbcore.errors import CheckpointError

FORMAT = 1
"""Raised when the layout of a state dict changes; rules have versions of their own."""

KEY = "hbcore"
"""The param group's entry that holds the string."""


def dump(rules: Mapping[str, int], codec: str) -> str:
    """The string for a group whose chain has ``rules`` (name -> version) and stores its slots with ``codec``."""
    return json.dumps({"format": FORMAT, "rules": dict(sorted(rules.items())), "codec": codec}, sort_keys=True)


def check(text: Any, rules: Mapping[str, int], group: int) -> None:
    """Refuse what this version cannot read. A group without the string comes from torch.optim, and is welcome.

    Raises:
        CheckpointError: the string is malformed, of a newer format, or a rule's version differs.
    """
    if text is None:
        return
    try:
        data = json.loads(text)
        format_, saved = int(data["format"]), {str(k): int(v) for k, v in data["rules"].items()}
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"param group {group}: its {KEY!r} entry is not hbcore's ({error}); got {text!r:.120}.") from None
    if format_ > FORMAT:
        raise CheckpointError(
            f"param group {group} has checkpoint format {format_}, this hbcore reads up to {FORMAT}; upgrade hbcore."
        )
    for name, version in common(saved, rules):
        if saved[name] != version:
            raise CheckpointError(
                f"param group {group}: rule {name!r} was saved at version {saved[name]}, installed is version {version}, "
                "and no migration leads from one to the other; install the version that wrote it."
            )


def rules(text: Any) -> Mapping[str, int]:
    """The rules that a checked string lists; none for a group from torch.optim."""
    return {} if text is None else json.loads(text)["rules"]


def common(saved: Mapping[str, int], rules: Mapping[str, int]) -> Iterable[tuple[str, int]]:
    """The rules that both sides have. One side alone means that a flag was turned on or off, which is allowed."""
    return ((name, version) for name, version in rules.items() if name in saved)
