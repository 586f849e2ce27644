"""Freeze small checkpoints of a HeavyBall release, and where more steps of HeavyBall's own lead, to test migrations with.

    pip download --no-deps heavyball==1.7.2 && unzip heavyball-1.7.2-*.whl -d FOLDER
    python scripts/heavyball_fixtures.py FOLDER [NAME...]     writes tests/fixtures/heavyball/1.7.2/NAME.pt

FOLDER may be ``-``, for the installed release. A file has the model's weights and the optimizer's ``state_dict()`` after
:data:`BEFORE` steps, as HeavyBall's users save them, and ``path``, ``[steps, elements]``, the weights after each of the next
steps; :func:`gradient` gives the gradients. Compiling is off, and so is rounding at random, where no fixed seed reaches it.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Mapping
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent.parent / "tests" / "fixtures" / "heavyball"
SHAPES = ((4, 3), (5,), (2, 3, 2))
MATRICES = ((4, 3), (3, 3), (2, 3, 2))
BEFORE = 7
AFTER = 20
SHORT = 3


class Case(NamedTuple):
    """A checkpoint to make.

    Attributes:
        cls: the class in HeavyBall.
        options: its arguments.
        shapes: the parameters'.
        steps: how many steps ``path`` has.
        frozen: whether the preconditioner is left as it is from the checkpoint on: what it is fitted with is random.
    """

    cls: str
    options: Mapping[str, Any] = {}
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    steps: int = SHORT
    frozen: bool = False


EVERY = {"precondition_frequency": 1}
FROZEN: dict[str, Any] = {"steps": AFTER, "frozen": True}
DECAY = {"weight_decay": 0.1, "warmup_steps": 9}

CASES: dict[str, dict[str, Case]] = {
    "1": {
        name: Case(f"Foreach{name}", steps=AFTER)
        for name in ("AdamW", "LaProp", "RMSprop", "SFAdamW", "Muon", "ADOPT", "SignLaProp")
    }
    | {name: Case(name) for name in ("MuonLaProp", "OrthoLaProp", "LaPropOrtho")}
    | {
        "PaLMSFAdamW": Case("PaLMForeachSFAdamW"),
        "SOAP": Case("ForeachSOAP", {"merge_dims": False, **EVERY}),
        "PSGDKron": Case("ForeachPSGDKron", {"precond_init_scale": 0.5, "store_triu_as_line": False}, ((3, 3),), **FROZEN),
    },
    "2": {
        name: Case(f"Foreach{name}", steps=AFTER)
        for name in ("AdamW", "NAdam", "AdEMAMix", "LaProp", "RMSprop", "SFAdamW", "ADOPT", "AdamC")
    }
    | {name: Case(name) for name in ("UnscaledAdamW", "MSAMLaProp", "MuonLaProp", "SGD", "SUDSAdamW", "Scion")}
    | {
        "Muon": Case("ForeachMuon", {"heavyball_momentum": True}, MATRICES, AFTER),
        "SOAP": Case("ForeachSOAP", EVERY, steps=AFTER),
        "SOLP": Case("ForeachSOLP", EVERY),
        "PSGDKron": Case("ForeachPSGDKron", **FROZEN),
        "PSGDLRA": Case("ForeachPSGDLRA", **FROZEN),
        "PaLMSOAP": Case("PaLMForeachSOAP", EVERY),
    },
    "3": {
        name: Case(name, steps=AFTER)
        for name in ("SGD", "NAdam", "AdEMAMix", "UnscaledAdamW", "RMSprop", "ADOPT", "LaProp", "SignLaProp", "SFAdamW")
    }
    | {name: Case(name, EVERY, steps=AFTER) for name in ("SOAP", "SOLP", "SOAPAdEMAMix", "KLSOAP", "HeavySOAP")}
    | {name: Case(name, EVERY) for name in ("HeavySOLP", "HeavySOAPAdEMAMix", "HeavyKLSOAP")}
    | {name: Case(name, {**EVERY, "weight_decay": 0.0}) for name in ("SOAPNAdam", "HeavySOAPNAdam")}
    | {name: Case(name, EVERY, MATRICES, AFTER) for name in ("KLShampoo", "HeavyKLShampoo")}
    | {name: Case(name, **FROZEN) for name in ("PSGDKron", "PSGDPRO", "QSGD", "LATHER", "PSGDLRA")}
    | {name: Case(name, steps=AFTER) for name in ("SUDSAdamW", "MuonLaProp", "OrthoLaProp", "LaPropOrtho")}
    | {
        "AdamW": Case("AdamW", DECAY, steps=AFTER),
        "AdamC": Case("AdamC", {"max_lr": 0.0025}, steps=AFTER),
        "HyperBallAdamW": Case("HyperBallAdamW", steps=AFTER),
        "Scion": Case("Scion", steps=AFTER),
        "MSAMLaProp": Case("MSAMLaProp", {}, ((4, 3),), AFTER),
        "MuonAdamW": Case("MuonAdamW", {"nesterov": False}, steps=AFTER),
        "Muon": Case("Muon", {"heavyball_momentum": True}, MATRICES, AFTER),
        "MuonAverage": Case("Muon", {"nesterov": False}, MATRICES, AFTER),
        "AdamWEcc": Case("AdamW", {"ecc": "bf16+16"}),
        "AdamWPalm": Case("AdamW", {"palm": True}),
        "AdamWMars": Case("AdamW", {"mars": True}),
        "SOAPSplit": Case("SOAP", {"max_precond_dim": 3, "split": True, **EVERY}, ((7, 4), (5,)), AFTER),
    },
}
"""The release's first number -> the file's name -> what is in it."""


def start(shapes: tuple[tuple[int, ...], ...]) -> list[nn.Parameter]:
    """The parameters that training starts from."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradient(step: int, shapes: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    """The gradients of a step, counted from 0."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def flat(params: list[nn.Parameter]) -> Tensor:
    """A copy of all weights in one vector."""
    return torch.cat([p.detach().reshape(-1) for p in params])


