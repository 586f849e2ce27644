"""Kronecker preconditioners as a rule: what every optimizer of this family keeps of a block, and PSGD itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from hb_psgd import kron
from hb_psgd.checks import Q_DTYPES, check_flags, check_settings
from hb_psgd.common import EPS, Probability, curvature_of, pair_of, refresh_rate
from hb_psgd.factor_rules import RULES, Factor, Settings
from hb_psgd.fitting import all_fitted, collected, settle
from hb_psgd.held import Held, slots_of
from hb_psgd.newton import first_scales
from hb_psgd.norms import PROBES
from hbcore.api import Block, Context, Curvature, Domain, Slot, State, Transform, grid_view, hyper, matrix_view, zeros

LOOK = 8
"""Where more than one in so many steps refresh, blocks that can start are looked for in every so manyth step."""


@dataclass(frozen=True)
class KronFactors(Transform):
    r"""What rules with Kronecker factors share: the factors' state, and how it follows the gradient.

    .. math::
        \tilde x = x + (\mathrm{dampening} + \epsilon |x|)\, v \qquad v \sim \mathcal N(0, 1) \qquad
        Q \leftarrow \mathrm{rule}(Q, \tilde x) \;\text{ when due}

    The factors start as multiples of the identity at the first x that is not zero, and are zeros until then: x is looked at
    in the steps 1, 2, 4, 8, ... and whenever a refresh is due, of frequent ones in every eighth step, see :meth:`looks`.

    Args:
        precond_lr: learning rate of the factors.
        lower_bound_beta: decay of the running bound on the factors' curvature.
        dampening: the noise that the factors are fitted with.
        precond_rule: how they are fitted, one of :data:`hb_psgd.factor_rules.RULES`.
        preconditioner_update_probability: the number of refreshes per step, in [0, 1]: a number, a module-level function of
            the step (1, 2, ...), or None for :func:`update_probability`. Not random: a refresh is due whenever the sum of them
            passes a whole number.
        max_size_triangular, min_ndim_triangular, memory_save_mode: which factors are dense, :func:`hb_psgd.kron.memory_layout`.
        merge_dims: how dimensions are joined, :func:`hbcore.api.matrix_view`; those of size 1 are dropped first.
        split: cut larger dimensions into blocks of ``max_size_triangular``.
        precond_grad_accum: fit the factors to the average of all x since the last refresh.
        precond_update_power_iterations: of :func:`hb_psgd.norms.norm_bound`.
        precond_init_scale: the scale of Q at first; None for ``(a s)^b``, s by :func:`hb_psgd.kron.whitening_scale`.
        precond_init_scale_scale, precond_init_scale_power: a and b; None for 1.
        cached: keep the factors of P, so that each dimension takes one product.
        q_dtype: what ``Q_i`` is stored in: "float32", which is the compute dtype, or "bfloat16", rounded stochastically. It is
            fitted in the compute dtype all the same.
        hessian_approx: fit and start the factors with Hessian-vector products in place of x; ``step`` takes a closure.
        hvp_interval: the first refresh has a product, and every so manyth after it; the others whiten.
        finite_differences, fallback_to_finite_differences: see :class:`hbcore.api.Curvature`.

    Slots: for each dimension i ``Q_i``, ``[n, n]`` or ``[n]``, ``L_i``, its bound, and with ``cached`` for the dense ones that
    :func:`hb_psgd.kron.keeps` names ``P_i``, :math:`Q_i^T Q_i`; ``init_scale``, 0 until the factors start; with
    ``precond_grad_accum``, ``grad_mean`` and ``grad_count``.
    """

    precond_lr: float = hyper(0.1, ge=0, le=1)
    lower_bound_beta: float = hyper(0.9, ge=0, lt=1)
    dampening: float = hyper(1e-9, ge=0)
    precond_rule: str = "quad"
    preconditioner_update_probability: Probability = None
    max_size_triangular: int = 2048
    min_ndim_triangular: int = 2
    memory_save_mode: str | None = None
    merge_dims: bool | int = False
    split: bool = False
    precond_grad_accum: bool = False
    precond_update_power_iterations: int = 2
    precond_init_scale: float | None = None
    precond_init_scale_scale: float = hyper(1.0, gt=0)
    precond_init_scale_power: float | None = None
    cached: bool = True
    q_dtype: str = "float32"
    hessian_approx: bool = False
    hvp_interval: int = 1
    finite_differences: bool = False
    fallback_to_finite_differences: bool = True
    domain = Domain.MATRIX

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hvp"}) if self.hessian_approx else frozenset()

    @property
    def curvature(self) -> Curvature:
        return curvature_of(self)

    def rate(self, k: int) -> float:
        return refresh_rate(self.preconditioner_update_probability, k)

    def blocks(self, shape: torch.Size) -> tuple[Block, ...]:
        whole = [n for n in shape if n != 1] or [1]
        if self.split:
            return grid_view(whole, max(1, self.max_size_triangular), self.merge_dims)
        return matrix_view(whole, self.merge_dims)

    def dense(self, shape: Sequence[int]) -> tuple[bool, ...]:
        """Which dimensions of a block have a dense factor."""
        return kron.memory_layout(shape, self.max_size_triangular, self.min_ndim_triangular, self.memory_save_mode)

    def slots(self, param: Tensor) -> dict[str, Slot]:
        shape = param.shape or torch.Size([1])
        slots = {"init_scale": Slot(torch.Size(), exact=True)}
        for i, (n, dense) in enumerate(zip(shape, self.dense(shape), strict=True)):
            slots[f"Q_{i}"] = Slot(torch.Size((n, n) if dense else (n,)), exact=True, dtype=Q_DTYPES[self.q_dtype])
            slots[f"L_{i}"] = Slot(torch.Size(), exact=True)
        if self.precond_grad_accum:
            slots |= {"grad_mean": zeros(param), "grad_count": Slot(torch.Size(), exact=True)}
        return slots | self.derived_slots(shape)

    def derived_slots(self, shape: Sequence[int]) -> dict[str, Slot]:
        """The slots that :meth:`derive` computes from others."""
        if not self.cached:
            return {}
        kept = map(all, zip(self.dense(shape), kron.keeps(shape), strict=True))
        sizes = ((i, n) for i, (n, some) in enumerate(zip(shape, kept, strict=True)) if some)
        return {f"P_{i}": Slot(torch.Size((n, n)), derived=True) for i, n in sizes}

    def derive(self, s: State, c: Context) -> dict[str, Tensor]:
        """The factors of P, from those of Q."""
        factors = [s[name] for name in s if name.startswith("Q_")]
        return {f"P_{i}": p for i, p in enumerate(self.grams(factors, c)) if p is not None}

    def grams(self, q: Sequence[Tensor], c: Context) -> list[Tensor | None]:
        """The factors of P that are kept, from all of Q's."""
        kept = kron.keeps([factor.shape[-1] for factor in q])
        some = (self.cached and each and factor.ndim == 3 for factor, each in zip(q, kept, strict=True))
        return [kron.gram(factor, c.products) if each else None for factor, each in zip(q, some, strict=True)]

    def averaged(self, x: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """What the factors are fitted to, and the slots of the average."""
        if not self.precond_grad_accum:
            return x, {}
        count = s["grad_count"] + 1
        mean = s["grad_mean"] + (x - s["grad_mean"]) / kron.per_block(count, x)
        kept = (torch.zeros_like(mean), torch.zeros_like(count)) if c.refresh else (mean, count)
        return mean, dict(zip(("grad_mean", "grad_count"), kept, strict=True))

    def held(self, s: State, ndim: int) -> Held:
        """The stored factors of blocks of ``ndim`` dimensions."""
        dims = range(ndim)
        q, bounds = [s[f"Q_{i}"] for i in dims], [s[f"L_{i}"] for i in dims]
        return Held(q, [s.get(f"P_{i}") for i in dims], bounds)

    def started(self, stacks: Sequence[tuple[Tensor, State, Context]]) -> list[tuple[Held, dict[str, Tensor]]]:
        """For each stack ``(x, s, c)`` the factors before this step's refresh, some of which may start from ``x``, and their
        scale's slot."""
        held, c = [self.held(s, x.ndim - 1) for x, s, _ in stacks], stacks[0][2]
        if not self.looks(int(c.step), bool(c.refresh)):
            return [(h, {}) for h in held]
        made: list[tuple[Held, dict[str, Tensor]]] = [(h, {}) for h in held]
        for dtype in {x.dtype: None for x, _, _ in stacks}:
            mine = [k for k, (x, _, _) in enumerate(stacks) if x.dtype == dtype]
            before = torch.cat([stacks[k][1]["init_scale"] for k in mine])
            waiting = before == 0
            scale = torch.where(waiting, self.first_scales([stacks[k] for k in mine]).to(dtype), before)
            whole = scale * waiting
            shares = {d: whole ** (1 / d) for d in {len(held[k].q): None for k in mine}}
            whole.square_()
            counts = [len(stacks[k][0]) for k in mine]
            rows = [slice(end - count, end) for end, count in zip(accumulate(counts), counts, strict=True)]
            for k, part in zip(mine, rows, strict=True):
                begun = held[k]._replace(share=shares[len(held[k].q)][part], whole=whole[part])
                made[k] = begun, {"init_scale": scale[part]}
        return made

    def looks(self, step: int, refresh: bool) -> bool:
        """Whether this step looks for blocks that can start. It costs a twentieth of a refresh, and hardly any block waits."""
        if step & (step - 1) == 0:
            return True
        return refresh and (step % LOOK == 0 or self.rate(step) * LOOK < 1)

    def first_scales(self, stacks: Sequence[tuple[Tensor, State, Context]]) -> Tensor:
        """The scale of Q for the blocks of stacks of one dtype that start, one after the other; 0 where nothing is known."""
        if self.precond_init_scale is not None:
            return torch.cat([torch.full_like(s["init_scale"], self.precond_init_scale) for _, s, _ in stacks])
        pairs = [pair_of(self, c) for _, _, c in stacks]
        scale = self.precond_init_scale_scale * first_scales([x for x, _, _ in stacks], pairs, self.dampening)
        power = self.precond_init_scale_power
        return scale if power is None else torch.where(scale > 0, scale**power, 0.0)

    def advanced(self, stacks: Sequence[tuple[Tensor, State, Context]]) -> Iterator[tuple[Held, Held, dict[str, Tensor]]]:
        """For each stack: its factors before this step's refresh and after it, and their slots as far as they change."""
        averages = [self.averaged(u, s, c) for u, s, c in stacks]
        begun = self.started([(x, s, c) for (x, _), (_, s, c) in zip(averages, stacks, strict=True)])
        targets = [(x, held, c) for (x, _), (held, _), (_, _, c) in zip(averages, begun, stacks, strict=True)]
        kept = [mean | scale for (_, mean), (_, scale) in zip(averages, begun, strict=True)]
        due = stacks[0][2].refresh
        fresh = self.refreshed(targets) if due else (held.begun() for _, held, _ in targets)
        for (_, before, _), new, after in zip(targets, kept, fresh, strict=True):
            yield before, after, new | slots_of(after) if due or before.share is not None else new

    def refreshed(self, stacks: Sequence[tuple[Tensor, Held, Context]]) -> Iterator[Held]:
        """The factors of several stacks ``(x, held, c)`` after a refresh; all factors of one size are fitted at once."""
        products = stacks[0][2].products
        settings = Settings(self.precond_lr, self.lower_bound_beta, self.precond_update_power_iterations, products)
        factors = [f for stack in stacks for f in self._factors(*stack)]
        ends = list(accumulate(len(held.q) for _, held, _ in stacks))
        numbers = [range(end - len(held.q), end) for end, (_, held, _) in zip(ends, stacks, strict=True)]
        before = [bound for _, held, _ in stacks for bound in held.bounds]
        portions = all_fitted(RULES[self.precond_rule], factors, settings)
        bounds = settle(portions, numbers, before)
        q = collected(portions, lambda portion: portion.new)
        del portions
        for mine, (_, _, c) in zip(numbers, stacks, strict=True):
            own = [q.pop(k) for k in mine]
            yield Held(own, self.grams(own, c), [bounds[k] for k in mine])

    def _factors(self, x: Tensor, held: Held, c: Context) -> Iterator[Factor]:
        """What a stack's factors are fitted with."""
        rule, pair, noise = RULES[self.precond_rule], pair_of(self, c), c.probe(x)
        g, v = (x, noise) if pair is None else pair
        noisy = kron.dampened(g, noise, self.dampening, EPS)
        if pair is None and not rule.reads_noise:
            v = noisy  # nobody reads it, and memory is short here
        del noise
        gather, begun = rule.evidence if pair is None else rule.newton, held.begun() if rule.reads_factors else held
        evidence = gather(noisy, v, begun.q, lambda g: begun.precondition_begun(g, c), c.products)
        del noisy, v
        for q, bound, (first, second) in zip(held.q, held.bounds, evidence, strict=True):
            like = q.new_empty(q.shape[0], PROBES if q.ndim == 3 else 0, q.shape[-1])
            start = c.probe(like) if q.ndim == 3 else like
            yield Factor(q, held.share, bound, first, second, start)


@dataclass(frozen=True)
class PreconditionByKron(KronFactors):
    r"""Precondition by Kronecker factors that are fitted to whiten what the rule is given: :math:`u = Q^T Q\, x`.

    Args:
        momentum: a rule that is applied to x once the factors have been fitted to it; where they are fitted to the result, it
            precedes this rule in the chain instead. None for no rule.
        delayed: precondition by the factors before this step's refresh.
        root: precondition by Q alone, a root of P.

    The others, the formula and the slots are those of :class:`KronFactors`.
    """

    momentum: Transform | None = None
    delayed: bool = False
    root: bool = False
    name = "psgd_kron"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags({"delayed": self.delayed, "root": self.root})

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {**(self.momentum.slots(param) if self.momentum else {}), **super().slots(param)}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        [result] = self.update_stacks([(u, s, c)])
        return result

    def update_stacks(self, stacks: Sequence[tuple[Tensor, State, Context]]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for (x, s, c), (before, after, new) in zip(stacks, self.advanced(stacks), strict=True):
            if self.momentum is not None:
                x, moved = c.apply(self.momentum, x, s)
                new = new | moved
            held = before.begun() if self.delayed else after
            out = c.into("update")
            yield kron.multiply(x, held.q, c.products, out) if self.root else held.precondition(x, c, out), new
