"""The names that a plugin may import; everything else in hbcore may change without notice.

What a manifest needs comes at once and without torch. What a rule needs is imported on first use, so that
``from hbcore.api import OptimizerSpec, hookimpl`` stays light.

``API_VERSION`` follows what is listed here: a new name raises the minor number, a removed or changed one the major
number. A manifest states the version that it was written for as ``API = (1, 0)``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hbcore.registry.hookspecs import API_VERSION, hookimpl
from hbcore.registry.spec import Alias, CodecSpec, OptimizerSpec

if TYPE_CHECKING:
    from hbcore.engine.options import Options
    from hbcore.errors import HyperparameterError, OptionError
    from hbcore.optimizer import Optimizer
    from hbcore.rules.moments import (
        CorrectedDecay,
        Momentum,
        ScaleByAdam,
        ScaleByAdEMAMix,
        ScaleByLaProp,
        ScaleByNAdam,
    )
    from hbcore.rules.numerics import Scalar, compute_dtype, debiased, ema
    from hbcore.rules.parallel import Parallel, graft
    from hbcore.rules.route import Route, is_matrix
    from hbcore.rules.stages import CoupleDecay
    from hbcore.rules.transform import Context, Domain, Role, Slot, State, Transform, hyper, zeros
    from hbcore.rules.views import Block, matrix_view
    from hbcore.wrappers.composite import Composite

__all__ = [
    "API_VERSION",
    "Alias",
    "Block",
    "CodecSpec",
    "Composite",
    "Context",
    "CorrectedDecay",
    "CoupleDecay",
    "Domain",
    "HyperparameterError",
    "Momentum",
    "Optimizer",
    "OptimizerSpec",
    "OptionError",
    "Options",
    "Parallel",
    "Role",
    "Route",
    "Scalar",
    "ScaleByAdEMAMix",
    "ScaleByAdam",
    "ScaleByLaProp",
    "ScaleByNAdam",
    "Slot",
    "State",
    "Transform",
    "compute_dtype",
    "debiased",
    "ema",
    "graft",
    "hookimpl",
    "hyper",
    "is_matrix",
    "matrix_view",
    "zeros",
]

_LAZY = {
    "Block": "hbcore.rules.views:Block",
    "Composite": "hbcore.wrappers.composite:Composite",
    "Context": "hbcore.rules.transform:Context",
    "CorrectedDecay": "hbcore.rules.moments:CorrectedDecay",
    "CoupleDecay": "hbcore.rules.stages:CoupleDecay",
    "Domain": "hbcore.rules.transform:Domain",
    "HyperparameterError": "hbcore.errors:HyperparameterError",
    "Momentum": "hbcore.rules.moments:Momentum",
    "Optimizer": "hbcore.optimizer:Optimizer",
    "OptionError": "hbcore.errors:OptionError",
    "Options": "hbcore.engine.options:Options",
    "Parallel": "hbcore.rules.parallel:Parallel",
    "Role": "hbcore.rules.transform:Role",
    "Route": "hbcore.rules.route:Route",
    "Scalar": "hbcore.rules.numerics:Scalar",
    "ScaleByAdEMAMix": "hbcore.rules.moments:ScaleByAdEMAMix",
    "ScaleByAdam": "hbcore.rules.moments:ScaleByAdam",
    "ScaleByLaProp": "hbcore.rules.moments:ScaleByLaProp",
    "ScaleByNAdam": "hbcore.rules.moments:ScaleByNAdam",
    "Slot": "hbcore.rules.transform:Slot",
    "State": "hbcore.rules.transform:State",
    "Transform": "hbcore.rules.transform:Transform",
    "compute_dtype": "hbcore.rules.numerics:compute_dtype",
    "debiased": "hbcore.rules.numerics:debiased",
    "ema": "hbcore.rules.numerics:ema",
    "graft": "hbcore.rules.parallel:graft",
    "is_matrix": "hbcore.rules.route:is_matrix",
    "matrix_view": "hbcore.rules.views:matrix_view",
    "hyper": "hbcore.rules.transform:hyper",
    "zeros": "hbcore.rules.transform:zeros",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; plugins may use {', '.join(__all__)}")
    module, _, attribute = _LAZY[name].partition(":")
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
