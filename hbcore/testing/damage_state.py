"""Damage to the state of parameters in a state dict."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

Saved = dict[str, Any]


class Damage(NamedTuple):
    """What was done to a state dict.

    Attributes:
        what: for messages.
        names: an error about it names one of these.
    """

    what: str
    names: tuple[str, ...]


Kind = Callable[[Saved, Random], Damage | None]
"""Changes a state dict, and says how; None if there was nothing of the kind to damage."""


def _entry(saved: Saved, random: Random) -> tuple[Any, dict[str, Any], str]:
    """Some parameter's key, its state, and its name."""
    key = random.choice([k for k, entry in saved["state"].items() if isinstance(entry, dict) and entry])
    for group in saved["param_groups"]:
        names = group.get("param_names")
        if key in group["params"] and isinstance(names, (list, tuple)):
            at = group["params"].index(key)
            return key, saved["state"][key], str(names[at]) if at < len(names) else str(key)
    return key, saved["state"][key], str(key)


def _slot(saved: Saved, random: Random) -> tuple[dict[str, Any], str, str]:
    """Some parameter's state, the name of an entry of it, and the parameter's name."""
    _, entry, name = _entry(saved, random)
    return entry, random.choice(sorted(entry, key=str)), name


def _drop_slot(saved: Saved, random: Random) -> Damage:
    entry, slot, name = _slot(saved, random)
    del entry[slot]
    return Damage(f"{slot!r} of {name!r} is missing", (name,))


def _add_slot(saved: Saved, random: Random) -> Damage:
    _, entry, name = _entry(saved, random)
    entry["alien"] = random.choice((torch.ones(3), torch.zeros(()), "text", 7, None, [1.0], {"deep": 1}))
    return Damage(f"{name!r} has an entry 'alien', {entry['alien']!r}", (name, "alien"))


def _retype_slot(saved: Saved, random: Random) -> Damage | None:
    entry, slot, name = _slot(saved, random)
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.complex64)
    dtype = random.choice(dtypes)
    if not isinstance(entry[slot], Tensor):
        return None
    entry[slot] = entry[slot].real.to(dtype)
    return Damage(f"{slot!r} of {name!r} is {dtype}", (name, slot))


def _reshape_slot(saved: Saved, random: Random) -> Damage | None:
    entry, slot, name = _slot(saved, random)
    if not isinstance(entry[slot], Tensor):
        return None
    shapes: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda t: t.new_zeros(0),
        lambda t: t.flatten()[:1].sum(),
        lambda t: torch.cat([t.flatten(), t.flatten()[:1]]),
        lambda t: t.flatten(),
        lambda t: t.unsqueeze(0),
        lambda t: t.mT if t.ndim > 1 else t.expand(2, *t.shape),
        lambda t: t.flatten()[: t.numel() // 2],
    )
    entry[slot] = random.choice(shapes)(entry[slot])
    return Damage(f"{slot!r} of {name!r} has shape {tuple(entry[slot].shape)}", (name, slot))


def _replace_slot(saved: Saved, random: Random) -> Damage:
    entry, slot, name = _slot(saved, random)
    values: tuple[Any, ...] = ("text", None, 3, 0.5, [], [0.0, 1.0], {}, {"a": 1}, b"bytes", True, (1,), math.nan)
    entry[slot] = random.choice(values)
    return Damage(f"{slot!r} of {name!r} is {entry[slot]!r}", (name, slot))


def _odd_tensor(saved: Saved, random: Random) -> Damage | None:
    entry, slot, name = _slot(saved, random)
    value = entry[slot]
    if not isinstance(value, Tensor):
        return None
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "sparse": lambda t: t.to_sparse(),
        "without values": lambda t: t.to("meta"),
        "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point()),
        "not contiguous": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2] if t.ndim else t,
        "NaN": lambda t: torch.full_like(t, math.nan) if t.is_floating_point() else t,
        "infinite": lambda t: torch.full_like(t, -math.inf) if t.is_floating_point() else t,
    }
    kind = random.choice(sorted(kinds))
    entry[slot] = kinds[kind](value)
    return Damage(f"{slot!r} of {name!r} is {kind}", (name, slot))


def _step(saved: Saved, random: Random) -> Damage:
    _, entry, name = _entry(saved, random)
    values = (math.nan, math.inf, -1.0, 0.5, 1e300, 2.0**60, "3", "three", None, [3], True, 2 + 0j)
    value: Any = random.choice(values)
    if isinstance(value, (int, float)) and random.random() < 0.5:
        value = torch.full(random.choice(((), (), (2,))), float(value), dtype=torch.float64)
        value = value.to(random.choice((torch.float32, torch.float64)))
    entry["step"] = value
    return Damage(f"'step' of {name!r} is {value!r}", (name,))


def _drop_entry(saved: Saved, random: Random) -> Damage:
    key, _, name = _entry(saved, random)
    del saved["state"][key]
    return Damage(f"{name!r} has no state", (name,))


def _replace_entry(saved: Saved, random: Random) -> Damage:
    key, _, name = _entry(saved, random)
    saved["state"][key] = random.choice((None, {}, [], "text", 1, torch.zeros(3), [("step", 1)]))
    return Damage(f"the state of {name!r} is {saved['state'][key]!r}", (name,))


def _rename_entry(saved: Saved, random: Random) -> Damage:
    key, entry, name = _entry(saved, random)
    del saved["state"][key]
    other = random.choice((str(key), 10**6, -1, float(key) + 0.5 if isinstance(key, int) else 0.5, (key,)))
    saved["state"][other] = entry
    return Damage(f"the state of {name!r} is that of {other!r}", (name, repr(other)))


def _swap_entries(saved: Saved, random: Random) -> Damage:
    (one, first, name), (two, second, other) = _entry(saved, random), _entry(saved, random)
    saved["state"][one], saved["state"][two] = second, first
    return Damage(f"the states of {name!r} and {other!r} are swapped", (name, other))


def _reorder(saved: Saved, random: Random) -> Damage:
    for key, entry in saved["state"].items():
        if isinstance(entry, dict):
            saved["state"][key] = dict(random.sample(sorted(entry.items(), key=str), len(entry)))
    saved["state"] = dict(random.sample(list(saved["state"].items()), len(saved["state"])))
    return Damage("the state is in another order", ())


STATE_KINDS: tuple[Kind, ...] = (
    *(_drop_slot, _add_slot, _retype_slot, _reshape_slot, _replace_slot, _odd_tensor, _step),
    *(_drop_entry, _replace_entry, _rename_entry, _swap_entries, _reorder),
)
"""Kinds of damage to the state of parameters."""
