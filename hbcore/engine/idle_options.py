"""Options that were asked for and have nothing to do: ``optimizer.report`` says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hbcore.engine.chain_spec import seen
from hbcore.engine.core import Group, OptimizerCore
from hbcore.engine.offload import applies
from hbcore.engine.param_codec import narrow
from hbcore.rules.domain import ORDER
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.transform import Domain, Transform
from hbcore.state.codec import ROUNDED

NEEDS = {"mars_gamma": "mars", "beta2_scale": "palm", "ema_decay": "use_ema"}
"""Options that another one has to turn on."""


def begin(core: OptimizerCore, given: Mapping[str, Any]) -> None:
    """The end of a constructor: store the parameters as ``param_ecc`` says, and note the ``given`` options that do nothing."""
    narrow(core)
    for text in idle(core, given):
        core.report.note(text)


def idle(core: OptimizerCore, given: Mapping[str, Any]) -> Iterator[str]:
    """What is to be said of each given option that changes no step of this optimizer.

    Options at a value that asks for nothing are not looked at; nor is ``division_backend``, since only a rule's own code tells
    whether it divides.
    """
    settings = core.settings
    for option, other in NEEDS.items():
        if option in given and not getattr(settings, other):
            yield f"{option}={given[option]!r} does nothing: it needs {other}=True"
    if "atan2_scale" in given and not isinstance(settings.divide, partial):
        yield f"atan2_scale={given['atan2_scale']!r} does nothing: it needs division_backend='atan2'"
    cautious = any(settings.cautious_weight_decay or group.get("cautious_weight_decay") for group in core.groups)
    if cautious and not any(group["weight_decay"] for group in core.groups):
        yield "cautious_weight_decay=True does nothing: weight_decay is 0 in every group"
    for option, needed in NEEDED.items():
        if given.get(option) not in (None, False, "float32", torch.float32) and not any(
            needed[0](core, group, p) for group in core.groups for p in group["params"]
        ):
            yield f"{option}={given[option]!r} does nothing: {needed[1]}"


def _is_elsewhere(core: OptimizerCore, group: Group, p: Tensor) -> bool:
    return applies(core.settings.offload, p.device) or p.is_meta


def _multiplies(core: OptimizerCore, group: Group, p: Tensor) -> bool:
    return any(t.domain == Domain.MATRIX for t in core.chain.chain(group, p))


def _works_in_less(core: OptimizerCore, group: Group, p: Tensor) -> bool:
    """Whether a matrix rule would be handed the update of a parameter in another dtype than it is computed in."""
    matrix = (t for t in core.chain.chain(group, p) if t.domain == Domain.MATRIX)
    return any(t.working_dtype(p) != compute_dtype(p.dtype) for t in matrix)


def _is_coded(core: OptimizerCore, group: Group, p: Tensor) -> bool:
    """Whether some slot is stored otherwise than it would be without a codec."""
    dtype = compute_dtype(p.dtype)
    if dtype == torch.float64:
        return False
    slots = [slot for slot in core.chain.expected(group, p) if slot.kind is not None and not slot.kind.exact]
    return any(slot.parts(p) != {slot.name: dtype} for slot in slots)


def _rounds(core: OptimizerCore, group: Group, p: Tensor) -> bool:
    """Whether something of a parameter is stored with fewer bits than it is computed with, in a way that noise can enter."""
    return p.dtype in ROUNDED or (core.settings.codec.rounds and _is_coded(core, group, p))


def _may_turn(core: OptimizerCore, group: Group, p: Tensor) -> bool:
    """Whether an update may have another sign than the gradient: by a momentum, by decay before the rule, by a matrix rule."""
    chain = core.chain.chain(group, p)
    before = [t for t in chain if ORDER.index(t.stage) < ORDER.index("caution")]
    return any(t.stage == "couple_decay" or t.domain == Domain.MATRIX or _remembers(t, p) for t in before)


def _remembers(t: Transform, p: Tensor) -> bool:
    """Whether a rule has a slot that may be negative; of a slot that is no element's own, nothing is known but its size."""
    return any(not slot.nonnegative and slot.shape == seen(p).shape for slot in t.slots(seen(p)).values())


NEEDED = {
    "offload": (_is_elsewhere, "state of parameters in host memory is there by itself"),
    "caution": (_may_turn, "every update has its gradient's sign"),
    "promote": (_works_in_less, "no rule takes these parameters' updates in fewer bits"),
    "matmul_precision": (_multiplies, "no rule multiplies these parameters as matrices"),
    "ecc": (_is_coded, "no state of these parameters is stored that way"),
    "storage_dtype": (_is_coded, "no state of these parameters is stored that way"),
    "stochastic_rounding": (_rounds, "neither parameters nor state are rounded to fewer bits"),
}
"""Options that need some parameter for which a function is true, and what is said where there is none."""
