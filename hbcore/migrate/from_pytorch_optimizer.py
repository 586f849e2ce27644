"""pytorch_optimizer 4: https://github.com/kozistr/pytorch_optimizer. Its state dicts name no class: entries and slots tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hbcore.errors import CheckpointError
from hbcore.migrate import from_schedulefree as schedule_free
from hbcore.migrate.forms import Form, Group, Shape, names, require, source
from hbcore.migrate.from_muon import ADAM, FLAGS

LIBRARY = "pytorch_optimizer"
BASE = names("lr weight_decay weight_decouple foreach step")
BETAS = BASE | names("betas fixed_decay")
MOMENTS = names("exp_avg exp_avg_sq")
MAXIMIZE = "it minimizes: maximize is not in its state dict"
COUNTS = {"step": "the counts of steps"}
ABOUT_EPS = "the 1e-15 that it adds to a second moment is 0, which matters to gradients below 1e-6"

NAMED = {
    ((3.4445, -4.775, 2.0315),): "jordan",
    (
        (4.0848, -6.8946, 2.927),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ): "you",
}
"""Tables of coefficients that hbcore's Muon has a name for."""


def decoupled(name: str, group: Group) -> None:
    """Require weight decay as hbcore's rule has it."""
    if group["weight_decay"]:
        require(f"{LIBRARY}'s {name}", group, weight_decouple=True, fixed_decay=False)


def lion(group: Group, shapes: Sequence[Shape]) -> dict[str, Any]:
    """Decoupled decay; no state but the momentum."""
    decoupled("Lion", group)
    return {k: group[k] for k in ("lr", "betas", "weight_decay")}


def ademamix(group: Group, shapes: Sequence[Shape]) -> dict[str, Any]:
    """Its two warm-ups are one number there."""
    decoupled("AdEMAMix", group)
    warmup = {k: group["t_alpha_beta3"] for k in ("alpha_warmup", "beta3_warmup")}
    shared = {k: group[k] for k in ("lr", "betas", "eps", "alpha", "weight_decay")}
    return {**shared, **warmup, "division_backend": "eps_add"}


def sgdw(group: Group, shapes: Sequence[Shape]) -> dict[str, Any]:
    """Coupled or decoupled decay, as the group says."""
    shared = {k: group[k] for k in ("lr", "momentum", "dampening", "nesterov", "weight_decay")}
    return {**shared, "decoupled_weight_decay": bool(group["weight_decouple"])}


def sfadamw(group: Group, shapes: Sequence[Shape]) -> dict[str, Any]:
    """The schedulefree library's settings, without what it adds."""
    require(f"{LIBRARY}'s ScheduleFreeAdamW", group, decoupling_c=0, ams_bound=False, use_palm=False)
    return schedule_free.settings(group, shapes)


def muon(group: Group, shapes: Sequence[Shape]) -> dict[str, Any]:
    """A group of matrices, or one of the auxiliary AdamW's."""
    decoupled("Muon", group)
    if not group["use_muon"]:
        return {**{k: group[k] for k in ("lr", "betas", "eps", "weight_decay")}, **ADAM}
    require(f"{LIBRARY}'s Muon", group, ns_method="newton_schulz")
    shared = {k: group[k] for k in ("lr", "momentum", "nesterov", "weight_decay", "ns_steps")}
    rows = tuple(tuple(row) for row in group["ns_coeffs"])
    if not all(len(row) == 3 for row in rows):
        raise CheckpointError(f"{LIBRARY}'s Muon: ns_coeffs={group['ns_coeffs']!r:.60} is no table of three numbers a row.")
    adjusted = "match_rms_adamw" if group["use_adjusted_lr"] else "original"
    own = {
        "method": "newton_schulz",
        "ns_coefficients": NAMED.get(rows, rows),
        "adjust_lr_fn": adjusted,
        "flatten": True,
        "eps": 1e-7,
    }
    return {**shared, **own, "use_muon": True, "division_backend": "eps_add"}


