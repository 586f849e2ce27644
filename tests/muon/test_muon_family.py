"""The rules around Muon's: against float64 oracles, on every backend, as stacks, and with gradients of bad shape."""

from __future__ import annotations

import pytest
import torch
from core.kit import combined, distance, gradients, parameters, run, same, values
from reference.muon import JORDAN
from reference.muon_family import hyperball_adamw, muon_laprop, ortho_laprop, scion
from rounding import drift

from hb_muon import HyperBallAdamW, LaPropOrtho, Muon, MuonAdamW, MuonLaProp, OrthoLaProp, Scion

STEPS = 20
TOLERANCE = {torch.float64: 1e-12, torch.float32: drift(torch.float32, STEPS)}
SHAPES = ((5, 7), (13,), (8, 3, 2, 2), (3, 6, 5), (1, 9), (1,), ())
BANDS = ((5, 7), (13,), (5, 2, 3))
SETTINGS = {"weight_decay": 0.3, "betas": (0.6, 0.9), "eps": 0.05, "warmup_steps": 5, "maximize": True}
CAUTIOUS = {"weight_decay": 0.3, "cautious_weight_decay": True, "caution": True}
NUMBERS = {"ns_coefficients": [3.0, -3.2, 1.2], "ns_steps": 3}
EPS_ADD = {"division_backend": "eps_add", "eps": 0.1}
AFTER = {"after": True}
FACTORS = {
    "numbers": (NUMBERS, {"coefficients": [(3.0, -3.2, 1.2)], "ns_steps": 3}),
    "exact": ({"method": "exact"}, {}),
    "gram": ({"method": "gram_newton_schulz", "ns_coefficients": "jordan"}, {"method": "", "coefficients": JORDAN}),
    "batch": ({"flatten": False}, {}),
    "dtype": ({"ns_dtype": "bfloat16"}, {}),  # float64 stays float64
    "bands": ({"split_sizes": (2, 3)}, {}),
}
SPELLED_OTHERWISE = {"ns_coefficients", "ns_dtype", "scale_mode", "adjust_lr_fn", "division_backend", "scale"}

SEGMENTS = {
    "ortho": (OrthoLaProp, ortho_laprop, {}, {}),
    "ortho-settings": (OrthoLaProp, ortho_laprop, SETTINGS, {}),
    "ortho-cautious": (OrthoLaProp, ortho_laprop, CAUTIOUS, {}),
    "ortho-eps_add": (OrthoLaProp, ortho_laprop, EPS_ADD, {"division": "eps_add"}),
    "after": (LaPropOrtho, ortho_laprop, {}, AFTER),
    "after-settings": (LaPropOrtho, ortho_laprop, SETTINGS, AFTER),
    "after-cautious": (LaPropOrtho, ortho_laprop, CAUTIOUS, AFTER),
    "hyperball": (HyperBallAdamW, hyperball_adamw, {}, {}),
    "hyperball-settings": (HyperBallAdamW, hyperball_adamw, SETTINGS, {}),
    "hyperball-cautious": (HyperBallAdamW, hyperball_adamw, {**CAUTIOUS, "lr": 0.3}, {}),
    "hyperball-eps_add": (HyperBallAdamW, hyperball_adamw, EPS_ADD, {"division": "eps_add"}),
}
MATRICES = {
    "laprop": (MuonLaProp, muon_laprop, {}, {}),
    "laprop-settings": (MuonLaProp, muon_laprop, SETTINGS, {}),
    "laprop-cautious": (MuonLaProp, muon_laprop, CAUTIOUS, {}),
    "laprop-graft": (MuonLaProp, muon_laprop, {"scale_mode": "graft"}, {"scaling": "graft"}),
    "laprop-rms": (MuonLaProp, muon_laprop, {"adjust_lr_fn": "match_rms_adamw"}, {"scaling": "match_rms_adamw"}),
    **{f"laprop-{name}": (MuonLaProp, muon_laprop, *case) for name, case in FACTORS.items()},
    "scion": (Scion, scion, {}, {}),
    "scion-settings": (
        Scion, scion, {"weight_decay": 0.3, "momentum": 0.6, "warmup_steps": 5, "maximize": True, "scale": 3.0}, {"radius": 3.0}
    ),
    "scion-constrained": (Scion, scion, {"lr": 0.1, "weight_decay": 1.0, "scale": 0.5}, {"radius": 0.5}),
    "scion-cautious": (Scion, scion, CAUTIOUS, {}),
    "scion-eps": (Scion, scion, {"eps": 3.0}, {}),
    "scion-sign": (Scion, scion, {"norm": "sign", "lr": 0.1}, {}),
    "scion-sign-batch": (Scion, scion, {"norm": "sign", "flatten": False}, {}),
    **{f"scion-{name}": (Scion, scion, *case) for name, case in FACTORS.items()},
}  # fmt: skip
"""Name -> class, oracle, settings, and those that the oracle spells otherwise."""

