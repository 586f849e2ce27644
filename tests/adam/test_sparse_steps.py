"""Steps on sparse gradients (engine/planning/sparse_plan.py), beside other optimizers, with other rules, and checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from adam.sparse import ROWS, WIDTH, sparse_gradients, table, train
from core.kit import distance, optimizer_of, same, values
from rounding import drift
from torch import Tensor, nn

import hbcore
from hb_adam import AdamW, SparseAdam
from hbcore.api import ScaleByAdam
from hbcore.errors import RuleError


@pytest.fixture(autouse=True)
def said_about_invariants() -> Iterator[None]:
    """torch warns, slowly, of every sparse tensor that is made while nobody said whether to check them."""
    with torch.sparse.check_sparse_tensor_invariants(True):
        yield


def embedder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.EmbeddingBag(ROWS, WIDTH, sparse=True, mode="sum"), nn.Linear(WIDTH, 2))


def lose(model: nn.Module, step: int) -> Tensor:
    return model(torch.randint(ROWS, (6, 3), generator=torch.Generator().manual_seed(step))).square().sum()


def test_it_trains_a_models_embedding_beside_another_optimizer_and_inside_backward():
    finals = []
    for released in (False, True):
        model = embedder()
        optimizer = hbcore.SplitOpt(
            [
                {"params": list(model[0].parameters()), "optimizer": SparseAdam, "lr": 0.05},
                {"params": list(model[1].parameters()), "optimizer": AdamW, "lr": 0.05},
            ]
        )
        start = lose(model, 0).item()
        handle = hbcore.hook_into_backward(model, optimizer) if released else None
        for step in range(30):
            lose(model, step).backward()
            optimizer.step()
        assert (handle is None) is not released and lose(model, 0).item() < 0.5 * start
        finals.append(values(model.parameters()))
    assert distance(*finals) < drift(torch.float32, 30)


def test_accumulated_gradients_are_one_gradient():
    whole, parts = embedder()[0], embedder()[0]
    for module, micro in ((whole, 1), (parts, 4)):
        optimizer = SparseAdam(module.parameters())
        for step in range(3):
            bags = torch.randint(ROWS, (8, 3), generator=torch.Generator().manual_seed(step))
            for chunk in bags.chunk(micro):
                module(chunk).sum().backward()
            optimizer.step()
        assert float(optimizer.state[module.weight]["step"]) == 3
    assert distance([parts.weight], [whole.weight]) < 1e-6


def test_a_grad_scaler_skips_infinite_steps():
    module = embedder()[0]
    optimizer, scaler = SparseAdam(module.parameters()), torch.amp.GradScaler("cpu", init_scale=4.0)
    before = values([module.weight])
    for factor in (float("inf"), 1.0):
        scaler.scale(module(torch.tensor([[1, 2]])).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert same([module.weight], before) is (factor != 1.0)


def test_torchs_checkpoints_load_and_ours_load_there():
    ours, theirs = table(), table()
    reference, optimizer = torch.optim.SparseAdam([theirs], lr=0.02), SparseAdam([ours])
    train(reference, theirs, sparse_gradients(6))
    ours.data.copy_(theirs.data)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    back = torch.optim.SparseAdam([theirs])
    back.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, ours, sparse_gradients(20))
    train(back, theirs, sparse_gradients(20))
    assert distance([ours], [theirs]) < 1e-6 and float(optimizer.state[ours]["step"]) == 26


@pytest.mark.filterwarnings("ignore:.*encountered in divide:RuntimeWarning")
@pytest.mark.parametrize("options", [{"compile": "triton"}, {"gradient_clipping": "global_l2norm_clip"}], ids=str)
def test_compiled_and_clipped_steps_are_those_of_dense_rows(options):
    """Every row has a gradient, in an order of its own: then the steps are those of the same rule on a dense one."""
    if "compile" in options and not pytest.importorskip("hbcore.engine.backends.triton.device_lib").INTERPRETED:
        pytest.skip("runs under Triton's interpreter")
    dense_rule = optimizer_of(ScaleByAdam)
    rows_rule = type("Rows", (dense_rule,), {"sparse_gradients": True})
    tables, denses = ([table(6, seed=s) for s in (1, 2)] for _ in range(2))
    sparse, dense = rows_rule(tables, **options), dense_rule(denses, **{**options, "compile": "eager"})
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        for p, q in zip(tables, denses, strict=True):
            g, order = torch.randn(6, WIDTH, generator=generator), torch.randperm(6, generator=generator)
            p.grad, q.grad = torch.sparse_coo_tensor(order[None], g[order], g.shape), g
        sparse.step()
        dense.step()
    assert distance(tables, denses) < 1e-6
    assert sparse.report.backend == options.get("compile", "eager") and not sparse.report.reasons


def test_a_rule_that_needs_whole_parameters_is_refused():
    from hb_adam.schedule_free import ScheduleFree

    p = table()
    p.grad = next(sparse_gradients(1))
    with pytest.raises(RuleError, match=r"schedule_free.*single rows"):
        type("Rows", (optimizer_of(ScheduleFree),), {"sparse_gradients": True})([p]).step()


def test_complex_tables_and_a_scalar():
    p, q = nn.Parameter(torch.randn(6, 2, dtype=torch.complex64)), nn.Parameter(torch.tensor(2.0))
    before = values([p, q])
    optimizer = SparseAdam([p, q])
    p.grad = torch.sparse_coo_tensor([[4, 1]], torch.randn(2, 2, dtype=torch.complex64), p.shape)
    q.grad = torch.tensor(3.0).to_sparse()
    optimizer.step()
    assert (p != before[0]).any(1).nonzero().flatten().tolist() == [1, 4] and q.item() == pytest.approx(2 - 0.001)
