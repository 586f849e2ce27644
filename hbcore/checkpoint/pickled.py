"""What deepcopy and pickle carry of an optimizer: no plan, no compiled code, and each step counter on its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hbcore.checkpoint import schema
from hbcore.engine.chain_spec import ChainSpec
from hbcore.engine.core import OptimizerCore
from hbcore.state.slots import StateMap, compacted


def content(core: OptimizerCore) -> dict[str, Any]:
    """The core as plain data. The keys are those of 0.1.0, whose pickles load."""
    core.skipping.settle()
    return {
        "_progress": core.group_scalars,
        "_training": core.modes.training,
        "_structure": (core.settings, core.chain.defaults, core.chain.hyper),
        "state": {p: compacted(s) for p, s in core.state.items()},
        "param_groups": core.groups,
    }


def restored(cls: Any, taken: dict[str, Any], newer: Mapping[str, Any]) -> OptimizerCore:
    """The core that :func:`content` describes, taken out of ``taken``; ``newer`` are the fields that the class has since."""
    settings, defaults, hyper = taken.pop("_structure")
    core = OptimizerCore(cls.__name__, ChainSpec(cls.chain, settings, {**defaults, **newer}, hyper), cls.sparse_gradients)
    core.state, core.groups = StateMap(taken.pop("state")), [{**newer, **g} for g in taken.pop("param_groups")]
    core.group_scalars, core.modes.training = taken.pop("_progress"), taken.pop("_training", True)
    core.options = schema.given_again(core.name, core.groups)
    return core
