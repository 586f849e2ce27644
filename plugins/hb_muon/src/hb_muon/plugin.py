"""hb_muon's manifest: its optimizers and their other names, as plain data. Importing this module imports no torch."""

from __future__ import annotations

from hbcore.api import Alias, OptimizerSpec, hookimpl

API = (1, 9)

OPTIMIZERS = (
    OptimizerSpec(
        name="Muon",
        target="hb_muon.muon:Muon",
        summary="Momentum, orthogonalized",
        paper="Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/",
        capabilities=frozenset({"matrix"}),
        small_lr=0.02,
    ),
    OptimizerSpec(
        name="MuonAdamW",
        target="hb_muon.muon_adamw:MuonAdamW",
        summary="Muon for hidden matrices, AdamW for embeddings, heads and vectors",
        paper="Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; Loshchilov & Hutter 2019, arXiv:1711.05101",
        capabilities=frozenset({"matrix"}),
        small_lr=0.02,
    ),
    OptimizerSpec(
        name="MuonLaProp",
        target="hb_muon.laprop:MuonLaProp",
        summary="LaProp's update, orthogonalized",
        paper="HeavyBall, https://github.com/HomebrewML/HeavyBall",
        capabilities=frozenset({"matrix"}),
    ),
    OptimizerSpec(
        name="HyperBallAdamW",
        target="hb_muon.hyperball:HyperBallAdamW",
        summary="Adam whose matrices stay on the sphere that they start on",
        paper="Wen et al. 2025, Fantastic Pretraining Optimizers and Where to Find Them 2.1: Hyperball Optimization",
        capabilities=frozenset({"capturable"}),
    ),
    OptimizerSpec(
        name="OrthoLaProp",
        target="hb_muon.orthograd:OrthoLaProp",
        summary="LaProp of the gradient's part across the weights",
        paper="Prieto et al. 2025, arXiv:2501.04697; Ziyin, Wang & Ueda 2020, arXiv:2002.04839",
        capabilities=frozenset({"capturable"}),
    ),
    OptimizerSpec(
        name="LaPropOrtho",
        target="hb_muon.orthograd:LaPropOrtho",
        summary="LaProp's update without its part along the weights",
        paper="Prieto et al. 2025, arXiv:2501.04697; Ziyin, Wang & Ueda 2020, arXiv:2002.04839",
        capabilities=frozenset({"capturable"}),
    ),
    OptimizerSpec(
        name="Scion",
        target="hb_muon.scion:Scion",
        summary="Steps to the boundary of a spectral norm's ball",
        paper="Pethick et al. 2025, arXiv:2502.07529",
        capabilities=frozenset({"matrix"}),
    ),
)
"""The optimizers of the Muon family."""


@hookimpl
def hb_optimizers(api: object) -> tuple[OptimizerSpec, ...]:
    """The optimizers of the Muon family."""
    return OPTIMIZERS


@hookimpl
def hb_aliases(api: object) -> list[Alias]:
    """Names that HeavyBall users know."""
    return [Alias(name="ForeachMuon", target="Muon")]
