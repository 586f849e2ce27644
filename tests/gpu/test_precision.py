"""Products at each precision on a CUDA device: what the default rests on (docs/adr/0029)."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import hbcore
from hbcore.rules import bases, factor_kernel, products_kernel
from hbcore.rules.halves import parts
from hbcore.rules.parts import Layout
from hbcore.rules.products import Exact, Split, Triple

pytestmark = pytest.mark.gpu
EXACT = ("ieee", "split")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def off(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("rows", [64, 768, 2048])
def test_split_products_are_as_exact_as_float32(rows):
    x, q = normal(2, rows, 3072) * 0.02, torch.linalg.qr(normal(2, rows, rows, seed=1))[0]
    for a, b in ((q.mT, x), (x.mT, q), (q, q.mT)):
        error = Split().matmul(a, b).double() - a.double() @ b.double()
        assert float(error.norm() / (a.double().abs() @ b.double().abs()).norm()) < 3e-7  # sums of squares are the worst
    mean = normal(2, rows, rows, seed=2)
    mean = mean + mean.mT
    for y in (x, x.mT[:, :, :rows].mT):
        wanted = 0.5 * mean.double() + 0.5 * y.double() @ y.double().mT
        assert off(Split().averaged(mean, y, 0.5), wanted) < 2e-6


@pytest.mark.parametrize("shape", [(3, 33, 40), (2, 5, 7), (1, 768, 768)], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-19, 1e18])
def test_the_kernel_splits_as_torch_does(shape, size):
    x = normal(*shape) * size
    for order, dim, run in (("lh", 2, shape[2]), ("hl", 1, shape[1] * shape[2])):
        [found] = products_kernel.split([x], (Layout(run, order == "lh"),))
        wanted, scale = parts(x, order, dim)
        assert torch.equal(found.memory, wanted.view(-1)) and torch.equal(found.scales(len(x)), scale.flatten())


@pytest.mark.parametrize("n", [5, 16, 64, 65, 100, 128])
def test_the_kernel_factorizes_as_the_library_does(n):
    x = normal(4, n, 2 * n)
    p = x @ x.mT
    p[1] = torch.eye(n, device="cuda")
    p[1, n // 2, n // 2] = -1
    out, good = torch.zeros_like(p), torch.ones(4, dtype=torch.int32, device="cuda")
    factor_kernel.inverse(p.clone(), out, good)
    assert good.tolist() == [1, 0, 1, 1]
    fine = [0, 2, 3]
    eye = torch.eye(n, dtype=torch.float64, device="cuda")
    assert float((out[fine].double() @ p[fine].double() @ out[fine].double().mT - eye).abs().max()) < 1e-4
    assert not out.triu(1).any()


def test_products_of_three_parts_are_more_exact_than_float32s():
    x, q = normal(2, 768, 3072) * 0.02, torch.linalg.qr(normal(2, 768, 768, seed=1))[0]
    for a, b in ((q.mT, x), (x.mT, q)):
        exact = a.double() @ b.double()
        assert off(Triple().matmul(a, b), exact) < 2e-7 < off(a @ b, exact)
    square = x.double() @ x.double().mT
    assert off(Triple().squared(x), square) < 4e-7 < off(x @ x.mT, square)
    mean = normal(2, 768, 768, seed=2)
    mean = mean + mean.mT
    wanted, memory = 0.5 * mean.double() + 0.5 * square, mean.clone()
    assert off(Triple().averaged(memory, x, 0.5, memory), wanted) < 1e-6 and off(memory, wanted) < 1e-6


@pytest.mark.parametrize("products", [Triple(), Split()], ids=EXACT)
def test_a_refresh_is_that_of_float64(products):
    x = normal(3, 300, 600)
    p, q = x @ x.mT, torch.linalg.qr(normal(3, 300, 300, seed=1))[0]
    wanted = bases.refreshed(p.double().cpu(), q.double().cpu())
    found = bases.refreshed(p, q, products)
    assert float((found.double().cpu() * wanted).sum(-2).abs().min()) > 1 - 1e-3


def trained(precision, gradients, steps, **options):
    """SOAP with these gradients, in or outside autocast; the parameters, and the moves of the last step."""
    params = [nn.Parameter(torch.zeros_like(g)) for g in gradients(0)]
    options = {"lr": 1.0, "weight_decay": 0.0, "matmul_precision": precision, **options}
    optimizer = hbcore.get("SOAP")(params, **options)
    for step in range(steps):
        before = [p.detach().clone() for p in params]
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g
        optimizer.step()
    return optimizer, params, [p.detach() - b for p, b in zip(params, before, strict=True)]


@pytest.mark.parametrize("precision", EXACT)
def test_gradients_of_rank_12_move_weights_within_their_rows(precision):
    """Refreshed at every step, float32 itself comes close to the bound, and above it."""
    rows = torch.linalg.qr(normal(96, 96))[0][:, :12]

    def gradients(step):
        return [1e-3 * normal(96, 12, seed=step) @ rows.mT]

    *_, [move] = trained(precision, gradients, 30, precondition_frequency=10)
    outside = move - move @ rows @ rows.mT
    assert float(outside.square().sum() / move.square().sum()) < 1e-3


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("precision", ["ieee", "split", "tf32"])
def test_bases_stay_orthogonal_for_a_thousand_steps(precision, autocast):
    def gradients(step):
        return [normal(96, 160, seed=step), normal(160, 96, seed=step + 1)]

    with torch.autocast("cuda", dtype=torch.bfloat16) if autocast else nullcontext():
        optimizer, params, _ = trained(precision, gradients, 1000, lr=1e-3, precondition_frequency=2)
    for p in params:
        for i in range(2):
            q = optimizer.state[p][f"Q_{i}"].double()
            assert float((q.mT @ q - torch.eye(len(q), dtype=torch.float64, device="cuda")).abs().max()) < 1e-4


def test_the_default_is_split_where_tensor_cores_are():
    optimizer, *_ = trained(None, lambda step: [normal(8, 8, seed=step)], 2)
    products = optimizer.core.plan.layout.levels[0]._tools.products(torch.device("cuda"))
    fast = torch.cuda.get_device_capability() in ((8, 0), (9, 0), (10, 0))
    assert type(products) is (Split if fast else Exact)
