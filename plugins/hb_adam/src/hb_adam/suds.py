"""SUDSAdamW: Adam in a basis whose first direction follows the gradient's largest principal component."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hbcore.api import Block, Context, Domain, Optimizer, ScaleByAdam, Slot, State, Transform, hyper, zeros


@dataclass(frozen=True)
class PreconditionBySUDS(Transform):
    r"""Adam in the coordinates of a reflection that maps the first axis to :math:`f`, the direction of most variance.

    .. math::
        H = I - 2 w w^\top, \quad w = \frac{e_1 - f}{\lVert e_1 - f \rVert} \qquad
        u = H \operatorname{inner}(H g) \qquad
        f \leftarrow f + \eta \left((g^\top f)\, g - (g^\top f)^2 f\right), \text{ normalised}

    The parameter is one long vector, and the basis is an eigenbasis of :math:`\lambda I + \sigma f f^\top`. The direction
    follows the gradients by Oja's rule (Oja 1982, A simplified neuron model as a principal component analyzer). It starts as
    that of the first gradient that is not zero; the very first gradient moves nothing.

    Args:
        inner: the elementwise rule.
        precond_lr: :math:`\eta`, at least 0.

    Slots: those of ``inner``, and ``fisher_approx``, :math:`f`; all of the parameter's shape.
    """

    inner: Transform = field(default_factory=ScaleByAdam)
    precond_lr: float = hyper(0.01, ge=0)
    name = "suds"
    domain = Domain.MATRIX
    primes = True

    def blocks(self, shape: torch.Size) -> tuple[Block, ...]:
        return (Block(0, 1, tuple(shape)),)

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {**self.inner.slots(param), "fisher_approx": zeros(param)}

    def prime(self, u: Tensor, s: State, c: Context) -> dict[str, Tensor]:
        return {"fisher_approx": unit(rows(u)).view(u.shape)}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        g, f = rows(u), rows(s["fisher_approx"])
        w = -f
        w[:, 0] += 1
        w = unit(w)
        direction, new = c.apply(self.inner, reflected(g, w).view(u.shape), s)
        along = (g * f).sum(1, keepdim=True)
        turned = f + self.precond_lr * along * (g - along * f)
        turned = torch.where(turned.isfinite().all(1, keepdim=True), turned, f)  # its terms are cubic in the gradient
        new["fisher_approx"] = unit(torch.where(f.norm(dim=1, keepdim=True) > 0, turned, g)).view(u.shape)
        return reflected(rows(direction), w).view(u.shape), new


def rows(x: Tensor) -> Tensor:
    """A stack of blocks ``[B, *shape]`` as ``[B, n]``."""
    return x.reshape(x.shape[0], -1)


def reflected(x: Tensor, w: Tensor) -> Tensor:
    """The rows of ``x`` ``[B, n]``, mirrored at the planes normal to the unit vectors ``w`` ``[B, n]``."""
    return x - 2 * (x * w).sum(1, keepdim=True) * w


def unit(x: Tensor) -> Tensor:
    """The rows of ``x`` ``[B, n]`` at length 1; a row of zeros stays zero."""
    norm: Tensor = x.norm(dim=1, keepdim=True, dtype=torch.float64)  # squares of large gradients overflow in float32
    return (x / norm.clamp(min=torch.finfo(x.dtype).tiny)).to(x.dtype)


class SUDSAdamW(Optimizer):
    r"""AdamW in a basis with one axis along the gradient's direction of most variance; HeavyBall's rule, without a paper.

    .. math::
        p_t = p_{t-1} - \mathrm{lr} \left(H \operatorname{Adam}(H g_t) + \lambda p_{t-1}\right) \qquad
        H = I - 2 w w^\top, \quad w = \frac{e_1 - f_{t-1}}{\lVert e_1 - f_{t-1} \rVert}

    where the unit vector :math:`f` follows the gradients by Oja's rule with the rate ``precond_lr``. Each tensor is one
    vector. Its first gradient sets :math:`f` and moves nothing.

    Args:
        lr: learning rate.
        betas: decay rates of the two moments, in [0, 1).
        eps: the smallest divisor, at least 0.
        precond_lr: the rate at which :math:`f` follows, at least 0. Its effect grows with the square of the gradient.
        weight_decay: :math:`\lambda`.

    State: ``exp_avg`` and ``exp_avg_sq`` in the basis, ``fisher_approx`` (:math:`f`), of the parameter's shape; ``step``.
    """

    lr: float = 0.0025
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    precond_lr: float = 0.01

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (PreconditionBySUDS(ScaleByAdam(h.betas, h.eps), h.precond_lr),)
