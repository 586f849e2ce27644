"""Checks of the settings of Kronecker preconditioners that have no bounds of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from hb_psgd.factor_rules import RULES
from hb_psgd.kron import memory_layout
from hbcore.api import HyperparameterError, OptionError, check_whole

Q_DTYPES: Mapping[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}
"""The values of ``q_dtype``; None is the compute dtype. In float16 a factor may be too small, and zero for good."""


def check_settings(rule: Any) -> None:
    """Check the structural fields of a :class:`hb_psgd.rule.KronFactors`.

    Raises:
        HyperparameterError: a number is not what it has to be.
        OptionError: an option has a value that does not exist.
    """
    if rule.precond_rule not in tuple(RULES):
        raise OptionError(f"precond_rule={rule.precond_rule!r} does not exist; pass one of {', '.join(map(repr, RULES))}.")
    if rule.q_dtype not in tuple(Q_DTYPES):
        raise OptionError(f"q_dtype={rule.q_dtype!r} is not supported; pass one of {', '.join(map(repr, Q_DTYPES))}.")
    memory_layout((), memory_save_mode=rule.memory_save_mode)  # raises if the mode does not exist
    if not callable(rule.preconditioner_update_probability):
        check_number("preconditioner_update_probability", rule.preconditioner_update_probability, low=0, high=1)
    check_whole("precond_update_power_iterations", rule.precond_update_power_iterations, 1)
    check_whole("max_size_triangular", rule.max_size_triangular, 0)
    check_whole("min_ndim_triangular", rule.min_ndim_triangular, 0)
    if not isinstance(rule.merge_dims, bool):
        check_whole("merge_dims", rule.merge_dims, 1)
    check_number("precond_init_scale", rule.precond_init_scale, low=1e-30)
    check_number("precond_init_scale_power", rule.precond_init_scale_power)
    check_whole("hvp_interval", rule.hvp_interval, 1)
    flags = ("split", "precond_grad_accum", "cached", "hessian_approx", "finite_differences", "fallback_to_finite_differences")
    check_flags({name: getattr(rule, name) for name in flags})


def check_flags(flags: Mapping[str, Any]) -> None:
    """Raise OptionError unless every one of these options, by name, is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise OptionError(f"{name}={value!r} is neither True nor False; pass one of them.")


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise HyperparameterError unless ``value`` is None or a finite number from ``low`` to ``high``."""
    if value is None:
        return
    try:
        fits = math.isfinite(value) and low <= value <= high
    except TypeError:
        fits = False
    if not fits:
        raise HyperparameterError(f"{name}={value!r} is not a finite number in [{low:g}, {high:g}]; pass one, or leave it out.")
