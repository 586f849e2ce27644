"""A segment of a chain as one pure function of tensors, which backends trace, compile or call; the tests' reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hbcore.engine.entry_forms import fixed, getter, length_of
from hbcore.engine.graph.draws import Draws
from hbcore.engine.graph.program import CARRIED, NOISE, NONFINITE, REPORT, STACK
from hbcore.engine.graph.where import where
from hbcore.errors import RuleError
from hbcore.rules.author_errors import naming
from hbcore.rules.contract import Slots, checked, slots_of, title
from hbcore.rules.division import Divide
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.transform import Context, Domain, Slot, Transform
from hbcore.state.codec import ROUNDED, StateCodec, narrowed
from hbcore.state.codec_choice import codec_of, noise_bits, per_block_of


class Hypers(SimpleNamespace):
    """A group's entries as ``chain(h)`` reads them."""

    def __getattr__(self, name: str) -> Any:  # only for names that are none of them
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(f"{where()}: h.{name} does not exist; the group has {', '.join(sorted(vars(self)))}.")


Chain = Callable[[SimpleNamespace, tuple[bool, ...], Any], tuple[Transform, ...]]
"""A group's hyperparameters, the branch taken at each fork, and the step -> the transforms, arranged."""
Reduce = Callable[[Tensor, str, Domain, str], Tensor]
"""``reduce(x, "sum" | "amax", domain, rule)``: the only way for a rule to see more than one element."""
Give = Callable[[Transform, Iterable[Any]], None]
"""``give(rule, tensors)``: told what each rule is given before it runs."""


def norms(before: Tensor, after: Tensor, numel: Tensor, reduce: Reduce) -> dict[str, Tensor]:
    """What ``report_norms=True`` says of one parameter: the root mean squares of its change and of its new value, 0-d."""
    values = {REPORT + "update": after - before, REPORT + "weight": after}
    return {name: (reduce(x * x, "sum", Domain.TENSOR, "report_norms") / numel).sqrt() for name, x in values.items()}


