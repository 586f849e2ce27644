"""Rules that need Hessian-vector products: what they are given, and what a step leaves as it was."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from core.kit import distance, same, values
from core.newton import Keep, KeepAgain, Keeping, batch, closure_of, derivatives, kept, loss_of, network, trainer
from core.rules import matrix, optimizer_with, parameter, rule

from hbcore.api import Parallel
from hbcore.engine.curvature import step_size
from hbcore.errors import OptionError, RuleError

WAYS = pytest.mark.parametrize("differences", [False, True], ids=["exact", "differences"])


def norm(tensors):
    return float(torch.stack([t.double().norm() for t in tensors]).norm())


def doubles(state):
    """How far a product is from twice its vector, as for a sum of squares."""
    assert state["vector"].any()
    return distance([state["product"]], [2 * state["vector"]])


def test_a_product_is_the_hessian_times_its_vector():
    model, optimizer = trainer(torch.float64)
    before = copy.deepcopy(model)
    optimizer.step(closure_of(model, optimizer))
    vectors = kept(optimizer, model, "vector")
    _, products, _ = derivatives(loss_of(before), list(before.parameters()), vectors)
    assert distance(kept(optimizer, model, "product"), products) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_finite_differences_are_within_their_error_of_the_exact_product(dtype):
    """Truncation is half of delta times the third derivative, rounding the gradients' own errors over delta; 1.5 leaves room
    for the next term of Taylor's series, and for an error of the moved gradient that is larger than that of the first."""
    model, optimizer = trainer(dtype, finite_differences=True)
    wide = network().to(dtype).double()
    delta = float(step_size([p.detach() for p in model.parameters()]))
    closure = closure_of(model, optimizer)
    closure()
    rounded = [p.grad.double() for p in model.parameters()]
    optimizer.step(closure)
    vectors, found = kept(optimizer, model, "vector"), kept(optimizer, model, "product")
    loss = wide(batch(dtype=dtype).double()).square().mean()
    gradient, products, third = derivatives(loss, list(wide.parameters()), vectors)
    rounding = norm([a - b for a, b in zip(rounded, gradient, strict=True)])
    bound = 1.5 * (delta / 2 * norm(third) + 2 * rounding / delta)
    assert norm([a - b for a, b in zip(found, products, strict=True)]) < bound
    assert bound < {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 0.6}[dtype] * norm(products)  # says something


def test_the_vector_of_a_difference_is_what_the_parameters_moved_by():
    """In bfloat16 they move by whole steps of their dtype."""
    model, optimizer = trainer(torch.bfloat16, finite_differences=True)
    start = [p.detach().double() for p in model.parameters()]
    delta = float(step_size([p.detach() for p in model.parameters()]))
    optimizer.step(closure_of(model, optimizer))
    moved = [p + delta * v for p, v in zip(start, kept(optimizer, model, "vector"), strict=True)]
    for m in moved:
        assert float((m - m.bfloat16().double()).abs().max()) < 1e-6 * float(m.abs().max())


def test_vectors_are_normal_and_differ_by_parameter_step_and_seed_alone():
    model, optimizer = trainer(torch.float64)
    torch.manual_seed(1)
    optimizer.step(closure_of(model, optimizer))
    first = torch.cat([v.flatten() for v in kept(optimizer, model, "vector")])
    assert 0.7 < float(first.std()) < 1.3
    assert abs(float(first.mean())) < 0.5
    assert len(first.unique()) == len(first)
    optimizer.step(closure_of(model, optimizer))
    assert not torch.equal(first, torch.cat([v.flatten() for v in kept(optimizer, model, "vector")]))
    for seed, alike in ((0, True), (1, False)):
        model, optimizer = trainer(torch.float64, seed=seed)
        torch.manual_seed(2)
        optimizer.step(closure_of(model, optimizer))
        assert torch.equal(first, torch.cat([v.flatten() for v in kept(optimizer, model, "vector")])) == alike


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_the_one_that_no_product_was_made_for(dtype, differences):
    """The same loss, gradients, parameters and random numbers, bit for bit."""
    plain = network(dtype, dropout=0.5)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    model, optimizer = trainer(dtype, dropout=0.5, finite_differences=differences, consume_grad=False)
    for seed in range(3):
        plain.load_state_dict(model.state_dict())  # so that rounding cannot make the two drift apart
        torch.manual_seed(seed)
        expected = sgd.step(closure_of(plain, sgd, seed))
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        before, losses = values(model.parameters()), []
        assert optimizer.step(closure_of(model, optimizer, seed, losses)) is losses[0]
        assert torch.equal(losses[0], expected)
        assert torch.equal(torch.get_rng_state(), after)
        assert same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
        assert same(kept(optimizer, model, "found"), [p.double() for p in before])
        assert distance(model.parameters(), plain.parameters()) < torch.finfo(dtype).eps
        assert len(losses) == 1 + differences


