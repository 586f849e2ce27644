"""How many bytes a model, its gradients and an optimizer's state will take, before any of it is allocated."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hbcore import registry
from hbcore.engine.chain_spec import seen
from hbcore.engine.core import Group, OptimizerCore
from hbcore.engine.params import check_params, is_lazy
from hbcore.engine.planning.partition import partition
from hbcore.errors import OptionError, ParameterError
from hbcore.optimizer import Optimizer
from hbcore.rules import route
from hbcore.state.expected import expected
from hbcore.wrappers.composite import Composite

TITLES = ("parameters", "gradient", "state", "derived", "stacks")


class Slot(NamedTuple):
    """One slot of an optimizer, over all parameters: its name, the rule that owns it, its stored dtypes, and its bytes."""

    name: str
    rule: str
    dtypes: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes on the device, and of the state in host memory; printed as a table.

    Attributes:
        elements: the model's elements, frozen ones too.
        parameters: the parameters, in the dtype that they are trained in: bfloat16 under ``param_ecc``.
        gradient: the gradients of all trainable parameters, in that dtype.
        state: what the optimizer keeps from step to step and saves, ``param_ecc``'s corrections among it.
        derived: what it keeps and does not save, since it follows from the state.
        stacks: the inputs of matrix rules, which have memory only during a step on a GPU, and always elsewhere.
        slots: the state and what is derived from it, slot by slot; with ``offload="cpu"`` most of these bytes are the host's.
        host: the state that ``offload="cpu"`` keeps in host memory, which is not among :attr:`state`. In a step some of it is
            on the device for a moment: a few shares of 32 MiB, and what matrix rules use at once.
    """

    elements: int
    parameters: int
    gradient: int
    state: int
    derived: int
    stacks: int
    slots: tuple[Slot, ...]
    host: int = 0

    @property
    def total(self) -> int:
        """All that is on the device."""
        return sum(getattr(self, title) for title in TITLES)

    @property
    def per_parameter(self) -> Mapping[str, float]:
        """The bytes for each of the model's elements, by the attributes' names, and ``"total"``."""
        return {title: getattr(self, title) / max(self.elements, 1) for title in (*TITLES, "total", "host")}

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """The table: a name, bytes for each element, and bytes."""
        each = self.per_parameter
        for title in TITLES:
            yield title, f"{each[title]:.3g}", f"{getattr(self, title):,}"
            yield from self._slots() if title == "state" and not self.host else ()
        yield "total", f"{each['total']:.3g}", f"{self.total:,}"
        if self.host:
            yield "in host memory", f"{each['host']:.3g}", f"{self.host:,}"
            yield from self._slots()

    def _slots(self) -> Iterator[tuple[str, str, str]]:
        for slot in self.slots:
            name = f"  {slot.name} ({', '.join(slot.dtypes)})"
            yield name, f"{slot.bytes / max(self.elements, 1):.3g}", f"{slot.bytes:,}"

    def __str__(self) -> str:
        rows = [(f"{self.elements:,} elements", "B each", "bytes"), *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


def memory(model: nn.Module | Iterable[Any], optimizer: str | type[Optimizer | Composite] = "AdamW", **options: Any) -> Memory:
    """What ``optimizer(model.parameters(), **options)`` will take, with the model. Allocates nothing.

    Activations, kernels' workspaces and the step counters, which are 4 bytes a tensor in host memory, are not counted.

    Args:
        model: a module, parameters, ``(name, parameter)`` pairs or groups of them, on any device: those of a model on the meta
            device are enough. Nothing of it is changed.
        optimizer: a registered name or a class; its own arguments are among the options.
        **options: as for the optimizer: ``ecc``, ``param_ecc``, ``storage_dtype``, ...

    Returns:
        The bytes, of one process that has the whole model.

    Raises:
        OptionError: the optimizer is not built on hbcore's engine, or refuses an option.
        ParameterError: a parameter is not initialized yet, or the optimizer refuses one.
    """
    cls: Any = registry.get(optimizer) if isinstance(optimizer, str) else optimizer
    if not (isinstance(cls, type) and issubclass(cls, (Optimizer, Composite))):
        raise OptionError(
            f"memory: {optimizer!r} is not built on hbcore's engine, whose optimizers' state is known beforehand."
        )
    given = model.named_parameters() if isinstance(model, nn.Module) else model
    groups = [_on_meta(member) for member in check_params("memory", given)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it would do to the parameters, it does to these
        built: Any = cls(groups, **options)
    cores = [child.core for child in (built.children if isinstance(built, Composite) else [built])]
    members = [(core, group, p) for core in cores for group in core.groups for p in group["params"]]
    slots, derived, host = _slots(members)
    return Memory(
        elements=sum(p.numel() for *_, p in members),
        parameters=sum(p.nbytes for *_, p in members),
        gradient=sum(p.nbytes for *_, p in members if p.requires_grad),
        state=sum(slot.bytes for slot in slots) - derived - host,
        derived=derived,
        stacks=max(_inputs(members).values(), default=0),
        slots=slots,
        host=host,
    )


def _on_meta(member: Any) -> Any:
    """A parameter, a named one or a group of them, without memory."""
    if isinstance(member, dict):
        return {**member, "params": [_on_meta(one) for one in member["params"]]}
    if isinstance(member, tuple):
        return member[0], _on_meta(member[1])
    if is_lazy(member):
        raise ParameterError("memory: a parameter is not initialized yet; run the model once on an example.")
    return nn.Parameter(torch.empty_like(member, device="meta"), requires_grad=member.requires_grad)


def _slots(members: Iterable[tuple[OptimizerCore, Group, Tensor]]) -> tuple[tuple[Slot, ...], int, int]:
    """Every slot, the bytes of those that are derived, and of those in host memory."""
    found: dict[tuple[str, str], tuple[dict[str, None], int]] = {}
    shared: set[tuple[int, str]] = set()
    derived = host = 0
    for core, group, p in members:
        if not p.requires_grad or not p.numel():
            continue
        chain, settings = core.chain.chain(group, p), core.settings
        flat = {t.name for t in chain if t.flat} if settings.multi_tensor else set()
        for slot in expected(chain, seen(p), settings.codec, settings.param_codec, derived=True):
            if slot.scalar and slot.rule in flat:  # one for all parameters of a group
                if (id(group), slot.name) in shared:
                    continue
                shared.add((id(group), slot.name))
            stored = slot.blank(torch.empty_like(seen(p), device="meta"))
            size = sum(t.nbytes for t in stored.values())
            key = (slot.name.partition("@")[0].partition("#")[0] if slot.rule != "param_ecc" else slot.name, slot.rule)
            dtypes, total = found.setdefault(key, ({}, 0))
            dtypes.update(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in stored.values()))
            found[key] = dtypes, total + size
            derived += size if slot.derived else 0
            stays = slot.derived or (slot.scalar and not (slot.kind and slot.kind.shared))
            host += size if settings.offload is not None and not stays else 0
    made = (Slot(name, rule, tuple(dtypes), size) for (name, rule), (dtypes, size) in found.items())
    return tuple(made), derived, host


def _inputs(members: Iterable[tuple[OptimizerCore, Group, Tensor]]) -> dict[int, int]:
    """The bytes of the inputs of matrix rules, by how many matrix rules come before them."""
    found: dict[int, int] = {}
    for core, group, p in members:
        if p.requires_grad and p.numel():
            spec = replace(core.chain.spec(group), branches=route.branches(core.chain.forked(group), p))
            for level, segment in enumerate(partition(spec, group, p, core.settings.promote).segments):
                found[level] = found.get(level, 0) + sum(p.numel() * dtype.itemsize for _, dtype in segment.feeds)
    return found
