"""Two processes follow one: under DDP and FSDP2, through state dicts and distributed checkpoints."""

from __future__ import annotations

import pytest
import torch
from core.kit import distance
from distributed import jobs
from distributed.ranks import on_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

MIXED = {"exp_avg": "int8", "exp_avg_sq": "bf16+8"}

LIMITS = {"SOAP-8bit": 1e-3}
"""How far ranks may be off, if not 1e-6: a product that rounds otherwise may be another code. A missed refresh is 1e-2."""

FULL_RANK = {"max_precond_dim": 20}
"""Of a gradient of low rank, rounding alone chooses the basis of what it leaves, and on some processors a product of a matrix
alone rounds otherwise than one of several."""

CASES = {
    "AdamW": ("AdamW", {"weight_decay": 0.1}),
    "AdamW-reductions": ("AdamW", {"caution": True, "update_clipping": "l2_clip_", "gradient_clipping": "global_l2norm_clip"}),
    "AdamW-ecc": ("AdamW", {"ecc": "bf16+8", "stochastic_rounding": True}),
    "AdamW-8bit": ("AdamW", {"ecc": "int8"}),
    "AdamW-8bit-triton": ("AdamW", {"ecc": MIXED, "stochastic_rounding": True, "compile": "triton"}),
    "AdamW-8bit-cpp": ("AdamW", {"ecc": MIXED, "stochastic_rounding": True, "compile": "cpp"}),
    "SOAP-8bit": ("SOAP", {**FULL_RANK, "ecc": "int8"}),
    "SGD": ("SGD", {"mars": True}),
    "Muon": ("Muon", {"ns_dtype": "float32", "update_clipping": "global_rmsnorm_clip"}),
    "SOAP": ("SOAP", {**FULL_RANK, "precondition_frequency": 2}),
    "SOAP-regions": ("SOAP", {"split": True, "max_precond_dim": 16, "ecc": "bf16+8"}),
    "SOAP-staggered": ("SOAP", {**FULL_RANK, "stagger": True, "precondition_frequency": 3}),
    "PSGDKron": ("PSGDKron", {}),
    "PSGDLRA": ("PSGDLRA", {}),
    "PSGDLRA-alone": ("PSGDLRA", {"multi_tensor": False, "ecc": "bf16+8"}),
    "SFAdamW": ("SFAdamW", {"weight_decay": 0.1}),
    "MSAMLaProp": ("MSAMLaProp", {"sam_step_size": 1.0, "weight_decay": 0.1}),
    "TwoMatrixRules": ("TwoMatrixRules", {}),
    "Adams": ("Adams", {"weight_decay": 0.5}),
    "LDoG": ("LDoG", {}),
    "DoG": ("DoG", {}),
    "rows": ("NormalisedRows", {"ecc": "bf16+8"}),
    "derived": ("Fitted", {}),
    "draws": ("Shaken", {}),
    "draws-triton": ("Shaken", {"compile": "triton"}),
    "draws-ecc": ("Shaken", {"ecc": "bf16+8", "stochastic_rounding": True}),
}


def seldom(cases, *always):
    """The cases, of which those besides ``always`` run in CI and not in ``make test``."""
    return [case if case in always else pytest.param(case, marks=pytest.mark.broad) for case in cases]


@pytest.mark.parametrize("case", seldom(CASES, "AdamW-reductions", "AdamW-8bit", "Muon", "SOAP", "PSGDKron", "PSGDLRA", "LDoG"))
def test_fully_sharded_parameters_follow_one_process(case):
    name, options = CASES[case]
    alone = jobs.follow(0, name, options, "alone")
    for result in on_ranks(2, jobs.follow, name, options, "fsdp"):
        assert distance([result[k] for k in alone], list(alone.values())) < LIMITS.get(case, 1e-6)


@pytest.mark.parametrize("case", ["AdamW", "Muon", "SOAP", "PSGDLRA"])
def test_ranks_agree_to_skip_a_step_for_what_one_of_them_sees(case):
    name, options = CASES[case]
    straight = on_ranks(2, jobs.skip_nonfinite, name, options, ())
    skipping = on_ranks(2, jobs.skip_nonfinite, name, options, (1, 3))
    for (expected, none), (result, skipped) in zip(straight, skipping, strict=True):
        assert (none, skipped) == (0, 2)
        assert all(torch.equal(result[k], t) for k, t in expected.items())


