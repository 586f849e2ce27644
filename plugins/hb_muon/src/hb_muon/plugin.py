"""What hb_muon offers to hbcore, as plain data. Importing this module imports no torch."""

from __future__ import annotations

from hbcore.api import Alias, OptimizerSpec, hookimpl

API = (1, 0)


@hookimpl
def hb_optimizers(api: object) -> list[OptimizerSpec]:
    """The optimizers of the Muon family."""
    return [
        OptimizerSpec(
            name="Muon",
            target="hb_muon.muon:Muon",
            summary="Momentum, orthogonalized",
            paper="Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/",
            capabilities=frozenset({"matrix"}),
        ),
    ]


@hookimpl
def hb_aliases(api: object) -> list[Alias]:
    """Names that HeavyBall users know."""
    return [Alias(name="ForeachMuon", target="Muon")]
