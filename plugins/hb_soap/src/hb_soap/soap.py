"""SOAP, Vyas et al. 2024, and other rules than Adam in its eigenbasis."""

from __future__ import annotations

from typing import Any

from hb_soap.rule import Solver, preconditioned
from hbcore.api import (
    CoupleDecay,
    Optimizer,
    ScaleByAdam,
    ScaleByAdEMAMix,
    ScaleByLaProp,
    ScaleByNAdam,
    ScaleByRms,
    ScheduleFree,
    Transform,
)


class SOAP(Optimizer):
    r"""Adam in the eigenbasis of Shampoo's preconditioner, Vyas et al. 2024 (arXiv:2409.11321), Algorithm 3.

    .. math::
        G' = Q_0^\top G Q_1 \qquad
        p_t = p_{t-1} - \mathrm{lr} \left(Q_0 \operatorname{Adam}(G')\,Q_1^\top + \lambda p_{t-1}\right) \qquad
        P_0 = \mathrm{EMA}(G G^\top),\; P_1 = \mathrm{EMA}(G^\top G)

    where :math:`Q_i` follows the eigenvectors of :math:`P_i`. The first step prepares the bases and moves no matrix. Vectors,
    scalars, and parameters without a dimension between 2 and ``max_precond_dim``, are updated by Adam from the first step on.

    Args:
        lr: learning rate.
        betas: decay rates of Adam's two moments, in [0, 1).
        shampoo_beta: decay rate of :math:`P_i`, in [0, 1); None means ``betas[1]``, as -1 does in the authors' code.
        eps: the smallest divisor, at least 0.
        precondition_frequency: the number of steps from one refresh of the bases to the next, at least 1. At 1 it is the best
            per step; at 10, the authors' choice, refreshes cost little.
        max_precond_dim: larger dimensions are not preconditioned.
        merge_dims: join dimensions after the first while their product is at most ``max_precond_dim``, or this number.
        split: cut larger dimensions into blocks of ``max_precond_dim``, each with bases of its own.
        precondition_1d: precondition vectors as well.
        use_precond_schedule: refresh the bases less and less often, and ignore ``precondition_frequency``.
        precond_scheduler: ``(a, b)`` of that schedule, :math:`1 / (1 + \log_{10}(t^a)^b)` refreshes at step ``t``.
        stagger: refresh each matrix in a step of its own, so that no step takes much longer than the others.
        solver: ``"qr"``, one power iteration for each refresh, or ``"eigh"``, which is exact, and slow on a GPU.
        weight_decay: :math:`\lambda`.

    State: ``exp_avg`` and ``exp_avg_sq``, in the bases; for each preconditioned dimension ``GG_i`` and ``Q_i``; ``step``.
    """

    lr: float = 0.003
    betas: tuple[float, float] = (0.9, 0.95)
    shampoo_beta: float | None = 0.95
    eps: float = 1e-8
    precondition_frequency: int = 2
    max_precond_dim: int = 2048
    merge_dims: bool | int = True
    split: bool = False
    precondition_1d: bool = False
    use_precond_schedule: bool = False
    precond_scheduler: tuple[float, float] = (1 / 3, 9)
    stagger: bool = False
    solver: Solver = "qr"
    weight_decay = 0.01

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return preconditioned(ScaleByAdam(h.betas, h.eps), h)


class SOLP(SOAP):
    r"""LaProp in SOAP's eigenbasis: Ziyin, Wang and Ueda 2020 (arXiv:2002.04839) in Vyas et al. 2024 (arXiv:2409.11321).

    .. math:: p_t = p_{t-1} - \mathrm{lr} \left(Q_0 \operatorname{LaProp}(Q_0^\top G Q_1)\,Q_1^\top + \lambda p_{t-1}\right)

    Args and state are those of :class:`SOAP`.
    """

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return preconditioned(ScaleByLaProp(h.betas, h.eps), h)


