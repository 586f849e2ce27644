"""Compressed parameters and state learn what float32 does, in whole trainings; bfloat16 by itself does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hbcore
from hbcore.cli.compare.data import load_corpus, training_batches, validation_batches
from hbcore.cli.compare.model import GPTConfig, build_model
from hbcore.engine.graph.program import Program

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore::hbcore.errors.StateWarning"),  # of float16's range, and of parameters made narrow
]

STEPS = 2000
BLOCKS = any(field.name == "per_block" for field in dataclasses.fields(Program))
ENGINE = pytest.mark.skipif(not BLOCKS, reason="the engine does not store numbers once a block yet")

Batch = tuple[Tensor, Tensor]
Task = tuple[nn.Module, Iterator[Batch], list[Batch]]
"""A new model, training batches and held-out ones."""


def text() -> Task:
    """The byte-level GPT of ``hbcore compare``, smaller, on the standard library's source."""
    config = GPTConfig(dim=64, depth=2, heads=4, context=32)
    corpus = load_corpus(None, config.context)
    held_out = validation_batches(corpus.validation, config.context, 64)
    return build_model(config, 0), training_batches(corpus.train, config.context, 16, 0), held_out


def digits() -> Task:
    """Ten blurred 8 x 8 shapes under noise that no classifier sees through: new ones in every batch."""
    generator = torch.Generator().manual_seed(0)
    shapes = F.avg_pool2d(torch.randn(10, 1, 12, 12, generator=generator), 5, 1).flatten(1) * 2.5

    def batches(size: int) -> Iterator[Batch]:
        while True:
            labels = torch.randint(10, (size,), generator=generator)
            yield shapes[labels] + torch.randn(size, 64, generator=generator), labels

    held_out = [next(batches(4096))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))
    return model, batches(64), held_out


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy, in float32 of logits in the model's dtype."""
    x, labels = batch
    dtype = next(model.parameters()).dtype
    logits = model(x.to(dtype) if x.is_floating_point() else x)
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())


def trained(task: Callable[[], Task], dtype: torch.dtype, lr: float = 1e-3, **options: Any) -> float:
    """The held-out loss after :data:`STEPS` steps of AdamW, the learning rate falling to zero."""
    model, batches, held_out = task()
    model.to(dtype)
    optimizer = hbcore.get("AdamW")(model.parameters(), lr=lr, betas=(0.9, 0.99), compile="eager", **options)
    for step, batch in zip(range(STEPS), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / STEPS)
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        return sum(float(loss_of(model, batch)) for batch in held_out) / len(held_out)


TASKS = pytest.mark.parametrize("task", [text, digits], ids=lambda task: task.__name__)
_float32: dict[str, float] = {}


def excess(task: Callable[[], Task], loss: float) -> float:
    """By what share ``loss`` is above that of float32 parameters and state."""
    if task.__name__ not in _float32:
        _float32[task.__name__] = trained(task, torch.float32)
    return loss / _float32[task.__name__] - 1


FAITHFUL = [
    pytest.param(torch.float32, {"ecc": "bf16+8"}, id="state"),
    pytest.param(torch.bfloat16, {"ecc": "bf16+8", "param_ecc": "bf16+8"}, id="bf16+8"),
    pytest.param(torch.bfloat16, {"ecc": "bf16+16", "param_ecc": "bf16+16"}, id="bf16+16"),
    pytest.param(torch.float16, {"ecc": "bf16+8", "param_ecc": "fp16+8"}, id="fp16+8"),
    pytest.param(torch.float32, {"ecc": "int8"}, id="int8", marks=ENGINE),
    pytest.param(torch.bfloat16, {"ecc": "int8", "param_ecc": "bf16+8"}, id="int8-bf16+8", marks=ENGINE),
]


@TASKS
@pytest.mark.parametrize(("dtype", "options"), FAITHFUL)
def test_it_ends_within_a_hundredth_of_float32s_loss(task, dtype, options):
    assert excess(task, trained(task, dtype, **options)) <= 0.01


@TASKS
def test_bfloat16_by_itself_does_not(task):
    assert excess(task, trained(task, torch.bfloat16, storage_dtype="bfloat16")) > 0.01


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),
        (torch.bfloat16, {"param_ecc": "bf16+8"}),
        (torch.float16, {"param_ecc": "fp16+8"}),
        (torch.bfloat16, {"param_ecc": "bf16+16"}),
    ],
    ids=str,
)
def test_ten_thousand_weights_of_one_drift_right_under_stochastic_rounding(dtype, options):
    """1,000 updates of 1e-4, a fortieth of bfloat16's last bit below 1: the mean is 0.9, within 5% of the way."""
    p = nn.Parameter(torch.ones(10_000, dtype=dtype))
    options = {"stochastic_rounding": True, "seed": 1, "compile": "eager", **options}
    optimizer = hbcore.get("SGD")([p], lr=1e-4, momentum=0.0, **options)
    for _ in range(1000):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert abs(float(p.detach().double().mean()) - 0.9) < 0.05 * 0.1
    assert bool((p.detach().double() - 0.9).abs().max() < 0.15)


def test_to_nearest_they_do_not_move_at_all():
    p = nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    optimizer = hbcore.get("SGD")([p], lr=1e-4, momentum=0.0, compile="eager")
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones_like(p))
