"""Adams against its float64 oracle, and where its spectral decay applies."""

from __future__ import annotations

import copy

import pytest
import torch
from core.kit import combined, distance, gradients, parameters, run, same, values
from distributed.ranks import on_ranks
from reference.adams import adams
from rounding import drift, unit
from torch import nn

import hbcore
from hb_adam import Adams
from hb_adam.adams import DecaySpectralNorm
from hbcore.errors import HyperparameterError, OptionError, ParameterError

SHAPES = ((5, 7), (7, 5), (13,), (2, 3, 4), (2, 2, 3, 5), (1, 6), (6, 1), (3, 1, 4), (1,), ())
STEPS = 25
TOLERANCE = {torch.float64: 1e-12, torch.float32: drift(torch.float32, STEPS)}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)

CASES = {
    "plain": {},
    "settings": {"betas": (0.6, 0.9), "warmup_steps": 5, "maximize": True, "weight_decay": 0.5},
    "two-decays": {"weight_decay": 0.3, "scalar_vector_weight_decay": 2.0},
    "matrices-alone": {"weight_decay": 1.0, "scalar_vector_weight_decay": 0.0},
    "vectors-alone": {"weight_decay": 0.0, "scalar_vector_weight_decay": 1.0},
    "use_spectral_decay": {"use_spectral_decay": False, "scalar_vector_weight_decay": 0.7},
    "caution": {"caution": True, "weight_decay": 0.5},
    "cautious_weight_decay": {"cautious_weight_decay": True, "weight_decay": 0.5, "scalar_vector_weight_decay": 2.0},
}


def expected(shapes, dtype, steps, **settings):
    """The oracle's outcome of each parameter for the same start and the same gradients."""
    columns = zip(*gradients(steps, shapes, dtype), strict=True)
    return [
        adams(p.detach().double().numpy(), [g.double().numpy() for g in column], **settings)
        for p, column in zip(parameters(shapes, dtype), columns, strict=True)
    ]


def agree(optimizer, params, wanted, tolerance):
    """The parameters are the oracle's, and so are the vectors of the power iteration, there where it has them."""
    assert distance(params, [torch.tensor(found.theta) for found in wanted]) < tolerance
    for p, found in zip(params, wanted, strict=True):
        assert ("spectral_u" in optimizer.state[p]) == (found.u is not None)
        if found.u is not None:
            assert distance([optimizer.state[p]["spectral_u"].flatten()], [torch.tensor(found.u).flatten()]) < 10 * tolerance


@every_dtype
@pytest.mark.parametrize("case", CASES)
def test_a_setting_agrees_with_the_oracle(case, dtype):
    params = parameters(SHAPES, dtype)
    optimizer = Adams(params, lr=0.02, **CASES[case], compile="eager")
    run(optimizer, params, gradients(STEPS, SHAPES, dtype))
    agree(optimizer, params, expected(SHAPES, dtype, STEPS, lr=0.02, **CASES[case]), TOLERANCE[dtype])
    assert not optimizer.report.reasons


@pytest.mark.filterwarnings("ignore:.*encountered in divide:RuntimeWarning")  # Triton's interpreter divides with NumPy
@pytest.mark.parametrize(("backend",), combined(["inductor", "triton"]))
def test_compiled_backends_agree_with_the_oracle(backend):
    if backend == "triton":
        helpers = pytest.importorskip("hbcore.engine.backends.triton.device_lib")
        if not helpers.INTERPRETED:
            pytest.skip("runs under Triton's interpreter")
    shapes, settings = ((5, 7), (2, 3, 4), (13,)), {"weight_decay": 0.3, "warmup_steps": 3}
    params = parameters(shapes)
    optimizer = Adams(params, lr=0.02, **settings, compile=backend)
    run(optimizer, params, gradients(5, shapes))
    assert optimizer.report.backend == backend and not optimizer.report.reasons
    agree(optimizer, params, expected(shapes, torch.float32, 5, lr=0.02, **settings), 1e-6)


