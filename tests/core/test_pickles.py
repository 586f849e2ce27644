"""Optimizers that version 0.1.0 pickled load, and train on as they would have: whole objects are what some trainers save.

The files were written by that version before the engine was rearranged; they are not to be written anew.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

FIXTURES = sorted((Path(__file__).parent.parent / "fixtures" / "pickles").glob("*.pt"))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_an_optimizer_pickled_by_0_1_0_trains_on(path):
    saved = torch.load(path, weights_only=True)
    model, optimizer = pickle.loads(saved["pickle"].numpy().tobytes())
    for t in range(3, 6):
        generator = torch.Generator().manual_seed(t)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    for p, after in zip(model.parameters(), saved["after"], strict=True):
        torch.testing.assert_close(p.detach(), after, rtol=1e-8, atol=1e-10)
