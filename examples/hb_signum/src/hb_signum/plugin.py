"""The manifest: what the package provides, as plain data. Importing this module imports no torch."""

from __future__ import annotations

from hbcore.api import OptimizerSpec, hookimpl

API = (1, 5)

OPTIMIZERS = (
    OptimizerSpec(
        name="Signum",
        target="hb_signum.signum:Signum",
        summary="The sign of the momentum",
        paper="Bernstein et al. 2018, arXiv:1802.04434",
        capabilities=frozenset({"capturable"}),
    ),
)


@hookimpl
def hb_optimizers(api: object) -> tuple[OptimizerSpec, ...]:
    """The one optimizer."""
    return OPTIMIZERS
