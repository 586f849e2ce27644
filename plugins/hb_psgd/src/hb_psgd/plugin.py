"""hb_psgd's manifest: its optimizers and their other names, as plain data. Importing this module imports no torch."""

from __future__ import annotations

from typing import Any

from hbcore.api import Alias, OptimizerSpec, hookimpl

API = (1, 7)

PAPER = "Pooladzandi & Li 2024, arXiv:2402.11858; Li 2015, arXiv:1512.04202"


def _spec(name: str, module: str, summary: str, *more: str, small_lr: float = 0.0025) -> OptimizerSpec:
    return OptimizerSpec(
        name=name,
        target=f"hb_psgd.{module}:{name}",
        summary=summary,
        paper=PAPER,
        capabilities=frozenset({"matrix", "random", *more}),
        small_lr=small_lr,
    )


OPTIMIZERS = (
    _spec("PSGDKron", "psgd", "Preconditioned SGD with Kronecker factors that whiten the momentum"),
    _spec("PSGDPRO", "psgd", "PSGDKron without clipping"),
    _spec("QSGD", "psgd", "PSGDPRO that applies the root of its preconditioner"),
    _spec("LATHER", "lather", "Adam in the eigenbasis of PSGD's preconditioner", "primes"),
    _spec("PSGDLRA", "lra_rule", "Preconditioned SGD with one low-rank preconditioner for all parameters of a group", "joint"),
)
"""The optimizers of the PSGD family."""


@hookimpl
def hb_optimizers(api: object) -> tuple[OptimizerSpec, ...]:
    """The optimizers of the PSGD family."""
    return OPTIMIZERS


ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(("ForeachPSGDKron", "ForeachCachedPSGDKron", "CachedPSGDKron"), ("PSGDKron", {})),
    **dict.fromkeys(("ForeachPurePSGD", "PurePSGD"), ("PSGDKron", {"exp_avg_input": False})),
    **dict.fromkeys(
        ("ForeachDelayedPSGD", "DelayedPSGD", "ForeachCachedDelayedPSGDKron", "CachedDelayedPSGDKron"),
        ("PSGDKron", {"delayed": True}),
    ),
    **dict.fromkeys(("ForeachCachedNewtonPSGD", "NewtonPSGDKron"), ("PSGDKron", {"hessian_approx": True})),
    "NewtonHybrid2PSGDKron": ("PSGDKron", {"hessian_approx": True, "hvp_interval": 2}),
    "ForeachPSGDLRA": ("PSGDLRA", {}),
    **dict.fromkeys(("ForeachDelayedPSGDLRA", "DelayedPSGDLRA"), ("PSGDLRA", {"delayed": True})),
    **dict.fromkeys(("ForeachNewtonPSGDLRA", "NewtonPSGDLRA"), ("PSGDLRA", {"hessian_approx": True})),
    "NewtonHybrid2PSGDLRA": ("PSGDLRA", {"hessian_approx": True, "hvp_interval": 2}),
}
"""Names that HeavyBall users know -> the optimizer and its options."""


@hookimpl
def hb_aliases(api: object) -> list[Alias]:
    """Names that HeavyBall users know."""
    return [Alias(name=name, target=target, preset=preset) for name, (target, preset) in ALIASES.items()]
