"""The settings in which the rules of one gradient are tried, each with its float64 oracle."""

from __future__ import annotations

import torch
from core.kit import SHAPES, gradients, parameters
from reference.adam import adam, unscaled_adamw
from reference.adamc import adamc
from reference.ademamix import ademamix
from reference.adopt import adopt
from reference.laprop import laprop
from reference.lion import lion
from reference.nadam import nadam
from reference.rmsprop import rmsprop
from reference.suds import suds_adamw

from hb_adam import ADOPT, Adam, AdamC, AdamW, AdEMAMix, LaProp, Lion, NAdam, RMSprop, SignLaProp, SUDSAdamW, UnscaledAdamW

STEPS = 25
SETTINGS = {"weight_decay": 0.3, "betas": (0.6, 0.9), "eps": 0.05, "warmup_steps": 5, "maximize": True}
CAUTIOUS = {"weight_decay": 0.3, "cautious_weight_decay": True, "caution": True}
SPELLED_OTHERWISE = {"division_backend", "decoupled_weight_decay", "compile"}

CASES = {
    "adam": (Adam, adam, {}, {}),
    "adam-settings": (Adam, adam, SETTINGS, {}),
    "adam-caution": (Adam, adam, {"weight_decay": 0.3, "caution": True}, {}),
    "adam-amsgrad": (Adam, adam, {"amsgrad": True, **SETTINGS}, {}),
    "adamw-amsgrad": (AdamW, adam, {"amsgrad": True, **SETTINGS}, {"coupled": False}),
    "adamw-amsgrad-cautious": (AdamW, adam, {"amsgrad": True, **CAUTIOUS}, {"coupled": False}),
    "unscaled": (UnscaledAdamW, unscaled_adamw, {}, {}),
    "unscaled-settings": (UnscaledAdamW, unscaled_adamw, SETTINGS, {}),
    "unscaled-eps_add": (
        UnscaledAdamW, unscaled_adamw, {"division_backend": "eps_add", "eps": 0.1}, {"division": "eps_add"}
    ),
    "nadam": (NAdam, nadam, {}, {}),
    "nadam-settings": (NAdam, nadam, SETTINGS, {}),
    "nadam-decay": (NAdam, nadam, {"momentum_decay": 0.3, "betas": (0.999, 0.9)}, {}),
    "nadam-no-decay": (NAdam, nadam, {"momentum_decay": 0.0}, {}),
    "nadam-decoupled": (NAdam, nadam, {**CAUTIOUS, "decoupled_weight_decay": True}, {"coupled": False}),
    "rmsprop": (RMSprop, rmsprop, {}, {}),
    "rmsprop-settings": (RMSprop, rmsprop, {"alpha": 0.8, "eps": 0.05, "momentum": 0.7, "weight_decay": 0.3}, {}),
    "rmsprop-cautious": (RMSprop, rmsprop, CAUTIOUS, {}),
    "rmsprop-betas": (RMSprop, rmsprop, {"betas": (0.1, 0.7)}, {"alpha": 0.7, "betas": None}),
    "rmsprop-centered": (RMSprop, rmsprop, {"centered": True, "eps": 0.05}, {}),
    "rmsprop-coupled": (
        RMSprop,
        rmsprop,
        {"centered": True, "debias": False, "weight_decay": 0.3, "decoupled_weight_decay": False, "eps": 0.05},
        {"coupled": True},
    ),
    "adopt": (ADOPT, adopt, {}, {}),
    "adopt-settings": (ADOPT, adopt, SETTINGS, {}),
    "adopt-cautious": (ADOPT, adopt, {"eps": 0.05, **CAUTIOUS}, {}),
    "ademamix": (AdEMAMix, ademamix, {}, {}),
    "ademamix-settings": (
        AdEMAMix, ademamix, {**SETTINGS, "betas": (0.7, 0.9, 0.95), "alpha": 5.0, "beta3_warmup": 17, "alpha_warmup": 9}, {}
    ),
    "ademamix-beta3": (AdEMAMix, ademamix, {"beta3_warmup": 1000, "alpha_warmup": 1}, {}),
    "ademamix-off": (AdEMAMix, ademamix, {"beta3_warmup": 0, "alpha_warmup": 0}, {"beta3_warmup": None, "alpha_warmup": None}),
    "adamc": (AdamC, adamc, {"max_lr": 0.01, "weight_decay": 0.3}, {}),
    "adamc-settings": (
        AdamC, adamc, {"lr": 0.005, "max_lr": 0.004, "warmup_steps": 5, "weight_decay": 2, "betas": (0.6, 0.9), "eps": 0.1}, {}
    ),
    "adamc-cautious": (AdamC, adamc, {"max_lr": 0.01, "weight_decay": 2.0, "cautious_weight_decay": True}, {}),
    "laprop": (LaProp, laprop, {}, {}),
    "laprop-settings": (LaProp, laprop, SETTINGS, {}),
    "laprop-cautious": (LaProp, laprop, CAUTIOUS, {}),
    "laprop-eps_add": (LaProp, laprop, {"division_backend": "eps_add", "eps": 0.1}, {"division": "eps_add"}),
    "sign": (SignLaProp, laprop, {}, {"signed": True}),
    "sign-settings": (SignLaProp, laprop, SETTINGS, {"signed": True}),
    "suds": (SUDSAdamW, suds_adamw, {}, {}),
    "suds-settings": (SUDSAdamW, suds_adamw, {"precond_lr": 0.2, **SETTINGS}, {}),
    "suds-cautious": (SUDSAdamW, suds_adamw, CAUTIOUS, {}),
    "lion": (Lion, lion, {}, {}),
    "lion-settings": (Lion, lion, {"lr": 0.01, "betas": (0.6, 0.9), "weight_decay": 0.3, "maximize": True}, {}),
    "lion-cautious": (Lion, lion, CAUTIOUS, {}),
}  # fmt: skip
"""Name -> class, oracle, settings, and those that the oracle spells otherwise."""


def expected(oracle, options, spelled, shapes=SHAPES, dtype=torch.float64, steps=STEPS):
    """The oracle's answer for the same start and the same gradients."""
    settings = {k: v for k, v in {**options, **spelled}.items() if k not in SPELLED_OTHERWISE and v is not None}
    columns = zip(*gradients(steps, shapes, dtype), strict=True)
    return [
        torch.tensor(oracle(p.detach().double().numpy(), [g.double().numpy() for g in column], **settings))
        for p, column in zip(parameters(shapes, dtype), columns, strict=True)
    ]
