"""Which optimizer saved a HeavyBall state dict: releases 1 and 2 save the class, 3 tells it by the rules that have state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hbcore.migrate.heavyball.reading import Group

BY_RULES: dict[frozenset[str], str] = {
    frozenset(rules): name
    for name, rules in {
        "AdamW": {"adam"},
        "AdamC": {"adamc"},
        "NAdam": {"nadam"},
        "AdEMAMix": {"ademamix"},
        "UnscaledAdamW": {"unscaled_adam"},
        "SUDSAdamW": {"suds"},
        "ADOPT": {"adopt"},
        "RMSprop": {"exp_avg_sq"},
        "SFAdamW": {"exp_avg_sq", "schedule_free"},
        "MSAMLaProp": {"exp_avg_sq", "msam"},
        "HyperBallAdamW": {"exp_avg_sq", "hyperball"},
        "Scion": {"exp_avg", "scion_auto_norm"},
        "SOAP": {"soap"},
        "SOLP": {"soap_laprop"},
        "SOAPNAdam": {"soap_nadam"},
        "SOAPAdEMAMix": {"soap_ademamix"},
        "KLSOAP": {"kl_soap"},
        "KLShampoo": {"kl_shampoo"},
        "HeavySOAP": {"heavy_soap"},
        "HeavySOLP": {"heavy_soap_laprop"},
        "HeavySOAPNAdam": {"heavy_soap_nadam"},
        "HeavySOAPAdEMAMix": {"heavy_soap_ademamix"},
        "HeavyKLSOAP": {"heavy_kl_soap"},
        "HeavyKLShampoo": {"heavy_kl_shampoo"},
        "LATHER": {"lather"},
        "PSGDKron": {"psgd"},
        "PSGDPRO": {"psgd_pro"},
        "PSGDLRA": {"psgd_lra"},
    }.items()
}
"""The rules with state, averages and moments that several share left out -> the optimizer."""

LAPROP = ("LaProp", "SignLaProp", "OrthoLaProp", "LaPropOrtho", "MuonLaProp")
MOMENTA = frozenset({"nesterov_ema", "nesterov_momentum", "heavyball_momentum"})


def saved_class(group: Group) -> str | None:
    """The name of the class that a group names, ``"ForeachAdamW"``; None in most of release 3."""
    value: Any = group.entries.get("__class__")
    full = getattr(value, "name", "") or f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
    return full.rpartition(".")[2] if isinstance(full, str) and full.startswith("heavyball.") else None


def optimizer_of(groups: Sequence[Group]) -> tuple[str | None, Sequence[str]]:
    """The optimizer's name, and if that is None, the names that fit."""
    if name := next(filter(None, map(saved_class, groups)), None):
        return name, ()
    entries = groups[0].entries
    rules = frozenset().union(*(group.rules for group in groups)) - {"mars"}
    if rules & MOMENTA:
        if "adam" in rules or "nesterov" not in entries:
            return ("MuonAdamW" if "adam" in rules else "SGD"), ()
        return "Muon", ()
    if rules == {"exp_avg", "adam"}:
        return "MuonAdamW", ()
    if rules == {"exp_avg"} and "nesterov" in entries:
        return "Muon", ()
    if rules == {"laprop"}:
        return None, LAPROP
    named = frozenset(rule.removeprefix("delayed_") for rule in rules)
    if named != {"exp_avg"}:  # PSGD's momentum is an average of its own
        named = named if "scion_auto_norm" in named else named - {"exp_avg"}
    if named == {"psgd_pro"} and entries.get("sqrt"):
        return "QSGD", ()
    return BY_RULES.get(named), ()
