"""The same rules in other libraries, and the arguments that make a comparison fair."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

from hbcore.cli.bench.contenders import Contender, accepts
from hbcore.errors import OptionError

FAIR = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov")
"""Hyperparameters that a peer gets too, if both constructors have them."""

HEAVYBALL_SETS = ("square", "sq8")
"""HeavyBall compiles a kernel for each tensor, which would take many minutes for a model of a hundred tensors."""


def fair_hyperparameters(cls: type[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The values of :data:`FAIR` that ``cls(**kwargs)`` would use."""
    parameters = inspect.signature(cls).parameters
    defaults = {key: parameters[key].default for key in FAIR if key in parameters}
    values = {**defaults, **{key: value for key, value in kwargs.items() if key in FAIR}}
    if values.get("momentum", 0) is None and "betas" in values:  # None means the first of betas
        values["momentum"] = values["betas"][0]
    return {key: value for key, value in values.items() if value is not inspect.Parameter.empty}


def _torch(module: Any, family: str) -> list[tuple[str, str, dict[str, Any]]]:
    cls = getattr(module, family, None)
    if cls is None:
        return []
    target, kinds = f"torch.optim:{family}", [kind for kind in ("fused", "foreach") if accepts(cls, kind)]
    if not kinds:
        return [(f"torch {family}", target, {})]
    return [(f"torch {family} {kind}", target, {kind: True}) for kind in kinds]


def _heavyball(module: Any, family: str) -> list[tuple[str, str, dict[str, Any]]]:
    if not hasattr(module, family):
        return []
    # Every class accepts consume_grad, though not all name it.
    return [(f"HeavyBall {family}", f"heavyball:{family}", {"consume_grad": False})]


def _flashoptim(module: Any, family: str) -> list[tuple[str, str, dict[str, Any]]]:
    name = f"Flash{family}"
    return [(f"FlashOptim {name}", f"flashoptim:{name}", {})] if hasattr(module, name) else []


def _schedulefree(module: Any, family: str) -> list[tuple[str, str, dict[str, Any]]]:
    if family != "SFAdamW":
        return []
    return [("schedulefree AdamW", "schedulefree:AdamWScheduleFree", {"foreach": True})]


def _dion(module: Any, family: str) -> list[tuple[str, str, dict[str, Any]]]:
    return [("dion Muon", "dion:Muon", {})] if family == "Muon" else []


Finder = Callable[[Any, str], list[tuple[str, str, dict[str, Any]]]]
PEERS: Mapping[str, tuple[str, Finder, tuple[str, ...]]] = {
    "torch": ("torch.optim", _torch, ()),
    "heavyball": ("heavyball", _heavyball, HEAVYBALL_SETS),
    "flashoptim": ("flashoptim", _flashoptim, ()),
    "schedulefree": ("schedulefree", _schedulefree, ()),
    "dion": ("dion", _dion, ()),
}
"""Peer -> the module to import, a function that finds its classes as (label, target, arguments), and the shape sets."""


def find_peers(names: Iterable[str], ours: Sequence[Contender]) -> tuple[list[Contender], list[str]]:
    """The peers of hbcore's contenders, once per family, with the hyperparameters of the family's first contender.

    Returns:
        The peers, and a note for each one that is not installed or does not have the rule.

    Raises:
        OptionError: a peer is unknown.
    """
    first: dict[str, Contender] = {}
    for one in ours:
        first.setdefault(one.family, one)
    found: list[Contender] = []
    notes: list[str] = []
    for name in names:
        if name not in PEERS:
            raise OptionError(f"--peers: no peer is named {name!r}; choose from {', '.join(PEERS)}")
        package, finder, only = PEERS[name]
        try:
            module = import_module(package)
        except Exception as error:  # a package built for another torch may fail in any way
            notes.append(f"{name} is skipped: {type(error).__name__}: {error}")
            continue
        for family, one in first.items():
            classes = finder(module, family)
            if not classes:
                notes.append(f"{name} is skipped for {family}: it has no such optimizer")
            found += [_peer(name, only, one, label, target, extra) for label, target, extra in classes]
    return found, notes


def _peer(name: str, only: tuple[str, ...], one: Contender, label: str, target: str, extra: dict[str, Any]) -> Contender:
    """A peer of ``one``, with the hyperparameters that both have."""
    peer = Contender(label, one.family, name, target, {}, only)
    cls = peer.load()
    fair = {key: value for key, value in fair_hyperparameters(one.load(), one.kwargs).items() if accepts(cls, key)}
    return Contender(label, one.family, name, target, {**fair, **extra}, only)
