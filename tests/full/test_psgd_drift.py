"""PSGDKron's factors over thousands of steps."""

from __future__ import annotations

import pytest
import torch

import hbcore


@pytest.mark.full
@pytest.mark.parametrize("q_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["quad", "pro", "qeq", "qep", "eq"])
def test_norms_do_not_drift_in_5000_steps(rule, dtype, q_dtype):
    """Of gradients from one distribution: the factors' norms of the last thousand steps are those of the thousand before."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(24, 16, dtype=dtype))
    scale = torch.logspace(0, -1, 24)[:, None] * torch.logspace(0, -0.5, 16)
    options = {"precond_rule": rule, "q_dtype": q_dtype, "preconditioner_update_probability": 1}
    optimizer = hbcore.get("PSGDKron")([p], lr=1e-3, compile="eager", **options)
    norms = []
    for _ in range(5000):
        p.grad = (scale * torch.randn(24, 16, generator=generator)).to(dtype)
        optimizer.step()
        norms.append([float(optimizer.state[p][f"Q_{i}"].float().norm()) for i in (0, 1)])
    late = torch.tensor(norms)[3000:].view(2, 1000, 2).mean(1)
    assert all(bool(t.isfinite().all()) for t in optimizer.state[p].values())
    assert torch.allclose(late[0], late[1], rtol=0.1), late
    if rule == "quad" and q_dtype == "float32":
        for i in (0, 1):
            q = optimizer.state[p][f"Q_{i}"]
            assert torch.equal(q, q.mT) or float((q - q.mT).norm() / q.norm()) < 1e-6