@pytest.mark.parametrize("case", ["Muon", "SOAP", "PSGDKron", "PSGDLRA", "TwoMatrixRules"])
def test_groups_on_two_ranks_follow_one_process(case):
    name, options = CASES[case]
    alone = jobs.follow(0, name, options, "alone", layerwise=True)
    usual = jobs.follow(0, name, options, "alone")
    assert distance([usual[k] for k in alone], list(alone.values())) > 1e-3
    for result in on_ranks(2, jobs.follow, name, options, "fsdp", "cpu", True):
        assert distance([result[k] for k in alone], list(alone.values())) < LIMITS.get(case, 1e-6)


ROUNDED = [
    ("wide", "triton", "triton"),
    ("tall", "triton", "triton"),
    ("odd", "triton", "cpp"),
    ("wide", "cpp", "cpp"),
    ("odd", "cpp", "cpp"),
]


@pytest.mark.parametrize(("name", "backend", "second"), ROUNDED)
def test_a_shard_is_rounded_by_the_wholes_random_bits(name, backend, second):
    """Where the second rank's begins between four elements that draw together, another backend than Triton runs there."""
    alone, _ = jobs.rounded(0, "alone", "eager", (name,))
    results = on_ranks(2, jobs.rounded, "fsdp", backend, (name,))
    assert [ran for _, ran in results] == [{backend}, {second}]
    for result, _ in results:
        assert float((result[name] != alone[name]).float().mean()) < 1e-2  # other bits round a half of them otherwise


RESUMED = (
    "AdamW-ecc", "AdamW-8bit", "SOAP-8bit", "SOAP", "SOAP-regions", "SOAP-staggered", "PSGDKron", "PSGDLRA", "PSGDLRA-alone",
    "SFAdamW", "TwoMatrixRules", "LDoG", "DoG", "rows", "derived", "draws", "draws-ecc",
)  # fmt: skip


@pytest.mark.parametrize("case", seldom(RESUMED, "AdamW-ecc", "SOAP", "PSGDLRA", "LDoG", "draws"))
def test_a_state_dict_on_two_ranks_resumes_exactly(case):
    name, options = CASES[case]
    for straight, resumed, keys in on_ranks(2, jobs.resume, name, options):
        assert all(torch.equal(resumed[k], straight[k]) for k in straight)
        assert keys > 0


SAVED = ("AdamW", "AdamW-8bit", "Muon", "SOAP", "SOAP-8bit", "PSGDKron", "PSGDLRA", "LDoG", "rows", "derived", "draws")


@pytest.mark.parametrize("case", seldom(SAVED, "AdamW-8bit", "SOAP", "PSGDLRA"))
def test_what_two_ranks_saved_loads_on_one_and_three(case, tmp_path):
    name, options = CASES[case]
    [trained, _] = on_ranks(2, jobs.save, str(tmp_path), name, options, "odd")
    for ranks in (1, 3):
        for result in on_ranks(ranks, jobs.load, str(tmp_path), name, options, "fsdp"):
            assert distance([result[k] for k in trained], list(trained.values())) < 1e-6


@pytest.mark.parametrize("case", ["AdamW", "SOAP", "PSGDKron", "PSGDLRA", "draws"])
def test_ranks_of_ddp_stay_equal_bit_for_bit(case):
    name, options = CASES[case]
    first, second = on_ranks(2, jobs.ddp, name, options)
    assert first == second


def test_param_ecc_before_the_wrapper_averages_gradients():
    one, other = on_ranks(2, jobs.param_ecc_under_ddp, "optimizer")
    assert one[1][0].flatten().tolist() == [12.0] * 8 and one[1][1].tolist() == [1.0] * 2
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def test_param_ecc_after_the_wrapper_is_refused_and_nothing_is_narrowed():
    for said, params in on_ranks(2, jobs.param_ecc_under_ddp, "wrapper"):
        assert "Make the optimizer first, then wrap the model" in said
        assert {p.dtype for p in params} == {torch.float32}


@pytest.mark.parametrize("case", ["AdamW", "AdamW-8bit-triton", "Muon"])
def test_norms_of_sharded_parameters_are_those_of_the_whole(case):
    name, options = CASES[case]
    alone = jobs.norms(0, name, options, "alone")
    assert alone.keys() == jobs.SHAPES.keys()
    for result in on_ranks(2, jobs.norms, name, options, "fsdp"):
        assert result.keys() == alone.keys()
        for key, pair in alone.items():
            assert result[key] == pytest.approx(pair, rel=1e-5)


def test_sharded_state_is_not_offloaded():
    for said in on_ranks(2, jobs.offloaded):
        assert "is sharded, which offload='cpu' does not support; shard the model with fully_shard(" in said
