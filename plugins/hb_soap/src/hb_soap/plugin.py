"""hb_soap's manifest: its optimizers and their other names, as plain data. Importing this module imports no torch."""

from __future__ import annotations

from typing import Any

from hbcore.api import Alias, OptimizerSpec, hookimpl

API = (1, 7)

SOAP_PAPER = "Vyas et al. 2024, arXiv:2409.11321"
KL_PAPER = "Lin et al. 2025, arXiv:2509.03378"


def _spec(name: str, module: str, summary: str, paper: str = SOAP_PAPER, *more: str, small_lr: float = 0.005) -> OptimizerSpec:
    return OptimizerSpec(
        name=name,
        target=f"hb_soap.{module}:{name}",
        summary=summary,
        paper=paper,
        capabilities=frozenset({"matrix", "primes", *more}),
        small_lr=small_lr,
    )


OPTIMIZERS = (
    _spec("SOAP", "soap", "Adam in the eigenbasis of Shampoo's preconditioner"),
    _spec("SOLP", "soap", "LaProp in SOAP's eigenbasis", f"{SOAP_PAPER}; Ziyin et al. 2020, arXiv:2002.04839"),
    _spec("SOAPNAdam", "soap", "NAdam in SOAP's eigenbasis", f"{SOAP_PAPER}; Dozat 2016"),
    _spec("SOAPAdEMAMix", "soap", "AdEMAMix in SOAP's eigenbasis", f"{SOAP_PAPER}; Pagliardini et al. 2024, arXiv:2409.03137"),
    _spec("SFSOAP", "soap", "Schedule-free SOAP", f"{SOAP_PAPER}; Defazio et al. 2024, arXiv:2405.15682", "modes"),
    _spec("KLSOAP", "kl", "SOAP in the eigenbasis of KL-Shampoo", KL_PAPER),
    _spec("KLShampoo", "kl", "Shampoo with factors that minimise a KL divergence", KL_PAPER, "random"),
    _spec("HeavySOAP", "heavy", "SOAP that rotates second moments", f"{SOAP_PAPER}; HeavyBall 3.2"),
    _spec("HeavySOLP", "heavy", "SOLP that rotates second moments", f"{SOAP_PAPER}; HeavyBall 3.2"),
    _spec("HeavySOAPNAdam", "heavy", "SOAPNAdam that rotates second moments", f"{SOAP_PAPER}; HeavyBall 3.2"),
    _spec("HeavySOAPAdEMAMix", "heavy", "SOAPAdEMAMix that rotates second moments", f"{SOAP_PAPER}; HeavyBall 3.2"),
    _spec("HeavyKLSOAP", "heavy", "KLSOAP that rotates second moments, with pseudo-inverses", f"{KL_PAPER}; HeavyBall 3.2"),
    _spec("HeavyKLShampoo", "heavy", "KLShampoo with pseudo-inverses", f"{KL_PAPER}; HeavyBall 3.2", "random"),
)
"""The optimizers of the SOAP family."""


@hookimpl
def hb_optimizers(api: object) -> tuple[OptimizerSpec, ...]:
    """The optimizers of the SOAP family."""
    return OPTIMIZERS


ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"Foreach{name}": (name, {}) for name in ("SOAP", "SOLP", "SOAPNAdam", "SOAPAdEMAMix")},
    **dict.fromkeys(("PaLMForeachSOAP", "PaLMSOAP", "PalmForEachSoap"), ("SOAP", {"palm": True})),
    **dict.fromkeys(("PrecondScheduleForeachSOAP", "PrecondScheduleSOAP"), ("SOAP", {"use_precond_schedule": True})),
    **dict.fromkeys(
        ("PrecondSchedulePaLMForeachSOAP", "PrecondSchedulePaLMSOAP"), ("SOAP", {"palm": True, "use_precond_schedule": True})
    ),
    "SFPaLMForeachSOAP": ("SFSOAP", {"palm": True}),
    **dict.fromkeys(
        ("PrecondScheduleSFPaLMForeachSOAP", "PrecondScheduleSFPaLMSOAP"),
        ("SFSOAP", {"palm": True, "use_precond_schedule": True}),
    ),
}
"""Names that HeavyBall users know -> the optimizer and its options."""


@hookimpl
def hb_aliases(api: object) -> list[Alias]:
    """Names that HeavyBall users know."""
    return [Alias(name=name, target=target, preset=preset) for name, (target, preset) in ALIASES.items()]
