"""PSGDKron with hessian_approx=True, as users train with it."""

from __future__ import annotations

import warnings
from unittest import SkipTest

import pytest
import torch
from core.kit import distance, normal, same
from core.newton import closure_of, network

from hb_psgd import PSGDKron
from hb_psgd.kron import precondition
from hbcore.errors import OptionError
from hbcore.rules.products import IEEE
from hbcore.testing.catalog import CHECKS
from hbcore.testing.subject import Subject

WAYS = pytest.mark.parametrize("differences", [False, True], ids=["exact", "differences"])


def spd(n, condition, seed):
    """A symmetric positive definite matrix whose eigenvalues range from 1 to ``condition``."""
    q = torch.linalg.qr(normal(n, n, seed=seed)).Q
    return q @ torch.diag(torch.logspace(0, float(torch.tensor(condition).log10()), n, dtype=torch.float64)) @ q.mT


def quadratic(p, a, b):
    r"""Half of :math:`\langle p, A p B \rangle`, whose Hessian is the Kronecker product of the two."""

    def loss():
        return 0.5 * (p * (a @ p @ b)).sum()

    return loss


def stepper(p, loss, **options):
    optimizer = PSGDKron([p], **{"hessian_approx": True, **options})

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return optimizer, closure


def inverse_error(state, a, b):
    """How far P H is from the identity, on random matrices."""
    w = normal(64, len(a), len(b), seed=99)
    factors = [state[f"Q_{i}"].double().expand(64, *state[f"Q_{i}"].shape) for i in range(2)]
    return distance([precondition(a @ w @ b, factors, IEEE)], [w])


@WAYS
def test_the_preconditioner_becomes_the_inverse_hessian(differences):
    """Within 5% in 150 steps, for a Hessian of condition 100 that Kronecker factors can invert."""
    a, b = spd(5, 10.0, 1), spd(4, 10.0, 2)
    p = torch.nn.Parameter(normal(5, 4, seed=3))
    optimizer, closure = stepper(p, quadratic(p, a, b), lr=0.0, finite_differences=differences)
    optimizer.step(closure)
    assert inverse_error(optimizer.state[p], a, b) > 0.5
    for _ in range(149):
        optimizer.step(closure)
    assert inverse_error(optimizer.state[p], a, b) < 0.05


def test_it_takes_newton_steps():
    """On a badly scaled quadratic it is done when the same optimizer, whitening, is not."""
    a, b = spd(5, 1000.0, 1), spd(4, 10.0, 2)
    losses = {}
    for newton in (True, False):
        p = torch.nn.Parameter(normal(5, 4, seed=3))
        optimizer, closure = stepper(p, quadratic(p, a, b), hessian_approx=newton, lr=0.3, update_clipping=None)
        for _ in range(150):
            loss = optimizer.step(closure)
        losses[newton] = float(loss.detach())
    assert losses[True] < 0.1
    assert losses[True] < 1e-3 * losses[False]


def test_between_products_the_hybrid_whitens():
    """Its second refresh is the first of an optimizer without products that has the same factors."""
    p = torch.nn.Parameter(normal(5, 4, seed=3))
    optimizer, closure = stepper(p, quadratic(p, spd(5, 10.0, 1), spd(4, 10.0, 2)), hvp_interval=2)
    optimizer.step(closure)
    whitening = PSGDKron([p])
    whitening.load_state_dict(optimizer.state_dict())
    closure()
    gradient = p.grad.clone()
    start = p.detach().clone()
    optimizer.step()  # needs no closure
    with torch.no_grad():
        moved = p.detach().clone()
        p.copy_(start)
    p.grad = gradient
    whitening.step()
    assert torch.equal(p, moved)
    assert same([whitening.state[p]["Q_0"]], [optimizer.state[p]["Q_0"]])
    closure()
    with pytest.raises(OptionError, match=r"'psgd_kron' needs Hessian-vector products in this step: call step\(closure\)"):
        optimizer.step()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_product_that_is_not_finite_changes_no_factor(value):
    """The gradient may be finite where the Hessian is not."""
    p = torch.nn.Parameter(torch.full((5, 4), 2.0))
    scale = torch.ones(())
    optimizer, closure = stepper(p, lambda: Curved.apply(p, scale).sum(), skip_nonfinite=True, consume_grad=False)
    for _ in range(3):
        optimizer.step(closure)
    before = {n: t.clone() for n, t in optimizer.state[p].items() if n[0] in "QL"}
    scale.fill_(value)
    optimizer.step(closure)
    assert bool(p.grad.isfinite().all())
    assert all(torch.equal(t, optimizer.state[p][n]) for n, t in before.items())
    assert bool(p.isfinite().all())
    scale.fill_(1.0)
    optimizer.step(closure)
    assert not torch.equal(before["Q_0"], optimizer.state[p]["Q_0"])