FAMILY = {
    "Muon": (Muon, {}),
    "Muon-graft": (Muon, {"scale_mode": "graft"}),
    "Muon-gram": (Muon, {"method": "gram_newton_schulz"}),
    "Muon-exact": (Muon, {"method": "exact"}),
    "MuonAdamW": (MuonAdamW, {}),
    "MuonLaProp": (MuonLaProp, {}),
    "HyperBallAdamW": (HyperBallAdamW, {}),
    "OrthoLaProp": (OrthoLaProp, {}),
    "LaPropOrtho": (LaPropOrtho, {}),
    "Scion": (Scion, {}),
    "Scion-sign": (Scion, {"norm": "sign"}),
}
every_member = pytest.mark.parametrize(("cls", "options"), FAMILY.values(), ids=FAMILY)


def agree(case, dtype, tolerance, shapes=SHAPES, steps=STEPS, backend="eager"):
    """The optimizer ends where its oracle ends; return it."""
    cls, oracle, options, spelled = case
    settings = {k: v for k, v in options.items() if k not in SPELLED_OTHERWISE} | spelled
    params = parameters(shapes, dtype)
    optimizer = cls(params, **options, compile=backend)
    run(optimizer, params, gradients(steps, shapes, dtype))
    columns = zip(*gradients(steps, shapes, dtype), strict=True)
    wanted = [
        torch.tensor(oracle(p.detach().double().numpy(), [g.double().numpy() for g in column], **settings))
        for p, column in zip(parameters(shapes, dtype), columns, strict=True)
    ]
    assert distance(params, wanted) < tolerance
    return optimizer


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("case", SEGMENTS.values(), ids=SEGMENTS)
def test_a_fused_rule_agrees_with_its_oracle(case, dtype):
    report = agree(case, dtype, TOLERANCE[dtype]).report
    assert report.programs == 2 and not report.reasons  # numbers and tensors, or vectors and matrices


@pytest.mark.parametrize("case", MATRICES.values(), ids=MATRICES)
def test_a_matrix_rule_agrees_with_its_oracle(case):
    agree(case, torch.float64, 1e-10, BANDS if "split_sizes" in case[2] else SHAPES)


def test_every_class_and_every_setting_has_an_oracle():
    tried = {(case[0], key) for case in (*SEGMENTS.values(), *MATRICES.values()) for key in case[2]}
    for cls in {case[0] for case in (*SEGMENTS.values(), *MATRICES.values())}:
        assert not {(cls, key) for key in cls.own if key not in ("lr", "beta", "betas")} - tried, cls


@pytest.mark.parametrize(
    ("backend", "name"),
    [*combined(["triton"], ["ortho-settings", "after-settings", "hyperball-settings"]), *combined(["inductor"], ["hyperball"])],
)
@pytest.mark.filterwarnings("ignore:.*encountered in divide:RuntimeWarning")  # Triton's interpreter divides with NumPy
def test_compiled_rules_agree_with_the_oracle(backend, name):
    if backend == "triton" and not pytest.importorskip("hbcore.engine.backends.triton.device_lib").INTERPRETED:
        pytest.skip("runs under Triton's interpreter")
    report = agree(SEGMENTS[name], torch.float32, 1e-6, ((5, 7),), 6, backend).report
    assert report.backend == backend and not report.reasons
    assert report.programs == 1


@pytest.mark.parametrize("cls", [Muon, MuonLaProp, Scion], ids=lambda c: c.__name__)
@pytest.mark.parametrize("shape", [(4, 6, 3), (3, 6, 3), (6, 6, 6), (1, 4, 4)], ids=str)
def test_a_stack_of_matrices_is_so_many_matrices(shape, cls):
    [whole] = parameters([shape], torch.float64)
    apart = [torch.nn.Parameter(part.detach().clone()) for part in whole]
    together = cls([whole], flatten=False, compile="eager")
    separate = cls(apart, compile="eager")
    for [grad] in gradients(6, [shape], torch.float64):
        run(together, [whole], [[grad]])
        run(separate, apart, [list(grad)])
    assert distance(whole, apart) < 1e-12


