"""What a plugin says about itself: frozen, plain data. Nothing here imports torch, a plugin or the rest of hbcore.

A manifest builds these at import, so they check themselves: a bad name or target is reported as that plugin's failure
when it loads, not as a riddle when somebody first asks for the optimizer. Annotations bind no plugin's author, hence
the checks of types.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from hbcore.errors import RegistryError

CAPABILITIES = frozenset({"capturable", "modes", "primes", "closure", "random", "matrix", "sparse"})
"""What an :class:`OptimizerSpec`, whose docstring says what each means, may declare."""

_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def fold(name: str) -> str:
    """The key under which a name is looked up: case, ``-`` and ``_`` do not count."""
    return name.replace("-", "").replace("_", "").casefold()


def split(name: str) -> tuple[str, str]:
    """``"hb_psgd:PSGDKron"`` -> the folded plugin and name; without a prefix the plugin is the empty string."""
    plugin, _, short = name.rpartition(":")
    return fold(plugin), fold(short)


def _check_name(kind: str, name: object) -> None:
    # An identifier, because `from hbcore import NAME` and the pickled name of a preset class both need one.
    if not (isinstance(name, str) and name.isidentifier() and fold(name)):
        raise RegistryError(f"{kind} name {name!r} must be a Python identifier such as 'AdamW'")


def _check_target(name: str, target: object) -> None:
    if not (isinstance(target, str) and _TARGET.fullmatch(target)):
        raise RegistryError(f"target {target!r} of {name!r} must have the form 'package.module:Class'")


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer that a plugin provides.

    Args:
        name: canonical spelling, ``"AdamW"``. Start it with a capital if ``from hbcore import Name`` shall work.
        target: ``"hb_adam.adamw:AdamW"``; imported by :func:`hbcore.get` and never before.
        summary: one line for ``hbcore list``.
        paper: citation with an arXiv id or a URL.
        capabilities: what the conformance kit (:mod:`hbcore.testing`) may expect of it, of :data:`CAPABILITIES`:
            ``"capturable"``: takes ``capturable=True``;
            ``"modes"``: has ``train()`` and ``eval()``, which change between two sets of weights;
            ``"primes"``: the first gradient of a matrix prepares its state and moves nothing;
            ``"closure"``: ``step`` needs a closure;
            ``"random"``: draws random numbers, by the option ``seed``;
            ``"matrix"``: sees whole matrices rather than one element at a time;
            ``"sparse"``: takes sparse gradients, and no others.

    Raises:
        RegistryError: the name is no identifier, the target does not read ``module:attribute``, or a capability is unknown.
    """

    name: str
    target: str
    summary: str
    paper: str = ""
    capabilities: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        _check_name("optimizer", self.name)
        _check_target(self.name, self.target)
        if isinstance(self.capabilities, str):
            raise RegistryError(f"capabilities of {self.name!r} must be a set of words; got {self.capabilities!r}")
        if unknown := sorted(map(repr, set(self.capabilities) - CAPABILITIES)):
            raise RegistryError(
                f"{self.name!r} declares {', '.join(unknown)}, no capability; there are {', '.join(sorted(CAPABILITIES))}"
            )
        object.__setattr__(self, "capabilities", frozenset(self.capabilities))


@dataclass(frozen=True)
class Alias:
    """Another name for an optimizer, with or without preset keyword arguments. Using one warns once.

    Args:
        name: the other name, ``"ForeachDelayedPSGD"``.
        target: canonical optimizer name, ``"PSGDKron"``, or ``"plugin:Name"``. Never another alias.
        preset: keyword arguments that the name stands for. The mapping is copied and read-only.
        since: version that made it an alias.
        removed_in: version that will no longer know it; only announced, the plugin itself drops the alias.
        message: one sentence added to the warning.

    Raises:
        RegistryError: the name is no identifier, the target is empty, or a preset key is no identifier.
    """

    name: str
    target: str
    preset: Mapping[str, object] = field(default_factory=dict, hash=False)  # its values may be unhashable
    since: str = "0.1"
    removed_in: str | None = None
    message: str = ""

    def __post_init__(self) -> None:
        _check_name("alias", self.name)
        target: object = self.target
        if not (isinstance(target, str) and split(target)[1]):
            raise RegistryError(f"alias {self.name!r} must have an optimizer's name as its target; got {target!r}")
        preset: dict[Any, object] = dict(self.preset)
        for key in preset:
            if not (isinstance(key, str) and key.isidentifier()):
                raise RegistryError(f"preset of alias {self.name!r} must be keyword arguments; got the key {key!r}")
        object.__setattr__(self, "preset", MappingProxyType(preset))

    def __reduce__(self) -> tuple[type[Alias], tuple[object, ...]]:
        # A mappingproxy cannot be pickled; the plain dict that it shows can.
        return Alias, (self.name, self.target, dict(self.preset), self.since, self.removed_in, self.message)

    @property
    def preset_text(self) -> str:
        """The preset as a call would write it: ``"palm=True, use_precond_schedule=True"``."""
        return ", ".join(f"{key}={value!r}" for key, value in self.preset.items())


@dataclass(frozen=True)
class CodecSpec:
    """One storage codec that a plugin provides: ``CodecSpec("bf16+8", "hb_ecc.codecs:BF16Plus8", "...")``.

    Raises:
        RegistryError: the name is empty or holds a colon or a space, or the target does not read ``module:attribute``.
    """

    name: str
    target: str
    summary: str

    def __post_init__(self) -> None:
        name: object = self.name
        if not (isinstance(name, str) and re.fullmatch(r"[^\s:]+", name)):
            raise RegistryError(f"codec name {name!r} must be a word without spaces or colons, such as 'bf16+8'")
        _check_target(self.name, self.target)


@dataclass(frozen=True)
class OptimizerInfo:
    """An optimizer's spec and where it comes from, as :func:`hbcore.info` reports it.

    Attributes:
        spec: what the plugin declared.
        plugin, distribution, version: who provides the class.
        aliases: every other name that resolves to it, sorted.
        alias: the alias that was asked for, or None when it was the optimizer itself.
    """

    spec: OptimizerSpec
    plugin: str
    distribution: str
    version: str
    aliases: tuple[str, ...] = ()
    alias: Alias | None = None

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.spec.name