class SOAPNAdam(SOAP):
    r"""NAdam in SOAP's eigenbasis: Dozat 2016 in Vyas et al. 2024 (arXiv:2409.11321).

    .. math:: p_t = p_{t-1} - \mathrm{lr} \left(Q_0 \operatorname{NAdam}(Q_0^\top G Q_1)\,Q_1^\top + \lambda p_{t-1}\right)

    Args:
        momentum_decay: how fast the momentum rises from half of ``betas[0]`` to all of it, at least 0.
        decoupled_weight_decay: decay the weights, as HeavyBall does whatever its option says. With False the decay is added to
            the gradient, as NAdam's is by default: SOAP's default of 0.01 is more than most gradients then, and outweighs them.

    The others, and the state, are those of :class:`SOAP`.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    momentum_decay: float = 4e-3
    decoupled_weight_decay: bool = True

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        rule = preconditioned(ScaleByNAdam(h.betas, h.eps, h.momentum_decay), h)
        return rule if h.decoupled_weight_decay else (CoupleDecay(h.weight_decay), *rule)


class SOAPAdEMAMix(SOAP):
    r"""AdEMAMix in SOAP's eigenbasis: Pagliardini, Ablin and Grangier 2024 (arXiv:2409.03137) in Vyas et al. 2024.

    .. math:: p_t = p_{t-1} - \mathrm{lr} \left(Q_0 \operatorname{AdEMAMix}(Q_0^\top G Q_1)\,Q_1^\top + \lambda p_{t-1}\right)

    Args:
        betas: decay rates of the fast average, the second moment and the slow average, in [0, 1).
        alpha: the weight of the slow average, at least 0.
        beta3_warmup: the number of steps until the slow average's decay is ``betas[2]``; None or 0 for no warm-up.
        alpha_warmup: the number of steps until its weight is ``alpha``; None or 0 for no warm-up.

    The others are those of :class:`SOAP`. State: ``exp_avg_fast``, ``exp_avg_slow`` and ``exp_avg_sq``, in the bases, and the
    rest of SOAP's.
    """

    betas: tuple[float, float, float] = (0.9, 0.95, 0.999)  # type: ignore[assignment]
    alpha: float = 2.0
    beta3_warmup: int | None = None
    alpha_warmup: int | None = None

    def normalise(self, h: dict[str, Any]) -> dict[str, Any]:
        return ScaleByAdEMAMix.entries(h)

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return preconditioned(ScaleByAdEMAMix.of(h), h)


class SFSOAP(SOAP):
    r"""Schedule-free SOAP: Defazio et al. 2024 (arXiv:2405.15682) over the eigenbasis of Vyas et al. 2024 (arXiv:2409.11321).

    .. math::
        u_k = Q_0 \frac{G'}{\max(\sqrt{\hat v_k}, \epsilon)}\, Q_1^\top + \lambda y_{k-1} \qquad G' = Q_0^\top G Q_1

    with :math:`\hat v_k` the second moment of :math:`G'`, and the average of iterates of :class:`hb_adam.SFAdamW`. The model
    trains with :math:`y` and must be evaluated with :math:`x`: call ``optimizer.eval()`` before evaluation,
    ``optimizer.train()`` after it.

    Args:
        betas: how much of :math:`x` is in :math:`y`, in (0, 1); the decay rate of :math:`v`, in [0, 1).
        beta: HeavyBall's spelling of ``betas[0]``.
        r: the power of the step count in the weights.
        weight_lr_power: the power of the largest learning rate in the weights, at least 0.

    The others are those of :class:`SOAP`. State: ``exp_avg_sq``, in the bases; ``z_minus_y``; ``GG_i``, ``Q_i`` and ``step``.
    """

    beta: float | None = None
    r: float = 0.0
    weight_lr_power: float = 2.0
    warmup_steps = 1
    gradient_clipping = ("adaptive_gradient_clipping_", 0.1)

    def normalise(self, h: dict[str, Any]) -> dict[str, Any]:
        return h if h["beta"] is None else {**h, "betas": (h["beta"], h["betas"][1])}

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        average = ScheduleFree(h.lr, h.betas[0], h.warmup_steps, h.r, h.weight_lr_power)
        return (*preconditioned(ScaleByRms(h.betas, h.eps), h), average)
