"""What the tests of trainers share: a model of a few hundred parameters, random tokens, and who is compared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "SFAdamW": {"lr": 0.01, "warmup_steps": 2},
    "MuonAdamW": {"lr": 0.01},
    "SOAP": {"lr": 0.01, "precondition_frequency": 2},
    "PSGDKron": {"lr": 0.01},
    "AdEMAMix": {"lr": 0.01, "ecc": "bf16+8"},
}
"""Names and options: elementwise, with two sets of weights, split by names, of matrices, random, compressed."""


def smoke(*names: str) -> list[Any]:
    """All of :data:`OPTIMIZERS`, for ``pytest.mark.parametrize``; in ``make test``, those named here."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.full) for name in OPTIMIZERS]


class Tokens(Dataset):
    """Random sequences, to be predicted from themselves."""

    def __init__(self, count: int = 32, length: int = 6, vocabulary: int = 24) -> None:
        generator = torch.Generator().manual_seed(7)
        self.rows = torch.randint(vocabulary, (count, length), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Llama of one layer; its dropout draws random numbers, whose state a resumed run has to restore too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
        attention_dropout=0.1,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).to(dtype)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """The names of the weights that are not equal bit for bit, or that only one side has."""
    names = sorted({*ours, *theirs})
    return [n for n in names if n not in ours or n not in theirs or not torch.equal(ours[n], theirs[n])]


def finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors)
