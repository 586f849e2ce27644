"""Checkpoint metadata: one JSON string in each param group, the only place that survives every trainer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hbcore.errors import CheckpointError

FORMAT = 1
"""Incremented when the layout of a state dict changes; rules have their own versions."""

KEY = "hbcore"
"""The param group entry that holds the string."""


@dataclass(frozen=True)
class Record:
    """The content of a group's string.

    Attributes:
        rules: the chain's transforms and their versions.
        codec: the name of the slots' codec.
        seed: the seed of the optimizer's random numbers.
        progress: the scalars that the group carries from step to step.
        training: for rules with two sets of weights, whether the parameters held the training weights.
    """

    rules: Mapping[str, int] = field(default_factory=dict)
    codec: str = "plain"
    seed: int = 0
    progress: Mapping[str, float] = field(default_factory=dict)
    training: bool = True

    def dump(self) -> str:
        """Serialize to the JSON string."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)


def read(text: Any, group: int) -> Record | None:
    """Parse a group's string; None for a group without one, which comes from torch.optim.

    Raises:
        CheckpointError: the string is malformed or has a newer format.
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
            f"param group {group} has checkpoint format {format_}, but this hbcore reads only up to {FORMAT}; upgrade hbcore."
        )
    return record


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a valid number in a checkpoint")
