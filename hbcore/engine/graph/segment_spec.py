"""A chain as one pure function of tensors: what the backends trace, compile or call, and what the tests take as the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
"""Hyperparameters of a group, the way at each fork, and the step -> the transforms, arranged."""
Reduce = Callable[[Tensor, str, Domain, str], Tensor]
"""``reduce(x, "sum" | "amax", domain, rule)``: the one door through which a rule sees more than one element."""


def length_of(value: Any) -> int | None:
    """How many numbers a hyperparameter is made of; None for a plain one."""
    return len(value) if isinstance(value, (tuple, list)) else None


@dataclass(frozen=True)
class Recipe:
    """Everything static about how a set of parameters is updated. Equal recipes share one compiled program.

    A matrix rule cuts a chain into lanes, and a recipe describes one of them: the lane before the rule ends by writing what the
    rule asks for into tensors named ``stack.<what>``, the one after it begins with the tensor named ``update``.

    Args:
        chain: hyperparameters of a group, the way at each fork, and the step -> its transforms, arranged.
        static: the group's entries that are structure, ``((key, value), ...)``.
        dynamic: the group's entries that may change every step, ``((key, length or None), ...)``: a length for tuples.
        divide: the division backend.
        codec: how slots are stored.
        param_codec: how parameters are stored; None stores them as they are.
        stochastic: bfloat16 is rounded to stochastically, with noise that arrives as tensors named ``noise.<slot>``.
        scaled: gradients come multiplied by ``grad_scale``, and ``found_inf`` skips the step, as torch's GradScaler says.
        maximize: ascend instead of descend.
        branches: the way at each fork of the chain.
        carried: the numbers that a group carries from step to step.
        span: the first transform of this lane, and the one after its last; None for the chain's end.
        takes: the dtype of the update that a matrix rule before this lane made; None where it begins with the gradient.
        feeds: what the matrix rule after this lane reads, and in which dtypes: ``(("update", bfloat16), ...)``.
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
        """Whether the group still has the structure this recipe was made for; its numbers may be any."""
        return bool(
            group["maximize"] == self.maximize
            and all(group[k] == v for k, v in self.static)
            and all(group[k] is not None and length_of(group[k]) == n for k, n in self.dynamic)
        )

    @property
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
        """The transforms of this lane."""
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
        packed = self.param_codec if self.packs(tensors["param"].dtype) else None
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

    def packs(self, dtype: torch.dtype) -> bool:
        """Whether parameters of ``dtype`` are stored with :attr:`param_codec`: those whose first part it keeps."""
        return self.param_codec is not None and self.param_codec.parts("param", torch.float32)["param"] == dtype

    def dtypes(self, param: Tensor, grad: torch.dtype, slots: Mapping[str, Slot]) -> dict[str, torch.dtype]:
        """Every stored tensor and its dtype, ``param`` and ``grad`` first; noise, which is not stored, last."""
        dtypes = {"param": param.dtype, "grad": grad}
        for name, slot in slots.items():
            dtypes.update(codec_of(slot, self.codec).parts(name, compute_dtype(param.dtype)))
        if self.param_codec is not None and self.packs(param.dtype):
            dtypes.update(self.param_codec.parts("param", torch.float32))
        if self.takes is not None:
            dtypes["update"] = self.takes
        dtypes.update({STACK + name: dtype for name, dtype in self.feeds})
        if self.stochastic:
            dtypes.update({NOISE + slot: torch.int32 for slot in self._rounded(param.dtype, slots)})
        return dtypes

    def _rounded(self, param: torch.dtype, slots: Mapping[str, Slot]) -> list[str]:
        """The slots, ``param`` among them, that are stored with fewer bits than they are computed in."""
        narrow = self.codec.rounds and compute_dtype(param) == torch.float32
        rounded = [name for name, slot in slots.items() if narrow and not slot.exact]
        exact = self.param_codec is not None and self.packs(param) and not self.param_codec.rounds
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
