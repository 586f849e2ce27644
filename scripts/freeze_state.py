"""Freeze a small checkpoint of each optimizer, and where three more steps lead, for later versions to load.

    python scripts/freeze_state.py            writes what is missing, to tests/fixtures/state/api-1.8/ or the like
    python scripts/freeze_state.py Lion       writes that of Lion, if it is missing

Each file has the model's weights, the optimizer's state dict, the gradients of three more steps and the weights after them; and
the options that the optimizer was built with. A file is written once, before a release, and never again:
``tests/core/test_frozen_state.py`` loads all of them, and says which are missing. The files beside the folders are older.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hbcore
from hbcore import registry
from hbcore.api import API_VERSION

ROOT = Path(__file__).parent.parent / "tests" / "fixtures" / "state"
SHAPES = ((5, 6), (4,), (3, 2, 2))
BLOCKS = ((2, 64), (4,))
"""Shapes for codecs, some of which store 32 elements together."""
OPTIONS: dict[str, dict[str, Any]] = {
    "AdamC": {"max_lr": 0.01},
    **{name: {"ns_dtype": "float32"} for name in ("Muon", "MuonAdamW", "MuonLaProp")},
}


def folder() -> Path:
    """The folder of the current API version."""
    return ROOT / f"api-{'.'.join(map(str, API_VERSION))}"


def files() -> dict[str, tuple[str, dict[str, Any], Sequence[tuple[int, ...]]]]:
    """The files of a version: the name of each -> the optimizer, its options, and the parameters' shapes."""
    plugins = [plugin for plugin in registry.plugins() if plugin.built_in]
    names = [spec.name for plugin in plugins for spec in plugin.optimizers]
    codecs = [codec.name for plugin in plugins for codec in plugin.codecs]
    plain: dict[str, Any] = {name: (name, OPTIONS.get(name, {}), SHAPES) for name in names}
    chosen: dict[str, Any] = {codec: {"exp_avg_sq": codec} if codec == "uint8" else codec for codec in codecs}  # no signs
    return plain | {f"AdamW-{codec}": ("AdamW", {"ecc": ecc}, BLOCKS) for codec, ecc in chosen.items()}


def built(name: str, weights: Sequence[Tensor], options: dict[str, Any]) -> tuple[Any, list[nn.Parameter]]:
    """An optimizer of named parameters that have these values."""
    params = [nn.Parameter(w.clone()) for w in weights]
    named = [(f"layer{i}.weight", p) for i, p in enumerate(params)]
    optimizer = hbcore.get(name)(named, compile="eager", **options)
    return optimizer, params


def steps(name: str, optimizer: Any, params: list[nn.Parameter], gradients: Sequence[Sequence[Tensor]]) -> None:
    """A step with each of the gradients."""
    capabilities = registry.info(name).spec.capabilities
    for given in gradients:
        closure = partial(_differentiate, params, given, "sparse" in capabilities, "closure" in capabilities)
        if "closure" in capabilities:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def freeze(name: str, options: dict[str, Any], shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """The content of a file."""
    generator = torch.Generator().manual_seed(0)
    drawn = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(9)]
    optimizer, params = built(name, drawn[0], {"lr": 0.01, **options})
    steps(name, optimizer, params, drawn[1:6])
    content = {"params": values(params), "optimizer": copy.deepcopy(optimizer.state_dict())}
    steps(name, optimizer, params, drawn[6:])
    return {**content, "name": name, "options": options, "gradients": drawn[6:], "after": values(params)}


def values(params: list[nn.Parameter]) -> list[Tensor]:
    """Copies of the parameters."""
    return [p.detach().clone() for p in params]


def _differentiate(params: list[nn.Parameter], given: Sequence[Tensor], sparse: bool, anew: bool) -> Tensor:
    """Give each parameter its gradient; to an optimizer that evaluates the model anew, one that depends on where it is."""
    for p, g in zip(params, given, strict=True):
        gradient = g + p.detach() if anew else g.clone()
        p.grad = gradient.to_sparse(min(p.ndim, 1)) if sparse else gradient
    return torch.zeros(())


if __name__ == "__main__":
    folder().mkdir(parents=True, exist_ok=True)
    wanted = files()
    if unknown := sorted(set(sys.argv[1:]) - set(wanted)):
        sys.exit(f"there is no file of {', '.join(unknown)}; choose from {', '.join(wanted)}")
    warnings.simplefilter("ignore", hbcore.HbcoreWarning)
    for file, arguments in wanted.items():
        path = folder() / f"{file}.pt"
        if not path.exists() and (not sys.argv[1:] or file in sys.argv[1:]):
            torch.save(freeze(*arguments), path)
            print(path)
