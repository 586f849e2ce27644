"""The entries of HeavyBall's param groups, under hbcore's names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hbcore.migrate.heavyball.naming import MOMENTA
from hbcore.migrate.heavyball.reading import Group
from hbcore.migrate.source import Note

ALIKE = frozenset({
    "lr", "betas", "beta", "eps", "weight_decay", "warmup_steps", "caution", "cautious_weight_decay", "mars", "mars_gamma",
    "palm", "beta2_scale", "multi_tensor", "storage_dtype", "ecc", "param_ecc", "max_lr", "momentum_decay",
    "decoupled_weight_decay", "alpha", "beta3_warmup", "alpha_warmup", "r", "weight_lr_power", "sam_step_size", "scale",
    "nesterov", "heavyball_momentum", "precond_lr", "shampoo_beta", "max_precond_dim", "merge_dims", "split",
    "precondition_1d", "init_factor", "dampening", "use_precond_schedule", "max_size_triangular", "min_ndim_triangular",
    "memory_save_mode", "rank", "q_dtype", "delayed", "momentum_into_precond_update", "exp_avg_input", "precond_grad_accum",
    "lower_bound_beta", "precond_update_power_iterations", "precond_init_scale", "precond_init_scale_scale",
    "precond_init_scale_power", "gradient_clipping", "update_clipping",
})  # fmt: skip
"""Entries that hbcore calls the same."""

BOOKKEEPING = frozenset({
    "param_count", "is_preconditioning", "base_lr", "prev_lr", "step", "step_count", "is_cached", "__class__", "weight_sum",
    "precond_step", "train_mode", "sqrt", "ema_step", "beta1", "beta2",
})  # fmt: skip
"""Entries that HeavyBall computes, and that are read elsewhere here or not needed."""

IDLE = frozenset({"cached", "store_triu_as_line"})
"""Entries that change how something is stored or computed, and no number."""

REMOVED = frozenset(
    {"stochastic_schedule", "normalize_grads", "correct_bias", "adaptive", "ortho_method", "inverse_free", "finite_differences"}
)
"""Options of releases 1 and 2 that release 3 has no more, and hbcore has not."""

HARMLESS: Mapping[str, Any] = {"correct_bias": True}
"""The value, if it is not false, at which a removed option changes nothing."""


def settings_of(group: Group, name: str | None) -> dict[str, Any]:
    """A group's entries as arguments of hbcore's optimizers: numbers and structure."""
    entries = group.entries
    found = {k: v for k, v in entries.items() if k in ALIKE and not _unset(v) and v is not None}
    found["lr"] = learning_rate(entries)
    if "foreach" in entries:
        found["multi_tensor"] = entries["foreach"]
    for clip in ("gradient_clipping", "update_clipping"):
        if clip in found:
            found[clip] = getattr(found[clip], "name", found[clip]).rpartition(".")[2]
    if is_palm(group):
        found["palm"] = True
        first, _, *rest = entries["betas"]
        found["betas"] = (first, 0.99, *rest)  # its second number was the last step's, not a setting
    found |= _by_rules(group, name)
    return {k: v for k, v in found.items() if not (k == "beta" and "betas" in found and name != "PSGDLRA")}


def _unset(value: Any) -> bool:
    """Whether a value is HeavyBall 1's sentinel for the default."""
    return getattr(value, "name", "").endswith(".object") or type(value) is object


def _by_rules(group: Group, name: str | None) -> dict[str, Any]:
    """Settings that HeavyBall has in its classes, and not in groups."""
    rules, entries = group.rules, group.entries
    made: dict[str, Any] = {}
    if rules & MOMENTA and "nesterov" in entries:
        made["heavyball_momentum"] = "nesterov_ema" not in rules
    if rules & {"psgd", "delayed_psgd", "lather"} or (name or "").removeprefix("Foreach") in ("PSGDKron", "LATHER"):
        made["precond_rule"] = "quad" if entries.get("inverse_free") else "eq"
    if rules & {"soap_nadam", "heavy_soap_nadam"}:
        made["decoupled_weight_decay"] = True  # HeavyBall's option changes nothing
    if rules & {"delayed_psgd", "delayed_psgd_lra"}:
        made["delayed"] = True
    if rules == {"psgd"} and entries.get("exp_avg_input") is None:
        made["exp_avg_input"] = False
    if "hyperball" in rules and is_pair(entries.get("betas")):
        made["betas"] = (0.0, entries["betas"][1])  # it has no first moment
    return made


def is_pair(value: Any) -> bool:
    """Whether a value is decay rates, two or more."""
    return isinstance(value, (tuple, list)) and len(value) >= 2 and all(isinstance(v, (int, float)) for v in value)


def is_palm(group: Group) -> bool:
    """Whether the second moment's decay rises with the step: HeavyBall writes each step's into the group."""
    betas, scale, steps = group.entries.get("betas"), group.entries.get("beta2_scale"), group.steps
    if group.entries.get("palm") is True:
        return is_pair(betas)
    if not is_pair(betas) or not isinstance(scale, (int, float)) or steps < 1:
        return False
    assert betas is not None
    return math.isclose(betas[1], 1 - float(steps) ** -scale, rel_tol=1e-6, abs_tol=1e-9)


def learning_rate(entries: Mapping[str, Any]) -> Any:
    """The rate before warm-up: releases 1 and 2 leave the last step's in the group, made from that in ``base_lr``."""
    lr, base, last = (entries.get(k) for k in ("lr", "base_lr", "prev_lr"))
    numbers = all(isinstance(v, (int, float)) for v in (lr, base, last))
    return base if numbers and math.isclose(float(lr), float(last), rel_tol=1e-6) else lr  # type: ignore[arg-type]


def notes_of(groups: Sequence[Group], used: Sequence[Mapping[str, Any]], options: Sequence[str]) -> list[Note]:
    """What became of the entries.

    Args:
        groups: the groups.
        used: of each group, the entries of the result.
        options: the names of the constructor's arguments.
    """
    notes: dict[Note, None] = {}
    for group, mine in zip(groups, used, strict=True):
        for key, value in group.entries.items():
            if note := _note(key, value, mine, options):
                notes[note] = None
    return list(notes)


def _note(key: str, value: Any, mine: Mapping[str, Any], options: Sequence[str]) -> Note | None:
    where = f"group entry {key!r}"
    if key in BOOKKEEPING or key in IDLE or key.startswith("_") or key.startswith("balance_prob") or _unset(value):
        return None
    renamed = {"foreach": "multi_tensor", "beta": "momentum", "betas": "momentum or alpha"}
    if key in mine or key in options:
        return Note("mapped", where, f"{key} = {mine[key]!r}" if key in mine else f"the option {key}")
    if key in renamed and any(word in mine or word in options for word in renamed[key].split()):
        return Note("mapped", where, renamed[key])
    if value is None or value is False or (key in HARMLESS and value == HARMLESS[key]):
        return None
    why = "HeavyBall 3 has removed it, and hbcore has no such option" if key in REMOVED else "this optimizer has no such option"
    return Note("dropped", where, f"{value!r:.60}: {why}")
