"""PaLM's second-moment decay rate, which increases with the step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.utils._pytree import tree_map_only

from hbcore.errors import OptionError
from hbcore.rules import roles
from hbcore.rules.bounds import Bounds, check_bounds
from hbcore.rules.numerics import Scalar
from hbcore.rules.transform import Transform

SCALE = Bounds(gt=0, le=1)
"""Bounds of ``beta2_scale``: above 1 the average would stop following the gradients."""


class RisingDecay:
    r"""The decay rate :math:`\beta_2(t) = 1 - t^{-s}`, from Chowdhery et al. 2022 (arXiv:2204.02311), section 5.

    Also in Shazeer and Stern 2018, Adafactor.

    Replaces a rule's :math:`\beta_2`; the rule itself needs no changes. Since :math:`\beta_2(1) = 0`, the moving average starts
    from the first gradient alone and has no bias towards zero. The rule's correction,
    :math:`1 - \prod_{i \le t} \beta_2(i)` (written ``1 - beta ** step`` for a constant rate), is therefore 1.

    Args:
        step: ``t``, 0-d float64, at least 1.
        scale: ``s``, in (0, 1].
    """

    def __init__(self, step: Scalar, scale: Scalar) -> None:
        self.inputs = (step, scale)

    @property
    def _gap(self) -> Any:
        """Computed on use: the tensors may be refilled every step."""
        step, scale = self.inputs
        return step**-scale

    def plain(self) -> Any:
        """The decay rate as an ordinary scalar."""
        return 1 - self._gap

    def __rsub__(self, other: Any) -> Any:
        return other - 1 + self._gap  # avoids cancellation in 1 - beta

    def __pow__(self, step: Any) -> Any:
        return 0 * self._gap

    def __mul__(self, other: Any) -> Any:
        return self.plain() * other

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(cls, cls.plain, (args, kwargs or {}))
        return func(*args, **kwargs)


def raised(rule: Iterable[Transform], step: Scalar, scale: Scalar) -> tuple[Transform, ...]:
    """The rule with every second-moment decay rate replaced by a rising one."""
    decay = RisingDecay(step, scale)
    return roles.replaced(rule, "second_moment", lambda _: decay)


def check(rule: Sequence[Transform], scale: Any) -> None:
    """Check that ``palm=True`` applies to a rule.

    Raises:
        HyperparameterError: ``scale`` is outside its bounds.
        OptionError: no hyperparameter has the role ``"second_moment"``.
    """
    check_bounds("beta2_scale", scale, SCALE)
    if next(roles.values(rule, "second_moment"), None) is None:
        known = ", ".join(dict.fromkeys(name for t in rule for name, _, _ in t.hypers())) or "none"
        raise OptionError(
            "palm=True schedules the decay rate of the second moment, but no hyperparameter of this rule is declared "
            f"with hyper(..., role='second_moment'); it has {known}. Pass palm=False."
        )