@every_member
def test_batched_equals_one_by_one(cls, options):
    shapes = [(6, 4), (4, 6), (6, 4), (6, 4), (4, 6), (7,), (7,)]
    ends = []
    for multi_tensor in (True, False):
        params = parameters(shapes, torch.float64)
        run(cls(params, **options, multi_tensor=multi_tensor, compile="eager"), params, gradients(5, shapes, torch.float64))
        ends.append(params)
    assert distance(*ends) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e-12, 1e15], ids=str)
@every_member
def test_gradients_of_rank_one_of_any_size_are_finite(cls, options, size, dtype):
    params = parameters([(6, 4), (4, 9), (8, 3, 2, 2), (7,), ()], dtype)
    before = values(params)
    optimizer = cls(params, **options, lr=0.05, compile="eager")
    for _ in range(3):
        for p in params:
            p.grad = torch.full_like(p, size)
        optimizer.step()
    assert all(p.isfinite().all() for p in params)
    if size >= 1:
        assert not any(map(torch.equal, params, before))
    elif size < 1e-20 and cls in (HyperBallAdamW, OrthoLaProp, LaPropOrtho):
        assert distance(params, before) < 1e-6  # no norm may be too small to divide by, and let a step jump


@every_member
def test_gradients_of_zeros_move_nothing(cls, options):
    params = parameters(SHAPES)
    before = values(params)
    run(cls(params, **options, compile="eager"), params, [[torch.zeros_like(p) for p in params]] * 3)
    assert same(params, before)


# --- HyperBall --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hyperball_keeps_the_norm_that_it_starts_with(dtype):
    """Nothing stores that norm, so the rounding of the stored weights moves it: a random walk, as the rule's docstring says.

    One step rounds each of n weights by less than u = eps / 2 of itself, independently, which moves the norm by less than
    u / sqrt(n) in the root mean square; t steps by sqrt(t) times as much. The bound is eight of those.
    """
    params = parameters([(40, 30), (8, 3, 3, 3)], dtype)
    before = values(params)
    optimizer = HyperBallAdamW(params, lr=0.01, weight_decay=0.1, compile="eager")
    run(optimizer, params, gradients(1000, [p.shape for p in params], dtype))
    for p, b in zip(params, before, strict=True):
        walk = torch.finfo(dtype).eps / 2 * (1000 / p.numel()) ** 0.5
        assert abs(p.double().norm() / b.double().norm() - 1) < 8 * walk
        assert (p - b).norm() > 0.5 * b.norm()


def test_a_hyperballs_learning_rate_is_relative_to_the_norm():
    """The triangle of the weights at length 1 and a step of length lr gives the angle between the weights before and after."""
    [p] = parameters([(40, 30)], torch.float64)
    before = p.detach() / p.detach().norm()
    p.grad = torch.randn(40, 30, generator=torch.Generator().manual_seed(3), dtype=torch.float64).sign()
    u = p.grad / p.grad.norm()  # the direction of Adam's first update, which is the gradient's sign
    HyperBallAdamW([p], lr=0.05, compile="eager").step()
    after, along = p.detach() / p.detach().norm(), float((u * before).sum())
    wanted = (1 - 0.05 * along) / (1 - 2 * 0.05 * along + 0.05**2) ** 0.5
    assert abs(float((after * before).sum()) - wanted) < 1e-14


# --- OrthoGrad --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [OrthoLaProp, LaPropOrtho], ids=lambda c: c.__name__)
def test_a_gradient_along_the_weights_moves_nothing(cls):
    for dtype in (torch.float32, torch.float64):
        params = parameters([(50, 30), (64,)], dtype)
        optimizer = cls(params, betas=(0.0, 0.0) if cls is LaPropOrtho else (0.9, 0.99), compile="eager")
        for p in params:
            p.data.copy_(p.data.sign())  # LaProp's update is the gradient's sign
            p.grad = 3 * p.detach()
        before = values(params)
        optimizer.step()
        assert same(params, before)


def test_steps_after_orthograd_are_at_right_angles_to_the_weights():
    params = parameters([(50, 30), (64,)], torch.float64)
    optimizer = LaPropOrtho(params, compile="eager")
    for grads in gradients(6, [p.shape for p in params], torch.float64):
        before = values(params)
        run(optimizer, params, [grads])
        for p, b in zip(params, before, strict=True):
            step = p.detach() - b
            assert abs(float((step * b).sum() / (step.norm() * b.norm()))) < 1e-12
