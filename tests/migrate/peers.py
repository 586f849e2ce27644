"""Stand-ins, written from their published definitions, for optimizers that no package index has: they save what those save."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def newton_schulz(u: Tensor, rows: Iterable[tuple[float, float, float]], safety: float = 1.0) -> Tensor:
    """The iteration in the dtype of ``u``: float64 shows that the maths is the same, where bfloat16 would hide a difference."""
    x = u.mT if u.shape[-2] > u.shape[-1] else u
    x = x / (safety * x.norm(dim=(-2, -1), keepdim=True))
    for a, b, c in rows:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if u.shape[-2] > u.shape[-1] else x


def adam(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: float, group: dict[str, Any], betas: Any, eps: float) -> None:
    """AdamW with eps outside of the root."""
    m.lerp_(g, 1 - betas[0])
    v.lerp_(g * g, 1 - betas[1])
    p.mul_(1 - group["lr"] * group["weight_decay"])
    p.sub_(group["lr"] * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps))


class Muon(torch.optim.Optimizer):
    """KellerJordan/Muon's ``SingleDeviceMuon``, and with groups that have ``use_muon`` its ``SingleDeviceMuonWithAuxAdam``."""

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state, g = self.state[p], p.grad
                if group.get("use_muon", True):
                    buffer = state.setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(g, 1 - group["momentum"])
                    ahead = g.lerp(buffer, group["momentum"])
                    update = newton_schulz(ahead.flatten(1) if p.ndim == 4 else ahead, JORDAN)
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(group["lr"] * max(1, p.shape[-2] / p.shape[-1]) ** 0.5 * update.view_as(p))
                else:
                    m, v = (state.setdefault(name, torch.zeros_like(p)) for name in ("exp_avg", "exp_avg_sq"))
                    state["step"] = state.get("step", 0) + 1
                    adam(p, g, m, v, state["step"], group, group["betas"], group["eps"])


class DionMuon(torch.optim.Optimizer):
    """microsoft/dion's ``Muon`` on one device."""

    def __init__(self, groups: list[dict[str, Any]], **given: Any) -> None:
        defaults = {"lr": 0.01, "mu": 0.95, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.01, "cautious_wd": False}
        defaults |= {"algorithm": "muon", "step": 0, "epsilon": 1e-8, "nesterov": False, "flatten": False}
        super().__init__(groups, {**defaults, "adjust_lr": "spectral_norm", **given})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"] = torch.zeros_like(p)
                if group["algorithm"] == "adamw":
                    self.state[p].update(variance=torch.zeros_like(p), step_dev=torch.zeros(()))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            group["step"] += 1
            for p in (p for p in group["params"] if p.grad is not None):
                state, g = self.state[p], p.grad
                if group["algorithm"] == "adamw":
                    state["step_dev"] += 1
                    betas = (group["beta1"], group["beta2"])
                    adam(p, g, state["momentum"], state["variance"], group["step"], group, betas, group["epsilon"])
                else:
                    self.muon(p, g, state["momentum"].mul_(group["mu"]).add_(g), group)

    @staticmethod
    def muon(p: Tensor, g: Tensor, total: Tensor, group: dict[str, Any]) -> None:
        ahead = g + group["mu"] * total if group["nesterov"] else total
        update = newton_schulz(ahead.flatten(1) if group["flatten"] else ahead, POLAR, 1.02)
        m, n = update.shape[-2:]
        scales = {None: 1.0, "rms_norm": 0.2 * math.sqrt(max(m, n)), "spectral_norm": math.sqrt(m / n)}
        decay = group["lr"] * group["weight_decay"] * p
        if group["cautious_wd"]:
            decay = torch.where(update.view_as(p) * p >= 0, decay, 0.0)
        p.sub_(decay)
        p.sub_(group["lr"] * scales[group["adjust_lr"]] * update.view_as(p))
