"""What a plugin declares: frozen, plain data. Nothing here imports torch, a plugin or the rest of hbcore.

A manifest creates these objects when it is imported, so they validate themselves: a bad name or target is reported as that
plugin's failure when it loads, not when the optimizer is first requested. Types are checked because annotations are not
enforced.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from hbcore.errors import RegistryError
from hbcore.registry.search import Searched, checked

CAPABILITIES = frozenset({"capturable", "modes", "primes", "closure", "random", "matrix", "joint", "sparse"})
"""The capabilities that an :class:`OptimizerSpec` may declare; its docstring explains each."""

_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def fold(name: str) -> str:
    """The lookup key of a name: case, ``-`` and ``_`` are ignored."""
    return name.replace("-", "").replace("_", "").casefold()


def split(name: str) -> tuple[str, str]:
    """``"hb_psgd:PSGDKron"`` -> the folded plugin and name; the plugin is empty if there is no prefix."""
    plugin, _, short = name.rpartition(":")
    return fold(plugin), fold(short)


def _check_name(kind: str, name: object) -> None:
    # `from hbcore import NAME` and the pickled name of a preset class both need an identifier.
    if not (isinstance(name, str) and name.isidentifier() and fold(name)):
        raise RegistryError(f"{kind} name {name!r} must be a Python identifier such as 'AdamW'")


def _check_target(name: str, target: object) -> None:
    if not (isinstance(target, str) and _TARGET.fullmatch(target)):
        raise RegistryError(f"target {target!r} of {name!r} must have the form 'package.module:Class'")


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer that a plugin provides.

    Args:
        name: canonical spelling, ``"AdamW"``. ``from hbcore import Name`` works if it starts with a capital.
        target: ``"hb_adam.adamw:AdamW"``; imported by :func:`hbcore.get`, not earlier.
        summary: one line for ``hbcore list``.
        paper: citation with an arXiv id or a URL.
        capabilities: a subset of :data:`CAPABILITIES`; it selects the checks of the conformance kit (:mod:`hbcore.testing`):
            ``"capturable"``: accepts ``capturable=True``;
            ``"modes"``: has ``train()`` and ``eval()``, which switch between two sets of weights;
            ``"primes"``: the first gradient of a matrix initializes its state without changing the matrix;
            ``"closure"``: ``step`` requires a closure;
            ``"random"``: draws random numbers, seeded by the option ``seed``;
            ``"matrix"``: works on whole matrices rather than elementwise;
            ``"joint"``: sees all parameters of a group at once, so that a parameter's step depends on the others;
                with ``multi_tensor=False`` it is another optimizer;
            ``"sparse"``: accepts only sparse gradients.
        small_lr: the learning rate for models of up to a few million parameters, if it is not the default of ``lr``:
            what ``hbcore compare`` uses where none is given.
        search: where ``hbcore tune`` looks for hyperparameters: names -> :class:`LogUniform`, :class:`Uniform`, :class:`Decay`,
            :class:`Choice`, or a tuple of them and of plain values. Empty for what follows from ``small_lr`` and the roles
            of the hyperparameters. The mapping is copied and read-only.

    Raises:
        RegistryError: the name is not an identifier, the target is not ``module:attribute``, a capability is unknown,
            ``small_lr`` is not a positive number, or ``search`` has something else than ranges.
    """

    name: str
    target: str
    summary: str
    paper: str = ""
    capabilities: frozenset[str] = frozenset()
    small_lr: float | None = None
    search: Mapping[str, Searched] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_name("optimizer", self.name)
        _check_target(self.name, self.target)
        if isinstance(self.capabilities, str):
            raise RegistryError(f"capabilities of {self.name!r} must be a set of strings; got {self.capabilities!r}")
        if unknown := sorted(map(repr, set(self.capabilities) - CAPABILITIES)):
            raise RegistryError(
                f"{self.name!r} declares unknown capabilities: {', '.join(unknown)}; choose from "
                f"{', '.join(sorted(CAPABILITIES))}"
            )
        object.__setattr__(self, "capabilities", frozenset(self.capabilities))
        lr: object = self.small_lr
        if lr is not None and not (isinstance(lr, (int, float)) and 0 < lr < math.inf):
            raise RegistryError(f"small_lr of {self.name!r} must be a positive number or None; got {lr!r}")
        object.__setattr__(self, "search", MappingProxyType(checked(self.name, self.search)))

    def __reduce__(self) -> tuple[type[OptimizerSpec], tuple[object, ...]]:
        # A mappingproxy cannot be pickled; a plain dict can.
        plain = self.name, self.target, self.summary, self.paper, self.capabilities, self.small_lr, dict(self.search)
        return OptimizerSpec, plain


@dataclass(frozen=True)
class Alias:
    """Another name for an optimizer, with or without preset keyword arguments. Using one warns once.

    Args:
        name: the other name, ``"ForeachDelayedPSGD"``.
        target: canonical optimizer name, ``"PSGDKron"``, or ``"plugin:Name"``. Never another alias.
        preset: keyword arguments that the name implies. The mapping is copied and read-only.
        since: the version that introduced the alias.
        removed_in: the version that will remove it. This is only announced; the plugin itself has to drop the alias.
        message: a sentence to append to the warning.

    Raises:
        RegistryError: the name is not an identifier, the target is empty, or a preset key is not an identifier.
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
        # A mappingproxy cannot be pickled; a plain dict can.
        return Alias, (self.name, self.target, dict(self.preset), self.since, self.removed_in, self.message)

    @property
    def preset_text(self) -> str:
        """The preset as arguments of a call: ``"palm=True, use_precond_schedule=True"``."""
        return ", ".join(f"{key}={value!r}" for key, value in self.preset.items())


@dataclass(frozen=True)
class CodecSpec:
    """One storage codec that a plugin provides: ``CodecSpec("bf16+8", "hb_ecc.codecs:BF16Plus8", "...")``.

    Raises:
        RegistryError: the name is empty or contains a colon or a space, or the target is not ``module:attribute``.
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
    """An optimizer's spec and origin, as :func:`hbcore.info` returns it.

    Attributes:
        spec: the plugin's declaration.
        plugin, distribution, version: the provider of the class.
        aliases: every other name that resolves to it, sorted.
        alias: the alias that was requested, or None for the canonical name.
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
