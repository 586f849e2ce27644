"""The manifest: what the package provides, as plain data. Importing this module imports no torch."""

from __future__ import annotations

from hbcore.api import OptimizerSpec, hookimpl

API = (1, 5)

OPTIMIZERS = (
    OptimizerSpec(
        name="Lookahead",
        target="hb_lookahead.lookahead:Lookahead",
        summary="Any optimizer, followed at a distance by slow weights that it returns to",
        paper="Zhang et al. 2019, arXiv:1907.08610",
        capabilities=frozenset({"capturable"}),
    ),
)


@hookimpl
def hb_optimizers(api: object) -> tuple[OptimizerSpec, ...]:
    """The one optimizer."""
    return OPTIMIZERS