def test_both_calls_of_the_closure_draw_the_same_dropout():
    products = []
    for differences in (False, True):
        model, optimizer = trainer(torch.float64, dropout=0.5, finite_differences=differences)
        torch.manual_seed(0)
        optimizer.step(closure_of(model, optimizer))
        products.append(kept(optimizer, model, "product"))
    assert distance(*products) < 1e-5


@WAYS
def test_an_error_in_the_closure_leaves_everything(differences):
    model, optimizer = trainer(finite_differences=differences, dropout=0.5)
    calls, states, original = [], [], torch.autograd.backward

    def closure():
        optimizer.zero_grad()
        if len(calls) == 1:
            raise KeyError("the user's own")
        loss = loss_of(model)
        loss.backward()
        calls.append([p.grad.clone() for p in model.parameters()])
        states.append(torch.get_rng_state())
        if not differences:
            raise KeyError("the user's own")
        return loss

    before = values(model.parameters())
    with pytest.raises(KeyError, match="own"):
        optimizer.step(closure)
    assert same(values(model.parameters()), before)
    assert same([p.grad for p in model.parameters()], calls[0])
    assert torch.autograd.backward is original
    assert torch.equal(torch.get_rng_state(), states[0])
    optimizer.step(closure_of(model, optimizer))
    assert not same(values(model.parameters()), before)


@WAYS
@pytest.mark.parametrize(("interval", "every", "due"), [(1, 1, "xxxxxx"), (2, 1, "x.x.x."), (3, 1, "x..x.."), (2, 2, ".x...x")])
def test_the_first_refresh_and_every_kth_after_it_have_a_product(interval, every, due, differences):
    model, optimizer = trainer(interval=interval, every=every, finite_differences=differences)
    last = [torch.zeros_like(p).double() for p in model.parameters()]
    for sign in due:
        calls = []
        optimizer.step(closure_of(model, optimizer, calls=calls))
        now = kept(optimizer, model, "product")
        assert same(now, last) == (sign == "."), due
        assert len(calls) == (2 if differences and sign == "x" else 1)
        last = [t.clone() for t in now]


def test_a_step_that_needs_a_product_asks_for_a_closure():
    model, optimizer = trainer(interval=2)
    loss_of(model).backward()
    before = values(model.parameters())
    with pytest.raises(OptionError, match=r"'keep' needs Hessian-vector products in this step: call step\(closure\)"):
        optimizer.step()
    assert same(values(model.parameters()), before)
    optimizer.step(closure_of(model, optimizer))
    loss_of(model).backward()
    optimizer.step()  # the second refresh has none
    loss_of(model).backward()
    with pytest.raises(OptionError, match=r"step\(closure\)"):
        optimizer.step()


def test_a_grad_scaler_passes_no_closure():
    model, optimizer = trainer()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model)).backward()
    with pytest.raises(OptionError, match="A GradScaler passes none"):
        scaler.step(optimizer)


def test_products_of_a_failed_step_are_not_used_later():
    model, optimizer = trainer()
    optimizer.step(closure_of(model, optimizer))
    with pytest.raises(RuleError, match="evaluate"):
        optimizer.core.modes.training = False
        optimizer.step(closure_of(model, optimizer))
    optimizer.core.modes.training = True
    assert not optimizer.core.pairs.made


@WAYS
def test_what_the_loss_does_not_bend_has_products_of_zero(differences):
    straight, unused = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3, 2))
    bent = torch.nn.Parameter(torch.full((3, 2), 2.0))
    optimizer = Keeping([straight, unused, bent], finite_differences=differences)

    def closure():
        optimizer.zero_grad()
        loss = straight.sum() + (bent**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert not optimizer.state[straight]["product"].any()
    assert torch.equal(unused, torch.ones(3, 2))
    assert doubles(optimizer.state[bent]) < 1e-3


@WAYS
def test_a_linear_loss_has_products_of_zero(differences):
    p = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = Keeping([p], finite_differences=differences)

    def closure():
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)
    assert not optimizer.state[p]["product"].any()
    assert optimizer.state[p]["vector"].any()


