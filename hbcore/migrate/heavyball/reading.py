"""HeavyBall's state dicts of all releases, unpacked into one form: groups of parameters of views of named slots.

=========  ======================================================================  ========================================
release    a parameter's state                                                     the group's count of steps
=========  ======================================================================  ========================================
1.7        ``{"update_by_adam_exp_avg": tensor, "Q": [tensor, ...]}``              ``"step"`` of its first parameter
2          ``{view: {"update_by_adam_exp_avg_0": tensor, ...}}``                   the same
3.0, 3.1   the same                                                                the group's ``"_group_step"``
3.2        the same; rules on stacks keep a leading dimension of size 1            the group's ``"step_count"``
=========  ======================================================================  ========================================

A view is the parameter itself, or one of the blocks that SOAP and PSGD cut it into. A key is the name of the function, of the
slot, and from 2 on the function's place in the chain. ``::ecc`` behind it marks a correction of a 16-bit float.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbcore.errors import CheckpointError
from hbcore.migrate.plain import number

SLOTS = (
    "exp_avg_fast", "exp_avg_slow", "exp_avg_sq", "exp_avg", "momentum", "mu_product", "fisher_approx", "running_lower_bound",
    "precond_grad_accum", "mars_old_grad", "scion_state", "init_norm", "Q_basis", "Q_cache", "velocity", "param_ema", "exprs",
    "step", "GG", "Q", "U", "V", "d", "z",
)  # fmt: skip
KEY = re.compile(rf"(?:(\w+?)_)?({'|'.join(SLOTS)})(?:_\d+)?(::ecc)?")
STACKED = re.compile(r"heavy_\w+|\w*soap\w*|\w*shampoo|lather|(delayed_)?psgd(_pro)?")
"""The rules whose slots have a leading dimension in 3.2."""

CORRECTED = {torch.bfloat16: (7, 127), torch.float16: (10, 15)}
"""The 16-bit floats: how many bits the mantissa has, and the exponent's bias."""


class Held(NamedTuple):
    """A slot as it was saved: its value, and the rule that owns it, ``"adam"`` for ``scale_by_adam`` and ``update_by_adam``."""

    rule: str
    value: Any


@dataclass
class View:
    """The state of a parameter, or of a block of it.

    Attributes:
        slots: by name; a rule's name is in :class:`Held`.
        unknown: the keys that are none of :data:`SLOTS`.
    """

    slots: dict[str, Held] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


@dataclass
class Group:
    """A param group.

    Attributes:
        entries: its entries, numbers for tensors of one element.
        steps: how many steps it has taken.
        params: its parameters' views, in order; none for a parameter without state.
        keys: the parameters' keys in the state dict.
    """

    entries: dict[str, Any]
    steps: int
    params: list[list[View]]
    keys: list[Any]

    @property
    def rules(self) -> set[str]:
        """The rules that have state."""
        return {held.rule for views in self.params for view in views for held in view.slots.values()} - {""}


def read(state_dict: Mapping[str, Any]) -> list[Group]:
    """The groups of a state dict.

    Raises:
        CheckpointError: it has another form than HeavyBall's.
    """
    if "optimizers" in state_dict:
        raise CheckpointError("this is the state of several optimizers: convert each of them, --key optimizer.optimizers.0.")
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(groups, (list, tuple)) or not groups:
        raise CheckpointError(f"a state dict has 'state' and 'param_groups'; this one has {sorted(map(str, state_dict))[:8]}.")
    return [_group(g, group, state) for g, group in enumerate(groups)]


def _group(g: int, group: Any, state: Mapping[Any, Any]) -> Group:
    if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
        raise CheckpointError(f"param_groups[{g}] has no list of 'params'.")
    keys = list(group["params"])
    entries = {str(k): number(v) for k, v in group.items() if k != "params"}
    found = [_views(key, state.get(key), stacked="step_count" in entries) for key in keys]
    counts = [steps for steps, _ in found if steps is not None]
    count = next((entries[k] for k in ("step_count", "_group_step") if entries.get(k) is not None), counts[0] if counts else 0)
    if isinstance(count, bool) or not isinstance(count, (int, float)) or not 0 <= count < 2**53:
        raise CheckpointError(f"param_groups[{g}] has the count of steps {count!r:.60}; expected a whole number.")
    return Group(entries, int(count), [views for _, views in found], keys)


