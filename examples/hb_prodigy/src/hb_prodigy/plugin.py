"""The manifest: what the package provides, as plain data. Importing this module imports no torch."""

from __future__ import annotations

from hbcore.api import OptimizerSpec, hookimpl

API = (1, 5)

OPTIMIZERS = (
    OptimizerSpec(
        name="Prodigy",
        target="hb_prodigy.prodigy:Prodigy",
        summary="Adam that estimates its own learning rate",
        paper="Mishchenko and Defazio 2023, arXiv:2306.06101",
        capabilities=frozenset({"capturable"}),
        small_lr=1.0,
    ),
)


@hookimpl
def hb_optimizers(api: object) -> tuple[OptimizerSpec, ...]:
    """The one optimizer."""
    return OPTIMIZERS
