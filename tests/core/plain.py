"""The protocol of rules spelled out for one parameter at a time, with no engine: what every engine must agree with.

It calls a chain's transforms one after the other, in the dtype of the parameter, and keeps their state in plain dicts. Rules
are tested with it against float64 oracles; the engine is tested against the same oracles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hbcore.api import Context, Domain, Transform
from hbcore.rules import roles, route, stages
from hbcore.rules.division import eps_clamp


def plain(
    chain: Callable[[Any], Sequence[Transform]],
    hyperparameters: Mapping[str, Any],
    param: Tensor,
    gradients: Iterable[Tensor],
    *,
    divide: Callable[..., Tensor] = eps_clamp,
    probes: Callable[[int, Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Train one parameter with ``chain`` between the usual decay, lr and application; return it and its state.

    Args:
        chain: an optimizer's ``chain``.
        hyperparameters: its group, ``lr`` among them.
        param: any shape, float32 or float64.
        gradients: one for each step.
        divide: the division backend.
        probes: what ``c.probe(like)`` draws, given how many draws came before; normal numbers of a fixed seed by default.
    """
    h = {"weight_decay": 0.0, "warmup_steps": 0, **hyperparameters}
    generator = torch.Generator().manual_seed(0)
    drawn = [0]

    def probe(like: Tensor) -> Tensor:
        drawn[0] += 1
        if probes is not None:
            return probes(drawn[0] - 1, like).to(like.dtype)
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    param, state = param.detach().clone(), {}
    scalars: dict[str, Any] = {}
    position, step = 0.0, 0
    for k, grad in enumerate(gradients, start=1):
        transforms = _arranged(chain, h, param)
        for t in transforms:
            for name, first in t.scalars().items():
                scalars.setdefault(name, torch.tensor(first, dtype=torch.float64))
        rates = [t.rate(k) for t in transforms if t.domain == Domain.MATRIX]
        before, position = position, position + (rates[0] if rates else 1.0)
        refresh = math.floor(position + 2**-10) > math.floor(before + 2**-10)
        primes = any(t.primes for t in transforms) and not state.get("primed")
        step += not primes
        u = grad.to(param.dtype)
        for t in transforms:
            c = Context(
                param=param, grad=grad.to(param.dtype), step=torch.tensor(float(max(step, 1)), dtype=torch.float64),
                divide=divide, sum=torch.sum, amax=torch.amax, numel=torch.tensor(float(param.numel())), refresh=refresh,
                probe=probe, noise=lambda like: torch.rand(like.shape, generator=generator).to(like.dtype),
            )  # fmt: skip
            c = c._replace(apply=lambda inner, u, s, c=c: inner.update(u, s, c))
            if t.domain == Domain.MATRIX:
                u = _matrix(t, u, c, state, scalars, primes)
                if primes and t.primes:
                    break  # nothing moves, and what would come after it is not run
            else:
                slots = state.setdefault(t.name, {n: _filled((), s, param) for n, s in t.slots(param).items()})
                u, new = t.update(u, {**slots, **scalars}, c)
                _keep(new, slots, scalars)
        state["primed"] = True
        param = param if primes else u
    return param, {**state, "scalars": scalars}


def _arranged(chain: Callable[[Any], Sequence[Transform]], h: Mapping[str, Any], param: Tensor) -> list[Transform]:
    bound = SimpleNamespace(**{k: _bound(v) for k, v in h.items()})
    fork = tuple(chain(bound))
    rule = route.resolve(fork, route.branches(fork, param))
    if not any(True for _ in roles.values(rule, "weight_decay")):
        rule += (stages.DecayWeights(bound.weight_decay),)
    if not any(t.owns_apply for t in rule):
        rule += (stages.ScaleByLr(bound.lr, bound.warmup_steps), stages.Apply())
    return list(stages.arrange(rule))


def _matrix(t: Transform, u: Tensor, c: Context, state: dict[str, Any], scalars: dict[str, Any], primes: bool) -> Tensor:
    """One matrix rule over the stacks that it cuts a parameter into."""
    result = torch.zeros_like(u, memory_format=torch.contiguous_format)
    for i, block in enumerate(t.blocks(u.shape)):
        shape = (block.batch, *block.shape)
        declared = t.slots(u.new_empty(block.shape))
        slots = state.setdefault((t.name, i), {n: _filled((block.batch,), s, u) for n, s in declared.items()})
        if any(s.derived for s in declared.values()):
            slots.update(t.derive({n: v for n, v in slots.items() if not declared[n].derived}, c))
        needed = {n: block.of(getattr(c, n).contiguous()) for n in t.needs}
        stack = block.of(u.contiguous())
        if primes and t.primes:
            new = t.prime(stack, {**slots, **scalars}, c._replace(**needed))
        else:
            out, new = t.update(stack, {**slots, **scalars}, c._replace(**needed))
            assert out.shape == shape
            block.of(result).copy_(out)
        _keep(new, slots, scalars)
        if c.refresh and type(t).refresh is not Transform.refresh and not (primes and t.primes):
            [new] = t.refresh([({**slots, **scalars}, c)])
            _keep(new, slots, scalars)
    return result


def _keep(new: Mapping[str, Tensor], slots: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    for name, value in new.items():
        home = scalars if name in scalars else slots
        assert name in home, f"the rule returned {name!r}, which is no slot of it"
        assert value.shape == home[name].shape, f"{name}: {tuple(value.shape)} for a slot of {tuple(home[name].shape)}"
        home[name] = value


def _filled(stack: tuple[int, ...], slot: Any, like: Tensor) -> Tensor:
    return torch.full((*stack, *slot.shape), slot.fill, dtype=like.dtype)


def _bound(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(map(_bound, value))
    return (
        value
        if isinstance(value, (bool, str)) or not isinstance(value, (int, float))
        else torch.tensor(float(value), dtype=torch.float64)
    )
