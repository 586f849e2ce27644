"""hb_soap's manifest: its optimizer and its other names, as plain data. Importing this module imports no torch."""

from __future__ import annotations

from hbcore.api import Alias, OptimizerSpec, hookimpl

API = (1, 4)


OPTIMIZERS = (
    OptimizerSpec(
        name="SOAP",
        target="hb_soap.soap:SOAP",
        summary="Adam in the eigenbasis of Shampoo's preconditioner",
        paper="Vyas et al. 2024, arXiv:2409.11321",
        capabilities=frozenset({"matrix", "primes"}),
        small_lr=0.005,
    ),
)
"""The optimizers of the SOAP family."""


@hookimpl
def hb_optimizers(api: object) -> tuple[OptimizerSpec, ...]:
    """The optimizers of the SOAP family."""
    return OPTIMIZERS


@hookimpl
def hb_aliases(api: object) -> list[Alias]:
    """Names that HeavyBall users know."""
    scheduled = ("PrecondScheduleForeachSOAP", "PrecondScheduleSOAP")
    return [
        Alias(name="ForeachSOAP", target="SOAP"),
        *(Alias(name=name, target="SOAP", preset={"use_precond_schedule": True}) for name in scheduled),
    ]
