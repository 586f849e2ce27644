"""Where a loss cannot be differentiated twice; and Hessian-vector products within wrappers, threads and the kit."""

from __future__ import annotations

import copy
import threading
import warnings
from unittest import SkipTest

import pytest
import torch
from core.kit import distance, same, values
from core.newton import Keeping, closure_of, derivatives, kept, loss_of, network, trainer

import hbcore
from hb_adam import SAMWrapper
from hbcore import SplitOpt
from hbcore.engine import curvature
from hbcore.engine.double_backward import DoubleBackward
from hbcore.errors import FallbackWarning, OptionError
from hbcore.testing.catalog import CHECKS
from hbcore.testing.subject import Subject


class Once(torch.autograd.Function):
    """The identity, whose derivative has none."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g


class Passed(torch.nn.Module):
    def forward(self, x):
        return Once.apply(x)


def closure_once(model, optimizer, calls=None):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(torch.nn.Sequential(model, Passed()))
        loss.backward()
        if calls is not None:
            calls.append(loss)
        return loss

    return closure


def test_a_loss_that_cannot_be_differentiated_twice_takes_finite_differences_and_says_so_once():
    model, optimizer = trainer(torch.float64)
    plain, other = trainer(torch.float64, finite_differences=True)
    counts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            calls = []
            optimizer.step(closure_once(model, optimizer, calls))
            other.step(closure_of(plain, other))
            counts.append(len(calls))
    [warning] = [w for w in caught if issubclass(w.category, FallbackWarning)]
    assert warning.filename == __file__
    assert "@once_differentiable" in str(warning.message)
    assert counts == [2, 2, 2]
    assert same(kept(optimizer, model, "product"), kept(other, plain, "product"))
    assert same(model.parameters(), plain.parameters())
    assert any("finite differences: a function of the loss is marked" in note for note in optimizer.report.notes)


def test_without_the_fallback_that_is_an_error():
    model, optimizer = trainer(fallback=False)
    before = values(model.parameters())
    with pytest.raises(OptionError, match=r"no exact Hessian-vector product \(a function of the loss is marked with @once"):
        optimizer.step(closure_once(model, optimizer))
    assert same(values(model.parameters()), before)
    optimizer.step(closure_of(model, optimizer))


def test_the_failed_attempt_is_not_seen_by_the_closure():
    """Its gradients, hooks and random numbers are those of a step that made no attempt."""
    model, optimizer = trainer(dropout=0.5, consume_grad=False)
    plain = copy.deepcopy(model)
    torch.manual_seed(0)
    loss_of(torch.nn.Sequential(plain, Passed())).backward()
    after = torch.get_rng_state()
    torch.manual_seed(0)
    with pytest.warns(FallbackWarning):
        optimizer.step(closure_once(model, optimizer))
    assert torch.equal(torch.get_rng_state(), after)
    assert same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_a_closure_with_gradients_of_its_own_takes_finite_differences():
    model, optimizer = trainer(torch.float64)
    plain, other = trainer(torch.float64)

    def closure():
        loss = loss_of(model)
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            p.grad = g
        return loss

    with pytest.warns(FallbackWarning, match="calls no backward"):
        optimizer.step(closure)
    other.step(closure_of(plain, other))
    assert distance(kept(optimizer, model, "product"), kept(other, plain, "product")) < 1e-5


def test_reentrant_checkpoints_are_noticed():
    """Their gradients have no graph within a backward pass: a product made of them would be wrong."""
    model, optimizer = trainer(torch.float64)
    plain, other = trainer(torch.float64)

    def closure(optimizer, model, reentrant):
        optimizer.zero_grad()
        x = torch.ones(5, 4, dtype=torch.float64, requires_grad=True)
        loss = model[3](torch.utils.checkpoint.checkpoint(model[:2], x, use_reentrant=reentrant)).square().mean()
        loss.backward()
        return loss

    with pytest.warns(FallbackWarning, match="use_reentrant=True"):
        optimizer.step(lambda: closure(optimizer, model, True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.step(lambda: closure(other, plain, False))
    assert distance(kept(optimizer, model, "product"), kept(other, plain, "product")) < 1e-5


@pytest.mark.broad
def test_a_compiled_model_takes_finite_differences():
    model, optimizer = trainer()
    plain, other = trainer()
    compiled = torch.compile(model, backend="aot_eager")

    def closure():
        optimizer.zero_grad()
        loss = loss_of(compiled)
        loss.backward()
        return loss

    with pytest.warns(FallbackWarning):
        optimizer.step(closure)
    optimizer.step(closure)
    for _ in range(2):
        other.step(closure_of(plain, other))
    assert distance(kept(optimizer, model, "product"), kept(other, plain, "product")) < 0.05


def test_several_processes_average_nothing_that_is_differentiated_twice(monkeypatch):
    monkeypatch.setattr(curvature.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(curvature.dist, "get_world_size", lambda: 2)
    model, optimizer = trainer()
    with pytest.warns(FallbackWarning, match="each of 2 ranks"):
        optimizer.step(closure_of(model, optimizer, calls=(calls := [])))
    assert len(calls) == 2
    model, optimizer = trainer(fallback=False)
    with pytest.raises(OptionError, match="each of 2 ranks"):
        optimizer.step(closure_of(model, optimizer))


def test_an_optimizer_says_that_it_takes_a_closure():
    assert trainer()[1].requires_closure
    assert not hbcore.get("AdamW")(network().parameters()).requires_closure


def test_gradient_release_is_refused():
    model, optimizer = trainer()
    with pytest.raises(OptionError, match="Keeping: keep needs Hessian-vector products"):
        hbcore.hook_into_backward(model, optimizer)


def test_a_wrapper_that_calls_the_closure_itself_is_refused():
    with pytest.raises(OptionError, match="SAMWrapper calls the closure itself, at other parameters, and Keeping needs"):
        SAMWrapper(network().parameters(), Keeping)


@pytest.mark.parametrize("differences", [False, True], ids=["exact", "differences"])
def test_split_optimizers_share_one_hessian(differences):
    """Two of three need products; each has those of the parameters of both, and the closure runs as often as for one."""
    model = network(torch.float64)
    twin = copy.deepcopy(model)
    options = {"optimizer": Keeping, "finite_differences": differences}
    specs = [{**options, "match": "0.*"}, {**options, "match": "3.weight"}, {"optimizer": "AdamW", "lr": 0.1}]
    optimizer = SplitOpt(model.named_parameters(), specs)
    calls = []
    loss = optimizer.step(closure_of(model, optimizer, calls=calls))
    assert loss is calls[0]
    assert len(calls) == 1 + differences
    curved = list(model.parameters())[:3]
    vectors, products = ([optimizer.state[p][name] for p in curved] for name in ("vector", "product"))
    assert distance(products, derivatives(loss_of(twin), list(twin.parameters())[:3], vectors)[1]) < 1e-6
    loss_of(model).backward()
    with pytest.raises(OptionError, match=r"step\(closure\)"):
        optimizer.step()


def test_an_extension_has_its_base_products():
    class Doubled(hbcore.api.Extension):
        @classmethod
        def chain(cls, h):
            return super().chain(h)

    model = network(torch.float64)
    optimizer = Doubled(model.parameters(), base=Keeping)
    optimizer.step(closure_of(model, optimizer))
    assert all(bool(t.any()) for t in kept(optimizer, model, "product"))


def test_other_threads_have_their_own_backward():
    """While a closure runs, a loss in another thread, which cannot be differentiated twice, is not touched."""
    model, optimizer = trainer()
    outside = torch.nn.Parameter(torch.ones(8, 4))

    def elsewhere():
        Once.apply(outside * model[0].weight).square().sum().backward()

    def closure():
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)
    assert outside.grad is not None


def test_backward_is_restored_whoever_leaves_first():
    original = torch.autograd.backward
    first, second = DoubleBackward(dict), DoubleBackward(dict)
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert torch.autograd.backward is second
    second.__exit__()
    assert torch.autograd.backward is original


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a_rule_that_needs_products_conforms(check):
    capabilities = frozenset({"matrix", "random", "closure"})
    if not check.applies(capabilities):
        pytest.skip("does not apply")
    try:
        check.run(Subject(Keeping, capabilities, {"interval": 2}))
    except SkipTest as error:
        pytest.skip(str(error))
