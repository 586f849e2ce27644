"""A chain as one pure function of tensors: what backends trace, compile or call, and what the tests take as the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hbcore.engine.graph.program import CARRIED, NOISE, STACK
from hbcore.rules.division import Divide
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.transform import Context, Domain, Slot, Transform
from hbcore.state.codec import StateCodec, codec_of, narrowed

Chain = Callable[[SimpleNamespace, tuple[bool, ...], Any], tuple[Transform, ...]]
"""A group's hyperparameters, the branch taken at each fork, and the step -> the transforms, arranged."""
Reduce = Callable[[Tensor, str, Domain, str], Tensor]
"""``reduce(x, "sum" | "amax", domain, rule)``: the only way in which a rule sees more than one element."""


def length_of(value: Any) -> int | None:
    """How many numbers a hyperparameter has; None for a plain number."""
    return len(value) if isinstance(value, (tuple, list)) else None


def fixed(value: Any) -> Any:
    """A structural entry as something that can be compared and hashed: a list, which users may write, as a tuple."""
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class SegmentSpec:
    """Everything static about how a set of parameters is updated. Equal specs share one compiled program.

    A segment is a run of elementwise transforms. A matrix rule cuts a chain in two: the segment before it ends by writing what
    the rule asks for into tensors named ``stack.<what>``, the one after it begins with the tensor named ``update``.

    Args:
        chain: a group's hyperparameters, the branch taken at each fork, and the step -> its transforms, arranged.
        static: the group's entries that are structure, ``((key, value), ...)``.
        dynamic: the group's entries that may change every step, ``((key, length or None), ...)``: a length for tuples.
        divide: the division backend.
        codec: how slots are stored.
        param_codec: how parameters are stored; None stores them as they are.
        stochastic: round bfloat16 values stochastically, with noise that arrives as tensors named ``noise.<slot>``.
        scaled: gradients come multiplied by ``grad_scale``, and ``found_inf`` skips the step, as torch's GradScaler asks.
        maximize: ascend instead of descend.
        branches: the branch taken at each fork of the chain.
        carried: the numbers that a group carries from step to step.
        span: the first transform of this segment, and the one after its last; None for the end of the chain.
        takes: the dtype of the update that the matrix rule before this segment made; None if it begins with the gradient.
        feeds: what the matrix rule after this segment reads, with dtypes: ``(("update", bfloat16), ...)``.
    """

    chain: Chain
    static: tuple[tuple[str, Any], ...]
    dynamic: tuple[tuple[str, int | None], ...]
    divide: Divide
    codec: StateCodec
    maximize: bool = False
    param_codec: StateCodec | None = None
    scaled: bool = False
    stochastic: bool = False
    branches: tuple[bool, ...] = ()
    carried: tuple[str, ...] = ()
    span: tuple[int, int | None] = (0, None)
    takes: torch.dtype | None = None
    feeds: tuple[tuple[str, torch.dtype], ...] = ()

    def fits(self, group: Mapping[str, Any]) -> bool:
        """Whether the group still has the structure that this spec describes; its numbers may be anything."""
        get, values = self._structure
        present = get(group)
        if present != values and tuple(map(fixed, present)) != values:
            return False
        for key, length in self.dynamic:
            value = group[key]
            if value is None or (len(value) if isinstance(value, (tuple, list)) else None) != length:
                return False
        return True

    @cached_property
    def _structure(self) -> tuple[Callable[[Mapping[str, Any]], Any], Any]:
        """How to read a group's structural entries in one call, and what they have to be."""
        entries = {"maximize": self.maximize, **dict(self.static)}
        get = itemgetter(*entries) if len(entries) > 1 else lambda group: (group["maximize"],)
        return get, tuple(entries.values())

    @cached_property
    def scalar_names(self) -> tuple[str, ...]:
        """The 0-d inputs, flattened: ``lr``, ``betas.0``, ``betas.1``, ..., ``step``, ``model_numel``."""
        names = [k if n is None else f"{k}.{i}" for k, n in self.dynamic for i in range(n or 1)]
        names += [CARRIED + name for name in self.carried]
        return (*names, *(("grad_scale", "found_inf") if self.scaled else ()), "step", "model_numel")

    def whole_chain(self, scalars: Mapping[str, Any]) -> tuple[Transform, ...]:
        """Every transform, hyperparameters bound to ``scalars``, which has an entry for each of :attr:`scalar_names`."""
        values = dict(self.static)
        for key, n in self.dynamic:
            values[key] = scalars[key] if n is None else tuple(scalars[f"{key}.{i}"] for i in range(n))
        return self.chain(SimpleNamespace(**values), self.branches, scalars["step"])

    def transforms(self, scalars: Mapping[str, Any]) -> tuple[Transform, ...]:
        """The transforms of this segment."""
        return self.whole_chain(scalars)[self.span[0] : self.span[1]]

    def update(
        self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Tensor], numel: Tensor, reduce: Reduce
    ) -> dict[str, Tensor]:
        """Run the chain on one parameter and return the new value of every stored tensor. Pure.

        Args:
            tensors: ``param``, ``grad`` and each slot's stored tensors, all of one shape.
            scalars: a 0-d float64 tensor for each of :attr:`scalar_names`.
            numel: how many elements the full tensor has, 0-d float64.
            reduce: how to reduce over a tensor or the model.
        """
        dtype = compute_dtype(tensors["param"].dtype)
        grad = tensors["grad"].to(dtype)
        if self.scaled:
            grad = grad * (1 / scalars["grad_scale"])
        if self.maximize:
            grad = -grad
        packed = self.param_codec if self.narrows(tensors["param"].dtype) else None
        param = packed.read(tensors, "param", dtype) if packed else tensors["param"].to(dtype)
        stored, update = {}, grad if self.takes is None else tensors["update"].to(dtype)
        for t in self.transforms(scalars):
            slots = t.slots(tensors["param"])
            state = {name: codec_of(slot, self.codec).read(tensors, name, dtype) for name, slot in slots.items()}
            state.update({name: scalars[CARRIED + name] for name in t.scalars()})
            update, new = t.update(update, state, self._context(t, param, grad, scalars, numel, reduce))
            for name, value in new.items():
                if name in t.scalars():
                    stored[CARRIED + name] = value
                else:
                    codec = codec_of(slots[name], self.codec)
                    stored.update(codec.write(tensors, name, value, tensors.get(NOISE + name)))
        if self.feeds:
            made = {"update": update, "grad": grad, "param": param}
            return {**stored, **{STACK + name: made[name].to(d) for name, d in self.feeds}}
        noise = tensors.get(f"{NOISE}param")
        plain = {"param": narrowed(update, tensors["param"].dtype, noise)}
        stored.update(packed.write(tensors, "param", update, noise) if packed else plain)
        if self.scaled:
            skip = scalars["found_inf"] > 0
            stored = {name: torch.where(skip, tensors[name], value) for name, value in stored.items()}
        return stored

    def narrows(self, dtype: torch.dtype) -> bool:
        """Whether parameters of ``dtype`` are stored with :attr:`param_codec`: if it is the dtype of the codec's first part."""
        return self.param_codec is not None and self.param_codec.parts("param", torch.float32)["param"] == dtype

    def dtypes(self, param: Tensor, grad: torch.dtype, slots: Mapping[str, Slot]) -> dict[str, torch.dtype]:
        """Every tensor that the segment reads or writes, and its dtype: ``param`` and ``grad`` first, noise last."""
        dtypes = {"param": param.dtype, "grad": grad}
        for name, slot in slots.items():
            dtypes.update(codec_of(slot, self.codec).parts(name, compute_dtype(param.dtype)))
        if self.param_codec is not None and self.narrows(param.dtype):
            dtypes.update(self.param_codec.parts("param", torch.float32))
        if self.takes is not None:
            dtypes["update"] = self.takes
        dtypes.update({STACK + name: dtype for name, dtype in self.feeds})
        if self.stochastic:
            dtypes.update({NOISE + slot: torch.int32 for slot in self._rounded(param.dtype, slots)})
        return dtypes

    def _rounded(self, param: torch.dtype, slots: Mapping[str, Slot]) -> list[str]:
        """The slots, and ``param``, that are stored with fewer bits than they are computed with."""
        narrow = self.codec.rounds and compute_dtype(param) == torch.float32
        rounded = [name for name, slot in slots.items() if narrow and not slot.exact]
        exact = self.param_codec is not None and self.narrows(param) and not self.param_codec.rounds
        return [*rounded, "param"] if param == torch.bfloat16 and not exact and not self.feeds else rounded

    def _context(
        self, t: Transform, param: Tensor, grad: Tensor, scalars: Mapping[str, Tensor], numel: Tensor, reduce: Reduce
    ) -> Context:
        return Context(
            param=param,
            grad=grad,
            step=scalars["step"],
            divide=self.divide,
            sum=lambda x: reduce(x, "sum", t.domain, t.name),
            amax=lambda x: reduce(x, "amax", t.domain, t.name),
            numel=scalars["model_numel"] if t.domain == Domain.MODEL else numel,
        )
