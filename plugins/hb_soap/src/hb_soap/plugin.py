"""What hb_soap offers to hbcore, as plain data. Importing this module imports no torch."""

from __future__ import annotations

from hbcore.api import Alias, OptimizerSpec, hookimpl

API = (1, 0)


@hookimpl
def hb_optimizers(api: object) -> list[OptimizerSpec]:
    """The optimizers of the SOAP family."""
    return [
        OptimizerSpec(
            name="SOAP",
            target="hb_soap.soap:SOAP",
            summary="Adam in the eigenbasis of Shampoo's preconditioner",
            paper="Vyas et al. 2024, arXiv:2409.11321",
            capabilities=frozenset({"matrix", "primes"}),
        ),
    ]


@hookimpl
def hb_aliases(api: object) -> list[Alias]:
    """Names that HeavyBall users know."""
    scheduled = ("PrecondScheduleForeachSOAP", "PrecondScheduleSOAP")
    return [
        Alias(name="ForeachSOAP", target="SOAP"),
        *(Alias(name=name, target="SOAP", preset={"use_precond_schedule": True}) for name in scheduled),
    ]
