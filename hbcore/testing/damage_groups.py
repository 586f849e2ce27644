"""Damage to the param groups of a state dict, to their records, and to the whole."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from random import Random
from typing import Any

import torch

from hbcore.testing.damage_state import Damage, Kind, Saved


def _group(saved: Saved, random: Random) -> tuple[int, dict[str, Any], tuple[str, ...]]:
    """Some group's index, the group, and what an error calls it."""
    g = random.randrange(len(saved["param_groups"]))
    return g, saved["param_groups"][g], (f"group {g}", "param groups", "param_groups")


def _groups(saved: Saved, random: Random) -> Damage:
    g, group, names = _group(saved, random)
    groups = saved["param_groups"]
    changes: dict[str, Callable[[], Any]] = {
        "lost": lambda: groups.pop(g),
        "there twice": lambda: groups.append(copy.deepcopy(group)),
        "a list": lambda: groups.__setitem__(g, list(group)),
        "None": lambda: groups.__setitem__(g, None),
        "empty": lambda: groups.__setitem__(g, {}),
        "without parameters": lambda: group.pop("params"),
    }
    what = random.choice(sorted(changes))
    changes[what]()
    return Damage(f"group {g} is {what}", names)


def _group_params(saved: Saved, random: Random) -> Damage:
    g, group, names = _group(saved, random)
    params = group["params"]
    values: tuple[Any, ...] = (
        [], params[:-1], [*params, 999], [*params[:-1], 999], params[:1] * len(params), params[::-1], None, "text", 3,
        [[k] for k in params], [str(k) for k in params], [None] * len(params), dict(enumerate(params)), tuple(params),
        [{} for _ in params], [math.nan] * len(params),
    )  # fmt: skip
    group["params"] = random.choice(values)
    return Damage(f"group {g} has params {group['params']!r}", (*names, "state", *map(str, group.get("param_names") or ())))


def _group_names(saved: Saved, random: Random) -> Damage | None:
    g, group, names = _group(saved, random)
    given = group.get("param_names")
    if not isinstance(given, (list, tuple)) or not given:
        return None
    known, given = tuple(map(str, given)), list(given)
    values: tuple[Any, ...] = (
        given[::-1], given[:-1], [*given, "more"], ["other", *given[1:]], given[:1] * len(given), None, [], "text", 5,
        [[n] for n in given], [None] * len(given), list(range(len(given))), dict(enumerate(given)),
    )  # fmt: skip
    group["param_names"] = random.choice(values)
    return Damage(f"group {g} has param_names {group['param_names']!r}", (*names, *known, "param_names"))


def _group_number(saved: Saved, random: Random) -> Damage:
    g, group, names = _group(saved, random)
    key = random.choice([k for k in ("lr", "weight_decay", "betas", "momentum", "eps", "beta", "warmup_steps") if k in group])
    values: tuple[Any, ...] = (
        math.nan, math.inf, -1.0, "0.1", "text", None, [], [0.1], (0.5,), (0.5, 0.5), (0.9, 0.99, 0.999), {}, 0.25, 2, True,
        1j, torch.tensor(0.25), torch.tensor([0.1, 0.2]), torch.tensor(math.nan), b"1",
    )  # fmt: skip
    group[key] = random.choice(values)
    return Damage(f"{key!r} of group {g} is {group[key]!r}", (*names, key))


def _group_keys(saved: Saved, random: Random) -> Damage:
    g, group, names = _group(saved, random)
    key = random.choice(sorted(k for k in group if k != "params"))
    if random.random() < 0.5:
        del group[key]
        return Damage(f"group {g} lacks {key!r}", (*names, str(key)))
    other = random.choice(("initial_lr", "mine", "__class__", "state", ""))
    group[other] = random.choice((0.5, "text", [1, [2]], torch.ones(2), None))
    return Damage(f"group {g} has {other!r}", (*names, str(other)))


def _record(saved: Saved, random: Random) -> Damage | None:
    g, group, names = _group(saved, random)
    text = group.get("hbcore")
    if not isinstance(text, str):
        return None
    values: tuple[Any, ...] = (
        text[: len(text) // 2], "", "{}", "[]", "null", "1", '"text"', text.encode(), 5, [text], {"format": 1}, "[" * 5000,
        text + text, "\udcff", "[1" + "0" * 5000 + "]",
        re.sub(r": \d+", ": 1e999", text), re.sub(r": \d+", f": 1{'0' * 400}", text), re.sub(r": \d+", ": 1.5", text),
    )  # fmt: skip
    group["hbcore"] = random.choice(values)
    return Damage(f"the record of group {g} is {group['hbcore']!r:.60}", (*names, "hbcore"))


def _record_field(saved: Saved, random: Random) -> Damage | None:
    g, group, names = _group(saved, random)
    try:
        record = json.loads(group["hbcore"])
        key = random.choice(sorted({*record, "frozen", "own", "param_codec", "options"}))
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    values: tuple[Any, ...] = (
        None, 0, 99, -1, 1.5, "text", "bf16+8", "a=b", "exp_avg=none", "cast:float31", [], [0], [99], [-1], ["x"], {}, {"x": 1},
        {"adam": 2}, {"adam": "two"}, {"x": "1e999"}, {"x": {"lr": 1}}, True, False, [[0]], 1e400, 10**40,
    )  # fmt: skip
    record[key] = random.choice([v for v in values if (key, v) != ("frozen", [0])])  # which says that there need be no state
    if random.random() < 0.2:
        del record[key]
    group["hbcore"] = json.dumps(record)
    return Damage(f"{key!r} in the record of group {g} is {record.get(key, 'missing')!r}", (*names, key, "hbcore", "state"))


def _top(saved: Saved, random: Random) -> Damage:
    key = random.choice(("state", "param_groups"))
    values: tuple[Any, ...] = (None, [], {}, "text", 1, [None], [[]], torch.zeros(2), list(saved[key]), {0: saved[key]})
    saved[key] = random.choice(values)
    if random.random() < 0.2:
        del saved[key]
    what = f"{saved[key]!r:.60}" if key in saved else "missing"
    return Damage(f"{key!r} is {what}", ("state", "group"))


GROUP_KINDS: tuple[Kind, ...] = (_groups, _group_params, _group_names, _group_number, _group_keys, _record, _record_field, _top)
"""Kinds of damage to param groups, their records, and the whole."""
