"""The manifest: what the package provides, as plain data. Importing this module imports no torch."""

from __future__ import annotations

from hbcore.api import OptimizerSpec, hookimpl

API = (1, 5)

OPTIMIZERS = (
    OptimizerSpec(
        name="NorMuon",
        target="hb_normuon.normuon:NorMuon",
        summary="Muon with a step size for each neuron",
        paper="Li et al. 2025, arXiv:2510.05491",
        capabilities=frozenset({"matrix"}),
    ),
)


@hookimpl
def hb_optimizers(api: object) -> tuple[OptimizerSpec, ...]:
    """The one optimizer."""
    return OPTIMIZERS
