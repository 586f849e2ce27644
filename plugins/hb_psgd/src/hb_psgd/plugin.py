"""hb_psgd's manifest: its optimizer and its other names, as plain data. Importing this module imports no torch."""

from __future__ import annotations

from hbcore.api import Alias, OptimizerSpec, hookimpl

API = (1, 7)


OPTIMIZERS = (
    OptimizerSpec(
        name="PSGDKron",
        target="hb_psgd.psgd:PSGDKron",
        summary="Preconditioned SGD with Kronecker factors that whiten the momentum",
        paper="Pooladzandi & Li 2024, arXiv:2402.11858; Li 2015, arXiv:1512.04202",
        capabilities=frozenset({"matrix", "random"}),
        small_lr=0.0025,
    ),
    OptimizerSpec(
        name="PSGDLRA",
        target="hb_psgd.lra_rule:PSGDLRA",
        summary="Preconditioned SGD with one low-rank preconditioner for all parameters of a group",
        paper="Pooladzandi & Li 2024, arXiv:2402.11858; Li 2015, arXiv:1512.04202",
        capabilities=frozenset({"matrix", "random", "joint"}),
        small_lr=0.0025,
    ),
)
"""The optimizers of the PSGD family."""


@hookimpl
def hb_optimizers(api: object) -> tuple[OptimizerSpec, ...]:
    """The optimizers of the PSGD family."""
    return OPTIMIZERS


@hookimpl
def hb_aliases(api: object) -> list[Alias]:
    """Names that HeavyBall users know."""
    same = ("ForeachPSGDKron", "ForeachCachedPSGDKron", "CachedPSGDKron")
    pure = ("ForeachPurePSGD", "PurePSGD")
    delayed = ("ForeachDelayedPSGD", "DelayedPSGD", "ForeachCachedDelayedPSGDKron", "CachedDelayedPSGDKron")
    newton = ("ForeachCachedNewtonPSGD", "NewtonPSGDKron")
    return [
        *(Alias(name, "PSGDKron") for name in same),
        *(Alias(name, "PSGDKron", {"exp_avg_input": False}) for name in pure),
        *(Alias(name, "PSGDKron", {"delayed": True}) for name in delayed),
        *(Alias(name, "PSGDKron", {"hessian_approx": True}) for name in newton),
        Alias("NewtonHybrid2PSGDKron", "PSGDKron", {"hessian_approx": True, "hvp_interval": 2}),
        Alias("ForeachPSGDLRA", "PSGDLRA"),
        *(Alias(name, "PSGDLRA", {"delayed": True}) for name in ("ForeachDelayedPSGDLRA", "DelayedPSGDLRA")),
    ]
