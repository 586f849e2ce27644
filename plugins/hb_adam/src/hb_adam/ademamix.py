"""AdEMAMix, Pagliardini, Ablin and Grangier 2024."""

from __future__ import annotations

from typing import Any

from hbcore.api import Optimizer, ScaleByAdEMAMix, Transform


class AdEMAMix(Optimizer):
    r"""Adam with a second, slow momentum, Pagliardini, Ablin and Grangier 2024 (arXiv:2409.03137), Algorithm 1.

    .. math::
        n_t = \beta_3(t)\, n_{t-1} + (1 - \beta_3(t))\, g_t \qquad
        p_t = p_{t-1} - \mathrm{lr} \left(\frac{m_t / (1 - \beta_1^t) + \alpha(t)\, n_t}
        {\max(\sqrt{v_t / (1 - \beta_2^t)}, \epsilon)} + \lambda p_{t-1}\right)

    with Adam's moments :math:`m_t`, :math:`v_t`. The warm-ups, counted by the parameter's own steps, raise
    :math:`\alpha(t)` from 0 and the half-life of :math:`\beta_3(t)` from :math:`\beta_1`'s, both linearly. The paper
    recommends as many steps as the training has, and :math:`\alpha` from 4 to 10.

    Args:
        lr: learning rate.
        betas: decay rates of the fast average, the second moment and the slow average, in [0, 1).
        eps: the smallest divisor, at least 0.
        alpha: the weight of the slow average, at least 0.
        beta3_warmup: the number of steps until :math:`\beta_3(t)` is ``betas[2]``; None or 0 for no warm-up.
        alpha_warmup: the number of steps until :math:`\alpha(t)` is ``alpha``; None or 0 for no warm-up.
        weight_decay: :math:`\lambda`.

    State: ``exp_avg_fast``, ``exp_avg_slow`` and ``exp_avg_sq``, of the parameter's shape, and ``step``.
    """

    lr: float = 0.001
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    eps: float = 1e-8
    alpha: float = 2.0
    beta3_warmup: int | None = None
    alpha_warmup: int | None = None

    def normalise(self, h: dict[str, Any]) -> dict[str, Any]:
        return ScaleByAdEMAMix.entries(h)

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (ScaleByAdEMAMix.of(h),)
