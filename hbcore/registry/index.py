"""Which plugin claims which name, resolved once per scan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hbcore.registry import blocks
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

    @property
    def rank(self) -> tuple[bool, bool]:
        """The lowest rank gets a name: hbcore's own families come first, and a canonical name before an alias."""
        return not self.plugin.built_in, self.alias is not None

    def means_the_same(self, other: Claim) -> bool:
        """Whether both claims lead to the same class, so that they do not conflict."""
        if self.spec is None or other.spec is None:
            return self.alias == other.alias
        preset, other_preset = (dict(claim.alias.preset) if claim.alias else {} for claim in (self, other))
        return self.spec.target == other.spec.target and preset == other_preset


@dataclass(frozen=True)
class Conflict:
    """A short name that several plugins of equal rank claim for different things; the qualified names still work.

    Attributes:
        name: the name.
        owners: each plugin with its qualified name.
        kind: ``"name"`` of an optimizer or ``"codec name"``.
    """

    name: str
    owners: tuple[tuple[Plugin, str], ...]
    kind: str = "name"

    def __str__(self) -> str:
        owners = " and ".join(f"{plugin} as {qualified!r}" for plugin, qualified in self.owners)
        return f"the {self.kind} {self.name!r} is claimed by {owners}"

    @classmethod
    def of_claims(cls, name: str, claims: Iterable[Claim]) -> Conflict:
        """Between optimizers or aliases."""
        return cls(name, tuple((claim.plugin, claim.qualified) for claim in claims))

    @classmethod
    def of_codecs(cls, name: str, claims: Iterable[tuple[Plugin, CodecSpec]]) -> Conflict:
        """Between codecs."""
        return cls(name, tuple((owner, f"{owner.name}:{codec.name}") for owner, codec in claims), "codec name")


@dataclass(frozen=True)
class Shadow:
    """A claim that lost to one of a better rank: the short name means ``winner``.

    Attributes:
        name: the short name, as the winner spells it.
        winner: who gets it, and under which qualified name.
        loser: who else claims it.
        qualified: the loser's name that still works.
    """

    name: str
    winner: str
    loser: str
    qualified: str

    def __str__(self) -> str:
        return f"the name {self.name!r} means {self.winner}; {self.loser} claims it too, and is found as {self.qualified!r}"


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
        """The distinct claims to ``"Name"`` or ``"plugin:Name"``, of the best rank: none, one, or a conflict."""
        plugin, key = split(name)
        return _best(_distinct(c for c in self.claims.get(key, ()) if not plugin or fold(c.plugin.name) == plugin))

    def find_codec(self, name: str) -> list[tuple[Plugin, CodecSpec]]:
        """The distinct codecs named ``"codec"`` or ``"plugin:codec"``, of the best rank."""
        plugin, _, short = name.rpartition(":")
        claims = self._codec_claims().get(short.casefold(), [])
        found = [(owner, codec) for owner, codec in claims if fold(plugin) in ("", fold(owner.name))]
        return [(owner, codec) for owner, codec in found if owner.built_in == found[0][0].built_in]

    def names(self, aliases: bool) -> Iterator[str]:
        """Every name that can be looked up; names that mean something else without their plugin in the qualified form."""
        for claims in self.claims.values():
            distinct = _distinct(claims)
            best = _best(distinct)
            for claim in distinct:
                if claim.spec is not None and (aliases or claim.alias is None):
                    yield claim.name if best == [claim] else claim.qualified

    def aliases_of(self, spec: OptimizerSpec) -> tuple[str, ...]:
        """The optimizer's other names, sorted."""
        found = ((_best(_distinct(claims)), claims) for claims in self.claims.values())
        return tuple(
            sorted(
                {
                    claim.name if any(claim.means_the_same(winner) for winner in best) else claim.qualified
                    for best, claims in found
                    for claim in claims
                    if claim.alias and claim.spec == spec
                }
            )
        )

    def conflicts(self) -> list[Conflict]:
        """The conflicts between optimizers and between codecs, sorted."""
        claims = (_best(_distinct(claims)) for claims in self.claims.values())
        codecs = (self.find_codec(claims[0][1].name) for claims in self._codec_claims().values())
        found = [Conflict.of_claims(c[0].name, c) for c in claims if len(c) > 1]
        return sorted(found + [Conflict.of_codecs(c[0][1].name, c) for c in codecs if len(c) > 1], key=str)

    def dangling(self, plugin: Plugin) -> list[tuple[Alias, str]]:
        """The plugin's aliases that lead to no optimizer, each with the reason."""
        claims = (claim for claims in self.claims.values() for claim in claims if claim.plugin is plugin)
        return [(c.alias, self._why_dangling(c.alias)) for c in claims if c.alias and c.spec is None]

    def _why_dangling(self, alias: Alias) -> str:
        found = self.find(alias.target)
        if not found:
            return f"no installed plugin provides {alias.target!r}"
        if len(found) > 1:
            return f"{Conflict.of_claims(alias.target, found)}; its target should be one of these"
        return f"{alias.target!r} is itself an alias"

    def shadows(self, name: str | None = None) -> list[Shadow]:
        """The claims that lost, to one short name (none for a qualified one) or to all."""
        keys = self.claims if name is None else [fold(name)]
        return [shadow for key in keys for shadow in self._shadows_of(self.claims.get(key, []))]

    def codec_shadows(self, name: str | None = None) -> list[Shadow]:
        """:meth:`shadows`, of codecs."""
        found = self._codec_claims()
        every = found.values() if name is None else [found.get(name.casefold(), [])]
        return [
            Shadow(first.name, f"'{winner.name}:{first.name}' of {winner}", str(owner), f"{owner.name}:{codec.name}")
            for claims in every
            for winner, first in claims[:1]
            for owner, codec in claims
            if owner.built_in != winner.built_in
        ]

    def _shadows_of(self, claims: list[Claim]) -> Iterator[Shadow]:
        distinct = _distinct(claims)
        best = _best(distinct)
        if core := blocks.find(best[0].name if best else ""):
            yield from (Shadow(core.name, "the core's own class", str(c.plugin), c.qualified) for c in distinct)
        elif len(best) == 1:
            winner = f"{best[0].qualified!r} of {best[0].plugin}"
            yield from (Shadow(best[0].name, winner, str(c.plugin), c.qualified) for c in distinct if c is not best[0])

    def _codec_claims(self) -> dict[str, list[tuple[Plugin, CodecSpec]]]:
        """Folded codec name -> its claims with distinct targets, built-in ones first."""
        found: dict[str, dict[str, tuple[Plugin, CodecSpec]]] = {}
        for owner in sorted(self.snapshot.plugins, key=lambda plugin: not plugin.built_in):
            for codec in owner.codecs:
                found.setdefault(codec.name.casefold(), {}).setdefault(codec.target, (owner, codec))
        return {name: list(claims.values()) for name, claims in found.items()}

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
    """One claim of each meaning, the best-ranked first."""
    kept: list[Claim] = []
    for claim in sorted(claims, key=lambda claim: claim.rank):
        if not any(claim.means_the_same(other) for other in kept):
            kept.append(claim)
    return kept


def _best(distinct: list[Claim]) -> list[Claim]:
    """Those that share the best rank."""
    return [claim for claim in distinct if claim.rank == distinct[0].rank]
