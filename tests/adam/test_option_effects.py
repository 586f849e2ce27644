"""What each shared option promises, seen on AdamW by itself, in numbers that can be worked out by hand.

Adam's first step is the sign of the gradient, and so is every one while the gradient stays the same: most promises are about
multiples of the learning rate. :func:`test_every_option_has_its_promise` finds an option that has none.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from core.kit import distance, gradients, parameters, run, same, values
from torch import Tensor, nn

from hb_adam import AdamW
from hbcore.engine.shared_options import OPTIONS
from hbcore.errors import StateWarning

LR = 2**-6
START = torch.tensor([1.0, -2.0, 0.5, -0.25], dtype=torch.float64)
GRAD = torch.tensor([3.0, 0.5, -0.125, -2.0], dtype=torch.float64)
SIGNS = GRAD.sign()

PROMISES: dict[str, list[str]] = {}
"""Option -> the tests that say what it does."""


def promises(*options: str):
    """Say which options a test is about."""

    def remember(test):
        for option in options:
            PROMISES.setdefault(option, []).append(test.__name__)
        return test

    return remember


def stepped(*grads: Tensor, start: Tensor = START, **options) -> tuple[nn.Parameter, AdamW]:
    """A parameter after a step on each of ``grads``, and its optimizer. Without eps, unless asked for."""
    p = nn.Parameter(start.clone())
    optimizer = AdamW([p], **{"lr": LR, "eps": 0.0, "compile": "eager", **options})
    run(optimizer, [p], [[g] for g in grads])
    return p, optimizer


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-12) -> bool:
    return distance([ours], [theirs]) < tolerance


def test_every_option_has_its_promise():
    assert set(PROMISES) == set(OPTIONS)


# --- the step ---------------------------------------------------------------------------------------------------------


@promises("weight_decay")
def test_weight_decay_shrinks_by_lr_times_it():
    p, _ = stepped(GRAD, weight_decay=0.5)
    assert close(p, START - LR * SIGNS - LR * 0.5 * START)


@promises("warmup_steps")
def test_warmup_reaches_the_whole_rate_one_step_after_its_last():
    before = START
    for t, share in enumerate([0.25, 0.5, 0.75, 1.0, 1.0], start=1):
        p, _ = stepped(*[GRAD] * t, warmup_steps=3)
        assert close(p - before, -LR * share * SIGNS, 1e-10), t
        before = p.detach()


@promises("caution")
def test_caution_drops_what_points_the_other_way_and_scales_up_the_rest():
    turned = GRAD * torch.tensor([1.0, 1.0, 1.0, -0.01], dtype=torch.float64)  # the average still points the old way
    plain, _ = stepped(GRAD, turned)
    cautious, _ = stepped(GRAD, turned, caution=True)
    after_one = START - LR * SIGNS
    kept = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert close(cautious - after_one, (plain - after_one) * kept * 4 / 3)


@promises("cautious_weight_decay")
def test_cautious_decay_spares_weights_that_the_update_makes_smaller_no_more():
    p, _ = stepped(GRAD, weight_decay=0.5, cautious_weight_decay=True)
    agree = (SIGNS * START > 0).double()
    assert 0 < agree.sum() < 4 and close(p, START - LR * SIGNS - LR * 0.5 * START * agree)


@promises("maximize")
def test_maximize_descends_the_negative_gradient():
    up, _ = stepped(GRAD, 2 * GRAD, maximize=True)
    down, _ = stepped(-GRAD, -2 * GRAD)
    assert same([up], [down])


@promises("skip_nonfinite")
def test_skip_nonfinite_leaves_out_a_step_that_is_not_finite():
    broken = torch.where(GRAD > 0, torch.nan, GRAD)
    skipping, optimizer = stepped(GRAD, broken, 2 * GRAD, skip_nonfinite=True)
    without, _ = stepped(GRAD, 2 * GRAD)
    assert same([skipping], [without])
    assert optimizer.report.skipped == 1


@promises("division_backend", "atan2_scale")
def test_each_division_divides_as_its_name_says():
    g, eps = np.append(GRAD.numpy(), 0.0), 0.75
    with np.errstate(invalid="ignore"):
        wanted = {
            "eps_clamp": g / np.maximum(np.abs(g), eps),
            "eps_add": g / (np.abs(g) + eps),
            "atan2": 16 * np.arctan2(g / 16, np.abs(g)),
            "nan_to_0": np.nan_to_num(g / np.abs(g)),
        }
    start = torch.zeros(5, dtype=torch.float64)
    for name, update in wanted.items():
        p, _ = stepped(torch.tensor(g), start=start, division_backend=name, eps=eps)
        assert close(p, torch.tensor(-LR * update)), name
    p, _ = stepped(torch.tensor(g), start=start, division_backend="atan2", atan2_scale=0.5)
    assert close(p, torch.tensor(-LR * 0.5 * np.arctan2(g / 0.5, np.abs(g))))


@promises("mars", "mars_gamma")
def test_mars_corrects_by_how_the_gradient_changed():
    small, beta = GRAD / 64, 0.8  # below a norm of 1, above which the correction is clipped
    for gamma in (0.0025, 0.4):
        _, optimizer = stepped(small, 2 * small, mars=True, mars_gamma=gamma, betas=(beta, 0.9))
        corrected = 2 * small + gamma * beta / (1 - beta) * small
        [state] = optimizer.state.values()
        assert close(state["exp_avg"], beta * (1 - beta) * small + (1 - beta) * corrected)


@promises("palm", "beta2_scale")
def test_palm_lets_the_second_decay_rise():
    for scale in (0.8, 0.5):
        _, optimizer = stepped(GRAD, 3 * GRAD, palm=True, beta2_scale=scale)
        [state] = optimizer.state.values()
        newest = 2**-scale
        assert close(state["exp_avg_sq"], (1 - newest) * GRAD**2 + newest * 9 * GRAD**2)


@promises("gradient_clipping", "update_clipping")
def test_gradients_are_clipped_before_the_rule_and_updates_after_it():
    _, optimizer = stepped(GRAD, gradient_clipping=("l2_clip_", 0.5), betas=(0.75, 0.9))
    [state] = optimizer.state.values()
    assert close(state["exp_avg"], 0.25 * 0.5 * GRAD / GRAD.norm())
    p, optimizer = stepped(GRAD, update_clipping=("l2_clip_", 0.5), betas=(0.75, 0.9))
    [state] = optimizer.state.values()
    assert close(p, START - LR * 0.5 * SIGNS / 2) and close(state["exp_avg"], 0.25 * GRAD)


@promises("use_ema", "ema_decay")
def test_the_average_of_the_weights_weighs_the_newest_by_ema_decay():
    d = 0.25
    first, _ = stepped(GRAD)
    p, optimizer = stepped(GRAD, -GRAD, use_ema=True, ema_decay=d)
    plain, _ = stepped(GRAD, -GRAD)
    assert same([p], [plain]), "training does not see it"
    wanted = (d * (1 - d) * first + d * p) / (1 - (1 - d) ** 2)
    with optimizer.ema_weights():
        assert close(p, wanted)
    assert same([p], [plain])


# --- numbers of few bits ----------------------------------------------------------------------------------------------


@promises("promote")
def test_promote_is_what_elementwise_rules_do_anyway():
    bf16 = [g.bfloat16() for g in (GRAD, -GRAD, 2 * GRAD)]
    for start in (START, START.float(), START.bfloat16()):
        grads = bf16 if start.dtype == torch.bfloat16 else [g.to(start.dtype) for g in bf16]
        plain, _ = stepped(*grads, start=start)
        promoted, _ = stepped(*grads, start=start, promote=True)
        assert same([promoted], [plain])


@promises("storage_dtype")
def test_state_is_stored_in_the_dtype_and_float64_stays():
    for start, stored in ((START.float(), torch.bfloat16), (START, torch.float64)):
        p, optimizer = stepped(GRAD.to(start.dtype), start=start, storage_dtype="bfloat16")
        assert {optimizer.state[p][k].dtype for k in ("exp_avg", "exp_avg_sq")} == {stored}
        assert p.dtype == start.dtype


@promises("ecc")
def test_ecc_stores_state_in_bfloat16_and_what_that_lacks():
    grads = [list(g) for g in gradients(8)]
    plain, coded, rounded = (parameters() for _ in range(3))
    run(AdamW(plain, compile="eager"), plain, grads)
    optimizer = AdamW(coded, ecc="bf16+8", compile="eager")
    run(optimizer, coded, grads)
    run(AdamW(rounded, storage_dtype="bfloat16", compile="eager"), rounded, grads)
    kinds = {k: t.dtype for k, t in optimizer.state[coded[0]].items() if k.startswith("exp_avg")}
    assert kinds["exp_avg"] == torch.bfloat16 and kinds["exp_avg#ecc"] == torch.int8
    assert distance(coded, plain) < distance(rounded, plain) / 20


@promises("param_ecc")
def test_param_ecc_keeps_beside_a_bfloat16_parameter_what_it_lacks():
    with pytest.warns(StateWarning, match="param_ecc turned"):
        p = nn.Parameter(torch.ones(64))
        optimizer = AdamW([p], lr=1e-4, param_ecc="bf16+16", compile="eager")
    run(optimizer, [p], [[torch.ones(64, dtype=torch.bfloat16)]] * 10)
    assert p.dtype == torch.bfloat16 and optimizer.state[p]["param#ecc"].dtype == torch.int16
    whole = optimizer.settings.param_codec.read({"param": p.detach(), **optimizer.state[p]}, "param", torch.float32)
    assert close(whole, torch.full((64,), 1 - 10 * 1e-4), 1e-6)
    alone = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    run(AdamW([alone], lr=1e-4, compile="eager"), [alone], [[torch.ones(64, dtype=torch.bfloat16)]] * 10)
    assert (alone == 1).all(), "rounded to the nearest it would not have moved"


@promises("stochastic_rounding", "seed")
def test_stochastic_rounding_moves_the_mean_and_the_seed_decides_which():
    start, grads = torch.ones(4096, dtype=torch.bfloat16), [torch.ones(4096, dtype=torch.bfloat16)] * 20
    nearest, _ = stepped(*grads, start=start, lr=1e-4)
    one, again, other = (
        stepped(*grads, start=start, lr=1e-4, stochastic_rounding=True, seed=seed)[0].detach() for seed in (1, 1, 2)
    )
    assert (nearest == 1).all() and math.isclose(1 - one.double().mean().item(), 20 * 1e-4, rel_tol=0.05)
    assert torch.equal(one, again) and not torch.equal(one, other)


# --- how it runs ------------------------------------------------------------------------------------------------------


@promises("consume_grad")
def test_consume_grad_clears_what_was_used():
    assert stepped(GRAD)[0].grad is None
    assert torch.equal(stepped(GRAD, consume_grad=False)[0].grad, GRAD)


@promises("multi_tensor", "foreach", "fused")
def test_multi_tensor_joins_what_runs_alike_and_torchs_spellings_mean_it():
    finals = {}
    for joined in (True, False):
        params = parameters()
        optimizer = AdamW(params, multi_tensor=joined, compile="eager")
        run(optimizer, params, gradients(4))
        finals[joined] = values(params)
        assert optimizer.report.programs == (1 if joined else len(params))
    assert distance(finals[True], finals[False]) < 1e-6
    for spelling in ("foreach", "fused"):
        for value in (True, False):
            with pytest.warns(FutureWarning, match=f"multi_tensor={value}"):
                assert stepped(**{spelling: value})[1].settings.multi_tensor is value


@promises("matmul_precision")
def test_matmul_precision_is_about_matrix_rules_alone():
    """``core/test_products.py`` says what they make of it."""
    plain, _ = stepped(GRAD, GRAD)
    for choice in ("ieee", "split", "tf32"):
        p, optimizer = stepped(GRAD, GRAD, matmul_precision=choice)
        assert same([p], [plain]) and optimizer.settings.matmul_precision == choice


@promises("offload")
def test_offload_changes_where_state_lives_and_nothing_else():
    """``core/test_offloaded.py`` has it at work."""
    p, optimizer = stepped(GRAD, GRAD, offload="cpu")
    assert same([p], [stepped(GRAD, GRAD)[0]]) and optimizer.state[p]["exp_avg"].device.type == "cpu"


@promises("report_norms")
def test_report_norms_says_how_far_a_step_went():
    p, optimizer = stepped(GRAD, report_norms=True)
    assert same([p], [stepped(GRAD)[0]])
    update, weight = optimizer.norms()[0]
    assert math.isclose(update, LR) and math.isclose(weight, float(p.detach().square().mean().sqrt()))


@promises("capturable")
def test_capturable_steps_decide_on_the_device_whether_they_count():
    p, optimizer = stepped(GRAD, capturable=True)
    plain, _ = stepped(GRAD)
    assert close(p, plain) and optimizer._step_supports_amp_scaling and optimizer.state[p]["step"].device == p.device
    before = p.detach().clone()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    run(optimizer, [p], [[GRAD * float("inf")]])
    assert same([p], [before]) and float(optimizer.state[p]["step"]) == 1
    optimizer.found_inf = torch.tensor(0.0)
    run(optimizer, [p], [[8 * GRAD]])
    assert close(p, stepped(GRAD, GRAD)[0]) and float(optimizer.state[p]["step"]) == 2


@pytest.mark.filterwarnings("ignore:.*encountered in divide:RuntimeWarning")  # Triton's interpreter divides with NumPy
@promises("compile", "compile_step")
def test_compile_chooses_the_backend():
    assert stepped(GRAD)[1].report.backend == "eager"
    assert stepped(GRAD, compile="auto")[1].report.backend == "eager", "too small to repay it, on a CPU"
    assert stepped(compile_step=True)[1].settings.compile == stepped(compile="inductor")[1].settings.compile == "inductor"
    helpers = pytest.importorskip("hbcore.engine.backends.triton.device_lib")
    if not helpers.INTERPRETED:
        pytest.skip("runs under Triton's interpreter")
    p, optimizer = stepped(GRAD, compile="triton")
    assert optimizer.report.backend == "triton" and close(p, stepped(GRAD)[0])