def unless(skip: Tensor | None, tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New values of stored tensors, or the old ones if ``skip``; the host takes back what groups carry; reports have none."""
    if skip is None:
        return dict(stored)
    return {n: v if n.startswith((CARRIED, REPORT)) else torch.where(skip, tensors[n], v) for n, v in stored.items()}


@dataclass(frozen=True)
class SegmentSpec:
    """The static description of how a set of parameters is updated. Equal specs share one compiled program.

    A segment is a run of elementwise transforms. A matrix rule splits a chain in two: the segment before it ends by writing the
    rule's inputs to tensors named ``stack.<name>``, the segment after it starts from the tensor named ``update``.

    Args:
        chain: a group's hyperparameters, the branch taken at each fork, and the step -> its transforms, arranged.
        static: the group's structural entries, ``((key, value), ...)``.
        dynamic: the group's entries that may change every step, ``((key, length or None), ...)``, with lengths for tuples.
        divide: the division backend.
        codec: how slots are stored, of parameters like those that this is for (:func:`~hbcore.state.codec_choice.fitting`).
        param_codec: how parameters are stored; None stores them as they are.
        stochastic: round to bfloat16 and float16 stochastically, with noise from tensors named ``noise.<slot>``.
        scaled: gradients are multiplied by ``grad_scale`` and ``found_inf`` skips the step (torch's GradScaler protocol).
        skip_nonfinite: a step in which a gradient of the model is not finite changes nothing.
        maximize: ascend instead of descend.
        branches: the branch taken at each fork of the chain.
        carried: names of the numbers that a group carries from step to step.
        span: indices of the segment's first transform and of the one after its last; None for the end of the chain.
        takes: dtype of the update from the matrix rule before this segment; None if the segment starts from the gradient.
        feeds: inputs of the matrix rule after this segment, with dtypes: ``(("update", bfloat16), ...)``.
        slots: each transform's slots, without shapes, for the whole chain; None to ask the transforms.
        draws: the random inputs of this segment's transforms.
        norms: report the root mean squares of the step and of the weights.
    """

    chain: Chain
    static: tuple[tuple[str, Any], ...]
    dynamic: tuple[tuple[str, int | None], ...]
    divide: Divide
    codec: StateCodec
    maximize: bool = False
    skip_nonfinite: bool = False
    param_codec: StateCodec | None = None
    scaled: bool = False
    stochastic: bool = False
    branches: tuple[bool, ...] = ()
    carried: tuple[str, ...] = ()
    span: tuple[int, int | None] = (0, None)
    takes: torch.dtype | None = None
    feeds: tuple[tuple[str, torch.dtype], ...] = ()
    slots: tuple[tuple[tuple[str, Slot], ...], ...] | None = None
    draws: tuple[str, ...] = ()
    norms: bool = False

    def fits(self, group: Mapping[str, Any]) -> bool:
        """Whether the group still has this spec's structure; its numbers may differ."""
        get, values = self._structure
        present = get(group)
        if present != values and tuple(map(fixed, present)) != values:
            return False
        for key, length in self.dynamic:
            value = group[key]
            kind = value.__class__
            if kind is float or kind is int:  # without a call
                present_length = None
            elif value is None:
                return False
            else:
                present_length = len(value) if kind is tuple else length_of(value)
            if present_length != length:
                return False
        return True

    @cached_property
    def _structure(self) -> tuple[Callable[[Mapping[str, Any]], Any], Any]:
        """A getter of a group's structural entries in one call, and their expected values."""
        entries = {"maximize": self.maximize, **dict(self.static)}
        return getter(entries), tuple(entries.values())

    @cached_property
    def numbers(self) -> tuple[str, ...]:
        """The names of the scalar slots of this segment."""
        slots = (self.slots or ())[self.span[0] : self.span[1]]
        return tuple(name for some in slots for name, slot in some if slot.scalar)

    @cached_property
    def scalar_names(self) -> tuple[str, ...]:
        """The 0-d inputs, flattened: ``lr``, ``betas.0``, ``betas.1``, ..., ``step``, ``model_numel``."""
        return (*self.numbered, *(("grad_scale", "found_inf") if self.scaled else ()), "step", "model_numel")

    @cached_property
    def numbered(self) -> tuple[str, ...]:
        """Those of them that are a group's: its hyperparameters and what it carries."""
        names = [k if n is None else f"{k}.{i}" for k, n in self.dynamic for i in range(1 if n is None else n)]
        return (*names, *(CARRIED + name for name in self.carried))

    def whole_chain(self, scalars: Mapping[str, Any]) -> tuple[Transform, ...]:
        """Every transform of the chain, with hyperparameters bound to ``scalars`` (an entry per :attr:`scalar_names`)."""
        values = dict(self.static)
        for key, n in self.dynamic:
            values[key] = scalars[key] if n is None else tuple(scalars[f"{key}.{i}"] for i in range(n))
        return self.chain(Hypers(**values), self.branches, scalars["step"])

    def transforms(self, scalars: Mapping[str, Any]) -> tuple[Transform, ...]:
        """The transforms of this segment."""
        return self.whole_chain(scalars)[self.span[0] : self.span[1]]

    def update(
        self,
        tensors: Mapping[str, Tensor],
        scalars: Mapping[str, Tensor],
        numel: Tensor,
        reduce: Reduce,
        give: Give | None = None,
    ) -> dict[str, Tensor]:
        """Run the chain on one parameter and return the new value of every stored tensor. Pure.

        Args:
            tensors: ``param``, ``grad`` and each slot's stored tensors, all of the same shape; and what :meth:`given` names.
            scalars: a 0-d float64 tensor per entry of :attr:`scalar_names`.
            numel: the number of elements of the full tensor, 0-d float64.
            reduce: the reduction over a tensor or the model.
            give: told what each rule is given.

        Raises:
            RuleError: a rule returned something else than its update and its slots.
        """
        dtype = compute_dtype(tensors["param"].dtype)
        grad = tensors["grad"].to(dtype)
        if self.scaled:
            grad = grad * (1 / scalars["grad_scale"])
        if self.maximize:
            grad = -grad
        skip = self._skip(tensors, scalars, grad, reduce)
        packed = self.param_codec if self.narrows(tensors["param"].dtype) else None
        param = packed.read(tensors, "param", dtype) if packed else tensors["param"].to(dtype)
        stored, update = {}, grad if self.takes is None else tensors["update"].to(dtype)
        for t, slots in self._with_slots(scalars, tensors["param"]):
            stored_as = {name: codec_of(name, slot, self.codec) for name, slot in slots.items()}
            state = Slots(t, {name: codec.read(tensors, name, dtype) for name, codec in stored_as.items()})
            carried = t.scalars()
            state.update({name: scalars[CARRIED + name] for name in carried})
            draws = Draws(t, tensors, update.shape)
            context = self._context(t, param, grad, scalars, numel, reduce, draws)
            if give is not None:
                give(t, (update, *state.values(), *context))
            with naming(t):
                update, new = checked(t, t.update(update, state, context), update, state)
            for name, value in new.items():
                if name in carried:
                    stored[CARRIED + name] = value
                else:
                    stored.update(stored_as[name].write(tensors, name, value, tensors.get(NOISE + name)))
        if self.feeds:
            made = {"update": update, "grad": grad, "param": param}
            if skip is not None:  # no rule should meet what is not finite, though nothing is kept of its results
                made.update(update=torch.where(skip, 0.0, update), grad=torch.where(skip, 0.0, grad))
            fed = {STACK + name: made[name].to(d) for name, d in self.feeds}
            return {**unless(skip, tensors, stored), **fed}
        noise = tensors.get(f"{NOISE}param")
        plain = {"param": narrowed(update, tensors["param"].dtype, noise)}
        stored.update(packed.write(tensors, "param", update, noise) if packed else plain)
        if self.norms:
            stored.update(norms(param, update if skip is None else torch.where(skip, param, update), numel, reduce))
        return unless(skip, tensors, stored)

    def given(self, param: torch.dtype) -> dict[str, torch.dtype]:
        """The 0-d inputs beside parameters of a dtype, and theirs: scalar slots, and what another segment found nonfinite."""
        found = (NONFINITE,) if self.skip_nonfinite and self.takes is not None else ()
        return dict.fromkeys((*self.numbers, *found), compute_dtype(param))

    def _skip(
        self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Tensor], grad: Tensor, reduce: Reduce
    ) -> Tensor | None:
        """Whether the step changes nothing, 0-d bool; None if that is not asked for."""
        skip = scalars["found_inf"] > 0 if self.scaled else None
        if not self.skip_nonfinite:
            return skip
        found = tensors.get(NONFINITE)
        if found is None:
            found = reduce((grad.abs() < math.inf).logical_not().to(grad.dtype), "amax", Domain.MODEL, "skip_nonfinite")
        return found > 0 if skip is None else skip | (found > 0)

    def _with_slots(self, scalars: Mapping[str, Any], param: Tensor) -> Iterable[tuple[Transform, Mapping[str, Slot]]]:
        """The transforms of this segment, and what slots they have."""
        if self.slots is None:
            return ((t, slots_of(t, param)) for t in self.transforms(scalars))
        return zip(self.transforms(scalars), map(dict, self.slots[self.span[0] : self.span[1]]), strict=True)

    def narrows(self, dtype: torch.dtype) -> bool:
        """Whether parameters of ``dtype`` use :attr:`param_codec`: its ``param`` part has that dtype."""
        return self.param_codec is not None and self.param_codec.parts("param", torch.float32)["param"] == dtype

    def dtypes(self, param: Tensor, grad: torch.dtype, slots: Mapping[str, Slot]) -> dict[str, torch.dtype]:
        """The dtype of every tensor that the segment reads or writes; ``param`` and ``grad`` first, noise last."""
        dtypes = {"param": param.dtype, "grad": grad}
        for name, slot in slots.items():
            dtypes.update(codec_of(name, slot, self.codec).parts(name, compute_dtype(param.dtype)))
        if self.param_codec is not None and self.narrows(param.dtype):
            dtypes.update(self.param_codec.parts("param", torch.float32))
        if self.takes is not None:
            dtypes["update"] = self.takes
        dtypes.update({STACK + name: dtype for name, dtype in self.feeds})
        if self.stochastic:
            dtypes.update(dict.fromkeys(self.noise(param.dtype, slots), torch.int32))
        dtypes.update(dict.fromkeys(self.draws, torch.int64))
        return dtypes

    def per_block(self, slots: Mapping[str, Slot]) -> frozenset[str]:
        """The stored tensors that have one entry for each block of elements."""
        return frozenset().union(*(per_block_of(codec_of(n, s, self.codec), n) for n, s in slots.items()))

    def noise(self, param: torch.dtype, slots: Mapping[str, Slot]) -> dict[str, int]:
        """The random inputs for rounding slots (and ``param``) that are stored with fewer bits than they are computed in, and
        the random bits of each."""
        if not self.stochastic or compute_dtype(param) != torch.float32:
            return {}
        stored_as = {name: codec_of(name, slot, self.codec) for name, slot in slots.items()}
        bits = {NOISE + name: noise_bits(codec) for name, codec in stored_as.items() if codec.rounds}
        packed = self.param_codec if self.narrows(param) else None
        if not self.feeds and (packed.rounds if packed else param in ROUNDED):
            bits[f"{NOISE}param"] = noise_bits(packed) if packed else 16
        return bits

    def _context(
        self,
        t: Transform,
        param: Tensor,
        grad: Tensor,
        scalars: Mapping[str, Tensor],
        numel: Tensor,
        reduce: Reduce,
        draws: Draws,
    ) -> Context:
        def unavailable(*_: Any) -> Any:
            raise RuleError(f"{title(t)} calls c.apply, which is for matrix rules; declare `domain = Domain.MATRIX`.")

        return Context(
            param=param,
            grad=grad,
            step=scalars["step"],
            divide=self.divide,
            sum=lambda x: reduce(x, "sum", t.domain, t.name),
            amax=lambda x: reduce(x, "amax", t.domain, t.name),
            numel=scalars["model_numel"] if t.domain == Domain.MODEL else numel,
            probe=draws.probe,
            noise=draws.noise,
            apply=unavailable,
        )