CONVERTED = (
    Form(
        "Lion", (BETAS,), (names("exp_avg"),), lambda groups: "Lion", settings=lion, becomes=COUNTS, assumed=(MAXIMIZE,)
    ),
    Form(
        "AdEMAMix",
        (BETAS | names("alpha eps t_alpha_beta3"),),
        (MOMENTS | names("exp_avg_slow"),),
        lambda groups: "AdEMAMix",
        settings=ademamix,
        becomes={**COUNTS, "t_alpha_beta3": "alpha_warmup and beta3_warmup"},
        renamed=lambda entry: {"exp_avg": "exp_avg_fast"},
        assumed=(MAXIMIZE,),
    ),
    Form(
        "SGDW",
        (BASE | names("dampening momentum nesterov"),),
        (names("momentum_buffer"),),
        lambda groups: "SGD",
        settings=sgdw,
        becomes={**COUNTS, "weight_decouple": "decoupled_weight_decay"},
        assumed=(MAXIMIZE,),
    ),
    Form(
        "ScheduleFreeAdamW",
        (names("lr foreach betas weight_decay r weight_lr_power warmup_steps decoupling_c ams_bound eps train_mode weight_sum "
               "lr_max use_palm step"),),
        (names("z exp_avg_sq"),),
        lambda groups: "SFAdamW",
        settings=sfadamw,
        renamed=lambda entry: {"z": None},
        relative=schedule_free.z_minus_y,
        progress=lambda group: schedule_free.progress(group, "step"),
        training=lambda group: bool(group["train_mode"]),
        becomes={**schedule_free.BECOMES, **COUNTS},
        assumed=(MAXIMIZE, ABOUT_EPS, "every parameter with state has had a gradient in every step"),
    ),
    Form(
        "Muon",
        (
            BASE | names("use_muon momentum nesterov ns_steps ns_coeffs ns_method ns_reset_steps use_adjusted_lr"),
            BASE | names("use_muon betas eps"),
        ),
        (names("momentum_buffer"), MOMENTS),
        lambda groups: "Muon" if all(group["use_muon"] for group in groups) else "MuonAdamW",
        settings=muon,
        becomes={**COUNTS, "ns_coeffs": "ns_coefficients", "ns_method": "method", "use_adjusted_lr": "adjust_lr_fn"},
        assumed=(MAXIMIZE, FLAGS),
    ),
)  # fmt: skip

REFUSED = (
    Form(
        "ADOPT (or Ano, EXAdam or RAdam, which save the same)",
        (BETAS | names("eps"),),
        (MOMENTS,),
        differs="ADOPT clips its quotients by default, which hbcore's ADOPT, the paper's first form, does not, and hbcore has "
        "none of the others; a state dict tells neither which one it is nor whether it clips",
    ),
    Form(
        "AdamC or AdamS",
        (BETAS | names("ams_bound eps"),),
        (MOMENTS, MOMENTS | names("max_exp_avg_sq")),
        differs="the two save the same and have other rules; AdamC also needs its largest learning rate, which is not saved",
    ),
    Form(
        "LaProp",
        (BETAS | names("ams_bound centered eps"),),
        (MOMENTS | names("exp_avg_lr_1 exp_avg_lr_2"),),
        differs="its first moment contains the learning rates of past steps, and its decay follows the update",
    ),
    Form(
        "SCION",
        (BASE | names("constraint momentum norm_kwargs norm_type scale"),),
        (names("d"),),
        differs="each group chooses a norm of its own there; hbcore's Scion chooses it by a parameter's shape",
    ),
    Form(
        "SOAP",
        (names("betas correct_bias eps lr max_precondition_dim merge_dims normalize_gradient precondition_1d "
               "precondition_frequency shampoo_beta step weight_decay"),),
        (MOMENTS | names("GG Q precondition_frequency shampoo_beta"),),
        differs="its refreshes, projections and corrections have not been seen to follow those of hbcore's SOAP",
    ),
    Form(
        "ScheduleFreeRAdam",
        (names("lr foreach betas weight_decay r weight_lr_power eps train_mode weight_sum lr_max use_palm "
               "silent_sgd_phase step"),),
        (names("z exp_avg_sq"),),
        differs="it rectifies the second moment's first steps, which hbcore's SFAdamW does not",
    ),
    Form(
        "ScheduleFreeSGD",
        (names("lr foreach momentum weight_decay r weight_lr_power eps train_mode weight_sum lr_max warmup_steps step"),),
        (names("z"),),
        differs="hbcore's schedule-free rules, SFAdamW and SFSOAP, divide by a second moment, and it does not",
    ),
)  # fmt: skip


def recognises(group: Group) -> bool:
    """Whether some optimizer of the library saved the group: it counts steps in its groups."""
    return {"step", "weight_decouple"} <= {*group}


PYTORCH_OPTIMIZER = source(LIBRARY, (*CONVERTED, *REFUSED), recognises)
