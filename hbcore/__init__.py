"""hbcore: a plugin platform for PyTorch optimizers.

Every public name is imported on first use (PEP 562), so ``import hbcore`` costs nothing and needs no torch. Besides the
names listed in ``__all__``, every installed optimizer can be imported from here: ``from hbcore import AdamW`` is
``get("AdamW")``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hbcore._version import __version__

if TYPE_CHECKING:
    from hbcore.casting import cast_model
    from hbcore.checkpoint.export import export
    from hbcore.checkpoint.full_state import full_state, load_full_state
    from hbcore.errors import (
        AmbiguousNameError,
        CheckpointError,
        CompileError,
        FallbackWarning,
        HbcoreError,
        HbcoreWarning,
        HyperparameterError,
        OptionError,
        ParameterError,
        ParameterTypeError,
        PluginError,
        PluginWarning,
        RegistryError,
        RuleError,
        SparseGradientError,
        StateWarning,
        TraceError,
        UnknownCodecError,
        UnknownOptimizerError,
    )
    from hbcore.footprint import memory
    from hbcore.migrate.apply import convert_checkpoint
    from hbcore.optimizer import Optimizer
    from hbcore.registry import block, create, get, info, list_optimizers, unblock
    from hbcore.rules.parallel import Parallel, graft
    from hbcore.wrappers.gradient_release import hook_into_backward
    from hbcore.wrappers.split import SplitOpt


__all__ = [
    "AmbiguousNameError",
    "CheckpointError",
    "CompileError",
    "FallbackWarning",
    "HbcoreError",
    "HbcoreWarning",
    "HyperparameterError",
    "Optimizer",
    "OptionError",
    "Parallel",
    "ParameterError",
    "ParameterTypeError",
    "PluginError",
    "PluginWarning",
    "RegistryError",
    "RuleError",
    "SparseGradientError",
    "SplitOpt",
    "StateWarning",
    "TraceError",
    "UnknownCodecError",
    "UnknownOptimizerError",
    "__version__",
    "block",
    "cast_model",
    "convert_checkpoint",
    "create",
    "export",
    "full_state",
    "get",
    "graft",
    "hook_into_backward",
    "info",
    "list_optimizers",
    "load_full_state",
    "memory",
    "unblock",
]

_REGISTRY = ("block", "create", "get", "info", "list_optimizers", "unblock")
_LAZY = {name: "hbcore.errors" for name in __all__ if name.endswith(("Error", "Warning"))}
_LAZY |= dict.fromkeys(_REGISTRY, "hbcore.registry") | {
    "Optimizer": "hbcore.optimizer",
    "Parallel": "hbcore.rules.parallel",
    "SplitOpt": "hbcore.wrappers.split",
    "cast_model": "hbcore.casting",
    "convert_checkpoint": "hbcore.migrate.apply",
    "export": "hbcore.checkpoint.export",
    "full_state": "hbcore.checkpoint.full_state",
    "graft": "hbcore.rules.parallel",
    "load_full_state": "hbcore.checkpoint.full_state",
    "memory": "hbcore.footprint",
    "hook_into_backward": "hbcore.wrappers.gradient_release",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = globals()[name] = getattr(import_module(_LAZY[name]), name)
        return value
    # Optimizers are capitalised. Submodules, dunders and private names, which tools probe for, must not start a scan.
    if not name[0].isupper():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hbcore.errors import AmbiguousNameError, UnknownOptimizerError
    from hbcore.registry import get

    try:
        return get(name)  # not kept in globals(): a plugin may be blocked or repaired later
    except (UnknownOptimizerError, AmbiguousNameError) as error:
        # `from hbcore import X` replaces an AttributeError by its own text, and the pip line is lost; so the import
        # system, which asks first, gets an ImportError. A PluginError is an ImportError already and passes as it is.
        if sys._getframe(1).f_globals.get("__name__") in ("importlib._bootstrap", "_frozen_importlib"):
            raise ImportError(str(error), name=__name__) from None
        raise AttributeError(str(error)) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