@pytest.mark.parametrize("how", ["several passes", "retained", "inputs", "torch.autograd.backward", "weighted"])
def test_backward_may_be_called_in_every_way(how):
    plain, once = trainer(torch.float64)
    once.step(closure_of(plain, once))
    model, optimizer = trainer(torch.float64)

    def closure():
        optimizer.zero_grad()
        if how == "several passes":
            for part in batch(dtype=torch.float64).split(4):
                (model(part).square().mean() / 4).backward()
        elif how == "retained":
            (0.25 * (loss := loss_of(model))).backward(retain_graph=True)
            (0.75 * loss).backward()
        elif how == "inputs":
            loss = loss_of(model)
            first, *others = model.parameters()
            loss.backward(retain_graph=True, inputs=[first])
            torch.autograd.backward(loss, inputs=others)
        elif how == "torch.autograd.backward":
            torch.autograd.backward([loss_of(model)])
        else:
            loss_of(model).backward(torch.tensor(1.0, dtype=torch.float64))

    optimizer.step(closure)
    assert distance(kept(optimizer, model, "product"), kept(once, plain, "product")) < 1e-12
    assert distance(model.parameters(), plain.parameters()) < 1e-12


@WAYS
def test_gradients_that_are_added_to_others_make_the_same_product(differences):
    """A closure that clears nothing, and gradients of before."""
    products = []
    for leftover in (False, True):
        model, optimizer = trainer(torch.float64, finite_differences=differences)
        if leftover:
            for p in model.parameters():
                p.grad = torch.ones_like(p)

        def closure(model=model):
            loss_of(model).backward()

        optimizer.step(closure)
        products.append(kept(optimizer, model, "product"))
    assert distance(*products) < (1e-6 if differences else 1e-15)


@WAYS
def test_gradients_cleared_in_place_stay_those_of_the_first_call(differences):
    model, optimizer = trainer(finite_differences=differences, consume_grad=False)

    def closure():
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = copy.deepcopy(model)
    loss_of(expected).backward()
    optimizer.step(closure)
    assert same([p.grad for p in model.parameters()], [p.grad for p in expected.parameters()])


def test_a_closure_without_gradients_is_an_error():
    model, optimizer = trainer(finite_differences=True)
    loss = loss_of(model)
    loss.backward()
    with pytest.raises(OptionError, match="the closure computed no gradients"):
        optimizer.step(lambda: loss)


@WAYS
def test_autocast_in_a_closure_works(differences):
    model, optimizer = trainer(finite_differences=differences)

    def closure():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    if not differences:  # which bfloat16's rounding drowns
        plain, other = trainer()
        other.step(closure_of(plain, other))
        assert distance(kept(optimizer, model, "product"), kept(other, plain, "product")) < 0.1
    assert all(bool(t.isfinite().all()) for t in kept(optimizer, model, "product"))


@WAYS
def test_a_checkpoint_between_products_resumes_bit_for_bit(differences):
    def run(model, optimizer, steps):
        for seed in steps:
            optimizer.step(closure_of(model, optimizer, seed))

    options = {"interval": 2, "every": 2, "finite_differences": differences}
    model, optimizer = trainer(**options)
    run(model, optimizer, range(3))
    resumed, other = trainer(**options)
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    run(model, optimizer, range(3, 8))
    run(resumed, other, range(3, 8))
    for name in ("product", "vector", "found"):
        assert same(kept(other, resumed, name), kept(optimizer, model, name))
    assert same(model.parameters(), resumed.parameters())


@pytest.mark.broad  # it waits for the collector
@WAYS
def test_fifty_steps_leave_no_tensor_behind(differences):
    model, optimizer = trainer(finite_differences=differences)
    frozen = torch.nn.Parameter(torch.ones(3))  # of no optimizer: its gradient must not keep a graph either
    counts = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model) + (frozen**3).sum()
        loss.backward()
        return loss

    for step in range(60):
        optimizer.step(closure)
        if step % 50 == 9:
            gc.collect()
            counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert counts[1] <= counts[0]
    assert frozen.grad.grad_fn is None


def test_a_late_group_has_its_own_turn():
    model, optimizer = trainer(interval=2)
    optimizer.step(closure_of(model, optimizer))
    late = torch.nn.Parameter(torch.ones(8, 4))
    optimizer.add_param_group({"params": [("late", late)]})

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model) + (late**2).sum()
        loss.backward()
        return loss

    early = [t.clone() for t in kept(optimizer, model, "product")]
    optimizer.step(closure)
    assert same(kept(optimizer, model, "product"), early)
    assert doubles(optimizer.state[late]) < 1e-6
    product = optimizer.state[late]["product"].clone()
    optimizer.step(closure)
    assert not same(kept(optimizer, model, "product"), early)
    assert torch.equal(optimizer.state[late]["product"], product)


