"""What pytest's options ask for: plugins, optimizers, a level. Found and checked without importing torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hbcore import registry
from hbcore.errors import RegistryError
from hbcore.registry.loading import one_line
from hbcore.registry.spec import fold
from hbcore.testing import levels

if TYPE_CHECKING:
    from hbcore.registry import Plugin
    from hbcore.testing.results import Case


@dataclass(frozen=True)
class Selection:
    """The values of pytest's options, as given.

    Attributes:
        plugins, optimizers: names.
        level, ranks: see :func:`hbcore.testing.run_checks`.
    """

    plugins: tuple[str, ...] = ()
    optimizers: tuple[str, ...] = ()
    level: str | None = None
    ranks: int | None = None

    def validate(self) -> None:
        """Look everything up.

        Raises:
            RegistryError: a name is unknown, a plugin is broken or blocked, or it has nothing to check.
            ValueError: there is no such level, or ``ranks`` is less than 1.
        """
        levels.names_of(self.level)
        if self.ranks is not None and self.ranks < 1:
            raise ValueError(f"--hbcore-ranks {self.ranks} is no number of processes; use 2.")
        for name in self.optimizers:
            registry.info(name)
        for name in self.plugins:
            found = plugin(name)
            if not found.optimizers and not found.codecs:
                raise RegistryError(f"plugin {found} declares neither optimizers nor codecs, so there is nothing to check.")

    def cases(self) -> list[Case | Broken]:
        """The checks of the optimizers, and of everything that the plugins declare."""
        from hbcore.testing.codec_runner import codec_cases
        from hbcore.testing.runner import cases

        found: list[Case | Broken] = []
        for name in self.optimizers:
            found += cases(name, ranks=self.ranks, level=self.level)
        for one in map(plugin, self.plugins):
            for spec in one.optimizers:
                found += _guarded(f"{one.name}:{spec.name}", lambda name: cases(name, ranks=self.ranks, level=self.level))
            for codec in one.codecs:
                found += _guarded(f"{one.name}:{codec.name}", lambda name: codec_cases(name, level=self.level))
        return found


@dataclass(frozen=True)
class Broken:
    """What a plugin declares and cannot be tested, because it cannot be imported or made; a call fails.

    Attributes:
        name: ``"hb_lion:Lion"``.
        cause: why.
    """

    name: str
    cause: str

    def __str__(self) -> str:
        return f"{self.name}-loads"

    def __call__(self) -> None:
        """Fail with the cause."""
        raise AssertionError(f"expected {self.name} to load, found {self.cause}")


def plugin(name: str) -> Plugin:
    """The working plugin of that name; case, ``-`` and ``_`` are ignored.

    Raises:
        RegistryError: there is none, or it is broken or blocked.
    """
    for found in registry.plugins():
        if fold(found.name) == fold(name):
            return found
    for failure in registry.failures():
        if fold(failure.entry) == fold(name):
            raise RegistryError(
                f"plugin {failure.entry} ({failure.distribution} {failure.version}) is broken: {failure.cause}; "
                "`hbcore doctor` shows the traceback."
            )
    for blocked in registry.blocked():
        if fold(blocked.name) == fold(name):
            raise RegistryError(f"plugin {blocked.name} ({blocked.distribution} {blocked.version}) is {blocked.reason}.")
    raise RegistryError(f"no plugin is named {name!r}. {_alike(name, (p.name for p in registry.plugins()))}")


def _alike(name: str, known: Iterable[str]) -> str:
    names = {fold(other): other for other in known}
    close = [names[key] for key in difflib.get_close_matches(fold(name), names, n=3)]
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Installed are {', '.join(names.values())}." if names else "None is installed."


def _guarded(name: str, make: Any) -> list[Any]:
    try:
        return list(make(name))
    except Exception as error:  # whatever a plugin raises is its own test's failure, and not that of the others'
        return [Broken(name, one_line(error))]
