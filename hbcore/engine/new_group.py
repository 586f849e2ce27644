"""A param group on its way into an optimizer: checked, and with every hyperparameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hbcore.engine.core import Group, OptimizerCore
from hbcore.engine.entry_forms import fixed
from hbcore.engine.options import without_options
from hbcore.engine.params import check_params
from hbcore.errors import ParameterTypeError


def completed(core: OptimizerCore, given: Any, defaults: Mapping[str, Any]) -> Group:
    """A copy of the group ``given``, with ``defaults`` for what it lacks; its parameters may still have names beside them.

    Raises:
        HyperparameterError: one of its hyperparameters is outside its bounds.
        ParameterError: a parameter is a duplicate, or no floating-point tensor.
    """
    where = f"{core.name}, parameter group {len(core.groups)}"
    if not isinstance(given, dict):
        raise ParameterTypeError(f"{core.name}: a param group must be a dict, not a {type(given).__name__}.")
    group = without_options(given, core.settings, core.chain.keys, where)
    if not core.building:  # the constructor checked all groups together; each beside all others would take quadratic time
        [group["params"]] = [g["params"] for g in check_params(core.name, [group], core.groups)]
    for key in core.chain.keys:
        group[key] = fixed(group.get(key, defaults[key]))
    core.chain.admit(group, where)
    members = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
    core.chain.refuse_complex({**group, "params": members}, where)
    return group
