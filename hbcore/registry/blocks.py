"""What the core itself has a name for: building blocks that no plugin provides, and that are no optimizers by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from hbcore.registry.spec import fold, split


@dataclass(frozen=True)
class CoreBlock:
    """A class of the core.

    Attributes:
        name: its name.
        module: where it is.
        asked: the name that was asked for.
    """

    name: str
    module: str
    asked: str

    @property
    def message(self) -> str:
        """What to say to somebody who asked for it by an old name; empty for the present one."""
        return "" if fold(self.asked) == fold(self.name) else f"{self.asked} is now {self.name}"

    def load(self) -> type[Any]:
        """Import it."""
        cls: type[Any] = getattr(import_module(self.module), self.name)
        return cls


_HOME = {
    "SplitOpt": ("SplitOpt", "hbcore.wrappers.split"),
    "SplitOptimizer": ("SplitOpt", "hbcore.wrappers.split"),
    "Parallel": ("Parallel", "hbcore.rules.parallel"),
    "Branch": ("Parallel", "hbcore.rules.parallel"),
}


def find(name: object) -> CoreBlock | None:
    """The block of that name, or of that old name; case, ``-`` and ``_`` do not count."""
    plugin, key = split(name) if isinstance(name, str) else ("", "")
    for asked, (block, module) in _HOME.items():
        if fold(asked) == key and plugin in ("", "hbcore"):
            return CoreBlock(block, module, asked)
    return None
