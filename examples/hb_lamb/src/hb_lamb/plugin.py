"""The manifest: what the package provides, as plain data. Importing this module imports no torch."""

from __future__ import annotations

from hbcore.api import OptimizerSpec, hookimpl

API = (1, 5)

OPTIMIZERS = (
    OptimizerSpec(
        name="LAMB",
        target="hb_lamb.lamb:LAMB",
        summary="Adam whose steps are as long as the parameter, for large batches",
        paper="You et al. 2019, arXiv:1904.00962",
        capabilities=frozenset({"capturable"}),
    ),
)


@hookimpl
def hb_optimizers(api: object) -> tuple[OptimizerSpec, ...]:
    """The one optimizer."""
    return OPTIMIZERS
