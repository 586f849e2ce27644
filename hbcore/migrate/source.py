"""What a library whose checkpoints hbcore converts has to provide: one :class:`Source`, a few pure functions of plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

if TYPE_CHECKING:
    from hbcore.optimizer import Optimizer

Kind = Literal["mapped", "dropped", "assumed"]


class Note(NamedTuple):
    """One line of the report.

    Attributes:
        kind: ``"mapped"``: it is in the result, under hbcore's name; ``"dropped"``: hbcore has no place for it; ``"assumed"``:
            the checkpoint does not tell, and this was taken for granted.
        where: a group's entry or a kind of state, as the library names it: ``"param_groups[0]['beta']"``.
        what: what became of it, in a few words.
    """

    kind: Kind
    where: str
    what: str


@dataclass(frozen=True)
class Description:
    """What a checkpoint tells about itself, before there is an optimizer to load it into.

    Attributes:
        name: the optimizer's name in hbcore, or an alias of it; None if the checkpoint does not tell.
        shapes: of each group, its parameters' shapes; None for a parameter whose state does not tell.
        settings: of each group, its entries under hbcore's names: numbers and structure, ``{"lr": 0.1, "caution": True}``. The
            optimizer is built with those that it has. Others should not be here, but in a note of :attr:`Converted.notes`.
        names: of each group, its parameters' names; None where the checkpoint has none.
        hint: where ``name`` is None, the names that fit: ``("SOAP", "PSGDKron")``.
        needs_weights: why the model's weights are needed to convert it; empty if they are not.
        dtypes: of parameters that are not float32, (group, index) -> dtype. Only float64 and complex ones matter here.
    """

    name: str | None
    shapes: Sequence[Sequence[tuple[int, ...] | None]]
    settings: Sequence[Mapping[str, Any]]
    names: Sequence[Sequence[str] | None] = ()
    hint: Sequence[str] = ()
    needs_weights: str = ""
    dtypes: Mapping[tuple[int, int], torch.dtype] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """The optimizer that a checkpoint is converted for.

    Attributes:
        optimizer: it has the same groups, of as many parameters, in the same order. Converting never changes it.
        weights: whether its parameters hold the model's weights as they were saved along with the checkpoint, and not
            zeros of their shapes.
    """

    optimizer: Optimizer
    weights: bool = False

    @property
    def name(self) -> str:
        """The name of the optimizer's class."""
        return self.optimizer.core.name

    def param(self, g: int, i: int) -> torch.Tensor:
        """Parameter ``i`` of group ``g``."""
        found: torch.Tensor = self.optimizer.param_groups[g]["params"][i]
        return found

    def slots(self, g: int, i: int) -> dict[str, torch.Size]:
        """The names and shapes of the slots that a parameter's state has in hbcore, by which :attr:`Converted.state_dict` goes;
        without ``step``, which all have."""
        core = self.optimizer.core
        return {s.name: s.shape for s in core.chain.expected(core.groups[g], self.param(g, i)) if s.rule != "param_ecc"}


class Converted(NamedTuple):
    """A checkpoint in torch's format, and the report on it.

    Attributes:
        state_dict: ``{"state": {index: {"step": count, slot: tensor}}, "param_groups": [{..., "params": [index, ...]}]}``.
            Slots are plain float tensors under hbcore's names, in float32 or float64, of the shapes that
            :meth:`Target.slots` gives; moments as torch has them, not debiased. A slot that is left out starts from zero, if
            it is a whole rule's; a parameter without an entry starts anew. Groups contain numbers under hbcore's names, and
            none of hbcore's own records.
        notes: what became of every entry of the source; where a hundred parameters fare alike, one note for all.
        progress: of each group, the numbers that it carries from step to step, by name: ``{"step": 10.0, "weight_sum": 3.0}``.
            What is left out starts anew.
        training: for optimizers with two sets of weights, whether the model has those to train with.
    """

    state_dict: dict[str, Any]
    notes: list[Note]
    progress: Sequence[Mapping[str, float]] = ()
    training: bool = True


@dataclass(frozen=True)
class Source:
    """A library whose optimizer checkpoints can be converted.

    Attributes:
        name: what ``--from`` calls it: ``"heavyball"``.
        recognises: whether a state dict was saved by the library. Gets anything that ``torch.load(weights_only=True)`` may
            return, hostile input too, and never raises.
        describe: what the state dict tells about itself. Raises CheckpointError if it is malformed.
        convert: the state dict for the target, without changing either. Raises CheckpointError if it does not fit: the
            message says where, in the library's own terms. Tensors of the result may share memory with the source's.
    """

    name: str
    recognises: Callable[[Any], bool]
    describe: Callable[[Mapping[str, Any]], Description]
    convert: Callable[[Mapping[str, Any], Target], Converted]
