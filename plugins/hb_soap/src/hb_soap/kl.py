"""SOAP and Shampoo with the factors that minimise a Kullback-Leibler divergence, Lin et al. 2025."""

from __future__ import annotations

from typing import Any

from hb_soap.rule import preconditioned
from hb_soap.soap import SOAP
from hbcore.api import Average, ScaleByAdam, Transform


class KLSOAP(SOAP):
    r"""SOAP in the eigenbasis of KL-Shampoo's factors, Lin et al. 2025 (arXiv:2509.03378).

    .. math::
        P_0 = \mathrm{EMA}\!\left(\tfrac{1}{n_1} G P_1^{-1} G^\top\right) \qquad
        P_1 = \mathrm{EMA}\!\left(\tfrac{1}{n_0} G^\top P_0^{-1} G\right)

    with the inverses taken in the bases, :math:`P_i^{-1} = Q_i \operatorname{diag}(d_i)^{-1} Q_i^\top`. SOAP's own factors
    weigh every direction of the other dimension alike. With more than two dimensions each factor averages the gradient that
    all others have whitened; with one it is SOAP's. The first gradient gives SOAP's factors.

    Args:
        eps: the smallest divisor, and the smallest eigenvalue that is inverted, at least 0.

    The others, and the state, are those of :class:`SOAP`.
    """

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return preconditioned(ScaleByAdam(h.betas, h.eps), h, covariance="kl")


class KLShampoo(SOAP):
    r"""Shampoo with factors that minimise a Kullback-Leibler divergence, Lin et al. 2025 (arXiv:2509.03378).

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) G \qquad
        p_t = p_{t-1} - \mathrm{lr} \left(P_0^{-1/2}\, m_t\, P_1^{-1/2} + \lambda p_{t-1}\right)

    with the factors of :class:`KLSOAP` before this step, :math:`P_i^{-1/2} = Q_i \operatorname{diag}(d_i)^{-1/2} Q_i^\top`.
    They begin as a multiple of the identity, and are kept of equal size. What has no dimension to precondition is Adam's.

    Args:
        betas: decay rates of the momentum, and of Adam's second moment where Adam runs, in [0, 1).
        eps: the smallest eigenvalue that is inverted, and Adam's smallest divisor, at least 0.
        init_factor: the multiple of the identity that factors begin as, above 0.
        dampening: :math:`\delta`: factors average :math:`g + (\delta + \epsilon_{32} |g|)\,n` with normal noise ``n``.

    The others are those of :class:`SOAP`. State: ``exp_avg``, in the bases; ``GG_i`` and ``Q_i``; ``step``.
    """

    init_factor: float = 0.1
    dampening: float = 1e-9

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return preconditioned(
            Average(h.betas[0]), h, ScaleByAdam(h.betas, h.eps), covariance="kl", whiten=True, init_factor=h.init_factor,
            dampening=h.dampening,
        )  # fmt: skip
