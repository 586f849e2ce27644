"""Which plugin claims which name, resolved once per scan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hbcore.registry.discovery import Snapshot
from hbcore.registry.loading import Plugin
from hbcore.registry.spec import Alias, CodecSpec, OptimizerSpec, fold, split


@dataclass(frozen=True)
class Claim:
    """One plugin's claim to one name.

    Attributes:
        plugin: the claiming plugin.
        name: the name, as that plugin spells it.
        alias: set if the name is an alias.
        owner, spec: the optimizer's plugin and spec; None if an alias' target is unavailable.
    """

    plugin: Plugin
    name: str
    alias: Alias | None = None
    owner: Plugin | None = None
    spec: OptimizerSpec | None = None

    @property
    def qualified(self) -> str:
        """The unambiguous form: ``"hb_psgd:PSGDKron"``."""
        return f"{self.plugin.name}:{self.name}"

    def means_the_same(self, other: Claim) -> bool:
        """Whether both claims lead to the same class, so that they do not conflict."""
        if self.spec is None or other.spec is None:
            return self.alias == other.alias
        preset, other_preset = (dict(claim.alias.preset) if claim.alias else {} for claim in (self, other))
        return self.spec.target == other.spec.target and preset == other_preset


@dataclass(frozen=True)
class Conflict:
    """A short name that several plugins claim for different optimizers; the qualified names still work."""

    name: str
    claims: tuple[Claim, ...]

    def __str__(self) -> str:
        owners = " and ".join(f"{claim.plugin} as {claim.qualified!r}" for claim in self.claims)
        return f"the name {self.name!r} is claimed by {owners}"


@dataclass
class Index:
    """Folded name -> claims in scan order. Built from a snapshot and read-only afterwards."""

    snapshot: Snapshot
    claims: dict[str, list[Claim]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plugins = self.snapshot.plugins
        for plugin in plugins:
            for spec in plugin.optimizers:
                self._add(Claim(plugin, spec.name, None, plugin, spec))
        # Aliases come after all optimizers, since a target may belong to any plugin. All are resolved before any is added,
        # so that an alias is never used as a target.
        for claim in [self._resolve(plugin, alias) for plugin in plugins for alias in plugin.aliases]:
            self._add(claim)

    def find(self, name: str) -> list[Claim]:
        """The distinct claims to ``"Name"`` or ``"plugin:Name"``: none, one, or a conflict."""
        plugin, key = split(name)
        return _distinct(c for c in self.claims.get(key, ()) if not plugin or fold(c.plugin.name) == plugin)

    def find_codec(self, name: str) -> list[tuple[Plugin, CodecSpec]]:
        """The distinct codecs named ``"codec"`` or ``"plugin:codec"``."""
        plugin, _, short = name.rpartition(":")
        found: dict[str, tuple[Plugin, CodecSpec]] = {}
        for owner in self.snapshot.plugins:
            for codec in owner.codecs:
                if codec.name.casefold() == short.casefold() and fold(plugin) in ("", fold(owner.name)):
                    found.setdefault(codec.target, (owner, codec))
        return list(found.values())

    def names(self, aliases: bool) -> Iterator[str]:
        """Every name that can be looked up; conflicting names in their qualified form."""
        for claims in self.claims.values():
            distinct = _distinct(claims)
            for claim in distinct:
                if claim.spec is not None and (aliases or claim.alias is None):
                    yield claim.name if len(distinct) == 1 else claim.qualified

    def aliases_of(self, spec: OptimizerSpec) -> tuple[str, ...]:
        """The optimizer's aliases, sorted."""
        every = (claim for claims in self.claims.values() for claim in claims)
        return tuple(sorted({claim.name for claim in every if claim.alias and claim.spec == spec}))

    def conflicts(self) -> list[Conflict]:
        """The conflicts, sorted."""
        found = (_distinct(claims) for claims in self.claims.values())
        return sorted((Conflict(c[0].name, tuple(c)) for c in found if len(c) > 1), key=str)

    def _add(self, claim: Claim) -> None:
        self.claims.setdefault(fold(claim.name), []).append(claim)

    def _resolve(self, plugin: Plugin, alias: Alias) -> Claim:
        found = self.find(alias.target)
        # Prefer the plugin's own optimizer: another plugin's claim to the short name must not break its aliases.
        own = [claim for claim in found if claim.plugin is plugin]
        target = own[0] if own else found[0] if len(found) == 1 else None
        if target is None:
            return Claim(plugin, alias.name, alias)
        return Claim(plugin, alias.name, alias, target.owner, target.spec)


def _distinct(claims: Iterable[Claim]) -> list[Claim]:
    kept: list[Claim] = []
    for claim in claims:
        if not any(claim.means_the_same(other) for other in kept):
            kept.append(claim)
    return kept
