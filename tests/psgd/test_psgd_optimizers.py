"""The classes of the PSGD family: names, defaults, and what they refuse."""

from __future__ import annotations

import inspect

import pytest
import torch

import hb_psgd
import hbcore
from hb_psgd import LATHER, PSGDPRO, QSGD, PSGDKron
from hb_psgd.psgd import FACTORS
from hb_psgd.rule import PreconditionByKron
from hbcore import registry
from hbcore.api import Domain
from hbcore.errors import HyperparameterError, OptionError

FLAGS = (
    "cached", "delayed", "exp_avg_input", "momentum_into_precond_update", "precond_grad_accum", "split", "store_triu_as_line",
)  # fmt: skip


class TestOptimizer:
    """The class, its names and what it refuses."""

    def test_it_is_a_matrix_rule_with_exact_factors(self):
        t = PreconditionByKron()
        assert t.domain == Domain.MATRIX
        slots = t.slots(torch.empty(6, 4))
        shapes = {"init_scale": (), "Q_0": (6, 6), "L_0": (), "Q_1": (4, 4), "L_1": (), "P_0": (6, 6), "P_1": (4, 4)}
        assert {n: tuple(s.shape) for n, s in slots.items()} == shapes
        assert all(s.exact for s in slots.values())
        assert set(PreconditionByKron(cached=False).slots(torch.empty(6, 4))) == {n for n in shapes if n[0] != "P"}
        assert set(PreconditionByKron(precond_grad_accum=True).slots(torch.empty(6, 4))) == {*shapes, "grad_mean", "grad_count"}
        assert {n for n in PreconditionByKron().slots(torch.empty(9)) if n[0] == "P"} == set()
        assert {n for n in PreconditionByKron().slots(torch.empty(20, 4)) if n[0] == "P"} == {"P_1"}  # the other is too large

    def test_names_and_defaults(self):
        shown = inspect.signature(PSGDKron).parameters
        defaults = {
            "lr": 0.001, "beta": 0.9, "update_clipping": "trust_region_clip_", "precond_lr": 0.1, "max_size_triangular": 2048,
            "min_ndim_triangular": 2, "memory_save_mode": None, "momentum_into_precond_update": True, "exp_avg_input": True,
            "delayed": False, "merge_dims": False, "lower_bound_beta": 0.9, "dampening": 1e-9, "weight_decay": 0.0,
            "precond_update_power_iterations": 2, "precond_init_scale": None, "precond_init_scale_scale": 1.0,
            "precond_init_scale_power": None, "preconditioner_update_probability": None,
        }  # fmt: skip
        assert {n: shown[n].default for n in defaults} == defaults
        group = PSGDKron([torch.nn.Parameter(torch.zeros(2))]).param_groups[0]
        assert {n: group[n] for n in FACTORS} == {n: shown[n].default for n in FACTORS}

    def test_betas_is_another_spelling(self):
        params = [torch.nn.Parameter(torch.zeros(2))]
        assert PSGDKron(params, betas=(0.5, 0.999)).param_groups[0]["beta"] == 0.5
        assert PSGDKron(params, beta=0.7).param_groups[0]["beta"] == 0.7
        assert PSGDKron(params, beta=None).param_groups[0]["beta"] == 0.9
        assert LATHER(params, beta=0.7).param_groups[0]["betas"] == (0.7, 0.999)

    @pytest.mark.parametrize(
        ("options", "error", "said"),
        [
            ({"memory_save_mode": "none"}, OptionError, "memory_save_mode='none' is not one of None, 'one_diag'"),
            ({"hvp_interval": 0}, HyperparameterError, "hvp_interval=0 is not a whole number from 1 on"),
            ({"hessian_approx": "exact"}, OptionError, "hessian_approx='exact' is neither True nor False"),
            ({"finite_differences": 1e-3}, OptionError, r"finite_differences=0\.001 is neither True nor False"),
            ({"precond_lr": 1.5}, HyperparameterError, r"precond_lr=1\.5 .*\[0, 1\]"),
            ({"beta": 1.0}, HyperparameterError, r"beta=1\.0 .*\[0, 1\)"),
            ({"dampening": -1}, HyperparameterError, r"dampening=-1 .*\[0, inf\)"),
            ({"lower_bound_beta": 1}, HyperparameterError, r"lower_bound_beta=1 .*\[0, 1\)"),
            ({"precond_init_scale": 0.0}, HyperparameterError, r"precond_init_scale=0\.0"),
            ({"precond_init_scale_scale": 0.0}, HyperparameterError, r"precond_init_scale_scale=0\.0 .*\(0, inf\)"),
            (
                {"precond_update_power_iterations": 0},
                HyperparameterError,
                "precond_update_power_iterations=0 is not a whole number from 1 on",
            ),
            ({"precond_update_power_iterations": "2"}, HyperparameterError, "precond_update_power_iterations='2'"),
            ({"precond_update_power_iterations": 1.5}, HyperparameterError, "precond_update_power_iterations=1.5"),
            ({"max_size_triangular": -1}, HyperparameterError, "max_size_triangular=-1 is not a whole number from 0 on"),
            ({"betas": ()}, HyperparameterError, r"betas=\(\) has no number"),
            ({"betas": 0.9}, HyperparameterError, r"betas=0\.9 has no number"),
            ({"precond_rule": "pros"}, OptionError, "precond_rule='pros' does not exist; pass one of 'pro', 'quad', 'eq'"),
            ({"q_dtype": "float16"}, OptionError, "q_dtype='float16' is not supported; pass one of 'float32', 'bfloat16'"),
            *(({flag: 1}, OptionError, f"{flag}=1 is neither True nor False") for flag in FLAGS),
        ],
        ids=str,
    )
    def test_values_out_of_range_are_refused(self, options, error, said):
        with pytest.raises(error, match=said):
            PSGDKron([torch.nn.Parameter(torch.zeros(2))], **options)

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_old_names_resolve_to_their_presets(self):
        assert hbcore.get("hb_psgd:PSGDKron") is hbcore.get("psgd-kron") is hb_psgd.PSGDKron is PSGDKron
        for name in ("ForeachPSGDKron", "ForeachCachedPSGDKron", "CachedPSGDKron"):
            assert hbcore.get(name) is PSGDKron
        presets = {
            "exp_avg_input": ("ForeachPurePSGD", "PurePSGD"),
            "delayed": ("ForeachDelayedPSGD", "DelayedPSGD", "ForeachCachedDelayedPSGDKron", "CachedDelayedPSGDKron"),
        }
        for option, names in presets.items():
            for name in names:
                group = hbcore.create(name, [torch.nn.Parameter(torch.zeros(2))]).param_groups[0]
                assert group[option] is (option == "delayed")
        assert {a for names in presets.values() for a in names} < set(registry.info("PSGDKron").aliases)

    def test_the_others_are_psgdkron_with_other_settings(self):
        params = [torch.nn.Parameter(torch.zeros(3, 2))]
        of = {cls: inspect.signature(cls).parameters for cls in (PSGDKron, PSGDPRO, QSGD, LATHER)}
        for cls in (PSGDPRO, QSGD):
            other = {n: p.default for n, p in of[cls].items() if p.default != of[PSGDKron][n].default}
            assert other == {"update_clipping": None, "store_triu_as_line": False, "precond_rule": "pro"}
            assert cls(params).settings.clips == ()
        shown = {n: of[LATHER][n].default for n in ("lr", "betas", "eps", "weight_decay", "update_clipping", "precond_lr")}
        assert shown == {
            "lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "update_clipping": "trust_region_clip_",
            "precond_lr": 0.1,
        }  # fmt: skip
        assert set(of[PSGDKron]) - set(of[LATHER]) == {"exp_avg_input", "delayed", "cached"}

    @pytest.mark.parametrize("option", ["delayed", "cached", "exp_avg_input"])
    def test_lather_has_no_option_that_it_could_not_follow(self, option):
        with pytest.raises((OptionError, TypeError), match=option):
            LATHER([torch.nn.Parameter(torch.zeros(2))], **{option: False})
