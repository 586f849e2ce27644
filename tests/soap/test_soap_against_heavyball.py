"""hb_soap trains as HeavyBall 3.2.1 does, compiling off, where HeavyBall does what its papers say; and so do the oracles.

What is not compared, because HeavyBall does something else (docs/differences.md):

====================================  ===================================================================================
not compared                          why
====================================  ===================================================================================
refreshes but at every step           they come at another phase: a frequency of 10 gives 11, 20, 30
a warm-up                             the gradient that only primes is a step of it there
what has no factor                    it is primed there too; KLShampoo's is momentum there, Adam's here
KLSOAP and KLShampoo of more than     HeavyBall averages plain outer products there
two dimensions
SOAPNAdam's coupled decay             it does nothing
SOLP's eps                            it is ignored: the default is compared, which no gradient here comes near
SFSOAP                                it has none
====================================  ===================================================================================

Two things are taken from HeavyBall, because no formula decides them. The eigenvectors of the first gradient's null space are
free, so a matrix whose sides differ by more than one starts from HeavyBall's bases. And HeavyBall adds to ``P Q``, before QR, a
multiple of ``Q``: 1e-8 of the largest eigenvalue, ``eps`` of it in the KL rules, and at least 64 n rounding errors; ours is 8
rounding errors. It matters to KLSOAP, when the first gradient has a null space. KLSOAP weighs that with ``1 / eps``, so that
the other side's factor gets a condition number of about ``1 / eps``, and what is added is as large as most eigenvalues (after
ten steps of a 5 x 6 matrix, paths are 7e-2 apart). There HeavyBall runs with rounding errors only. HeavyKLSOAP's pseudo-inverse
leaves the null space out, and needs nothing.

In float32 the 64 n rounding errors are 5e-5 of the largest eigenvalue. KLSOAP and HeavyKLSOAP make factors as badly conditioned
as the square of the first gradient, and for most random ones HeavyBall in float32 is 1% to 50% from HeavyBall in float64, while
ours is about as many rounding errors from ours as that square's condition number. So in float32 they are compared after a first
gradient with a condition number of 13; the other names differ by 1e-4 to 7e-4 whatever the gradients.
"""

from __future__ import annotations

import pytest
import torch
from core.kit import distance
from soap.family import FAMILY, normal, row, settings_of, stream, wanted

import hbcore

STEPS = 10
TOLERANCE = 1e-5
"""Of the distance travelled, in float64; 1e-3 would do, but nothing needs it. HeavyBall keeps the betas in float32."""

BASIC = {"precondition_frequency": 1, "eps": 1e-8, "weight_decay": 0.1}
CASES = {
    "square": ((6, 6), {}),
    "betas": ((6, 6), {"betas": (0.7, 0.8, 0.95), "shampoo_beta": 0.7}),
    "cautious-decay": ((6, 6), {"cautious_weight_decay": True}),
    "caution": ((6, 6), {"caution": True}),
    "wide": ((5, 6), {}),
    "tall": ((9, 5), {}),
    "conv-merged": ((7, 2, 2, 2), {"merge_dims": True, "max_precond_dim": 8}),
    "one-sided": ((4, 12), {"max_precond_dim": 8}),
    "split": ((9, 14), {"merge_dims": True, "max_precond_dim": 5, "split": True}),
    "conv": ((6, 2, 2, 2), {}),
    "three": ((3, 4, 2), {}),
}
OWN = {
    "SOAPNAdam": ("momentum-decay", (6, 6), {"momentum_decay": 0.3}),
    "SOAPAdEMAMix": ("warm-ups", (6, 6), {"alpha": 5.0, "beta3_warmup": 17, "alpha_warmup": 9}),
    "KLShampoo": ("init-factor", (6, 6), {"init_factor": 2.0, "dampening": 1e-9}),
    "SOAP": ("eps", (6, 6), {"eps": 0.05}),
}
NAMES = [name for name in FAMILY if name != "SFSOAP"]
ALL = [
    row(name, case, *CASES[case], always=case in ("square", "wide"))
    for name in NAMES
    for case in CASES
    if not ("KL" in name and case in ("conv", "three"))
]
ALL += [row(name, *OWN[base], always=True) for name in NAMES if (base := name.removeprefix("Heavy")) in OWN]
KNOWN = [known for known in ALL if known.values[1] not in ("tall", "caution", "cautious-decay")]
"""What the oracle takes: neither bases nor cautious options."""


