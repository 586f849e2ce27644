"""A matrix rule in one step: bound to the step's numbers, and what it is told of the step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hbcore.engine.group_scalars import Due
from hbcore.engine.stacks.bound_rule import BoundRule
from hbcore.engine.stacks.key import StackKey
from hbcore.engine.stacks.tools import Tools


class Turn:
    """A rule, bound to the numbers of one call in one step.

    Args:
        key: of any stack that the rule takes.
        tools: what the optimizer's calls share.

    Attributes:
        rule: the rule.
        carried: what the groups carry for it.
        step: the rows' step.
        due: whether the rule's expensive part is due.
        asks: whether it has Hessian-vector products.
        row: the numbers themselves, as in ``spec.scalar_names``.
    """

    def __init__(self, key: StackKey, tools: Tools) -> None:
        self.spec, self.index, self.tools = key.spec, key.index, tools
        self._bound = BoundRule(key.spec, key.index)
        self.rule, self.carried = self._bound.rule, self._bound.carried
        self._interval = self.rule.curvature.interval if "hvp" in self.rule.needs else 0
        self.step, self.due, self.asks = 0, Due(0.0, 1.0), False
        self.row: list[float] = []

    @property
    def step_tensor(self) -> Tensor:
        """The rows' step, 0-d float64 on the host."""
        return self._bound.scalars["step"]

    def fill(self, numbers: Sequence[float], step: float, due: Due) -> None:
        """Take this step's numbers: hyperparameters and what a group carries."""
        self.step, self.due, self.row = int(step), due, [*numbers, step, 1.0]
        self.rule = self._bound.fill(numbers, step)
        self.asks = self._interval > 0 and due.asks(self._interval)
