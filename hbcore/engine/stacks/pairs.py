"""Hessian-vector products on their way to the rules: what the engine made of each parameter, laid out in stacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hbcore.distributed.exchange import Transfer, to_owners
from hbcore.engine.group_scalars import Due
from hbcore.engine.stacks.flat_stack import FlatView, View
from hbcore.engine.stacks.stack import ShardedView
from hbcore.errors import OptionError
from hbcore.rules.transform import Transform

Pairs = Mapping[Tensor, tuple[Tensor, Tensor]]
"""Parameter -> a vector and the Hessian's product with it; of a sharded one, this rank's parts."""


class CurvedMember(Protocol):
    """What is known of a parameter here; see :class:`hbcore.engine.stacks.level.StackMember`."""

    param: Tensor
    group: int

    @property
    def views(self) -> Sequence[View]: ...

    @property
    def reach(self) -> int: ...

    def rule_at(self, level: int) -> Transform:
        """The matrix rule with ``level`` others before it."""


class Curved:
    """The parameters of one level whose rules need Hessian-vector products. False if there are none, on any rank.

    Args:
        members: all active parameters.
        level: how many matrix rules come before these.
    """

    def __init__(self, members: Sequence[CurvedMember], level: int) -> None:
        self._level, self._pairs = level, dict[Tensor, tuple[Tensor, Tensor]]()
        rules = [(m, m.rule_at(level)) for m in members if level < min(m.reach, len(m.views))]
        self._members = [(m, rule.name, rule.curvature.interval) for m, rule in rules if "hvp" in rule.needs]

    def __bool__(self) -> bool:
        return bool(self._members)

    def take(self, pairs: Pairs, due: Mapping[int, Mapping[str, Due]]) -> None:
        """Keep this step's products until the rules run.

        Raises:
            OptionError: a rule needs some in this step, and they were not made.
        """
        self._pairs = {}
        for m, name, interval in self._members:
            if due[m.group][name].asks(interval):
                if m.param not in pairs:
                    raise OptionError(
                        f"rule {name!r} needs Hessian-vector products in this step: call step(closure), with a closure that "
                        "clears the gradients, computes the loss, calls backward() and returns the loss. A GradScaler passes "
                        "none; train in bfloat16, which needs no scaler."
                    )
                self._pairs[m.param] = pairs[m.param]

    def bring(self) -> None:
        """Lay the vectors and products out in stacks, like the rules' other inputs. Collective if some are sharded."""
        for view, *pair in self._whole():
            for block, stack, row in view.runs:
                if not stack.pair:
                    stack.pair = {name: torch.zeros_like(stack.inputs["update"]) for name in ("vector", "hvp")}
                for target, whole in zip(stack.pair.values(), pair, strict=True):
                    if isinstance(view, FlatView):
                        target[view.stack.elements(row)] = whole.reshape(-1)
                    else:
                        target[row : row + block.batch] = block.of(whole)
        self.drop()

    def drop(self) -> None:
        """Keep nothing of a step."""
        self._pairs = {}

    def _whole(self) -> Iterator[tuple[View, Tensor, Tensor]]:
        """The pairs of whole parameters; those of sharded ones only where they have runs, on their owners. Flat rules see this
        rank's parts."""
        sharded: dict[tuple[Any, torch.dtype], list[tuple[ShardedView, list[Transfer]]]] = {}
        for m in (m for m, _, _ in self._members if m.param in self._pairs):
            view, pair = m.views[self._level], self._pairs[m.param]
            if not isinstance(view, ShardedView):
                yield view, pair[0].contiguous(), pair[1].contiguous()
                continue
            shards, size = view.shards, view.shards.shape.numel()
            sent = [Transfer(t.reshape(-1), t.new_empty(size) if view.runs else None, view.owner, shards.sizes()) for t in pair]
            sharded.setdefault((shards.mesh, pair[1].dtype), []).append((view, sent))
        for views in sharded.values():
            to_owners([transfer for _, sent in views for transfer in sent], views[0][0].shards)
            for view, sent in views:
                vector, product = (transfer.whole for transfer in sent)
                if vector is not None and product is not None:
                    yield view, vector.view(view.shards.shape), product.view(view.shards.shape)