def test_matrices_that_are_called_together_may_have_their_products_in_other_steps():
    """Both of the new ones take their first step, in one stack; one is of a group whose second refresh it is."""
    first, late, other = (torch.nn.Parameter(torch.full((3, 2), x)) for x in (1.0, 2.0, 3.0))
    optimizer = Keeping([first, late], interval=2)

    def closure_over(*params):
        def closure():
            optimizer.zero_grad()
            sum((p**2).sum() for p in params).backward()

        return closure

    optimizer.step(closure_over(first))
    optimizer.add_param_group({"params": [other]})
    optimizer.step(closure_over(late, other))
    assert doubles(optimizer.state[other]) < 1e-6
    assert not optimizer.state[late]["product"].any()
    optimizer.step(closure_over(late, other))
    assert doubles(optimizer.state[late]) < 1e-6


@WAYS
def test_a_frozen_parameter_with_a_gradient_left_over_has_no_part_in_the_hessian(differences):
    model, optimizer = trainer(torch.float64, finite_differences=differences, consume_grad=False)
    optimizer.step(closure_of(model, optimizer))
    model[0].weight.requires_grad_(False)
    twin = copy.deepcopy(model)

    def closure():
        for p in list(model.parameters())[1:]:
            p.grad = None
        loss_of(model).backward()

    optimizer.step(closure)
    vectors, products = (kept(optimizer, model, name) for name in ("vector", "product"))
    assert not vectors[0].any()
    assert not products[0].any()
    assert distance(products[1:], derivatives(loss_of(twin), list(twin.parameters())[1:], vectors[1:])[1]) < 1e-6


def test_two_rules_of_a_chain_have_the_same_products():
    class Twice(Keeping):
        @staticmethod
        def chain(h):
            return (Keep(), KeepAgain(interval=2))

    model = network(torch.float64)
    optimizer = Twice(model.parameters())
    optimizer.step(closure_of(model, optimizer))
    first = kept(optimizer, model, "product")
    assert all(bool(t.any()) for t in first)
    assert same(kept(optimizer, model, "again.product"), first)
    optimizer.step(closure_of(model, optimizer))
    assert not same(kept(optimizer, model, "product"), kept(optimizer, model, "again.product"))


def test_parallel_hands_products_on():
    class Both(Keeping):
        @staticmethod
        def chain(h):
            return (Parallel(((Keep(2),), ())),)

    model = network(torch.float64)
    both = Both(model.parameters())
    both.step(closure_of(model, both))
    products, vectors = (kept(both, model, f"branch0.{name}") for name in ("product", "vector"))
    twin = network(torch.float64)
    assert distance(products, derivatives(loss_of(twin), list(twin.parameters()), vectors)[1]) < 1e-12
    loss_of(model).backward()
    both.step()


FAULTS = {
    "elementwise": (rule(needs=frozenset({"hvp"})), r"rule 'toy' .* needs Hessian-vector products, .*declare that domain"),
    "staggered": (matrix(needs=frozenset({"hvp"}), staggers=True), r"needs Hessian-vector products, .*leave staggers False"),
    "no curvature": (matrix(curvature=3), r"curvature = 3 is not supported; curvature is a Curvature"),
    "undeclared": (matrix(lambda self, u, s, c: (u + c.hvp, {})), r"reads c\.hvp; declare needs = frozenset\(\{'hvp'\}\)"),
    "vector": (matrix(lambda self, u, s, c: (u + c.vector, {})), r"reads c\.vector; declare needs = frozenset\(\{'hvp'\}\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_rule_cannot_need_is_said(fault):
    made, said = FAULTS[fault]
    p = parameter(3, 2)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuleError, match=said):
        optimizer_with(lambda h: (made(h.beta),))([p]).step()


def test_a_rule_reads_products_in_its_refresh_too():
    def refresh(self, stacks):
        return ({"m": c.hvp + s["m"]} for s, c in stacks)

    made = matrix(needs=frozenset({"hvp"}), refresh=refresh)
    p = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    optimizer = optimizer_with(lambda h: (made(h.beta),))([p], weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        (p**2).sum().backward()

    optimizer.step(closure)
    assert 0.5 < float(optimizer.state[p]["m"].std()) / 2 < 1.5
