"""Loads one plugin's manifest and reads its declarations; any failure disables only that plugin.

Every plugin has its own plugin manager: with a shared one, a hook that raises would abort the call for all plugins. For the
same reason pluggy's entry-point loader is not used, which stops at the first plugin that fails to import.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

import pluggy

from hbcore.errors import PluginError, RegistryError
from hbcore.registry import hookspecs
from hbcore.registry.hookspecs import API_VERSION, HOOK_NAMES, PROJECT, Api
from hbcore.registry.spec import Alias, CodecSpec, OptimizerSpec, fold, split

if TYPE_CHECKING:
    from importlib_metadata import EntryPoint

Phase = Literal["metadata", "import", "api", "register", "hooks"]


BUILT_IN = frozenset({"hb_adam", "hb_muon", "hb_psgd", "hb_soap", "hb_ecc"})
"""The families of hbcore's repository, each in the distribution of its name."""


def built_in(plugin: str, distribution: str) -> bool:
    """Whether this plugin of this distribution is one of :data:`BUILT_IN`."""
    return plugin in BUILT_IN and fold(distribution) == fold(plugin)


@dataclass(frozen=True)
class PluginFailure:
    """Why a plugin is disabled. Text only: a stored exception would keep the frames of its traceback alive.

    Attributes:
        distribution, version, entry: the plugin's origin; ``entry`` is its name.
        phase: the phase that failed.
        cause: one line, ``"ModuleNotFoundError: No module named 'x'"``.
        location: the entry point's value and the folder of its distribution.
        traceback: the full text; empty if hbcore itself rejected the plugin.
        provides: the optimizers that it declared before it failed.
    """

    distribution: str
    version: str
    entry: str
    phase: Phase
    cause: str
    location: str = field(default="unknown", repr=False, compare=False)
    traceback: str = field(default="", repr=False, compare=False)
    provides: tuple[str, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Plugin:
    """A plugin whose manifest and declarations have been loaded."""

    name: str
    distribution: str
    version: str
    location: str
    optimizers: tuple[OptimizerSpec, ...]
    aliases: tuple[Alias, ...]
    codecs: tuple[CodecSpec, ...]
    manager: pluggy.PluginManager = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})"

    @property
    def built_in(self) -> bool:
        """Whether it is one of the families that hbcore's repository holds."""
        return built_in(self.name, self.distribution)

    def migrations(self) -> tuple[Any, ...]:
        """What its ``hb_migrations`` returns.

        Raises:
            RegistryError: it returned None, or something that is not a list.
            Exception: whatever the hook itself raises.
        """
        return _collect(self.manager, "hb_migrations", object, Api(API_VERSION, self.name))

    def call(self, hook: str, **arguments: object) -> list[Any]:
        """Call one hook of this plugin only. Exceptions of the implementation propagate."""
        results: list[Any] = getattr(self.manager.hook, hook)(**arguments)
        return results


class _Refusal(RegistryError):
    """hbcore itself rejects a plugin; the traceback would carry no information."""


def load(entry: Entry) -> Plugin | PluginFailure:
    """The plugin behind an entry point, or why it failed. Exceptions of the plugin never propagate."""
    before = set(sys.modules)
    loader = _Loader(entry)
    try:
        return loader.load()
    except (Exception, SystemExit) as error:  # a module may call sys.exit(); Ctrl-C still propagates
        _forget_modules(entry.package, before)
        text = "" if isinstance(error, _Refusal) else traceback.format_exc()
        return entry.failure(loader.phase, one_line(error), text, loader.provides)


