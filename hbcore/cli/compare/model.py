"""A byte-level GPT: small enough for two CPU cores, complete enough to compare optimizers fairly.

It has every kind of parameter that optimizers treat differently: embeddings, square and oblong matrices, biases, norm scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # one token per byte value
EMBEDDING_STD = 0.2  # ten times GPT-2's: 300 steps are too few to grow from 0.02 (final loss 2.3 instead of 2.0)
MATRIX_STD = 0.02


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a model: ``dim`` features, ``depth`` blocks, ``heads`` per block, ``context`` bytes per sequence."""

    dim: int
    depth: int
    heads: int
    context: int


# "nano" trains for 300 steps in about 12 seconds on two cores; "medium" needs a GPU. The wider models need lower
# learning rates than nano: AdamW's 0.0025 is too high for medium.
SIZES = {
    "nano": GPTConfig(dim=128, depth=2, heads=4, context=64),
    "small": GPTConfig(dim=256, depth=4, heads=8, context=128),
    "medium": GPTConfig(dim=512, depth=8, heads=8, context=256),
}


class Attention(nn.Module):
    """Causal self-attention, ``[batch, time, dim]`` -> ``[batch, time, dim]``."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, dim = x.shape
        heads = self.qkv(x).view(batch, time, 3, self.heads, dim // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [batch, heads, time, dim / heads]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, dim))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a two-layer perceptron, each added to its input."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.dim)
        self.up = nn.Linear(config.dim, 4 * config.dim)
        self.down = nn.Linear(4 * config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Bytes ``[batch, time]`` (int64, ``time <= context``) -> next-byte logits ``[batch, time, 256]``."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, config.dim)
        self.position_embedding = nn.Embedding(config.context, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, VOCABULARY, bias=False)
        self.apply(_initialise)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte, a 0-d tensor. Guessing gives ``log(256) = 5.55``."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=EMBEDDING_STD)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=MATRIX_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build_model(config: GPTConfig, seed: int) -> GPT:
    """A newly initialised model on the CPU, determined by ``seed``. Does not change the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT(config)
