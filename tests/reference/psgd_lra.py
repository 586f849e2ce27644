"""PSGD with a low-rank preconditioner in float64, from psgd_torch's description of it and arXiv:2402.11858, section 4.

Q is written out as an N x N matrix, and inverted as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from reference.options import Array, decayed

EPS_FP32 = 2.0**-23


@dataclass
class LowRank:
    """A preconditioner of vectors of N elements: ``Q = (I + U V^T) diag(d)``, and its bounds on the curvature."""

    u: Array
    v: Array
    d: Array
    bounds: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])

    def q(self) -> Array:
        return (np.eye(len(self.d)) + self.u @ self.v.T) @ np.diag(self.d)

    def precondition(self, x: Array) -> Array:
        return self.q().T @ self.q() @ x

    def balance(self) -> None:
        rho = (np.trace(self.u.T @ self.u) / np.trace(self.v.T @ self.v)) ** 0.25
        self.u, self.v = self.u / rho, self.v * rho
        uu, vv = self.u.T @ self.u, self.v.T @ self.v
        e = 0.1 * (uu - vv) / (np.trace(uu) + np.trace(vv))
        self.u, self.v = self.u - self.u @ (e - e @ e / 2), self.v + self.v @ (e + e @ e / 2)

    def fit(self, h: Array, v: Array, on_u: bool, lr: float, beta: float, eps: float) -> None:
        """One step from the pair (v, h); with ``on_u`` on U, otherwise on V."""
        q, p = self.q(), self.q().T @ self.q()
        a, b = q @ h, np.linalg.solve(q.T, v)
        scale = (norm(b) / norm(a)) ** 0.5
        if not 0.1 <= scale <= 10:  # ours alone: hundreds of steps at once
            self.d, self.bounds = scale * self.d, [0.0, 0.0, 0.0]
            return
        gain, loss = h * (p @ h), v * np.linalg.solve(p, v)
        step_d = lr / self._bound(0, np.abs(gain).max() + np.abs(loss).max(), beta, eps)
        d = self.d - step_d * (gain - loss) * self.d
        low = np.eye(len(self.d)) + self.u @ self.v.T
        if on_u:
            vv = self.v @ self.v.T
            size = norm(a) * norm(vv @ a) + norm(b) * norm(vv @ b)
            k = np.eye(self.u.shape[1]) + self.v.T @ self.u
            step = lr / self._bound(1, size, beta, eps)
            self.u = self.u - step * (np.outer(a, a) - np.outer(b, b)) @ self.v @ k
        else:
            uu = self.u @ self.u.T
            size = norm(a) * norm(uu @ a) + norm(b) * norm(uu @ b)
            step = lr / self._bound(2, size, beta, eps)
            self.v = self.v - step * low.T @ (np.outer(a, a) - np.outer(b, b)) @ self.u
        self.d = d

    def _bound(self, which: int, size: float, beta: float, eps: float) -> float:
        self.bounds[which] = max(beta * self.bounds[which] + (1 - beta) * size, size, eps)
        return self.bounds[which]


def norm(x: Array) -> float:
    return float(np.linalg.norm(x))


def psgd_lra(
    param: Array,
    gradients: Iterable[Array],
    *,
    draw: Callable[[tuple[int, ...]], Array],
    lr: float,
    rank: int,
    beta: float = 0.9,
    precond_lr: float = 0.1,
    lower_bound_beta: float = 0.9,
    dampening: float = 1e-9,
    eps: float = 1e-8,
    exp_avg_input: bool = True,
    momentum_into_precond_update: bool = True,
    delayed: bool = False,
    refresh: Callable[[int], bool] = lambda t: True,
    balance_every: int = 10,
    weight_decay: float = 0.0,
    clip: Callable[[Array], Array] = lambda u: u,
) -> tuple[Array, LowRank]:
    """Train one vector; U, then V, is drawn first. ``refresh(t)`` says whether step t = 1, 2, ... fits."""
    n, m, turn = len(param), np.zeros_like(param), 0
    lra = LowRank(draw((n, rank)) * (0.1 / (n * rank)) ** 0.5, draw((n, rank)) * (0.1 / (n * rank)) ** 0.5, np.zeros(n))
    for t, g in enumerate(gradients, start=1):
        m = beta * m + (1 - beta) * g
        x = m / (1 - beta**t) if exp_avg_input else g
        target = x if momentum_into_precond_update else g
        if not lra.d.any() and target.any():
            lra.d = np.full(n, (np.mean(target**4) + dampening**4) ** (-1 / 8))
        before = lra.precondition(x)
        if refresh(t):
            v = draw((n,))
            if lra.d.any() and target.any():
                if turn % balance_every == 0:
                    lra.balance()
                dampened = target + (dampening + EPS_FP32 * np.abs(target)) * v
                lra.fit(dampened, v, turn % 2 == 0, precond_lr, lower_bound_beta, eps)
            turn += 1
        update = clip(before if delayed else lra.precondition(x))
        param = param - lr * decayed(update, param, weight_decay)
    return param, lra