@pytest.fixture
def heavyball(monkeypatch):
    """The package, with its compiling off."""
    package = pytest.importorskip("heavyball", reason="heavyball does not import here", exc_type=ImportError)
    monkeypatch.setattr(package.utils, "compile_mode", None)
    return package


def compared(name, changed):
    """The settings for ours and the oracle: those of the family's table but for what is basic here."""
    changed = {**BASIC, **changed}
    if "betas" in changed and "AdEMAMix" not in name:
        changed["betas"] = changed["betas"][:2]
    return changed


def theirs(package, name, start, grads, changed):
    """HeavyBall's parameter after each gradient, and its bases after the first: for each block, one a dimension or None."""
    param, bases, path = torch.nn.Parameter(start.clone()), [], []
    optimizer = getattr(package, name)([param], storage_dtype=str(start.dtype)[6:], **settings_of(name, changed))
    for g in grads:
        param.grad = g.clone()
        optimizer.step()
        path.append(param.detach().clone())
        if not bases:
            states = optimizer.state[param].values()
            bases = [value for state in states for key, value in state.items() if "_Q_" in key]
            bases = [[q if q is None else q[0].clone() for q in block] for block in bases]
    return path, bases


def ours(name, start, grads, changed, bases=()):
    """Our parameter after each gradient, started from these bases."""
    param, path = torch.nn.Parameter(start.clone()), []
    optimizer = hbcore.get(name)([param], compile="eager", **settings_of(name, changed))
    for g in grads:
        param.grad = g.clone()
        optimizer.step()
        path.append(param.detach().clone())
        for i, q in enumerate(bases if len(path) == 1 else ()):
            optimizer.state[param][f"Q_{i}"].copy_(q)
    return path


def without_floor(package, monkeypatch):
    """Let HeavyBall add no more than rounding errors before QR."""
    qr = package.utils.get_orthogonal_matrix_QR
    monkeypatch.setattr(package.utils, "get_orthogonal_matrix_QR", lambda *a, floor, **k: qr(*a, floor=0.0, **k))


def farthest(path, expected, start):
    """Of all steps after the first, which moves nothing."""
    assert torch.equal(path[0], start) and torch.equal(expected[0], start)
    assert (expected[-1] - start).norm() > 0.05 * start.numel() ** 0.5, "nothing moved: the comparison would be empty"
    return max(distance([a - start], [b - start]) for a, b in zip(path[1:], expected[1:], strict=True))


@pytest.mark.parametrize(("name", "case", "shape", "changed"), ALL)
def test_heavyball_trains_alike(heavyball, monkeypatch, name, case, shape, changed):
    if name == "KLSOAP" and shape[0] != shape[1]:
        without_floor(heavyball, monkeypatch)
    start, grads, changed = normal(*shape, seed=1), stream(shape, STEPS, seed=3, largest=1.3), compared(name, changed)
    expected, bases = theirs(heavyball, name, start, grads, changed)
    assert farthest(ours(name, start, grads, changed, bases[0] if case == "tall" else ()), expected, start) < TOLERANCE


@pytest.mark.parametrize(("name", "case", "shape", "changed"), KNOWN)
def test_heavyball_and_the_oracle_agree(heavyball, monkeypatch, name, case, shape, changed):
    if name == "KLSOAP" and shape[0] != shape[1]:
        without_floor(heavyball, monkeypatch)
    start, grads, changed = normal(*shape, seed=1), stream(shape, STEPS, seed=3, largest=1.3), compared(name, changed)
    expected, _ = theirs(heavyball, name, start, grads, changed)
    path = [wanted(name, start, grads[:k], changed) for k in range(1, STEPS + 1)]
    assert farthest(path, expected, start) < TOLERANCE


def test_in_float32_heavyball_trains_alike(heavyball):
    start, grads = normal(6, 6, seed=1, dtype=torch.float32), stream((6, 6), STEPS, torch.float32, seed=11, largest=1.3)
    for name in NAMES:
        changed = compared(name, {})
        expected, _ = theirs(heavyball, name, start, grads, changed)
        assert farthest(ours(name, start, grads, changed), expected, start) < 1e-3, name


def test_every_optimizer_is_compared(heavyball):
    import hb_soap

    assert {name for name in hb_soap.__all__ if hasattr(heavyball, name) and name[0].isupper()} == set(NAMES)
