"""What a checkpoint says of itself: one JSON string in each param group, the only place that survives every trainer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hbcore.errors import CheckpointError

FORMAT = 1
"""Raised when the layout of a state dict changes; rules have versions of their own."""

KEY = "hbcore"
"""The param group's entry that holds the string."""


@dataclass(frozen=True)
class Record:
    """What a group's string says.

    Attributes:
        rules: the chain's transforms and their versions.
        codec: how slots are stored.
        seed: what random numbers are drawn from.
        progress: what the group carries from step to step.
        training: whether the parameters held the weights to train with, of rules that have others too.
    """

    rules: Mapping[str, int] = field(default_factory=dict)
    codec: str = "plain"
    seed: int = 0
    progress: Mapping[str, float] = field(default_factory=dict)
    training: bool = True

    def dump(self) -> str:
        """The string."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)


def read(text: Any, group: int) -> Record | None:
    """Read a group's string. A group without one comes from torch.optim, and is welcome.

    Raises:
        CheckpointError: the string is malformed, or of a newer format.
    """
    if text is None:
        return None
    try:
        data = json.loads(text, parse_constant=_no_constant)
        format_ = int(data["format"])
        record = Record(
            {str(k): int(v) for k, v in data["rules"].items()},
            str(data["codec"]),
            int(data.get("seed", 0)),
            {str(k): float(v) for k, v in data.get("progress", {}).items()},
            bool(data.get("training", True)),
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"param group {group}: its {KEY!r} entry is not hbcore's ({error}); got {text!r:.120}.") from None
    if format_ > FORMAT:
        raise CheckpointError(
            f"param group {group} has checkpoint format {format_}, this hbcore reads up to {FORMAT}; upgrade hbcore."
        )
    return record


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of a checkpoint's")
