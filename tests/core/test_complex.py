"""Complex parameters are pairs of real ones to every elementwise rule, and refused by rules of matrices."""

from __future__ import annotations

import pytest
import torch
from core.kit import combined, same
from torch import nn

from hb_adam import SGD, AdamW, Lion, SAMWrapper, SFAdamW, SignLaProp
from hb_muon import Muon
from hb_soap import SOAP
from hbcore import ParameterError, export, hook_into_backward

SHAPES = ((4, 3), (5,), ())


def drawn(seed, shape, dtype=torch.complex64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def twins(dtype=torch.complex64):
    """The same parameters twice: complex, and as pairs; each with a real one beside."""
    start = [drawn(i, s, dtype) for i, s in enumerate(SHAPES)]
    ours = [nn.Parameter(x.clone()) for x in start]
    pairs = [nn.Parameter(torch.view_as_real(x).clone()) for x in start]
    beside = torch.view_as_real(start[0]).clone()
    return [*ours, nn.Parameter(beside.clone())], [*pairs, nn.Parameter(beside.clone())]


def give(ours, pairs, step):
    for i, (p, q) in enumerate(zip(ours, pairs, strict=True)):
        g = drawn(100 * step + i, p.shape, p.dtype)
        p.grad, q.grad = g, (torch.view_as_real(g) if g.is_complex() else g).clone()


def as_pairs(params):
    return [torch.view_as_real(p.detach()) if p.is_complex() else p.detach() for p in params]


CASES = {
    "adamw": (AdamW, {"weight_decay": 0.1, "caution": True, "mars": True, "gradient_clipping": "global_l2norm_clip"}),
    "sign": (SignLaProp, {}),
    "schedule_free": (SFAdamW, {}),
    "lion": (Lion, {}),
    "ecc": (AdamW, {"ecc": "bf16+8", "use_ema": True}),
}


@pytest.mark.parametrize(("name", "backend"), [*combined(CASES, ["eager"]), *combined(["adamw"], ["inductor", "triton"])])
def test_they_move_as_pairs_of_real_ones(name, backend):
    cls, options = CASES[name]
    ours, pairs = twins()
    a, b = (cls(params, lr=0.05, compile=backend, **options) for params in (ours, pairs))
    for t in range(4):
        give(ours, pairs, t)
        a.step()
        b.step()
    assert same(as_pairs(ours), pairs)
    a.eval()
    b.eval()
    assert same(as_pairs(ours), pairs)


def test_in_double_precision():
    ours, pairs = twins(torch.complex128)
    a, b = AdamW(ours), AdamW(pairs)
    give(ours, pairs, 0)
    a.step()
    b.step()
    assert same(as_pairs(ours), pairs) and a.state[ours[0]]["exp_avg"].dtype == torch.float64


def test_conjugate_gradients():
    ours, _ = twins()
    plain, _ = twins()
    for p, q in zip(ours, plain, strict=True):
        g = drawn(7, p.shape, p.dtype)
        p.grad, q.grad = g.conj(), g.conj().resolve_conj().clone()
    AdamW(ours).step()
    AdamW(plain).step()
    assert same(ours, plain)


def test_they_are_torchs_and_exchange_checkpoints():
    ours, _ = twins()
    theirs, _ = twins()
    a = AdamW(ours, lr=0.05, betas=(0.9, 0.999), weight_decay=0.01, division_backend="eps_add")
    b = torch.optim.AdamW(theirs, lr=0.05)
    for t in range(5):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = drawn(10 * t + i, p.shape, p.dtype)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    back = AdamW(ours, lr=0.05)
    back.load_state_dict(b.state_dict())
    assert torch.equal(back.state_dict()["state"][0]["exp_avg"], torch.view_as_real(b.state_dict()["state"][0]["exp_avg"]))
    torch.optim.AdamW(theirs).load_state_dict(export(a))
    assert export(a)["state"][0]["exp_avg"].is_complex()


def test_checkpoints_resume_exactly():
    ours, pairs = twins()
    a = AdamW(ours)
    for t in range(2):
        give(ours, pairs, t)
        a.step()
    other = [nn.Parameter(p.detach().clone()) for p in ours]
    b = AdamW(other)
    b.load_state_dict(a.state_dict())
    for t in range(2, 4):
        give(ours, pairs, t)
        for p, q in zip(ours, other, strict=True):
            q.grad = p.grad.clone()
        a.step()
        b.step()
    assert same(ours, other)


def test_sam_and_gradient_release():
    def run(params, optimizer_of):
        loss = lambda: sum((p.abs() ** 2 if p.is_complex() else p**2).sum() for p in params)  # noqa: E731
        optimizer_of(params, loss)
        return as_pairs(params)

    def sam(params, loss):
        optimizer = SAMWrapper(params, SGD, lr=0.1)

        def closure():
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        optimizer.step(closure)

    def released(params, loss):
        hook_into_backward(params, SGD(params, lr=0.1))
        loss().backward()

    for how in (sam, released):
        ours, pairs = twins()
        for p, q in zip(run(ours, how), run(pairs, how), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", [Muon, SOAP])
def test_rules_of_matrices_refuse_them(cls):
    with pytest.raises(ParameterError, match=r"complex parameter of shape \(4, 3\)"):
        cls([nn.Parameter(torch.zeros(4, 3, dtype=torch.complex64))])
