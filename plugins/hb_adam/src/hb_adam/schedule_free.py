"""Schedule-free AdamW, Defazio et al. 2024."""

from __future__ import annotations

from typing import Any

from hbcore.api import Optimizer, ScaleByRms, ScheduleFree, Transform


class SFAdamW(Optimizer):
    r"""Schedule-free AdamW, Defazio et al. 2024, The Road Less Scheduled (arXiv:2405.15682), in the authors' library's form.

    .. math::
        u_k = \frac{g_k}{\max(\sqrt{\hat v_k}, \epsilon)} + \lambda y_{k-1} \qquad
        z_k = z_{k-1} - \gamma_k u_k \qquad
        x_k = (1 - c_k) x_{k-1} + c_k z_k \qquad
        y_k = (1 - \beta_1) z_k + \beta_1 x_k

    with :math:`\hat v_k` AdamW's second moment of the gradient at :math:`y_{k-1}`, and :math:`c_k` the share of step ``k`` in
    the sum of the weights :math:`w_k = k^r (\max_{i \le k} \gamma_i)^\rho`. The model trains with :math:`y` and must be
    evaluated with :math:`x`: call ``optimizer.eval()`` before evaluation, ``optimizer.train()`` after it.

    The library differs in three conventions. It divides by :math:`\sqrt{\hat v_k} + \epsilon`, which is
    ``division_backend="eps_add"``. Its warm-up multiplies the learning rate by :math:`\min(1, k / N)`, ours by
    :math:`\min(1, k / (N + 1))`: its ``warmup_steps`` is ours plus one. It corrects :math:`v` by the group's count of steps,
    ours by the parameter's own; they differ for a parameter that joins late. Everything else, the warm-up too, counts the
    group's steps in both, and the weights use the learning rate after warm-up. Schedulers may change it nonetheless.

    Args:
        lr: learning rate; a good one is often larger than AdamW's.
        betas: :math:`\beta_1`, how much of :math:`x` is in :math:`y`, in (0, 1); the decay rate of :math:`v`, in [0, 1).
        eps: the smallest divisor, at least 0.
        r: the power of the step count in the weights.
        weight_lr_power: :math:`\rho`, the power of the largest learning rate in the weights, at least 0.
        weight_decay: :math:`\lambda`.

    State: ``exp_avg_sq`` and ``z_minus_y``, of the parameter's shape, and ``step``.
    """

    lr: float = 0.0025
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-6
    r: float = 0.0
    weight_lr_power: float = 2.0

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (
            ScaleByRms(h.betas, h.eps),
            ScheduleFree(h.lr, h.betas[0], h.warmup_steps, h.r, h.weight_lr_power),
        )