class Curved(torch.autograd.Function):
    """Half a square, whose second derivative is what ``scale`` says."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return 0.5 * x * x

    @staticmethod
    def backward(ctx, g):
        return Slope.apply(g, *ctx.saved_tensors), None


class Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, x, scale):
        ctx.save_for_backward(g, x, scale)
        return g * x

    @staticmethod
    def backward(ctx, gg):
        g, x, scale = ctx.saved_tensors
        return gg * x, gg * g * scale, None


def test_a_linear_loss_starts_the_factors_by_its_gradient():
    p = torch.nn.Parameter(normal(5, 4, seed=3))
    optimizer, closure = stepper(p, lambda: (p * normal(5, 4, seed=4)).sum())
    before = p.detach().clone()
    optimizer.step(closure)
    assert bool((optimizer.state[p]["init_scale"] > 0).all())
    assert not torch.equal(p, before)


@WAYS
def test_training_resumes_bit_for_bit_between_products(differences):
    options = {"hessian_approx": True, "hvp_interval": 2, "finite_differences": differences, "lr": 0.01}
    model = network()
    optimizer = PSGDKron(model.named_parameters(), **options)
    for seed in range(3):
        optimizer.step(closure_of(model, optimizer, seed))
    resumed = network()
    resumed.load_state_dict(model.state_dict())
    other = PSGDKron(resumed.named_parameters(), **options)
    other.load_state_dict(optimizer.state_dict())
    for seed in range(3, 7):
        optimizer.step(closure_of(model, optimizer, seed))
        other.step(closure_of(resumed, other, seed))
    assert same(model.parameters(), resumed.parameters())


def test_a_bfloat16_model_trains():
    model = network(torch.bfloat16)
    optimizer = PSGDKron(
        model.named_parameters(), hessian_approx=True, finite_differences=True, lr=0.01, stochastic_rounding=True
    )
    closure = closure_of(model, optimizer)
    losses = [float(optimizer.step(closure).detach()) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


def checks():
    """Those that step with a closure, of which `make test` runs one: tests/core has them all, for a smaller rule."""
    capabilities = frozenset({"matrix", "random", "closure"})
    marks = {"resuming_changes_no_bit": ()}
    chosen = [check for check in CHECKS if check.applies(capabilities)]
    return [pytest.param(check, id=check.name, marks=marks.get(check.name, pytest.mark.broad)) for check in chosen]


@pytest.mark.filterwarnings("ignore::hbcore.errors.FallbackWarning")
@pytest.mark.parametrize("check", checks())
def test_the_newton_form_conforms(check):
    try:
        check.run(Subject(PSGDKron, frozenset({"matrix", "random", "closure"}), {"hessian_approx": True, "hvp_interval": 2}))
    except SkipTest as error:
        pytest.skip(str(error))


def test_its_name_warns_once_as_other_old_names_do():
    import hbcore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        optimizer = hbcore.create("NewtonPSGDKron", network().named_parameters())
    assert optimizer.param_groups[0]["hessian_approx"] is True
