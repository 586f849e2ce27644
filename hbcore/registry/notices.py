"""Messages to users: hints about names, and warnings that point at the caller's line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from hbcore.errors import PluginError, RegistryError, UnknownOptimizerError
from hbcore.registry.discovery import BlockedPlugin, Snapshot
from hbcore.registry.index import Index
from hbcore.registry.loading import PluginFailure
from hbcore.registry.spec import Alias, fold, split

_FAMILIES = {
    "hb_adam": "SGD Adam AdamW UnscaledAdamW NAdam RMSprop ADOPT AdEMAMix AdamC LaProp SignLaProp SUDSAdamW SFAdamW "
    "MSAMLaProp SAMWrapper Adams Adafactor SparseAdam Lion",
    "hb_muon": "Muon MuonAdamW MuonLaProp HyperBallAdamW OrthoLaProp LaPropOrtho Scion",
    "hb_soap": "SOAP SOAPNAdam SOAPAdEMAMix SOLP SFSOAP KLSOAP KLShampoo",
    "hb_psgd": "PSGD PSGDKron PSGDPRO QSGD LATHER PSGDLRA",
}
# Optimizer -> plugin known to provide it. Only for the pip hint: lookups do not use this table.
KNOWN = {name: plugin for plugin, names in _FAMILIES.items() for name in names.split()}
KNOWN_CODECS = {name: "hb_ecc" for name in ("bf16+8", "bf16+16", "fp16+8", "fp16+16", "int8")}

_FOLDED = {fold(name): plugin for name, plugin in KNOWN.items()}
# HeavyBall's old names prefix the optimizer's name with these words: PaLMForeachSFAdamW, NewtonHybrid2PSGDKron.
_OLD_PREFIXES = re.compile("(?:foreach|cached|delayed|newton|hybrid2|pure|palm|precondschedule|sf(?=palm))*")


def family(key: str) -> str:
    """The plugin known to provide the folded name, or the empty string."""
    return _FOLDED.get(key) or _FOLDED.get(_OLD_PREFIXES.sub("", key, count=1), "")


def pip_line(plugin: str) -> str:
    """The command that installs the plugin."""
    return f"pip install {plugin}"


def suggestions(name: str, known: Iterable[str]) -> str:
    """``"Did you mean AdamW? "`` or the empty string; optimizers that are not installed come with their pip command."""
    spelled = {fold(other): f"{other} ({pip_line(plugin)})" for other, plugin in KNOWN.items()}
    spelled.update((fold(other), other) for other in known)
    close = difflib.get_close_matches(fold(name.rpartition(":")[2]), spelled, n=3, cutoff=0.7)
    return f"Did you mean {', '.join(spelled[key] for key in close)}? " if close else ""


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
    provider = family(key)
    if absent := _unusable(index.snapshot, repr(name), prefix or fold(provider), key):
        return absent
    present = {fold(plugin.name): plugin for plugin in index.snapshot.plugins}
    if prefix in present:
        message = f"Plugin {present[prefix]} provides no optimizer {name.rpartition(':')[2]!r}. "
    else:
        message = f"No installed plugin provides the optimizer {name!r}. "
        wanted = provider or next((known for known in _FAMILIES if fold(known) == prefix), "")
        if wanted and fold(wanted) not in present:
            return UnknownOptimizerError(f"{message}It comes with {wanted}: {pip_line(wanted)}")
        if provider:  # the family is installed: suggesting the name itself would not help
            return UnknownOptimizerError(
                f"{message}It belongs to {wanted}, but {present[fold(wanted)]} does not provide it yet; "
                f"a newer version may: pip install --upgrade {wanted}. 'hbcore list' shows every name"
            )
    message += suggestions(name, index.names(aliases=True))
    if broken := ", ".join(failure.entry for failure in index.snapshot.failures):
        message += f"It may belong to a disabled plugin ({broken}; see 'hbcore doctor'). "
    return UnknownOptimizerError(f"{message}'hbcore list' shows every name")


def unknown_codec(index: Index, name: str) -> RegistryError:
    """The error for an unknown codec."""
    prefix, _, short = name.rpartition(":")
    provider = KNOWN_CODECS.get(short.casefold(), "")
    if absent := _unusable(index.snapshot, f"codec {name!r}", fold(prefix or provider)):
        return absent
    present = {plugin.name for plugin in index.snapshot.plugins}
    hint = f"It comes with {provider}: {pip_line(provider)}. " if provider and provider not in present else ""
    known = ", ".join(sorted(codec.name for plugin in index.snapshot.plugins for codec in plugin.codecs)) or "none"
    return UnknownOptimizerError(f"No installed plugin provides the codec {name!r}. {hint}Installed codecs: {known}")


def _unusable(snapshot: Snapshot, what: str, plugin: str, key: str = "") -> RegistryError | None:
    """The error if a name is missing only because its plugin is broken or blocked."""
    for failure in snapshot.failures:
        if fold(failure.entry) == plugin or (key and key in map(fold, failure.provides)):
            error = PluginError(f"{what} is unavailable: {failure_text(failure)}")
            error.__cause__ = cause_of(failure)
            return error
    for blocked in snapshot.blocked:
        if fold(blocked.name) == plugin:
            return UnknownOptimizerError(f"{what} is unavailable: {blocked_text(blocked)}; unblock it first")
    return None


def alias_text(alias: Alias, canonical: str) -> str:
    """The warning for using an alias."""
    instead = f"{canonical}({alias.preset_text})" if alias.preset else canonical
    ends = f", to be removed in {alias.removed_in}" if alias.removed_in else ""
    text = f"{alias.name} is another name for {instead} (since {alias.since}{ends}); use {instead}"
    return f"{text}. {alias.message}" if alias.message else text
