"""A summary of which parameters are orthogonalized, for ``repr``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

Named: TypeAlias = "tuple[str, Tensor]"


def members(groups: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str, Tensor]]:
    """``(group, name, parameter)`` of each parameter; the name is empty where there is none."""
    return [
        (group, name, p)
        for group in groups
        for name, p in zip(group.get("param_names") or [""] * len(group["params"]), group["params"], strict=True)
    ]


def routing(groups: Iterable[Mapping[str, Any]], taken: Callable[[Mapping[str, Any], Tensor], bool], yes: str, no: str) -> str:
    """Two lines: which parameters are ``yes``, those for which ``taken(group, parameter)`` holds, and which are ``no``."""
    everyone = members(groups)
    total = sum(p.numel() for _, _, p in everyone)
    parts: dict[bool, list[Named]] = {True: [], False: []}
    for group, name, p in everyone:
        parts[taken(group, p)].append((name, p))
    return "\n".join(f"{label}: {summary(parts[way], total)}" for way, label in ((True, yes), (False, no)))


def summary(parameters: list[Named], total: int, first: int = 4) -> str:
    """``"2 parameters, 96 of 104 elements; (8, 6) x 2; h.0.weight, h.1.weight"``."""
    if not parameters:
        return "nothing"
    count = sum(p.numel() for _, p in parameters)
    shapes = Counter(tuple(p.shape) for _, p in parameters).most_common()
    listed = [f"{shape} x {n}" for shape, n in shapes[:first]] + ["..."] * (len(shapes) > first)
    text = f"{len(parameters)} parameters, {count:,} of {total:,} elements; {', '.join(listed)}"
    names = [name for name, _ in parameters if name]
    return f"{text}; {', '.join(names[:first] + ['...'] * (len(names) > first))}" if names else text