def _views(key: Any, entry: Any, stacked: bool) -> tuple[Any, list[View]]:
    """A parameter's count of steps, if it has one, and its views."""
    if entry is None or entry == {}:
        return None, []
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"state[{key!r:.40}] is {type(entry).__name__}; expected a dict.")
    parts = entry if all(isinstance(v, Mapping) for v in entry.values()) else {0: entry}
    if sorted(map(str, parts)) != sorted(map(str, range(len(parts)))):
        raise CheckpointError(f"state[{key!r:.40}] has the views {list(map(str, parts))[:8]}; expected 0, 1, ...")
    ordered = [parts[k] for k in sorted(parts, key=lambda k: int(k))]
    steps = next((number(part["step"]) for part in ordered if "step" in part), None)
    return steps, [
        view for view in (_view(f"state[{key!r:.40}]", part, stacked) for part in ordered) if view.slots or view.unknown
    ]


def _view(where: str, entry: Mapping[Any, Any], stacked: bool) -> View:
    view, corrections = View(), dict[str, Tensor]()
    for key, value in entry.items():
        match = KEY.fullmatch(str(key))
        if key in ("step", "is_initialized") or str(key).startswith("_warmup_"):
            continue  # the group's count, and which functions have run
        if match is None:
            view.unknown.append(str(key)[:60])
            continue
        rule = re.sub(r"^(scale|update)_by_", "", match[1] or "")
        if match[3]:
            corrections[match[2]] = value
        elif not (match[2] == "step" and not rule):
            value = _unstacked(value) if stacked and STACKED.fullmatch(rule) else value
            view.slots[match[2]] = Held(rule, value)
    for slot, correction in corrections.items():
        if slot not in view.slots:
            raise CheckpointError(f"{where} has a correction of {slot!r}, and not the numbers that it corrects.")
        held = view.slots[slot]
        view.slots[slot] = held._replace(value=corrected(f"{where}[{slot!r}]", held.value, correction))
    return view


def _unstacked(value: Any) -> Any:
    """A value without the leading dimension of stacks."""
    if isinstance(value, Tensor):
        return value[0] if value.ndim and value.shape[0] == 1 else value
    if isinstance(value, list):
        return [_unstacked(one) for one in value]
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Tensor):
        shape = value[0][1:] if isinstance(value[0], (list, tuple)) and len(value[0]) == 3 else value[0]
        return shape, _unstacked(value[1])
    return value


def corrected(where: str, short: Any, correction: Any) -> Tensor:
    """The float32 that a 16-bit float and a correction stand for: the correction counts fractions of half the float's last bit.

    Raises:
        CheckpointError: they are no such pair.
    """
    fits = isinstance(short, Tensor) and isinstance(correction, Tensor) and short.shape == correction.shape
    if not fits or short.dtype not in CORRECTED or correction.dtype not in (torch.int8, torch.int16):
        raise CheckpointError(f"{where} is stored as a float and a correction, in dtypes that HeavyBall does not use.")
    mantissa, bias = CORRECTED[short.dtype]
    exponent = ((short.view(torch.int16) & 0x7FFF) >> mantissa).to(torch.int32).clamp(min=1) - bias - mantissa
    share = correction.double() / torch.iinfo(correction.dtype).max
    value: Tensor = short.double() + torch.ldexp(share, exponent - 1)
    return value.float()


def matrix(factor: Any) -> Tensor | None:
    """A preconditioner's factor as a matrix or a diagonal: ``(shape, line)`` has an upper triangle's rows in one line.

    Raises:
        CheckpointError: the line has another length.
    """
    if not isinstance(factor, tuple):
        return factor if isinstance(factor, Tensor) else None
    shape, line = factor if len(factor) == 2 else (None, None)
    if not isinstance(line, Tensor):
        raise CheckpointError(f"a factor is {factor!r:.60}; expected a shape and a tensor.")
    if shape is None:
        return line
    n = shape[-1] if isinstance(shape, Sequence) and shape else None
    if not isinstance(n, int) or line.ndim != 1 or line.numel() != n * (n + 1) // 2:
        raise CheckpointError(f"a factor of shape {shape!r:.40} has {line.numel()} numbers, which are no triangle of it.")
    full = line.new_zeros(n, n)
    rows, columns = torch.triu_indices(n, n)
    full[rows, columns] = line
    return full
