"""Optimizers that are at fault on several ranks only. Module-level classes, because other processes import them."""

from __future__ import annotations

from hb_adam import AdamW
from hbcore.errors import RuleError


class SeesItsShard(AdamW):
    """Divides each gradient by the norm of this rank's part."""

    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"]):
            part = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
            part.div_(1 + part.norm())
        return super().step(closure)


class RefusesTooLate(AdamW):
    """Steps on shards, and refuses to afterwards."""

    def step(self, closure=None):
        loss = super().step(closure)
        if any(hasattr(p, "to_local") for group in self.param_groups for p in group["params"]):
            raise RuleError("cannot be sharded")
        return loss


class RefusesInTime(AdamW):
    """Refuses to step on shards."""

    def step(self, closure=None):
        if any(hasattr(p, "to_local") for group in self.param_groups for p in group["params"]):
            raise RuleError("cannot be sharded")
        return super().step(closure)


class RaisesOnShards(AdamW):
    """Fails on shards, and not with a RuleError."""

    def step(self, closure=None):
        if any(hasattr(p, "to_local") for group in self.param_groups for p in group["params"]):
            raise IndexError("no shard")
        return super().step(closure)


class ForgetsShards(AdamW):
    """Loses the moments of what is sharded when it loads."""

    def load_state_dict(self, state_dict, strict=True):
        super().load_state_dict(state_dict, strict)
        for state in self.state.values():
            if hasattr(state["exp_avg"], "to_local"):
                state["exp_avg"].to_local().zero_()


BROKEN = {
    "shards_follow_one_process": (SeesItsShard, RefusesTooLate, RaisesOnShards),
    "a_sharded_run_resumes_exactly": (ForgetsShards,),
}
"""Check -> optimizers that must fail it."""

CORRECT = (AdamW, RefusesInTime)
"""Optimizers that pass all."""
