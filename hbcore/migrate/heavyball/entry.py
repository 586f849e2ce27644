"""One parameter's entry: its views' slots under hbcore's names, arranged as hbcore cuts the parameter into blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbcore.errors import CheckpointError
from hbcore.migrate.heavyball import blocks, factors
from hbcore.migrate.heavyball.reading import Group, Held, View
from hbcore.migrate.heavyball.slots import Averages, Made, Reading, elementwise
from hbcore.migrate.source import Note, Target


class Place(NamedTuple):
    """A parameter: of which group, its index there, and what messages call its state."""

    g: int
    i: int
    where: str


def entry_of(group: Group, at: Place, averages: Averages, training: bool, target: Target) -> tuple[dict[str, Any], list[Note]]:
    """The entry of a parameter in torch's format, empty if nothing of its state has a place; and what became of its slots.

    Args:
        group: the group that the parameter is in.
        at: which one it is.
        averages: of the group.
        training: whether the model has the weights to train with, if there are two sets.
        target: what it is converted for.
    """
    wanted, entry = target.slots(at.g, at.i), dict[str, Any]()
    mapped, others, steps = dict[str, str](), dict[str, None](), averages.steps
    for view, suffix in _arranged(group, at, target):
        names = {n.partition("@")[0]: shape for n, shape in wanted.items() if (n.endswith(suffix) if suffix else "@" not in n)}
        made = elementwise(r := Reading(at.where, view, averages, names, target.optimizer.param_groups[at.g]))
        factors.add(r, made)
        if "z" in view.slots:
            _second_weights(view.slots["z"].value, averages.betas[0], training, made, target, at)
        steps = min(steps, made.steps)
        for name, value in made.slots.items():
            if name + suffix in wanted and name + suffix not in entry:
                entry[name + suffix] = _shaped(f"{at.where}, slot {name!r}", value, wanted[name + suffix])
                if source := made.origins.get(name):
                    mapped[source] = made.told[source]
        others |= dict.fromkeys(view.unknown)
        others |= {s: None for s, held in view.slots.items() if held.value is not None and s not in made.idle}
    if not entry:
        return {}, [Note("assumed", "parameters without such state", "start anew: HeavyBall has other state for them")]
    notes = [Note("mapped", f"state {source!r}", told) for source, told in mapped.items()]
    lost = [Note("dropped", f"state {s!r}", "this optimizer has no such state") for s in others if s not in mapped]
    return {**entry, "step": float(steps)}, notes + lost


def _arranged(group: Group, at: Place, target: Target) -> list[tuple[View, str]]:
    """The views with the suffix of hbcore's slots for each: ``"@1"`` for the second of several blocks."""
    views = group.params[at.i]
    if len(views) == 1:
        return [(views[0], "")]
    if "step_count" not in group.entries:
        raise CheckpointError(f"{at.where} is cut into {len(views)} blocks, which is supported from HeavyBall 3.2 on.")
    param = target.param(at.g, at.i)
    limit = group.entries.get("max_size_triangular", group.entries.get("max_precond_dim"))
    if not isinstance(limit, int) or limit < 1:
        raise CheckpointError(f"{at.where} has {len(views)} blocks, and its group no size of theirs.")
    places = blocks.theirs(param.shape, limit)
    runs = blocks.ours(target.optimizer.core, target.optimizer.param_groups[at.g], param)
    order = blocks.matched(places, runs)
    if len(places) != len(views) or (runs and order is None):
        raise CheckpointError(
            f"{at.where} has {len(views)} blocks, and {target.name} cuts the parameter, {tuple(param.shape)}, into "
            f"{len(runs)}; pass the same split, merge_dims and largest size."
        )
    return [*((views[v], f"@{k}") for k, v in enumerate(order or ())), (_joined(views, places, param), "")]


def _joined(views: list[View], places: list[Tensor], param: Tensor) -> View:
    """The views' slots of their own shapes as slots of the parameter's: hbcore has some of whole parameters alone."""
    whole = View()
    for name in set.intersection(*(set(view.slots) for view in views)):
        parts = [view.slots[name].value for view in views]
        if all(isinstance(p, Tensor) and p.numel() == len(at) for p, at in zip(parts, places, strict=True)):
            full = parts[0].new_zeros(param.numel())
            for part, at in zip(parts, places, strict=True):
                full[at] = part.reshape(-1)
            whole.slots[name] = Held(views[0].slots[name].rule, full.view(param.shape))
    return whole


def _second_weights(z: Any, beta: float, training: bool, made: Made, target: Target, at: Place) -> None:
    """The second set of weights, as its difference from the parameter's: a schedule-free optimizer's, or MSAMLaProp's."""
    slots, param = target.slots(at.g, at.i), target.param(at.g, at.i).detach()
    if not isinstance(z, Tensor) or z.numel() != param.numel():
        raise CheckpointError(f"{at.where}, slot 'z': its shape is not the parameter's, {tuple(param.shape)}.")
    if "z_minus_y" in slots and not target.weights:
        raise CheckpointError("a schedule-free optimizer's z is relative to the weights: pass them with --model FILE.")
    difference = z.double().reshape(param.shape) - param.to("cpu").double()
    if "z_minus_y" in slots:  # in evaluation the parameter is x, and y = x + (1 - beta) (z - x)
        made.put("z_minus_y", difference if training else beta * difference, "z", ", less the weights")
    elif "perturbation" in slots and target.weights:
        made.put("perturbation", difference if training else -difference, "z", ", less the weights")
    elif "perturbation" in slots:
        made.idle.add("z")  # computed from exp_avg


def _shaped(where: str, value: Any, shape: torch.Size) -> Tensor:
    """A slot's value as hbcore has it: a float tensor of the expected shape."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise CheckpointError(f"{where} is {kind}; expected floats.")
    if value.numel() != shape.numel() or [n for n in value.shape if n != 1] != [n for n in shape if n != 1]:
        raise CheckpointError(
            f"{where} has the shape {tuple(value.shape)}, and {tuple(shape)} here: the parameter has another shape, or the "
            "optimizer other options."
        )
    return value.detach().to(torch.float32).reshape(shape)


def counts(groups: list[Group], ours: list[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """How many parameters each group has, in the checkpoint and in the optimizer."""
    return [len(group.params) for group in groups], [len(group["params"]) for group in ours]
