"""The SOAP family against its float64 oracle, and the oracle against the ones that it generalizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core.kit import distance
from reference.adamw import adamw
from reference.ademamix import ademamix
from reference.laprop import laprop
from reference.nadam import nadam
from reference.schedule_free import schedule_free_adamw
from reference.soap import joined, soap
from reference.soap_family import soap_family
from soap.family import FAMILY, PLAIN, averaged, normal, row, settings_of, stream, told, trained, wanted

# A side may exceed the rank of the first gradient by one: the missing eigenvector is unique then, and free otherwise.
CASES = {
    "square-every-step": ((5, 5), {"precondition_frequency": 1}),
    "square-every-other": ((5, 5), {"precondition_frequency": 2}),
    "square-every-seventh": ((5, 5), {"precondition_frequency": 7}),
    "square-schedule": ((5, 5), {"use_precond_schedule": True, "precond_scheduler": (2, 3)}),
    "wide": ((5, 6), {}),
    "tall": ((6, 5), {"precondition_frequency": 1}),
    "conv": ((6, 2, 2, 2), {}),
    "conv-merged": ((7, 2, 2, 2), {"merge_dims": True, "max_precond_dim": 8}),
    "three": ((3, 4, 2), {"precondition_frequency": 1}),
    "one-sided": ((4, 12), {"max_precond_dim": 8}),
    "other-sided": ((12, 4), {"max_precond_dim": 8, "precondition_frequency": 1}),
    "two-of-three": ((3, 12, 4), {"max_precond_dim": 8}),
    "too-large": ((12, 9), {"max_precond_dim": 8}),
    "split": ((9, 14), {"max_precond_dim": 5, "split": True, "merge_dims": True}),
    "split-one-side": ((5, 10), {"max_precond_dim": 5, "split": True, "precondition_frequency": 1}),
    "split-with-a-rest-of-one": ((3, 5), {"max_precond_dim": 2, "split": True}),
    "split-merged": ((7, 2, 2, 2), {"max_precond_dim": 4, "split": True, "merge_dims": True}),
    "vector": ((5,), {}),
    "vector-preconditioned": ((2,), {"precondition_1d": True}),
    "vector-split": ((5,), {"precondition_1d": True, "max_precond_dim": 2, "split": True}),
    "scalar": ((), {"precondition_1d": True}),
}


@pytest.mark.parametrize(
    ("name", "case"), [row(name, case, always=case in ("square-every-other", "wide")) for name in FAMILY for case in CASES]
)
def test_agrees_with_the_oracle(name, case):
    shape, changed = CASES[case]
    start, grads = normal(*shape, seed=1), stream(shape)
    expected = wanted(name, start, grads, changed)
    assert (expected - start).norm() > 0.01 * start.numel() ** 0.5, "nothing moved: the comparison would be empty"
    assert distance([trained(name, start, grads, changed)[0] - start], [expected - start]) < 1e-9


@pytest.mark.parametrize("frequency", [1, 2, 7])
@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.broad
def test_agrees_with_the_oracle_over_200_steps_of_noise(name, frequency):
    start, changed = normal(6, 6, seed=1), {"precondition_frequency": frequency}
    grads = list(normal(200, 6, 6, seed=2))
    expected = wanted(name, start, grads, changed)
    assert distance([trained(name, start, grads, changed)[0] - start], [expected - start]) < 1e-9


CHANGED = {
    "betas": {"betas": (0.5, 0.999, 0.7)},
    "shampoo_beta": {"shampoo_beta": 0.5},
    "eps": {"eps": 0.3},
    "weight_decay": {"weight_decay": 0.3},
    "warmup_steps": {"warmup_steps": 5},
}
OWN = {
    "SOAPNAdam": ({"momentum_decay": 0.3}, {"weight_decay": 0.3, "decoupled_weight_decay": False}),
    "SOAPAdEMAMix": ({"alpha": 5.0}, {"beta3_warmup": 17, "alpha_warmup": 9}),
    "KLShampoo": ({"init_factor": 2.0},),
    "SFSOAP": ({"r": 0.5}, {"weight_lr_power": 1.0, "warmup_steps": 7}),
}
HYPERS = [row(name, "-".join(changed), changed) for name in FAMILY for changed in CHANGED.values()]
HYPERS += [row(n, "-".join(changed), changed, always=True) for n in FAMILY for changed in OWN.get(n.removeprefix("Heavy"), ())]


@pytest.mark.parametrize(("name", "_", "changed"), HYPERS)
def test_hyperparameters_agree_with_the_oracle(name, _, changed):
    if "betas" in changed and name.removeprefix("Heavy") != "SOAPAdEMAMix":
        changed = {"betas": changed["betas"][:2]}
    start, grads = normal(5, 5, seed=1), stream((5, 5))
    expected = wanted(name, start, grads, changed)
    assert distance([trained(name, start, grads, changed)[0] - start], [expected - start]) < 1e-9
    assert distance([wanted(name, start, grads) - start], [expected - start]) > 1e-4


@pytest.mark.parametrize("shape", [(5, 5), (5, 6), (6, 3, 2, 2), (7,)], ids=str)
@pytest.mark.parametrize("name", FAMILY)
def test_float32_follows_float64(name, shape):
    """Eigenvectors are only known as well as eigenvalues are separate, and small ones are not: those here are alike."""
    start, grads = normal(*shape, seed=1, dtype=torch.float32), stream(shape, dtype=torch.float32, seed=3, largest=1.3)
    param, optimizer = trained(name, start, grads)
    assert {t.dtype for t in optimizer.state[optimizer.param_groups[0]["params"][0]].values() if t.ndim} == {torch.float32}
    assert distance([param - start], [wanted(name, start, grads) - start]) < 1e-4


@pytest.mark.parametrize("shape", [(5, 5), (7,)], ids=str)
def test_the_schedule_free_form_evaluates_with_the_average(shape):
    changed = {"warmup_steps": 3, "r": 0.5, "weight_decay": 0.1}
    start, grads = normal(*shape, seed=1), stream(shape)
    expected = averaged(start, grads, changed)
    param, optimizer = trained("SFSOAP", start, grads, changed)
    held = optimizer.param_groups[0]["params"][0]
    optimizer.eval()
    assert distance([held - start], [expected.x - start]) < 1e-9
    assert distance([held - start], [expected.y - start]) > 1e-3
    optimizer.train()
    assert distance([held], [param]) < 1e-12


@pytest.mark.parametrize("name", FAMILY)
def test_the_first_gradient_prepares_and_moves_nothing(name):
    start, grads = normal(4, 5, seed=1), stream((4, 5))
    changed = {"weight_decay": 0.5}
    assert torch.equal(trained(name, start, grads[:1], changed)[0], start)
    assert not torch.equal(trained(name, start, grads[:2], changed)[0], start)


@pytest.mark.parametrize("name", [name for name in FAMILY if "KL" in name])
def test_factors_agree_with_the_papers_formulas(name):
    """Second gradient of a matrix: ``P_1 = b P_1 + (1 - b) G P_2^-1 G^T / n_2``, for KLShampoo with unit vectors as bases."""
    g0, g1 = stream((4, 4), 2)
    _, optimizer = trained(name, normal(4, 4, seed=1), [g0, g1], {"eps": 0.0, "precondition_frequency": 9})
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    first = [0.1 * torch.eye(4, dtype=torch.float64)] * 2 if "Shampoo" in name else [g0 @ g0.T, g0.T @ g0]
    left = 0.9 * 0.1 * first[0] + 0.1 * g1 @ torch.linalg.inv(first[1]) @ g1.T / 4
    right = 0.9 * 0.1 * first[1] + 0.1 * g1.T @ torch.linalg.inv(first[0]) @ g1 / 4
    if "Shampoo" in name:
        a, b = left.abs().max(), right.abs().max()
        left, right = left * (b / a).sqrt(), right * (a / b).sqrt()
    assert distance([state["GG_0"], state["GG_1"]], [left, right]) < 1e-9


def arrays(shape, steps=21):
    return normal(*shape, seed=1).numpy(), [g.numpy() for g in stream(shape, steps)]


def apart(a, b, start):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b - start))


@pytest.mark.parametrize("case", [case for case in CASES if "split" not in case])
def test_with_adam_the_oracle_is_that_of_soap(case):
    shape, changed = CASES[case]
    start, grads = arrays(shape)
    h = told("SOAP", changed)
    assert apart(soap_family(start, grads, **h), soap(start, grads, **pick(h)), start) < 1e-10


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("split")])
def test_a_split_parameter_is_its_blocks_by_themselves(case):
    """A block without a dimension above 1 is left out: by itself it would move at the first gradient."""
    shape, changed = CASES[case]
    start, grads = arrays(shape)
    h, size = told("SOAP", changed), changed["max_precond_dim"]
    merged = joined(shape, size) if h["merge_dims"] else shape
    whole, blocks = soap_family(start, grads, **h).reshape(merged), 0
    for corner in np.ndindex(*(-(-n // size) for n in merged)):
        part = tuple(slice(size * i, size * (i + 1)) for i in corner)
        piece = start.reshape(merged)[part]
        if piece.size > 1:
            pieces = [g.reshape(merged)[part] for g in grads]
            alone = soap(piece, pieces, **{**pick(h), "merge_dims": False, "precondition_1d": True})
            assert apart(whole[part], alone, piece) < 1e-10
            blocks += 1
    assert blocks > 1


def test_with_one_factor_kl_is_soap():
    start, grads = arrays((4, 12))
    one, h = {"max_precond_dim": 8}, told("SOAP")
    assert (
        apart(soap_family(start, grads, **{**h, **one, "covariance": "kl"}), soap(start, grads, **pick(h), **one), start)
        < 1e-10
    )
    assert apart(soap_family(start, grads, **{**h, "covariance": "kl"}), soap(start, grads, **pick(h)), start) > 1e-3


def pick(h):
    """What the oracle of SOAP takes."""
    return {k: v for k, v in h.items() if k not in ("inner", "split")}


@pytest.mark.parametrize("name", PLAIN)
def test_without_a_refresh_heavy_is_plain(name):
    start, grads = arrays((5, 5))
    moments, inverse = name != "KLShampoo", "covariance" in PLAIN[name]
    for changed, alike in (
        ({"precondition_frequency": 100}, True),
        ({"precondition_frequency": 1}, not moments),
        ({"precondition_frequency": 1, "eps": 3.0}, not moments and not inverse),
    ):
        heavy, plain = (soap_family(start, grads, **told(n, changed)) for n in (f"Heavy{name}", name))
        assert (apart(heavy, plain, start) < 1e-12) == alike, changed


ALONE = {
    "SOAP": (adamw, {}),
    "SOAPNAdam": (nadam, {"momentum_decay": 0.3, "coupled": False}),
    "SOAPAdEMAMix": (ademamix, {"alpha": 5.0, "beta3_warmup": 17, "alpha_warmup": 9}),
    "SOLP": (laprop, {}),
    "KLSOAP": (adamw, {}),
}
ALONE |= {f"Heavy{name}": alone for name, alone in ALONE.items()}


def diagonal(steps=21):
    """Gradients whose eigenvectors are unit vectors at every step, in an order that changes."""
    return [np.diag(g) for g in normal(steps, 5, seed=3).numpy() * np.linspace(0.2, 2, 5)]


@pytest.mark.parametrize("name", ALONE)
def test_among_unit_vectors_the_basis_changes_nothing(name):
    """The inner rule by itself, from the second gradient on, decides what each inner rule of the oracle must be."""
    rule, own = ALONE[name]
    start, grads = normal(5, 5, seed=1).numpy(), diagonal()
    changed = {**own, "weight_decay": 0.1, "warmup_steps": 3, "eps": 1e-3}
    h = {k: v for k, v in told(name, changed).items() if k not in ("inner", "covariance", "transport")}
    by_itself = {k: v for k, v in h.items() if k in ("lr", "betas", "eps", "weight_decay", "warmup_steps", *own)}
    assert apart(soap_family(start, grads, **told(name, changed)), rule(start, grads[1:], **by_itself), start) < 1e-12
    changed.pop("coupled", None)
    ours, _ = trained(name, torch.tensor(start), map(torch.tensor, grads), changed)
    assert apart(ours.numpy(), rule(start, grads[1:], **by_itself), start) < 1e-9


def test_among_unit_vectors_the_schedule_free_form_is_schedule_free_adamw():
    start, grads = normal(5, 5, seed=1).numpy(), diagonal()
    changed = {"eps": 1e-3, "weight_decay": 0.1, "warmup_steps": 3, "r": 0.5, "weight_lr_power": 1.0}
    by_itself = {k: settings_of("SFSOAP", changed)[k] for k in ("lr", "betas", *changed)}
    expected = schedule_free_adamw(start, grads[1:], **by_itself)
    for a, b in zip(averaged(torch.tensor(start), map(torch.tensor, grads), changed), expected, strict=True):
        assert apart(a.numpy(), b, start) < 1e-12
    ours, _ = trained("SFSOAP", torch.tensor(start), map(torch.tensor, grads), changed)
    assert apart(ours.numpy(), expected.y, start) < 1e-9