def test_the_decay_takes_the_largest_singular_value_and_no_other():
    """The power iteration has found it after a while: a matrix without gradients loses ``lr lambda sqrt(M)`` of it a step."""
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    sizes = torch.tensor([8.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    p = nn.Parameter(left @ torch.diag(sizes) @ right)
    optimizer = Adams([p], lr=0.0, weight_decay=0.25, compile="eager")
    for step in range(41):
        optimizer.param_groups[0]["lr"] = 0.1 * (step == 40)
        p.grad = torch.zeros_like(p)
        optimizer.step()
    wanted = torch.cat([sizes[:1] * (1 - 0.1 * 0.25 * 6**0.5), sizes[1:]])
    assert torch.allclose(torch.linalg.svdvals(p.detach()), wanted, atol=1e-9)


def test_a_step_is_at_most_half_pi_and_does_not_see_the_gradients_scale():
    outcomes = []
    for scale in (1e-12, 1.0, 1e12):
        params = parameters(SHAPES, torch.float64)
        optimizer = Adams(params, lr=0.1, weight_decay=0, scalar_vector_weight_decay=0, compile="eager")
        before = values(params)
        run(optimizer, params, [[scale * g for g in grads] for grads in gradients(4, SHAPES, torch.float64)])
        assert all(((p - b).abs() <= 0.4 * torch.pi / 2).all() for p, b in zip(params, before, strict=True))
        outcomes.append(values(params))
    assert distance(outcomes[0], outcomes[1]) < 1e-12 and distance(outcomes[2], outcomes[1]) < 1e-12


def test_a_parameter_or_a_group_may_refuse_spectral_decay():
    shapes = ((5, 7),) * 3
    params = parameters(shapes, torch.float64)
    params[0].use_spectral_decay = False
    groups = [{"params": params[:2]}, {"params": params[2:], "use_spectral_decay": False}]
    settings = {"lr": 0.02, "weight_decay": 0.3, "scalar_vector_weight_decay": 2.0}
    optimizer = Adams(groups, **settings, compile="eager")
    run(optimizer, params, gradients(STEPS, shapes, torch.float64))
    plain = expected(shapes, torch.float64, STEPS, **settings, use_spectral_decay=False)
    spectral = expected(shapes, torch.float64, STEPS, **settings)
    agree(optimizer, params, [plain[0], spectral[1], plain[2]], 1e-12)

    twins = [nn.Parameter(p) for p in values(params)]
    twins[0].use_spectral_decay = False
    resumed = Adams([{"params": twins[:2]}, {"params": twins[2:], "use_spectral_decay": False}], compile="eager")
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o, ps in ((optimizer, params), (resumed, twins)):
        run(o, ps, gradients(6, shapes, torch.float64))
    assert same(params, twins)
    assert same([optimizer.state[params[1]]["spectral_u"]], [resumed.state[twins[1]]["spectral_u"]])


def test_a_fresh_optimizers_state_dict_knows_who_refuses():
    params = parameters(((5, 7), (5, 7)))
    params[0].use_spectral_decay = False
    saved = Adams(params, compile="eager").state_dict()["state"]
    assert "spectral_u" not in saved[0]
    assert saved[1]["spectral_u"].tolist() == [1.0] * 5


def test_scheduled_decays_compile_nothing():
    params = parameters(SHAPES)
    optimizer = Adams(params, compile="eager")
    run(optimizer, params, gradients(2, SHAPES))
    programs = optimizer.report.programs
    for key in ("weight_decay", "scalar_vector_weight_decay", "lr"):
        optimizer.param_groups[0][key] = 0.7
        run(optimizer, params, gradients(1, SHAPES))
    assert optimizer.report.programs == programs


def test_matrices_of_zeros_stay_and_leave_the_vector_alone():
    p = nn.Parameter(torch.zeros(2, 3, 4))
    optimizer = Adams([p], compile="eager")
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert not p.detach().any()
    assert optimizer.state[p]["spectral_u"].tolist() == [[1.0] * 3] * 2


def test_the_moments_are_stored_in_the_master_dtype_and_the_vector_is_not():
    params = parameters(((5, 7),), torch.bfloat16)
    optimizer = Adams(params, master_dtype=torch.bfloat16, compile="eager")
    run(optimizer, params, gradients(3, ((5, 7),), torch.bfloat16))
    state = optimizer.state[params[0]]
    assert (state["exp_avg"].dtype, state["spectral_u"].dtype) == (torch.bfloat16, torch.float32)
    full = Adams(parameters(((5, 7),), torch.bfloat16), compile="eager")
    [p] = full.param_groups[0]["params"]
    run(full, [p], gradients(3, ((5, 7),), torch.bfloat16))
    assert full.state[p]["exp_avg"].dtype == torch.float32
    [wanted] = expected(((5, 7),), torch.bfloat16, 3)
    assert distance([p], [torch.tensor(wanted.theta)]) < 3 * unit(torch.bfloat16)  # three steps, each rounded once


@pytest.mark.parametrize(
    "options",
    [
        {"mars": True, "use_ema": True},
        {"palm": True},
        {"ecc": "bf16+8"},
        {"gradient_clipping": "global_l2norm_clip", "update_clipping": "l2_clip_"},
        {"multi_tensor": False},
        {"stochastic_rounding": True},
    ],
    ids=str,
)
def test_shared_options_train(options):
    """The loss falls, and nothing is NaN."""
    params = parameters(SHAPES)
    optimizer = Adams(params, lr=0.02, **options, compile="eager")
    before = sum(float(p.detach().square().sum()) for p in params)
    for _ in range(15):
        for p in params:
            p.grad = p.detach().clone()
        optimizer.step()
    assert sum(float(p.detach().square().sum()) for p in params) < before


def test_what_it_cannot_do_is_refused_by_name():
    p = nn.Parameter(torch.ones(3, 4))
    with pytest.raises(OptionError, match="capturable=True is not supported by spectral_decay"):
        Adams([p], capturable=True)
    with pytest.raises(OptionError, match="division_backend='eps_add' would need an eps"):
        Adams([p], division_backend="eps_add")
    with pytest.raises(OptionError, match="two names of one option"):
        Adams([p], master_dtype=torch.bfloat16, storage_dtype=torch.bfloat16)
    with pytest.raises(ParameterError, match="complex"):
        Adams([nn.Parameter(torch.ones(3, 4, dtype=torch.complex64))])
    for key in ("weight_decay", "scalar_vector_weight_decay"):
        with pytest.raises(HyperparameterError, match=f"{key}=-0.5 is outside"):
            Adams([p], **{key: -0.5})


def test_a_rule_sees_blocks_of_one_matrix_each():
    [block] = DecaySpectralNorm().blocks(torch.Size((2, 5, 3, 4)))
    assert (block.batch, block.shape) == (10, (3, 4))


def test_buffers_are_left_alone_without_a_process_group():
    buffer = torch.ones(3)
    Adams([nn.Parameter(torch.ones(2))]).broadcast_buffers([buffer])
    assert buffer.tolist() == [1.0] * 3


def broadcast(rank):
    """Buffers that differ between ranks, after the broadcast."""
    buffers = [torch.full((3,), float(rank)), torch.tensor(rank)]
    Adams([nn.Parameter(torch.ones(2))]).broadcast_buffers(buffers)
    return [b.tolist() for b in buffers]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_buffers_become_those_of_the_first_rank():
    assert on_ranks(2, broadcast) == [[[0.0] * 3, 0]] * 2


@pytest.mark.filterwarnings("ignore:Adams_ZeRO is another name:FutureWarning")
def test_its_names_and_defaults():
    assert hbcore.get("Adams") is hbcore.get("Adams_ZeRO") is Adams
    [group] = Adams([nn.Parameter(torch.ones(2))]).param_groups
    wanted = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "scalar_vector_weight_decay": 0.1}
    assert {key: group[key] for key in wanted} == wanted
