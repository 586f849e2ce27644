"""Finds the installed plugins, loads them, and keeps the outcome: which work, which failed, which are blocked."""

from __future__ import annotations

import importlib
import os
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hbcore.errors import RegistryError
from hbcore.registry.hookspecs import GROUP
from hbcore.registry.loading import Entry, Plugin, PluginFailure, load, one_line
from hbcore.registry.spec import fold

if TYPE_CHECKING:
    from importlib_metadata import EntryPoint

DISABLE_ENV = "HBCORE_DISABLE_PLUGINS"
ALLOW_ENV = "HBCORE_PLUGINS"


@dataclass(frozen=True)
class BlockedPlugin:
    """An installed plugin that was not loaded because it is blocked."""

    name: str
    distribution: str
    version: str
    reason: str


@dataclass(frozen=True)
class Snapshot:
    """The result of one scan. Immutable, so readers need no lock."""

    plugins: tuple[Plugin, ...] = ()
    failures: tuple[PluginFailure, ...] = ()
    blocked: tuple[BlockedPlugin, ...] = ()


def installed(path: list[str] | None = None) -> Iterator[EntryPoint | PluginFailure]:
    """The plugins' entry points on ``path`` (default: ``sys.path``), and a failure for each plugin with unreadable metadata.

    ``importlib_metadata.entry_points()`` would raise at the first unreadable distribution, plugin or not.
    """
    import importlib_metadata  # imported here to keep importing hbcore.registry cheap

    seen: set[str] = set()
    for distribution in importlib_metadata.distributions(**({} if path is None else {"path": path})):
        if GROUP not in _entry_point_text(distribution):
            continue
        name = version = "unknown"
        try:
            name, version = distribution.name or name, distribution.version or version
            if fold(name) in seen:  # shadowed by an earlier entry of sys.path, as for imports
                continue
            seen.add(fold(name))
            yield from distribution.entry_points.select(group=GROUP)
        except Exception as error:
            text = traceback.format_exc()
            yield PluginFailure(name, version, name, "metadata", one_line(error), traceback=text)


class _Readable(Protocol):
    def read_text(self, filename: str) -> str | None: ...


def _entry_point_text(distribution: _Readable) -> str:
    try:
        return distribution.read_text("entry_points.txt") or ""
    except Exception:  # undecodable, so its owner is unknown; most likely it is not a plugin
        return ""


def _listed(variable: str) -> frozenset[str]:
    return frozenset(fold(name.strip()) for name in os.environ.get(variable, "").split(",") if name.strip())


class Discovery:
    """Scans on first use, caches the result, and rescans on request.

    Args:
        source: yields the entry points; tests inject their own.
    """

    def __init__(self, source: Callable[[], Iterable[EntryPoint | PluginFailure]] = installed) -> None:
        self._source = source
        self._lock = threading.RLock()
        self._current: Snapshot | None = None
        self._blocked: set[str] = set()
        self._loading: str | None = None  # the plugin whose manifest is running
        self._kept: dict[tuple[str, str, str, str], Plugin] = {}

    def snapshot(self) -> Snapshot:
        """The latest scan; scans now if there has been none.

        Raises:
            RegistryError: called from a manifest or hook while it is being loaded.
        """
        with self._lock:
            self._refuse_reentry()
            return self._current or self._scan()

    def rescan(self) -> Snapshot:
        """Find new and removed plugins and retry the failed ones; working plugins are kept."""
        with self._lock:
            self._refuse_reentry()
            importlib.invalidate_caches()  # the import system caches directory listings
            return self._scan()

    def refresh(self) -> None:
        """Forget every plugin; the next lookup scans from scratch."""
        with self._lock:
            self._refuse_reentry()
            importlib.invalidate_caches()
            self._kept.clear()
            self._current = None

    def block(self, name: str) -> None:
        """Stop using the plugin, and do not load it."""
        with self._lock:
            self._refuse_reentry()
            self._blocked.add(fold(name))
            self._current = None

    def unblock(self, name: str) -> None:
        """Undo :meth:`block`.

        Raises:
            RegistryError: an environment variable blocks it; code cannot override that.
        """
        with self._lock:
            self._refuse_reentry()
            self._blocked.discard(fold(name))
            self._current = None
            if reason := self.reason_blocked(name):
                raise RegistryError(f"plugin {name!r} stays blocked by {reason}; change the variable instead")

    def _refuse_reentry(self) -> None:
        # While a plugin loads, only the loading thread gets here: the others wait for the lock.
        if self._loading is not None:
            raise RegistryError(
                f"plugin {self._loading!r} used hbcore's registry while it was being loaded; a manifest and its hooks "
                "may only declare data. Look up other optimizers in the target's module"
            )

    def reason_blocked(self, name: str) -> str:
        """What blocks the plugin, a call or an environment variable; empty if nothing does."""
        key = fold(name)
        if key in self._blocked:
            return f"hbcore.block({name!r})"
        if key in _listed(DISABLE_ENV):
            return DISABLE_ENV
        allowed = _listed(ALLOW_ENV)
        return ALLOW_ENV if allowed and key not in allowed else ""

    def _scan(self) -> Snapshot:
        plugins: dict[str, Plugin] = {}
        failures: list[PluginFailure] = []
        blocked: list[BlockedPlugin] = []
        entries = []
        for found in self._source():
            if isinstance(found, PluginFailure):
                failures.append(found)
            else:
                entries.append(Entry(found))
        # Built-in families first: no other distribution can take the name of one.
        for entry in sorted(entries, key=lambda e: (not e.built_in, e.distribution, e.name)):
            if reason := self.reason_blocked(entry.name):
                blocked.append(BlockedPlugin(entry.name, entry.distribution, entry.version, reason))
                continue
            if owner := plugins.get(fold(entry.name)):
                failures.append(entry.failure("register", f"the plugin name {entry.name!r} is taken by {owner}"))
                continue
            result = self._kept.get(entry.identity) or self._load(entry)
            if isinstance(result, Plugin):
                self._kept[entry.identity] = plugins[fold(entry.name)] = result
            else:
                failures.append(result)
        self._current = Snapshot(tuple(plugins.values()), tuple(failures), tuple(blocked))
        return self._current

    def _load(self, entry: Entry) -> Plugin | PluginFailure:
        self._loading = entry.name
        try:
            return load(entry)
        finally:
            self._loading = None