def import_target(target: str, owner: Plugin, what: str) -> Any:
    """Import ``"module:attribute"``.

    Raises:
        PluginError: the import failed; the cause is chained. Other optimizers of the plugin may still work.
    """
    module, _, attribute = target.partition(":")
    known = module in sys.modules
    try:
        return reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (Exception, SystemExit) as error:
        # Leave nothing stale behind: the plugin may be repaired before the next attempt.
        importlib.invalidate_caches()
        if not known:
            sys.modules.pop(module, None)
        raise PluginError(f"{what} of plugin {owner} does not load from {target!r}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The error on one line; hbcore's own refusals without the exception type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, _Refusal) else f"{type(error).__name__}: {text}"


def _forget_modules(package: str, before: set[str]) -> None:
    """Remove the modules of a failed package, so that the next attempt reads the repaired files."""
    for name in set(sys.modules) - before:
        if name == package or name.startswith(package + "."):
            del sys.modules[name]


class Entry:
    """An entry point, and its distribution's name and version, which an injected entry point may lack."""

    def __init__(self, point: EntryPoint) -> None:
        self.point = point
        self.name = point.name
        self.distribution: str = getattr(point.dist, "name", None) or "unknown"
        self.version: str = getattr(point.dist, "version", None) or "unknown"
        self.package = point.value.partition(":")[0].partition(".")[0].strip()
        folder = point.dist.locate_file("") if point.dist is not None else "an unknown folder"
        self.location = f"{point.value} in {folder}"
        self.built_in = built_in(self.name, self.distribution)
        self.identity = (self.distribution, self.version, point.name, point.value)

    def failure(self, phase: Phase, cause: str, text: str = "", provides: tuple[str, ...] = ()) -> PluginFailure:
        origin = (self.distribution, self.version, self.name)
        return PluginFailure(*origin, phase, cause, self.location, text, provides)


class _Loader:
    """Turns an entry point into a :class:`Plugin`; ``phase`` and ``provides`` record the progress."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.phase: Phase = "import"
        self.provides: tuple[str, ...] = ()

    def load(self) -> Plugin:
        """Load the plugin. Raises the plugin's own exceptions, and :class:`RegistryError` if hbcore rejects it."""
        entry = self.entry
        manifest = entry.point.load()
        self.phase = "api"
        _negotiate(getattr(manifest, "API", None))
        self.phase = "register"
        manager = _register(manifest, entry.name)
        self.phase = "hooks"
        api = Api(API_VERSION, entry.name)
        optimizers = _collect(manager, "hb_optimizers", OptimizerSpec, api)
        self.provides = tuple(spec.name for spec in optimizers)
        aliases = _collect(manager, "hb_aliases", Alias, api)
        codecs = _collect(manager, "hb_codecs", CodecSpec, api)
        _check_names(optimizers, aliases)
        location = str(getattr(manifest, "__file__", None) or "unknown")
        return Plugin(entry.name, entry.distribution, entry.version, location, optimizers, aliases, codecs, manager)


def _negotiate(required: object) -> None:
    if not (isinstance(required, tuple) and len(required) == 2 and all(type(part) is int for part in required)):
        raise _Refusal(f"its manifest must declare API = {API_VERSION}, a pair of integers; found {required!r}")
    if required[0] != API_VERSION[0] or required[1] > API_VERSION[1]:
        ours, theirs = ".".join(map(str, API_VERSION)), ".".join(map(str, required))
        remedy = "upgrade hbcore" if required > API_VERSION else "upgrade the plugin"
        raise _Refusal(f"it needs plugin API {theirs}, but this hbcore has {ours}; {remedy}")


def _register(manifest: Any, name: str) -> pluggy.PluginManager:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(manifest, name)
    manager.check_pending()  # rejects unknown hooks: misspelled, or of a newer API
    marked = {caller.name for caller in manager.get_hookcallers(manifest) or ()}
    for hook in HOOK_NAMES:
        if hook not in marked and callable(getattr(manifest, hook, None)):
            raise _Refusal(f"its function {hook} lacks the @hookimpl decorator from hbcore.api and would never be called")
    return manager


def _collect(manager: pluggy.PluginManager, hook: str, kind: type[Any], api: Api) -> tuple[Any, ...]:
    items: list[Any] = []
    listed = f"a list of {'migrations' if kind is object else kind.__name__}"
    caller = getattr(manager.hook, hook)
    results = caller(api=api)
    if len(results) < len(caller.get_hookimpls()):  # pluggy leaves out None
        raise _Refusal(f"{hook} must return {listed}; it returned None. Is a 'return' missing?")
    for result in results:
        if not isinstance(result, Iterable) or (kind is not object and isinstance(result, kind)):
            raise _Refusal(f"{hook} must return {listed}; it returned {result!r}")
        items.extend(result)
    for item in items:
        if not isinstance(item, kind):
            raise _Refusal(f"{hook} must return only {kind.__name__} objects; found {item!r}")
    return tuple(items)


def _check_names(optimizers: tuple[OptimizerSpec, ...], aliases: tuple[Alias, ...]) -> None:
    """A name must have a single meaning within a plugin, because ``plugin:Name`` could not distinguish two."""
    meanings: dict[str, tuple[str, object]] = {}
    claims: list[tuple[str, tuple[str, object]]] = [(spec.name, (fold(spec.name), {})) for spec in optimizers]
    claims += [(alias.name, (split(alias.target)[1], dict(alias.preset))) for alias in aliases]
    for name, meaning in claims:
        if meanings.setdefault(fold(name), meaning) != meaning:
            raise _Refusal(f"it gives the name {name!r} two meanings (case, '-' and '_' are ignored); rename one")
    targets: dict[str, str] = {}
    for spec in optimizers:
        if targets.setdefault(fold(spec.name), spec.target) != spec.target:
            both = f"{targets[fold(spec.name)]} and {spec.target}"
            raise _Refusal(f"it declares {spec.name!r} twice, with the targets {both}")
