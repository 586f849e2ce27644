"""Every state dict that was ever frozen loads, whole, into today's optimizer, which goes on as that version did.

``scripts/freeze_state.py`` writes the files: once for each API version, never again.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from core.kit import distance
from torch import nn

import hbcore
from hbcore.errors import HbcoreWarning

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("freeze_state", ROOT / "scripts" / "freeze_state.py")
frozen = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(frozen)

FILES = sorted(frozen.ROOT.glob("api-*/*.pt"))
OLDER = sorted(frozen.ROOT.glob("*.pt"))
"""From before there was a folder for each version: without names, options or gradients."""
OLDER_OPTIONS = {"Muon": {"ns_dtype": "float32"}, "MuonAdamW": {"ns_dtype": "float32"}, "PSGDKron": {"precond_rule": "pro"}}

CHANGED = {name: {"decoupled_weight_decay": False} for name in ("SOAPNAdam", "HeavySOAPNAdam")}
"""Structural defaults that changed since, and that a checkpoint made with the old ones needs to be told."""

BOUND = 1e-5
"""How far weights may be from the frozen ones, relative to their norm. The state is loaded bit for bit; the steps after it are
not, because sums and matrix products round differently with the width of a machine's vectors and the version of its BLAS."""


def loaded(path: Path):
    """The content of a file, and today's optimizer with that state. Its own ``lr`` is another, which the file's replaces."""
    saved = torch.load(path, weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HbcoreWarning)
        optimizer, params = frozen.built(
            saved["name"], saved["params"], {**CHANGED.get(saved["name"], {}), **saved["options"], "lr": 0.5}
        )
    optimizer.load_state_dict(saved["optimizer"])
    return saved, optimizer, params


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_frozen_state_loads_bit_for_bit_and_goes_on_as_it_went(path):
    saved, optimizer, params = loaded(path)
    state = optimizer.state_dict()["state"]
    assert state.keys() == saved["optimizer"]["state"].keys()
    for key, entry in saved["optimizer"]["state"].items():
        torch.testing.assert_close(state[key], entry, rtol=0, atol=0, equal_nan=True)
    frozen.steps(saved["name"], optimizer, params, saved["gradients"])
    assert distance(params, saved["after"]) < BOUND
    assert distance(params, saved["params"]) > 100 * BOUND  # the steps do something


@pytest.mark.filterwarnings("ignore:MuonAdamW. the parameters have no names")
@pytest.mark.parametrize("path", OLDER, ids=lambda path: path.stem)
def test_an_older_frozen_state_loads_and_goes_on_as_it_went(path):
    saved = torch.load(path, weights_only=True)
    params = [nn.Parameter(p) for p in saved["params"]]
    name = path.stem.split("-")[0]
    optimizer = hbcore.get(name)(params, lr=0.5, compile="eager", **OLDER_OPTIONS.get(name, {}))
    optimizer.load_state_dict(saved["optimizer"])
    for step in range(6, 9):
        generator = torch.Generator().manual_seed(step)
        frozen.steps(name, optimizer, params, [[torch.randn(p.shape, generator=generator) for p in params]])
    assert distance(params, saved["after"]) < BOUND


def test_the_current_api_version_has_its_files():
    missing = sorted(set(frozen.files()) - {path.stem for path in frozen.folder().glob("*.pt")})
    command = "python scripts/freeze_state.py"
    assert not missing, (
        f"run `{command}`, and commit what it writes: {frozen.folder().name} has no state of {', '.join(missing)}"
    )
    assert len(OLDER) == 7


def test_the_files_are_small_and_plain():
    assert sum(path.stat().st_size for path in FILES) < 1_500_000
    assert max(path.stat().st_size for path in FILES) < 20_000
