"""AdamC, Defazio 2025."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

from hbcore.api import CorrectedDecay, Optimizer, ScaleByAdam, Transform, warn_at_caller

LR = 0.0025
"""The default learning rate."""


class AdamC(Optimizer):
    r"""AdamW whose weight decay follows the learning rate twice, Defazio 2025 (arXiv:2506.02285), Algorithm 1.

    .. math::
        p_t = p_{t-1} - \gamma_t \left(\frac{\hat m_t}{\max(\sqrt{\hat v_t}, \epsilon)}
        + \lambda \frac{\gamma_t}{\gamma_{\max}} p_{t-1}\right)

    with Adam's corrected moments, and :math:`\gamma_t` the learning rate after warm-up. Layers before a normalisation
    settle at a ratio of gradient to weight, which then stays the same while the learning rate falls. The paper keeps AdamW's
    decay for all other layers.

    Args:
        lr: learning rate.
        betas: decay rates of the two moments, in [0, 1).
        eps: the smallest divisor, at least 0.
        max_lr: :math:`\gamma_{\max}`, the largest learning rate of the training, above 0; None, with a warning: each
            group's initial ``lr``, which is right if the learning rate only falls from there (the default ``lr`` if it is 0).
        weight_decay: :math:`\lambda`.

    State: ``exp_avg`` and ``exp_avg_sq``, of the parameter's shape, and ``step``.
    """

    lr: float = LR
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    max_lr: float | None = None
    _: KW_ONLY
    cautious_weight_decay: bool = False  # applied by the rule's own decay

    def after_init(self) -> None:
        if self.defaults["max_lr"] is None:
            warn_at_caller(
                "AdamC: max_lr is not given, so each group's present lr is taken as the largest of the training; pass max_lr.",
                UserWarning,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time; its ``max_lr`` defaults to the constructor's, or to its ``lr`` if that is None."""
        given: Any = param_group  # the base class rejects anything but a dict
        if isinstance(given, dict) and given.get("max_lr", self.defaults["max_lr"]) is None:
            # a group that starts at 0, as a scheduler's warm-up does, says nothing about the largest rate
            given = {**given, "max_lr": float(given.get("lr", self.defaults["lr"])) or LR}
        super().add_param_group(given)

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        decay = CorrectedDecay(h.weight_decay, h.cautious_weight_decay, h.lr, h.warmup_steps, h.max_lr)
        return (ScaleByAdam(h.betas, h.eps), decay)
