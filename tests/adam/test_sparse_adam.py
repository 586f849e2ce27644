"""SparseAdam: equal to torch.optim.SparseAdam and to its formula, and blind to rows without a gradient."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator

import pytest
import torch
from adam.sparse import ROWS, WIDTH, sparse_gradients, table, train
from core.kit import distance, same, values
from reference.options import warmed_up
from torch import nn

import hbcore
from hb_adam import AdamW, SparseAdam
from hbcore.errors import HyperparameterError, OptionError, ParameterError


@pytest.fixture(autouse=True)
def said_about_invariants() -> Iterator[None]:
    """torch warns, slowly, of every sparse tensor that is made while nobody said whether to check them."""
    with torch.sparse.check_sparse_tensor_invariants(True):
        yield


PARITY = {"defaults": {}, "settings": {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-3, "maximize": True}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dims", [1, 2], ids=["rows", "elements"])
@pytest.mark.parametrize("settings", PARITY.values(), ids=PARITY)
def test_torch_trains_alike_for_100_steps(settings, dims, dtype):
    ours, theirs = table(dtype=dtype), table(dtype=dtype)
    optimizer, reference = SparseAdam([ours], **settings), torch.optim.SparseAdam([theirs], **settings)
    train(optimizer, ours, sparse_gradients(100, dtype, sparse_dims=dims))
    train(reference, theirs, sparse_gradients(100, dtype, sparse_dims=dims))
    limit = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    assert distance([ours], [theirs]) < limit
    held, wanted = optimizer.state[ours], reference.state[theirs]
    assert set(held) == set(wanted) and float(held["step"]) == wanted["step"] == 100
    for name in ("exp_avg", "exp_avg_sq"):
        assert distance([held[name]], [wanted[name]]) < limit, name
    assert optimizer.report.programs == 1 and not optimizer.report.reasons


@pytest.mark.filterwarnings("ignore:.*encountered in divide:RuntimeWarning")  # Triton's interpreter divides with NumPy
def test_a_kernel_follows_the_rows_from_step_to_step():
    if not pytest.importorskip("hbcore.engine.backends.triton.device_lib").INTERPRETED:
        pytest.skip("runs under Triton's interpreter")
    ours, theirs = ([table(), table(seed=1)] for _ in range(2))
    optimizer, reference = SparseAdam(ours, compile="triton"), torch.optim.SparseAdam(theirs)
    streams = zip(sparse_gradients(15), list(sparse_gradients(18))[3:], strict=True)
    for grads in streams:
        for params, o in ((ours, optimizer), (theirs, reference)):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            o.step()
    assert distance(ours, theirs) < 1e-6
    assert optimizer.report.backend == "triton" and optimizer.report.programs == 1 and optimizer.report.compiles <= 2


def test_the_rule_agrees_with_the_formula():
    """Element by element in plain Python, with all that the options put around it."""
    betas, eps, lr, decay = (0.8, 0.95), 0.1, 0.05, 0.5
    p = table(dtype=torch.float64)
    theta = p.detach().clone()
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    optimizer = SparseAdam([p], lr=lr, betas=betas, eps=eps, weight_decay=decay, warmup_steps=6, caution=True)
    for t, sparse in enumerate(sparse_gradients(12, torch.float64), start=1):
        p.grad = sparse.clone()
        optimizer.step()
        g = sparse.to_dense()
        moved = sparse.coalesce().indices()[0]
        steps = {}
        for i in moved.tolist():
            for j in range(WIDTH):
                m[i, j] = betas[0] * m[i, j] + (1 - betas[0]) * g[i, j]
                v[i, j] = betas[1] * v[i, j] + (1 - betas[1]) * g[i, j] ** 2
                steps[i, j] = (1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t) * m[i, j] / (v[i, j] ** 0.5 + eps)
        kept = {key: float(u * g[key] > 0) for key, u in steps.items()}
        mean = max(sum(kept.values()) / max(len(kept), 1), 1e-3)
        for key, u in steps.items():
            theta[key] -= warmed_up(lr, t, 6) * (u * kept[key] / mean + decay * theta[key])
        assert distance([p], [theta]) < 1e-14, t


def test_duplicates_are_summed_before_they_are_squared():
    p = nn.Parameter(torch.zeros(3, 1))
    p.grad = torch.sparse_coo_tensor([[1, 1, 1]], [[3.0], [2.0], [-1.0]], (3, 1))
    optimizer = SparseAdam([p], lr=1.0, betas=(0.5, 0.5))
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].flatten().tolist() == [0, 2, 0]
    assert optimizer.state[p]["exp_avg_sq"].flatten().tolist() == [0, 8, 0]


# --- rows without a gradient ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.5, "caution": True, "mars": True}, {"ecc": "bf16+8"}], ids=str)
def test_other_rows_are_neither_read_nor_written(options):
    """Bit for bit, poison included: a NaN that was read would spread through caution's mean."""
    p = table()
    optimizer = SparseAdam([p], **options)
    train(optimizer, p, sparse_gradients(3))
    touched = [3, 17, 39]
    others = torch.tensor([i for i in range(ROWS) if i not in touched])
    tensors = {name: t for name, t in optimizer.state[p].items() if name != "step"} | {"param": p.data}
    for t in tensors.values():
        t[others] = float("nan") if t.is_floating_point() else 77
    before = {name: t.clone() for name, t in tensors.items()}
    p.grad = torch.sparse_coo_tensor([touched], torch.ones(3, WIDTH), p.shape)
    optimizer.step()
    for name, t in tensors.items():
        bits = {2: torch.int16, 4: torch.int32, 1: torch.int8}[t.element_size()]
        assert torch.equal(t.view(bits)[others], before[name].view(bits)[others]), name
    assert p[touched].isfinite().all() and not torch.equal(p[touched], before["param"][touched])


