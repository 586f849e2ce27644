"""The optimizers that have a page: those of the families in ``plugins/``, whatever else is installed."""

from __future__ import annotations

from typing import Any, NamedTuple

from hbcore import registry
from hbcore.registry import OptimizerInfo

FAMILIES = {"hb_adam": "Adam and SGD", "hb_muon": "Muon", "hb_psgd": "PSGD", "hb_soap": "SOAP"}
"""Plugin -> the title of its family."""


class Entry(NamedTuple):
    """One optimizer.

    Attributes:
        info: what its plugin declares.
        cls: its class.
    """

    info: OptimizerInfo
    cls: type[Any]

    @property
    def name(self) -> str:
        """Its canonical name."""
        return self.info.name


def entries() -> list[Entry]:
    """Every optimizer of a family, by name.

    Raises:
        RegistryError: a family's plugin cannot be loaded.
    """
    infos = [registry.info(name) for name in registry.list_optimizers("*")]
    return [Entry(info, registry.resolve(info.name)) for info in infos if info.plugin in FAMILIES]
