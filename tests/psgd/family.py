"""What tests of the PSGD family share: gradients, trainings by the plain driver, and the oracle told the same."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import torch
from core.plain import plain
from reference.psgd import psgd_kron

from hb_psgd import PSGDKron

STEPS = 18
DYNAMIC = ("beta", "precond_lr", "lower_bound_beta", "dampening", "precond_init_scale_scale")


def drawn(i, shape):
    return np.random.default_rng([3, i]).standard_normal(shape)


def probes(i, like):
    """One draw for every block of the stack, so that a stack equals its blocks one by one."""
    return torch.from_numpy(drawn(i, like.shape[1:])).expand(like.shape)


OPTIONS_OF = {n: p.default for n, p in inspect.signature(PSGDKron).parameters.items()}


def chain_of(cls=PSGDKron, **options):
    """PSGDKron's chain; its structural fields stay plain values, as the engine hands them over."""
    given = {**OPTIONS_OF, **options}
    return lambda h: cls.chain(SimpleNamespace(**{**given, **{n: getattr(h, n) for n in DYNAMIC}}))


def train(param, gradients, *, cls=PSGDKron, extra=(), rule_probes=probes, **options):
    numbers = {"lr": 0.01} | {n: options.get(n, OPTIONS_OF[n]) for n in DYNAMIC}
    chain = chain_of(cls, **options)
    return plain(lambda h: (*chain(h), *extra), numbers, param, gradients, probes=rule_probes)


def problem(shape, dtype=torch.float64, steps=STEPS, seed=0):
    """A parameter and gradients whose elements are correlated and of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    param = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradients = []
    for step in range(steps):
        g = torch.randn(shape, generator=generator, dtype=torch.float64) * 2.0 ** (step % 5 - 6)
        for axis, n in enumerate(g.shape):
            g = g * torch.linspace(0.2, 3, n, dtype=torch.float64).view([-1 if a == axis else 1 for a in range(g.ndim)])
            g = g + 0.4 * g.flip(axis) if n > 1 else g
        gradients.append(g.to(dtype))
    return param.to(dtype), gradients


def expected(param, gradients, **options):
    counter = iter(range(10**6))
    options = {"lr": 0.01} | options
    return psgd_kron(
        param.double().numpy(), [g.double().numpy() for g in gradients],
        draw=lambda shape: drawn(next(counter), shape), **options,
    )  # fmt: skip


def relative(ours, theirs):
    theirs = torch.as_tensor(theirs)
    return float((ours.double() - theirs).norm() / theirs.norm())


def factors_of(state):
    slots = state["psgd_kron", 0]
    return [slots[name][0] for name in sorted(slots) if name.startswith("Q_")]


def finite(*tensors):
    return all(bool(torch.isfinite(t).all()) for t in tensors)