def step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], k: int) -> None:
    """Take one step."""
    for p, g in zip(params, gradient(k, tuple(tuple(p.shape) for p in params)), strict=True):
        p.grad = g.clone()
    optimizer.step()


def freeze(package: Any, case: Case, file: Path) -> None:
    """Write one file."""
    torch.manual_seed(0)
    params = start(case.shapes)
    optimizer = getattr(package, case.cls)(params, **case.options)
    for k in range(BEFORE):
        step(optimizer, params, k)
    model = {f"weight.{i}": p.detach().clone() for i, p in enumerate(params)}
    saved = {"model": model, "optimizer": optimizer.state_dict(), "options": dict(case.options)}
    torch.save(saved, file)  # before more steps change what the state dict holds
    if case.frozen:
        optimizer.precond_schedule = 0.0
    path = []
    for k in range(BEFORE, BEFORE + case.steps):
        step(optimizer, params, k)
        path.append(flat(params))
    saved = torch.load(file, weights_only=False)  # HeavyBall 1 and 2 save classes, too
    torch.save({**saved, "path": torch.stack(path)}, file)


def release(folder: str) -> tuple[Any, str]:
    """The package in ``folder``, and its version."""
    if folder != "-":
        sys.path.insert(0, folder)
    heavyball = import_module("heavyball")

    if folder == "-":
        version = metadata.version("heavyball")
    else:
        [info] = Path(folder).glob("heavyball-*.dist-info")
        version = re.sub(r"heavyball-(.*)\.dist-info", r"\1", info.name)
    utils = heavyball.utils
    utils.compile_mode = None
    if hasattr(utils, "stochastic_round_"):
        utils.stochastic_round_ = lambda ref, source=None: ref if source is None else source.to(ref.dtype)
    if hasattr(utils, "scion_auto_init_param_"):
        utils.scion_auto_init_param_ = lambda param, scale, seed=0: None
    return heavyball, version


def main(folder: str, *names: str) -> None:
    """Write the files of one release."""
    warnings.simplefilter("ignore")
    torch._dynamo.config.disable = True  # here, and not where this is imported: tests do, and others of theirs compile
    package, version = release(folder)
    target = FOLDER / version
    target.mkdir(parents=True, exist_ok=True)
    for name, case in CASES[version[0]].items():
        if not names or name in names:
            freeze(package, case, target / f"{name}.pt")
            print(target / f"{name}.pt", (target / f"{name}.pt").stat().st_size)


if __name__ == "__main__":
    main(*sys.argv[1:])
