"""Structural options of SOAP and PSGDKron that cannot be meant are refused when the optimizer is built, by name."""

from __future__ import annotations

import pytest
import torch
from core.kit import gradients, parameters, run

import hbcore
from hb_psgd import PSGDKron
from hb_soap import SOAP
from hbcore.errors import HyperparameterError

REFUSED = [
    (SOAP, {"precondition_frequency": 2.5}),
    (SOAP, {"precondition_frequency": 0}),
    (SOAP, {"precondition_frequency": True}),
    (SOAP, {"max_precond_dim": 1.5}),
    (SOAP, {"max_precond_dim": 0}),
    (SOAP, {"merge_dims": "x"}),
    (SOAP, {"merge_dims": 0}),
    (SOAP, {"precond_scheduler": None}),
    (SOAP, {"precond_scheduler": (1 / 3,)}),
    (SOAP, {"precond_scheduler": (1 / 3, float("nan"))}),
    (SOAP, {"precond_scheduler": "no"}),
    (PSGDKron, {"precond_update_power_iterations": 1.5}),
    (PSGDKron, {"precond_update_power_iterations": 0}),
    (PSGDKron, {"max_size_triangular": -1}),
    (PSGDKron, {"max_size_triangular": 10.5}),
    (PSGDKron, {"min_ndim_triangular": -1}),
    (PSGDKron, {"merge_dims": 0}),
    (PSGDKron, {"betas": ()}),
]


@pytest.mark.parametrize(("cls", "options"), REFUSED, ids=str)
def test_they_are_refused(cls, options):
    [name] = options
    with pytest.raises(HyperparameterError, match=f"{name}="):
        cls(parameters(((4, 3),)), **options)


@pytest.mark.parametrize("limit", [6, 24])
def test_soap_merges_dimensions_up_to_a_number_of_its_own(limit):
    p = torch.nn.Parameter(torch.randn(5, 4, 3, 2))
    optimizer = SOAP([p], lr=0.01, merge_dims=limit)
    run(optimizer, [p], gradients(2, ((5, 4, 3, 2),)))
    sizes = sorted(v.shape[0] for k, v in optimizer.state[p].items() if k.startswith("Q_"))
    assert sizes == {6: [4, 5, 6], 24: [5, 24]}[limit]


def test_whole_numbers_of_other_libraries_are_whole():
    np = pytest.importorskip("numpy")
    optimizer = hbcore.get("SOAP")(parameters(((4, 3),)), precondition_frequency=np.int64(3))
    assert optimizer.param_groups[0]["precondition_frequency"] == 3
