"""Sets of parameter shapes: known models, synthetic sets, and any importable model. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from hbcore.errors import OptionError

Shape = tuple[int, ...]


def _gpt2_hidden() -> list[Shape]:
    """The four matrices of a GPT-2 block, twelve times."""
    return [(768, 2304), (768, 768), (768, 3072), (3072, 768)] * 12


def _gpt2() -> list[Shape]:
    """GPT-2 124M: 148 tensors, most of them vectors of 768."""
    norm: list[Shape] = [(768,), (768,)]
    attention: list[Shape] = [(768, 2304), (2304,), (768, 768), (768,)]
    mlp: list[Shape] = [(768, 3072), (3072,), (3072, 768), (768,)]
    return [(50257, 768), (1024, 768), *(norm + attention + norm + mlp) * 12, *norm]


def _qwen_hidden() -> list[Shape]:
    """The seven matrices of a Qwen2.5-0.5B block, 24 times."""
    return [(896, 896), (128, 896), (128, 896), (896, 896), (4864, 896), (4864, 896), (896, 4864)] * 24


def _qwen() -> list[Shape]:
    """Qwen2.5-0.5B, embeddings tied: 290 tensors."""
    attention: list[Shape] = [(896, 896), (896,), (128, 896), (128,), (128, 896), (128,), (896, 896)]
    mlp: list[Shape] = [(4864, 896), (4864, 896), (896, 4864)]
    return [(151936, 896), *(attention + mlp + [(896,), (896,)]) * 24, (896,)]


def _vit_b() -> list[Shape]:
    """ViT-B/16 for 224 x 224 images: 152 tensors."""
    norm: list[Shape] = [(768,), (768,)]
    attention: list[Shape] = [(2304, 768), (2304,), (768, 768), (768,)]
    mlp: list[Shape] = [(3072, 768), (3072,), (768, 3072), (768,)]
    stem: list[Shape] = [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,)]
    return [*stem, *(norm + attention + norm + mlp) * 12, *norm, (1000, 768), (1000,)]


def _resnet50() -> list[Shape]:
    """ResNet-50: 161 tensors, each convolution followed by the two vectors of its batch norm."""
    convolutions: list[Shape] = [(64, 3, 7, 7)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, channels, 1, 1))  # the shortcut of a block that changes the width
            channels = 4 * width
    normed = [shape for conv in convolutions for shape in (conv, (conv[0],), (conv[0],))]
    return [*normed, (1000, 2048), (1000,)]


SETS: Mapping[str, Callable[[], list[Shape]]] = {
    "square": lambda: [(2048, 2048)] * 32,
    "sq8": lambda: [(1024, 1024)] * 8,
    "tiny": lambda: [(256,)] * 2000,
    "gpt2": _gpt2,
    "gpt2_2d": _gpt2_hidden,
    "qwen": _qwen,
    "qwen2d": _qwen_hidden,
    "vit_b": _vit_b,
    "resnet50": _resnet50,
}
"""Name -> shapes. ``gpt2_2d`` and ``qwen2d`` contain only the hidden matrices, for rules that accept nothing else."""


def count(shapes: Sequence[Shape]) -> int:
    """Number of parameters (scalars) in the shapes."""
    return sum(map(math.prod, shapes))


VOCABULARY = 20_000
"""A matrix with at least this many rows is considered a token embedding."""


def names_of(shapes: Sequence[Shape]) -> list[str]:
    """Names for parameters of these shapes, for rules that route by name: ``embed.0``, ``layer.1``, ..."""
    return [f"{'embed' if len(s) == 2 and s[0] >= VOCABULARY else 'layer'}.{i}" for i, s in enumerate(shapes)]


def shapes_of(name: str) -> list[Shape]:
    """The shapes of a set, or of the model returned by ``module:factory``.

    Raises:
        OptionError: the set is unknown, or the factory does not return a model.
    """
    if name in SETS:
        return SETS[name]()
    if ":" in name:
        return _of_model(name)
    raise OptionError(f"--shapes: no set is named {name!r}; choose from {', '.join(SETS)}, or use --model MODULE:FACTORY")


def _of_model(target: str) -> list[Shape]:
    module, _, factory = target.partition(":")
    try:
        model: Any = getattr(import_module(module), factory)()
    except Exception as error:  # the user's code may raise anything
        raise OptionError(f"--model {target}: {type(error).__name__}: {error}") from error
    try:
        shapes = [tuple(p.shape) for p in model.parameters() if p.requires_grad]
    except AttributeError as error:
        raise OptionError(f"--model {target}: returned a {type(model).__name__}, not an nn.Module") from error
    if not shapes:
        raise OptionError(f"--model {target}: the model has no parameters that require a gradient")
    return shapes
