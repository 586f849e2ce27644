"""Looks up classes by name: aliases, presets, suggestions, and errors that explain what went wrong."""

from __future__ import annotations

import fnmatch
import os
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from hbcore.errors import AmbiguousNameError, PluginError, PluginWarning, UnknownCodecError, UnknownOptimizerError
from hbcore.registry import blocks, hints, notices
from hbcore.registry.discovery import BlockedPlugin, Discovery, installed
from hbcore.registry.hookspecs import DoctorReport
from hbcore.registry.index import Claim, Conflict, Index, Shadow
from hbcore.registry.loading import Plugin, PluginFailure, import_target, one_line
from hbcore.registry.presets import subclass
from hbcore.registry.spec import Alias, CodecSpec, OptimizerInfo, OptimizerSpec, split
from hbcore.warn import warn_at_caller

if TYPE_CHECKING:
    from importlib_metadata import EntryPoint

STRICT_ENV = "HBCORE_STRICT"


class Registry:
    """All installed optimizers by name. hbcore has one instance; tests create their own with injected entry points.

    The first lookup scans. Lookups do not import torch: only :meth:`get`, :meth:`create` and :meth:`load_codec` import a
    target's module.

    Args:
        source: yields the plugins' entry points.
    """

    def __init__(self, source: Callable[[], Iterable[EntryPoint | PluginFailure]] = installed) -> None:
        self._discovery = Discovery(source)
        self._indexed: Index | None = None
        self._warned: set[object] = set()
        self._presets: dict[tuple[type, str], tuple[dict[str, object], type]] = {}
        self._presets_lock = threading.Lock()

    def get(self, name: str) -> type[Any]:
        """The optimizer class with this name. Case, ``-`` and ``_`` are ignored; ``"plugin:Name"`` is never ambiguous.

        Also finds the core's own building blocks, see :mod:`hbcore.registry.blocks`.

        Raises:
            UnknownOptimizerError: no installed plugin provides the name.
            AmbiguousNameError: two plugins claim it.
            PluginError: the plugin that provides it is broken; the cause is chained.
        """
        if block := blocks.find(name):
            if block.message:
                self._warn_once(("hbcore", block.name), block.message, FutureWarning)
            return block.load()
        claim = self._find(name)
        cls = self._class(claim)
        if claim.alias and claim.spec:
            text = notices.alias_text(claim.alias, claim.spec.name)
            self._warn_once((claim.plugin.name, claim.alias.name), text, FutureWarning)
        return cls

    def create(self, name: str, params: Any, *arguments: Any, **options: Any) -> Any:
        """``get(name)(params, ...)``; of a module, ``params`` are its ``named_parameters()``, or ``cls.params_of(module)``.

        Raises:
            RegistryError: see :meth:`get`.
            HbcoreError: the constructor rejects its arguments.
        """
        cls = self.get(name)
        named = getattr(params, "named_parameters", None)  # duck-typed, to avoid importing torch
        if callable(named):
            own = getattr(cls, "params_of", None)
            params = own(params) if callable(own) else list(named())
        return cls(params, *arguments, **options)

    def list_optimizers(self, pattern: str = "*", aliases: bool = False) -> list[str]:
        """The canonical names that match the glob, ignoring case, sorted; optionally with the aliases.

        A name that means something else without its plugin, or nothing, is listed as ``plugin:Name``, so every listed name can
        be looked up.
        """
        glob = pattern.lower()
        return [
            name
            for name in sorted(set(self._ready().names(aliases)))
            if any(fnmatch.fnmatchcase(part.lower(), glob) for part in (name, name.rpartition(":")[2]))
        ]

    def info(self, name: str) -> OptimizerInfo:
        """Spec and origin of an optimizer, or of an alias' target. Does not import torch or warn about aliases.

        Raises:
            UnknownOptimizerError, AmbiguousNameError, PluginError: see :meth:`get`.
        """
        claim = self._find(name)
        owner, spec = self._target(claim)
        aliases = self._index().aliases_of(spec)
        return OptimizerInfo(spec, owner.name, owner.distribution, owner.version, aliases, claim.alias)

    def resolve(self, name: str) -> type[Any]:
        """:meth:`get` without the alias warning, for tools and unpickling: no line of user code chose the alias."""
        return self._class(self._find(name))

    def preset_class(self, name: str) -> type[Any]:
        """The class of an alias with a preset, without the alias warning.

        Raises:
            UnknownOptimizerError: the name is unknown, or has no preset.
            AmbiguousNameError, PluginError: see :meth:`get`.
        """
        claim = self._find(name)
        if not (claim.alias and claim.alias.preset):
            raise UnknownOptimizerError(f"{name!r} has no preset; hbcore.get({name!r}) returns the class itself")
        return self._class(claim)

    def codecs(self) -> list[CodecSpec]:
        """Every installed codec, sorted by name."""
        plugins = self._ready().snapshot.plugins
        return sorted((codec for plugin in plugins for codec in plugin.codecs), key=lambda codec: codec.name)

    def load_codec(self, name: str) -> Any:
        """Import and return the target of ``"codec"`` or ``"plugin:codec"``.

        Raises:
            UnknownCodecError: no installed plugin provides it; for hb_ecc's codecs, the message has the pip command.
            AmbiguousNameError: two plugins provide different codecs with this name.
            PluginError: its plugin is broken.
        """
        owner, codec = self._find_codec(name)
        return import_target(codec.target, owner, f"codec {codec.name!r}")

    def codec_info(self, name: str) -> tuple[CodecSpec, Plugin]:
        """A codec's declaration and the plugin that provides it. Does not import its target.

        Raises:
            UnknownCodecError, AmbiguousNameError, PluginError: see :meth:`load_codec`.
        """
        owner, codec = self._find_codec(name)
        return codec, owner

    def _find_codec(self, name: str) -> tuple[Plugin, CodecSpec]:
        if not isinstance(name, str):
            raise UnknownCodecError(f"a codec's name must be a string such as 'bf16+8'; got {name!r}")
        stale = self._indexed
        index = self._ready()
        found = index.find_codec(name)
        if not found and index is stale:
            index = self._ready(rescan=True)
            found = index.find_codec(name)
        if not found:
            raise notices.unknown_codec(index, name)
        if len(found) > 1:
            raise AmbiguousNameError(f"{Conflict.of_codecs(name, found)}; use a qualified name")
        self._warn_of(index.codec_shadows(name))
        return found[0]

    def migrations(self) -> list[object]:
        """The migrations of all plugins. A hook that raises is skipped, with a PluginWarning."""
        found: list[object] = []
        for plugin in self._ready().snapshot.plugins:
            try:
                found.extend(plugin.migrations())
            except Exception as error:
                text = f"hb_migrations of plugin {plugin} failed: {one_line(error)}; its migrations are unavailable"
                self._warn_once((plugin.name, "migrations"), text, PluginWarning)
        return found

    def examine(self, plugin: Plugin) -> DoctorReport:
        """Run one plugin's ``hb_doctor``, and check its aliases; an exception becomes a problem in the report."""
        report = DoctorReport()
        for alias, reason in self.dangling(plugin):
            known = hints.home(split(alias.target)[1])
            absent = known is not None and known.exact and known.plugin not in {p.name for p in self.plugins()}
            (report.note if absent else report.problem)(f"its alias {alias.name!r} leads nowhere: {reason}")
        try:
            plugin.call("hb_doctor", report=report)
        except Exception as error:
            report.problem(f"its hb_doctor hook raised {error!r}")
        return report

    def dangling(self, plugin: Plugin) -> list[tuple[Alias, str]]:
        """The plugin's aliases that lead to no optimizer, each with the reason."""
        return self._index().dangling(plugin)

    def plugins(self) -> tuple[Plugin, ...]:
        """The working plugins. Like the next three methods, this neither warns nor raises about broken ones."""
        return self._index().snapshot.plugins

    def failures(self) -> tuple[PluginFailure, ...]:
        """The disabled plugins, and why they failed."""
        return self._index().snapshot.failures

    def blocked(self) -> tuple[BlockedPlugin, ...]:
        """The installed plugins that are blocked."""
        return self._index().snapshot.blocked

    def conflicts(self) -> list[Conflict]:
        """The short names, of optimizers and of codecs, that are errors because several plugins claim them."""
        return self._index().conflicts()

    def shadows(self) -> list[Shadow]:
        """The claims to short names that lost: to hbcore's own families, or an alias to a canonical name."""
        index = self._index()
        return [*index.shadows(), *index.codec_shadows()]

    def block(self, name: str) -> None:
        """Block a plugin, loaded or not, until :meth:`unblock`. It need not be installed."""
        self._discovery.block(name)

    def unblock(self, name: str) -> None:
        """Undo :meth:`block`.

        Raises:
            RegistryError: an environment variable blocks the plugin.
        """
        self._discovery.unblock(name)

    def reason_blocked(self, name: str) -> str:
        """What blocks the plugin, a call or an environment variable; empty if nothing does. Does not scan."""
        return self._discovery.reason_blocked(name)

    def refresh(self) -> None:
        """Clear the cache; the next lookup scans again and rereads the environment variables."""
        self._discovery.refresh()

    def _index(self, rescan: bool = False) -> Index:
        snapshot = self._discovery.rescan() if rescan else self._discovery.snapshot()
        index = self._indexed
        if index is None or index.snapshot is not snapshot:
            self._indexed = index = Index(snapshot)
        return index

    def _ready(self, rescan: bool = False) -> Index:
        """The index, after one warning for each failure; with ``HBCORE_STRICT=1`` the first failure raises instead."""
        index = self._index(rescan)
        for failure in index.snapshot.failures:
            text = notices.failure_text(failure)
            if os.environ.get(STRICT_ENV, "") not in ("", "0"):
                remedy = f"Repair or uninstall it, or unset {STRICT_ENV}"
                raise PluginError(f"{text}. {remedy}") from notices.cause_of(failure)
            more = f"'hbcore doctor' shows the traceback; HBCORE_DISABLE_PLUGINS={failure.entry} silences this"
            self._warn_once(failure, f"{text}. {more}", PluginWarning)
        return index

    def _warn_once(self, key: object, message: str, category: type[Warning]) -> None:
        if key not in self._warned:
            warn_at_caller(message, category)
            self._warned.add(key)  # after the warning: if a filter turns it into an error, the next call raises again

    def _warn_of(self, shadows: Iterable[Shadow]) -> None:
        for shadow in shadows:
            self._warn_once(shadow, str(shadow), PluginWarning)

    def _find(self, name: str) -> Claim:
        if not isinstance(name, str):
            raise UnknownOptimizerError(f"an optimizer's name must be a string such as 'AdamW'; got {name!r}")
        stale = self._indexed
        index = self._ready()
        claims = index.find(name)
        if not claims and index is stale:  # something may have been installed or repaired since that scan
            index = self._ready(rescan=True)
            claims = index.find(name)
        if not claims:
            raise notices.unknown_optimizer(index, name)
        if len(claims) > 1:
            raise AmbiguousNameError(f"{Conflict.of_claims(name, claims)}; use a qualified name")
        self._warn_of(index.shadows(name))
        return claims[0]

    def _target(self, claim: Claim) -> tuple[Plugin, OptimizerSpec]:
        """The plugin and spec of the optimizer that a claim leads to."""
        if claim.owner is not None and claim.spec is not None:
            return claim.owner, claim.spec
        # Only an alias can be unresolved: its target is missing, ambiguous, or itself an alias.
        target = claim.alias.target if claim.alias else claim.name
        found = self._find(target)
        if found.owner is None or found.spec is None or found.alias is not None:
            raise PluginError(f"plugin {claim.plugin}: {claim.name!r} is an alias of {target!r}, which is itself an alias")
        return found.owner, found.spec

    def _class(self, claim: Claim) -> type[Any]:
        owner, spec = self._target(claim)
        base = import_target(spec.target, owner, f"optimizer {spec.name!r}")
        if not isinstance(base, type):
            raise PluginError(f"plugin {owner}: the target {spec.target!r} must be a class; it is {base!r}")
        if not (claim.alias and claim.alias.preset):
            return base
        key, preset = (base, claim.alias.name), dict(claim.alias.preset)
        with self._presets_lock:
            kept, made = self._presets.get(key, (None, base))
            if kept != preset:
                try:
                    made = subclass(base, claim.alias.name, preset)
                except (TypeError, ValueError) as error:
                    raise PluginError(f"alias {claim.alias.name!r} of plugin {claim.plugin}: {error}") from error
                self._presets[key] = (preset, made)
        return made
