"""The other optimizers of SOAP's kind, in float64: other rules in the basis, other factors, other ways to turn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from reference.options import Array, decayed, warmed_up
from reference.schedule_free import Weights, schedule_free_adamw
from reference.soap import joined, turned, unfolded
from reference.soap_inner import INNER, Moments, Settings, without_factors


def soap_family(theta: Array, gradients: Iterable[Array], **settings: Any) -> Array:
    """Any of the family but the schedule-free form; the parameter after the last gradient::

        first gradient:  P_i = (1 - b3) G_(i) G_(i)^T,  Q_i = its eigenvectors; theta stays
        every other one: U = inner(G along each i times Q_i)
                         theta = theta - lr (U along each i times Q_i^T + lambda theta)
                         P_i = b3 P_i + (1 - b3) (the covariance along i)
        when it is due:  Q_i = qr(P_i Q_i), and what inner keeps follows

    ``G_(i)`` is the gradient unfolded along dimension ``i``. Frame, order and conventions are those of the oracle ``soap``.
    What has no factor anywhere is updated by the inner rule itself, and by Adam for shampoo.

    Args:
        theta: any shape.
        gradients: one for each step.
        settings: fields of :class:`Settings`.
    """
    h = Settings(**settings)
    blocks = cut(np.shape(theta), h)
    if not blocks:
        return without_factors(theta, gradients, h)
    theta = np.array(theta, dtype=np.float64)
    for t, g in enumerate(gradients):
        g = np.asarray(g) + (h.weight_decay * theta if h.coupled else 0.0)
        u = together(blocks, t, g)
        if t > 0:
            theta = theta - warmed_up(h.lr, t, h.warmup_steps) * decayed(u, theta, 0.0 if h.coupled else h.weight_decay)
    return theta


def schedule_free_soap(theta: Array, gradients: Iterable[Array], **settings: Any) -> Weights:
    """SFSOAP: ``g / sqrt(v)`` in the basis; its projection back is the step of Defazio et al. 2024 (arXiv:2405.15682)::

        z = z - gamma_t (u + lambda y)
        x = (1 - c_t) x + c_t z,  c_t = w_t / (w_1 + ... + w_t),  w_t = t^r (max gamma)^weight_lr_power
        y = (1 - b1) z + b1 x

    The first gradient only prepares, and is no step of the average either: ``t`` is 1 at the second.
    """
    h = Settings(**{"inner": "rms", **settings})
    blocks = cut(np.shape(theta), h)
    if not blocks:
        return schedule_free_adamw(
            theta, gradients, lr=h.lr, betas=h.betas[:2], eps=h.eps, weight_decay=h.weight_decay, r=h.r,
            weight_lr_power=h.weight_lr_power, warmup_steps=h.warmup_steps, division=h.division,
        )  # fmt: skip
    beta1 = h.betas[0]
    x = np.array(theta, dtype=np.float64)
    y, z = x.copy(), x.copy()
    weight_sum, largest = 0.0, 0.0
    for t, g in enumerate(gradients):
        u = together(blocks, t, np.asarray(g))
        if t == 0:
            continue
        gamma = warmed_up(h.lr, t, h.warmup_steps)
        largest = max(largest, gamma)
        weight = t**h.r * largest**h.weight_lr_power
        weight_sum += weight
        z = z - gamma * decayed(u, y, h.weight_decay)
        x = x + weight / weight_sum * (z - x)
        y = (1 - beta1) * z + beta1 * x
    return Weights(y, x, z)


def cut(shape: tuple[int, ...], h: Settings) -> list[tuple[tuple[int, ...], tuple[slice, ...], Block]]:
    """The blocks of a parameter: its shape with dimensions joined, the part of it that is the block's, and the block.

    None if no block would have a factor.
    """
    merged = joined(shape, h.max_precond_dim) if h.merge_dims else shape
    if len(shape) < 2 and not h.precondition_1d:
        return []
    pieces = []
    for n in merged:
        size = h.max_precond_dim if h.split else max(n, 1)
        pieces.append([slice(start, min(start + size, n)) for start in range(0, n, size)])
    grid = list(itertools.product(*pieces))
    blocks = [(merged, part, Block(tuple(s.stop - s.start for s in part), h)) for part in grid]
    return blocks if any(block.dims for *_, block in blocks) else []


def together(blocks: list[tuple[tuple[int, ...], tuple[slice, ...], Block]], t: int, g: Array) -> Array:
    """Hand each block its part of the gradient; their updates, at their places."""
    merged = blocks[0][0]
    u = np.zeros(merged)
    for _, part, block in blocks:
        u[part] = block.step(t, g.reshape(merged)[part])
    return u.reshape(g.shape)


class Block:
    """A part of a parameter with a factor and a basis for each of its dimensions."""

    def __init__(self, shape: tuple[int, ...], h: Settings) -> None:
        self.h = h
        self.dims = [i for i, n in enumerate(shape) if 2 <= n <= h.max_precond_dim]
        self.factors: dict[int, Array] = {}
        self.bases: dict[int, Array] = {}
        self.moments = Moments(shape, h)

    def step(self, t: int, g: Array) -> Array:
        """The update for gradient ``t``, counted from 0; 0 for the first, which only prepares."""
        if t == 0:
            self.prime(g)
            return np.zeros_like(g)
        if self.h.inner == "shampoo":
            u = self.whitened(self.moments.average(g), t)
        else:
            u = turned(INNER[self.h.inner](t, turned(g, self.bases), self.moments, self.h), self.bases, back=True)
        self.accumulate(g, t)
        if due(t + 1, self.h):
            self.refresh()
        if self.h.inner == "shampoo":
            self.balance()
        return u

    def prime(self, g: Array) -> None:
        """KL-Shampoo starts from a multiple of the identity, all others from the first gradient."""
        for i in self.dims:
            first = unfolded(g, i) @ unfolded(g, i).T
            if self.h.inner == "shampoo":
                first = self.h.init_factor * np.eye(g.shape[i])
            self.factors[i] = (1 - self.h.shampoo_beta) * first
            self.bases[i] = np.linalg.eigh(self.factors[i])[1][:, ::-1]

    def eigenvalues(self, i: int, t: int) -> Array:
        """``diag(Q_i^T P_i Q_i)`` with the factor before gradient ``t`` comes in, an average of ``t`` products, debiased."""
        q = self.bases[i]
        return np.diag(q.T @ self.factors[i] @ q) / (1 - self.h.shampoo_beta**t)

    def whitened(self, m: Array, t: int) -> Array:
        """KL-Shampoo's step, Lin et al. 2025 (arXiv:2509.03378): ``m`` times ``Q_i diag(d_i)^(-1/2) Q_i^T`` along all."""
        u = turned(m, self.bases)
        for i in self.dims:
            u = along(u, i, np.maximum(self.eigenvalues(i, t), self.h.eps) ** -0.5)
        return turned(u, self.bases, back=True)

    def accumulate(self, g: Array, t: int) -> None:
        """Average the covariances, all of them made with the factors as they were before this gradient."""
        b3 = self.h.shampoo_beta
        covariance = self.kl if self.h.covariance == "kl" else self.outer
        self.factors = {i: b3 * self.factors[i] + (1 - b3) * covariance(g, i, t) for i in self.dims}

    def outer(self, g: Array, i: int, t: int) -> Array:
        """Shampoo's."""
        return unfolded(g, i) @ unfolded(g, i).T

    def kl(self, g: Array, i: int, t: int) -> Array:
        """Lin et al. 2025 (arXiv:2509.03378): the minimum in ``P_i`` of the divergence, the other factors given.

        For a matrix, ``G P_2^-1 G^T / n_2`` and ``G^T P_1^-1 G / n_1``; for more dimensions, with the Kronecker product of all
        the other factors between. The inverse is that of the eigenvalues.
        """
        for j in self.dims:
            if j != i:
                d = self.eigenvalues(j, t)
                inverse = 1 / np.maximum(d, self.h.eps)
                if self.h.transport == "square":
                    inverse = np.where(d > self.h.eps, inverse, 0.0)
                g = along(turned(g, {j: self.bases[j]}), j, np.sqrt(inverse / g.shape[j]))
        return unfolded(g, i) @ unfolded(g, i).T

    def refresh(self) -> None:
        """A step of power iteration; the moments follow."""
        old, orders = self.bases, {}
        self.bases = {}
        for i in self.dims:
            orders[i] = np.argsort(-np.diag(old[i].T @ self.factors[i] @ old[i]))
            self.bases[i] = np.linalg.qr(self.factors[i] @ old[i][:, orders[i]])[0]
        self.moments.first = [turned(turned(m, old, back=True), self.bases) for m in self.moments.first]
        for i in self.dims:
            if self.h.transport == "permute":
                self.moments.second = np.take(self.moments.second, orders[i], axis=i)
            else:
                # v as a covariance diag(v): its diagonal in the new basis, without what is beside the diagonal
                self.moments.second = turned(self.moments.second, {i: (old[i].T @ self.bases[i]) ** 2})

    def balance(self) -> None:
        """Only the product of a block's factors has a meaning: give them one scale, their geometric mean."""
        sizes = {i: np.abs(self.factors[i]).max() for i in self.dims}
        mean = math.exp(sum(math.log(size) for size in sizes.values()) / len(sizes)) if sizes else 1.0
        self.factors = {i: self.factors[i] * mean / sizes[i] for i in self.dims}


def along(x: Array, dim: int, factors: Array) -> Array:
    """The slices of ``x`` along ``dim``, each times its factor."""
    return np.moveaxis(np.moveaxis(x, dim, -1) * factors, -1, dim)


def due(k: int, h: Settings) -> bool:
    """Whether a refresh comes after gradient ``k``, counted from 1."""
    if h.schedule is None:
        return k % h.precondition_frequency == 0
    a, b = h.schedule
    before, now = (sum(1 / (1 + math.log10(i**a) ** b) for i in range(1, end)) for end in (k, k + 1))
    return math.floor(now + 2**-10) > math.floor(before + 2**-10)
