"""Checkpoint metadata: one JSON string in each param group, the only place that survives every trainer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hbcore.errors import CheckpointError

FORMAT = 1
"""Incremented when the layout of a state dict changes; rules have their own versions."""

KEY = "hbcore"
"""The param group entry that holds the string."""

KEPT = "train."
"""What the names of the weights to train with begin with, in the state of an optimizer whose parameters hold those to evaluate
with: computing one set from the other is not exact in low precision."""


@dataclass(frozen=True)
class Record:
    """The content of a group's string.

    Attributes:
        rules: the chain's transforms and their versions.
        codec: the name of the slots' codec.
        seed: the seed of the optimizer's random numbers.
        progress: the scalars that the group carries from step to step.
        training: for rules with two sets of weights, whether the parameters held the training weights.
        frozen: the indices, in the group, of parameters that were not trained and have no state.
        own: the names of state that no rule uses: of a composite optimizer, or of the user.
        param_codec: the name of the codec that stores parameters; empty if none does.
        options: in a live group, the optimizer's name -> the options that its constructor was given.
    """

    rules: Mapping[str, int] = field(default_factory=dict)
    codec: str = "plain"
    seed: int = 0
    progress: Mapping[str, float] = field(default_factory=dict)
    training: bool = True
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    frozen: tuple[int, ...] = ()
    own: tuple[str, ...] = ()
    param_codec: str = ""

    def dump(self) -> str:
        """Serialize to the JSON string."""
        before, after = self.around()
        return before + encoded(self.progress) + after

    def around(self) -> tuple[str, str]:
        """What comes before and after the progress, in which alone most of hundreds of groups differ."""
        content = {k: v for k, v in vars(self).items() if v or k not in ("options", "frozen", "own", "param_codec")}
        before, key, after = encoded({"format": FORMAT, **content, "progress": {}}).partition('"progress": ')
        return before + key, after.removeprefix("{}")


encoded: Callable[[Any], str] = json.JSONEncoder(sort_keys=True).encode
"""As ``json.dumps``, which would make an encoder in each call."""


def read(text: Any, group: int) -> Record | None:
    """Parse a group's string; None for a group without one, which comes from torch.optim.

    Raises:
        CheckpointError: the string is malformed or has a newer format.
    """
    if text is None:
        return None
    try:
        data = json.loads(text, parse_constant=_no_constant)
        format_ = _integer(data["format"])
        record = Record(
            {str(k): _integer(v) for k, v in data["rules"].items()},
            str(data["codec"]),
            _integer(data.get("seed", 0)),
            {str(k): _number(v) for k, v in data.get("progress", {}).items()},
            bool(data.get("training", True)),
            {str(k): dict(v) for k, v in data.get("options", {}).items()},
            tuple(map(_integer, data.get("frozen", ()))),
            tuple(map(str, data.get("own", ()))),
            str(data.get("param_codec", "")),
        )
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"param group {group}: its {KEY!r} entry is not hbcore's ({error}); got {text!r:.120}.") from None
    if format_ > FORMAT:
        raise CheckpointError(
            f"param group {group} has checkpoint format {format_}, but this hbcore reads only up to {FORMAT}; upgrade hbcore."
        )
    return record


def textual(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of an optimizer's options that a string can hold: not functions, nor tensors."""
    return {name: value for name, value in options.items() if _is_textual(value)}


def _is_textual(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_textual, value))
    return value is None or isinstance(value, (bool, int, float, str))


def given_again(optimizer: str, groups: Iterable[Any]) -> dict[str, Any]:
    """The options of the optimizer that ``groups`` come from, if it is of the same name: ``type(o)(o.param_groups)``."""
    found: dict[str, Any] = {}
    for i, group in enumerate(groups):
        try:
            record = read(group.get(KEY), i) if isinstance(group, dict) else None
        except CheckpointError:  # the user's own entry of that name
            continue
        found.update(record.options.get(optimizer, {}) if record is not None else {})
    return found


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r:.40} is no integer")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < math.inf:
        raise ValueError(f"{value!r:.40} is no finite number")
    return float(value)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a valid number in a checkpoint")
