"""Names that the core itself provides: building blocks that belong to no plugin."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from hbcore.registry.spec import fold, split


@dataclass(frozen=True)
class CoreBlock:
    """A class of the core.

    Attributes:
        name: its current name.
        module: the module that defines it.
        asked: the name that was requested, possibly an old one.
    """

    name: str
    module: str
    asked: str

    @property
    def message(self) -> str:
        """The warning for an old name; empty for the current one."""
        return "" if fold(self.asked) == fold(self.name) else f"{self.asked} is now {self.name}"

    def load(self) -> type[Any]:
        """Import and return the class."""
        cls: type[Any] = getattr(import_module(self.module), self.name)
        return cls


_HOME = {
    "SplitOpt": ("SplitOpt", "hbcore.wrappers.split"),
    "SplitOptimizer": ("SplitOpt", "hbcore.wrappers.split"),
    "Parallel": ("Parallel", "hbcore.rules.parallel"),
    "Branch": ("Parallel", "hbcore.rules.parallel"),
}
NAMES = tuple(dict.fromkeys(name for name, _ in _HOME.values()))
"""The current names."""


def aliases_of(name: str) -> list[str]:
    """The old names of the block with this current name."""
    return sorted(old for old, (current, _) in _HOME.items() if current == name != old)


def find(name: object) -> CoreBlock | None:
    """The block with this current or old name, or None; case, ``-`` and ``_`` are ignored."""
    plugin, key = split(name) if isinstance(name, str) else ("", "")
    for asked, (block, module) in _HOME.items():
        if fold(asked) == key and plugin in ("", "hbcore"):
            return CoreBlock(block, module, asked)
    return None
