"""What a HeavyBall optimizer carries from step to step: counts, refreshes of preconditioners, weights of averages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hbcore.migrate.heavyball.reading import Group
from hbcore.migrate.source import Target
from hbcore.rules.transform import Domain

FITTED = ("soap", "psgd_kron", "psgd_lra", "lather")
"""hbcore's rules whose refreshes HeavyBall schedules, all by one sum."""

MOST = 10**7
"""Steps beyond which the usual schedule is not summed up again."""


def refreshes(state_dict: Mapping[str, Any]) -> tuple[float, int]:
    """The sum of the probabilities of refreshes, and over how many steps; zeros where they are not saved, as in release 1."""
    stats = state_dict.get("heavyball")
    inner = stats.get("inner_group") if isinstance(stats, Mapping) else None
    inner = inner if isinstance(inner, Mapping) else {}
    total, steps = inner.get("cumulative_prob"), inner.get("cumulative_prob_prob_step")
    if isinstance(total, (int, float)) and isinstance(steps, int) and 0 <= total <= steps:
        return float(total), steps
    return 0.0, 0


def settings_of(state_dict: Mapping[str, Any], group: Group) -> dict[str, Any]:
    """How often the preconditioner is refreshed, as hbcore's options: no group tells, but the sum does."""
    total, steps = refreshes(state_dict)
    if not total or not steps:
        return {}
    every = steps / total
    if any("soap" in rule or "shampoo" in rule for rule in group.rules):
        constant = math.isclose(every, round(every), rel_tol=1e-6)
        return {"precondition_frequency": round(every)} if constant else {"use_precond_schedule": True}
    if any("psgd" in rule or rule == "lather" for rule in group.rules) and steps <= MOST:
        usual = math.fsum(max(0.03, min(1.0, 0.999 ** (k - 1000))) for k in range(1, steps + 1))
        return {} if math.isclose(total, usual, rel_tol=1e-6) else {"preconditioner_update_probability": total / steps}
    return {}


def progress(state_dict: Mapping[str, Any], group: Group, target: Target, g: int) -> dict[str, float]:
    """What hbcore's group carries from step to step."""
    core, steps = target.optimizer.core, group.steps
    total, counted = refreshes(state_dict)
    made = {"step": float(steps)}
    for rule in core.chain.every(core.groups[g]):
        if rule.domain == Domain.MATRIX and steps:
            same = rule.name in FITTED and counted
            made[f"{rule.name}.refreshes"] = total if same else steps * rule.rate(steps)
        for name in rule.scalars():
            value = _scalar(name, group, total)
            if value is not None and math.isfinite(value):
                made[name] = value
    return made


def _scalar(name: str, group: Group, total: float) -> float | None:
    entries = group.entries
    if name == "k":
        return float(group.steps)
    if name == "psgd_lra.fits":
        fits = entries.get("precond_step")
        return float(fits + 1) if isinstance(fits, int) else float(math.floor(total))
    value = entries.get({"weight_sum": "weight_sum", "lr_max": "prev_lr"}.get(name, ""))
    return float(value) if isinstance(value, (int, float)) else None
