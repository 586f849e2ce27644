"""AdamC, Defazio 2025."""

from __future__ import annotations

import warnings
from typing import Any

from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from hbcore.api import CorrectedDecay, Optimizer, Options, ScaleByAdam, Transform


class AdamC(Optimizer):
    r"""AdamW whose weight decay follows the learning rate twice, Defazio 2025 (arXiv:2506.02285), Algorithm 1.

    .. math::
        p_t = p_{t-1} - \gamma_t \left(\frac{\hat m_t}{\max(\sqrt{\hat v_t}, \epsilon)}
        + \lambda \frac{\gamma_t}{\gamma_{\max}} p_{t-1}\right)

    with Adam's corrected moments, and :math:`\gamma_t` the learning rate after warm-up. The ratio of gradient to weight that
    layers before a normalisation settle at then stays as it is while the learning rate falls. The paper leaves other layers
    with AdamW's decay.

    Args:
        params: parameters, named parameters or groups of them; any floating dtype and shape.
        lr: learning rate.
        betas: decay rates of the two moments, in [0, 1).
        eps: the smallest divisor, at least 0.
        max_lr: :math:`\gamma_{\max}`, the largest learning rate of the training, above 0; None, with a warning: each
            group's ``lr`` as it is given, which is right if that is where it falls from.
        **options: ``weight_decay`` is :math:`\lambda`; for all of them see :class:`hbcore.api.Options`.

    State: ``exp_avg`` and ``exp_avg_sq``, of the parameter's shape, and ``step``.

    Raises:
        HyperparameterError: a hyperparameter is outside its bounds.
        OptionError: an option does not exist.
        ParameterError: ``params`` is unusable.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.0025,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        max_lr: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        if max_lr is None:
            warnings.warn(
                "AdamC: max_lr is not given, and each group's present lr taken for the largest of the training; pass max_lr.",
                UserWarning,
                stacklevel=2,
            )
        cautious = bool(options.pop("cautious_weight_decay", False))  # the rule's own decay minds it
        hyperparameters = {"lr": lr, "betas": betas, "eps": eps, "max_lr": max_lr, "cautious_weight_decay": cautious}
        super().__init__(params, hyperparameters, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time; ``max_lr`` is its ``lr`` unless it or the constructor was given one."""
        given: Any = param_group  # what is no dict is for the base class to refuse
        if isinstance(given, dict) and given.get("max_lr", self.defaults["max_lr"]) is None:
            given = {**given, "max_lr": float(given.get("lr", self.defaults["lr"]))}
        super().add_param_group(given)

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        decay = CorrectedDecay(h.weight_decay, h.cautious_weight_decay, h.lr, h.warmup_steps, h.max_lr)
        return (ScaleByAdam(h.betas, h.eps), decay)