def test_a_step_costs_what_its_rows_cost():
    """Five times the time of a table 3,000 times as small is what noise may add; the table's own cost would be 100 times."""
    times = []
    for rows in (1_000, 3_000_000):
        p = nn.Parameter(torch.zeros(rows, WIDTH))
        optimizer = SparseAdam([p])
        best = float("inf")
        for _ in range(12):
            p.grad = torch.sparse_coo_tensor(torch.arange(16)[None] * (rows // 16), torch.ones(16, WIDTH), p.shape)
            start = time.perf_counter()
            optimizer.step()
            best = min(best, time.perf_counter() - start)
        times.append(best)
    assert times[1] < 5 * times[0], times


def test_a_gradient_of_no_row_is_a_step_that_moves_nothing():
    p = table()
    optimizer = SparseAdam([p], weight_decay=0.5)
    before = values([p])
    p.grad = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, WIDTH), p.shape)
    optimizer.step()
    assert same([p], before) and float(optimizer.state[p]["step"]) == 1


# --- gradients that are what nobody expects ---------------------------------------------------------------------------


def test_a_dense_gradient_is_refused_and_nothing_changes():
    first, second = table(), table(seed=1)
    optimizer = SparseAdam([("table", first), ("head.weight", second)])
    first.grad = next(sparse_gradients(1))
    second.grad = torch.ones_like(second)
    before = values([first, second])
    with pytest.raises(ParameterError, match=r"'head\.weight'.*dense gradient.*use Adam.*sparse=True") as raised:
        optimizer.step()
    assert isinstance(raised.value, RuntimeError)  # as in torch.optim
    assert same([first, second], before)


def test_others_name_the_optimizer_for_sparse_gradients():
    p = table()
    p.grad = next(sparse_gradients(1))
    with pytest.raises(ParameterError, match=r"sparse gradient.*\(SparseAdam\)"):
        AdamW([p]).step()


def test_a_bare_tensor_is_refused():
    with pytest.raises(TypeError, match="params argument given to the optimizer should be an iterable of Tensors or dicts"):
        SparseAdam(table())


def test_options_and_numbers_that_do_not_go_with_it_are_refused():
    for option in ("capturable", "use_ema"):
        with pytest.raises(OptionError, match=option):
            SparseAdam([table()], **{option: True})
    for bad in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": 0.0}):
        with pytest.raises(HyperparameterError, match=next(iter(bad))):
            SparseAdam([table()], **bad)


def test_gradients_are_left_alone_or_let_go():
    p = table()
    optimizer = SparseAdam([p], consume_grad=False)
    for given in sparse_gradients(3):
        p.grad = given.clone()
        held = p.grad
        optimizer.step()
        assert p.grad is held and not held.is_coalesced() and torch.equal(held.to_dense(), given.to_dense())
    optimizer = SparseAdam([p], compile="triton")
    p.grad = given.clone()
    watched = weakref.ref(p.grad._values())
    held = None
    optimizer.step()
    assert p.grad is None and watched() is None


def test_names_and_defaults():
    assert hbcore.get("sparse_adam") is SparseAdam
    [ours], [theirs] = SparseAdam([table()]).param_groups, torch.optim.SparseAdam([table()]).param_groups
    for key in ("lr", "betas", "eps", "maximize"):
        assert ours[key] == theirs[key], key
