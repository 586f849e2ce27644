"""Messages to users: hints about names, and warnings that point at the caller's line."""

from __future__ import annotations

from collections.abc import Mapping

from hbcore.errors import PluginError, RegistryError, UnknownCodecError, UnknownOptimizerError
from hbcore.registry import blocks, hints
from hbcore.registry.discovery import BlockedPlugin, Snapshot
from hbcore.registry.hints import Home
from hbcore.registry.index import Index
from hbcore.registry.loading import Plugin, PluginFailure
from hbcore.registry.origin import pip_line
from hbcore.registry.spec import Alias, fold, split


def failure_text(failure: PluginFailure) -> str:
    """One sentence about a disabled plugin."""
    return (
        f"plugin {failure.entry!r} (distribution {failure.distribution} {failure.version}) is disabled because "
        f"it failed at {failure.phase}: {failure.cause}"
    )


def blocked_text(blocked: BlockedPlugin) -> str:
    """One sentence about a blocked plugin."""
    origin = f"{blocked.distribution} {blocked.version}"
    return f"plugin {blocked.name!r} ({origin}) is installed but blocked by {blocked.reason}"


def cause_of(failure: PluginFailure) -> RegistryError | None:
    """The stored traceback as an exception to chain, like a worker process' traceback in its parent."""
    return RegistryError(f"\n{failure.traceback}") if failure.traceback else None


def unknown_optimizer(index: Index, name: str) -> RegistryError:
    """The error for an unknown name: its plugin is broken, blocked or not installed, or the name is misspelled."""
    prefix, key = split(name)
    home = hints.home(key)
    provider = prefix or (fold(home.plugin) if home else "")
    if absent := _unusable(index.snapshot, repr(name), provider, UnknownOptimizerError, key):
        return absent
    message = f"{_lacking(index.snapshot, name, 'optimizer')} {_whereabouts(index, name, home)}"
    if broken := ", ".join(failure.entry for failure in index.snapshot.failures):
        message += f"It may belong to a disabled plugin ({broken}; see 'hbcore doctor'). "
    return UnknownOptimizerError(f"{message}'hbcore list' shows every name")


def unknown_codec(index: Index, name: str) -> RegistryError:
    """The error for an unknown codec."""
    prefix, _, short = name.rpartition(":")
    home = hints.codec_home(short)
    if absent := _unusable(index.snapshot, f"codec {name!r}", fold(prefix or (home.plugin if home else "")), UnknownCodecError):
        return absent
    known = sorted(codec.name for plugin in index.snapshot.plugins for codec in plugin.codecs)
    if elsewhere := [f"{owner.name}:{codec.name}" for owner, codec in index.find_codec(short)]:
        hint = f"{short!r} exists as {' and '.join(map(repr, elsewhere))}. "
    else:
        hint = _from_home(_present(index.snapshot), home) or hints.suggestions(short, known)
    message = f"{_lacking(index.snapshot, name, 'codec')} {hint}Installed codecs: {', '.join(known) or 'none'}"
    return UnknownCodecError(message)


def _present(snapshot: Snapshot) -> dict[str, Plugin]:
    return {fold(plugin.name): plugin for plugin in snapshot.plugins}


def _lacking(snapshot: Snapshot, name: str, kind: str) -> str:
    """One sentence: who lacks the name."""
    prefix, _, short = name.rpartition(":")
    present = _present(snapshot)
    if not fold(short):
        return f"{name!r} names no {kind}." if not prefix else f"{name!r} names no {kind}: nothing follows the colon."
    if not prefix:
        return f"No installed plugin provides the {kind} {name!r}."
    if plugin := present.get(fold(prefix)):
        return f"Plugin {plugin} provides no {kind} {short!r}."
    if fold(prefix) == "hbcore":
        return f"hbcore itself provides no {kind} {short!r}, only {' and '.join(blocks.NAMES)}."
    return f"No plugin named {prefix!r} is installed."


def _whereabouts(index: Index, name: str, home: Home | None) -> str:
    """Where to find an optimizer, or what is spelled like it; empty if nothing is known."""
    prefix, _, short = name.rpartition(":")
    present = _present(index.snapshot)
    if prefix and short and (elsewhere := [claim.qualified for claim in index.find(short)]):
        return f"{short!r} exists as {' and '.join(map(repr, elsewhere))}. "
    if short and (codecs := index.find_codec(short)):
        return f"It is a codec of {codecs[0][0]}: pass ecc={codecs[0][1].name!r} to an optimizer. "
    if known := _from_home(present, home):
        return known
    absent = [family for family in hints.FAMILIES if fold(family) not in present]
    if near := hints.suggestions(short, index.names(aliases=True), absent):
        return near
    if family := next((family for family in absent if fold(family) == fold(prefix)), ""):
        return f"{family} has no such optimizer either; it has {', '.join(hints.FAMILIES[family])}. "
    return ""


def _from_home(present: Mapping[str, Plugin], home: Home | None) -> str:
    """How to get a name that one of hbcore's families holds, or the nearest thing to a name of HeavyBall's."""
    if home is None:
        return ""
    installed = present.get(fold(home.plugin))
    if not home.exact:
        of = home.plugin if installed else f"{home.plugin}: {pip_line(home.plugin)}"
        return f"The nearest relative that hbcore has is {home.name} ({of}). "
    if installed is None:
        return f"{home.name} comes with {home.plugin}: {pip_line(home.plugin)}. "
    return f"{home.name} comes with a newer version of {installed}: {pip_line(home.plugin, upgrade=True)}. "


def _unusable(snapshot: Snapshot, what: str, plugin: str, unknown: type[RegistryError], key: str = "") -> RegistryError | None:
    """The error if a name is missing only because its plugin is broken or blocked."""
    for failure in snapshot.failures:
        if fold(failure.entry) == plugin or (key and key in map(fold, failure.provides)):
            error = PluginError(f"{what} is unavailable: {failure_text(failure)}")
            error.__cause__ = cause_of(failure)
            return error
    for blocked in snapshot.blocked:
        if fold(blocked.name) == plugin:
            return unknown(f"{what} is unavailable: {blocked_text(blocked)}; unblock it first")
    return None


def alias_text(alias: Alias, canonical: str) -> str:
    """The warning for using an alias."""
    instead = f"{canonical}({alias.preset_text})" if alias.preset else canonical
    ends = f", to be removed in {alias.removed_in}" if alias.removed_in else ""
    text = f"{alias.name} is another name for {instead} (since {alias.since}{ends}); use {instead}"
    return f"{text}. {alias.message}" if alias.message else text
