"""Steps on sparse gradients: the rows that have one are gathered, updated as parameters of their own, and written back.

For optimizers that say ``sparse_gradients = True``. A step costs what its rows cost, whatever the size of the table, and leaves
every other row of the parameter and of its state as it was: nothing decays there. Their chains are the ordinary elementwise
ones. What a rule sums over a tensor is summed over the gathered rows, and a parameter's count of steps is the same for all of
them. What rules draw, and the noise of stochastic rounding, is drawn by a row's place among them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hbcore.distributed.placement import is_dtensor, local
from hbcore.engine.core import OptimizerCore
from hbcore.engine.graph.scalar_inputs import NO_AMP, Amp
from hbcore.engine.options import Settings
from hbcore.engine.planning.plan import Plan
from hbcore.engine.planning.segments import Member
from hbcore.errors import OptionError, RuleError, SparseGradientError
from hbcore.rules import route
from hbcore.rules.transform import Domain

Index = tuple[Tensor, ...]
"""Where gathered rows lie: one int64 tensor for each sparse dimension."""


class SparsePlan(Plan):
    """A plan whose gradients are sparse. Lays its rows out anew at every step.

    Raises:
        RuleError: a rule of the chain sees matrices, or two sets of weights.
    """

    def __init__(self, core: OptimizerCore) -> None:
        super().__init__(core)
        self._rows: list[Rows] = []
        for t in (t for group in core.groups for t in route.every(core.chain.forked(group))):
            if t.domain == Domain.MATRIX or t.owns_apply or t.scalars():
                raise RuleError(f"rule {t.name!r} needs whole parameters, and sparse_gradients=True gives it single rows.")

    def step(self, amp: Amp = NO_AMP) -> list[Tensor]:
        try:
            super().step(amp)
            for rows in self._rows:
                rows.write_back()
            stepped = [rows.whole.param for rows in self._rows]
            torch.autograd.graph.increment_version(stepped)
            return stepped
        finally:  # the next step has other rows; a backend may hold these until then, but not their gradients
            for rows in self._rows:
                rows.rows.param.grad = None
            self.layout, self._rows = None, []

    def _gradient(self, p: Tensor, g: int, i: int) -> Tensor:
        grad = p.grad
        assert grad is not None
        if is_dtensor(p) or is_dtensor(grad):
            raise SparseGradientError(f"{self.core.name_of(g, i)} is sharded; keep a table of sparse rows whole.")
        if grad.layout != torch.sparse_coo:
            raise SparseGradientError(
                f"{self.core.name_of(g, i)} has a dense gradient ({grad.layout}), and this optimizer takes sparse ones only; "
                "use Adam for it, or make the layer sparse (nn.Embedding(..., sparse=True))."
            )
        return grad._values()

    def _grouped(self, active: Iterable[Member]) -> list[Member]:
        """Members made of the rows that have a gradient."""
        self._rows = [gathered(m) for m in active]
        return [rows.rows for rows in self._rows]

    def _numel(self) -> int:
        return 0  # a step takes a few rows of a table: compile="auto" compiles nothing on a CPU


def plan_for(core: OptimizerCore) -> Plan:
    """A plan for gradients of the kind that the optimizer takes."""
    return SparsePlan(core) if core.sparse else Plan(core)


@dataclass(frozen=True)
class Rows:
    """The rows of one parameter that have a gradient.

    Attributes:
        whole: the parameter.
        rows: a member made of the gathered rows, ``[rows, *dense dimensions]``, as if they were a parameter.
        index: where they lie in the parameter.
    """

    whole: Member
    rows: Member
    index: Index

    def write_back(self) -> None:
        """Put the rows, and their state, where they were gathered from."""
        if not self.rows.local.numel():
            return
        put(self.whole.local, self.index, self.rows.local)
        for name, part in self.rows.stored.items():
            if part is not self.whole.stored[name]:
                put(self.whole.stored[name], self.index, part)


def gathered(m: Member) -> Rows:
    """Copies of the rows of ``m`` that its parameter's gradient has; rows that come twice have the sum of their gradients."""
    assert m.param.grad is not None
    grad = m.param.grad.coalesce()
    index: Index = grad.indices().unbind(0)
    values = local(grad.values())
    param = take(m.local, index)[: len(values)]
    param.grad = values
    whole = {"step", *(name for segment in m.segments for name in segment.key.spec.numbers)}
    stored = {name: t if name in whole else take(t, index)[: len(values)] for name, t in m.stored.items()}
    return Rows(m, replace(m, param=param, local=param, stored=stored, held={}), index)


def take(table: Tensor, index: Index) -> Tensor:
    """``table[index]``, a copy; of a 0-d table, which has no sparse dimension, its one element."""
    return table[index] if index else table.clone().unsqueeze(0)


def put(table: Tensor, index: Index, rows: Tensor) -> None:
    """Write ``rows`` where :func:`take` took them from."""
    if index:
        table.index_put_(index, rows)
    else:
        table.copy_(rows[0])


def check(optimizer: str, settings: Settings) -> None:
    """Check that the options support sparse gradients.

    Raises:
        OptionError: one does not.
    """
    if settings.capturable:
        raise OptionError(f"{optimizer}: capturable=True needs gradients of one size, and sparse ones have any; pass False.")
    if settings.offload is not None:
        raise OptionError(
            f"{optimizer}: offload={settings.offload!r} would move whole tables for the few rows that a step takes; pass "
            "offload=None."
        )
    if settings.report_norms:
        raise OptionError(
            f"{optimizer}: report_norms=True needs whole parameters, and a step takes single rows; pass report_norms=False."
        )
    if settings.use_ema:
        raise OptionError(
            f"{optimizer}: use_ema=True averages over all steps, and a row is seen in those alone that have a gradient for it; "
            "pass use_ema=False."
        )
