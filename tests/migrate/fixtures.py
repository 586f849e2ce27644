"""The frozen HeavyBall checkpoints, and the steps that continue them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from heavyball_fixtures import BEFORE, CASES, FOLDER, flat, step  # noqa: E402

from hbcore.migrate import files, sources, weights  # noqa: E402
from hbcore.migrate.apply import Migrated, migrate  # noqa: E402

VERSIONS = ("1.7.2", "2.3.1", "3.2.1")
ALL = [(version, name) for version in VERSIONS for name in CASES[version[0]]]
IN_FLOAT32 = {"ns_dtype": "float32", "method": "newton_schulz"}
"""Muon's iteration as HeavyBall's fixtures were made."""

UNTOLD = {"LaProp", "SignLaProp", "OrthoLaProp", "LaPropOrtho", "MuonLaProp"}
"""Names that HeavyBall 3's state does not tell."""


def load(version: str, name: str) -> dict[str, Any]:
    """A file's content."""
    content: dict[str, Any] = files.read(FOLDER / version / f"{name}.pt")
    return content


def options_of(version: str, name: str) -> dict[str, Any]:
    """What the optimizer is built with, to compare it with the path of a fixture."""
    case, options = CASES[version[0]][name], dict[str, Any](compile="eager")
    if "Muon" in name or name == "Scion":
        options |= IN_FLOAT32
    if (version, name) == ("1.7.2", "SOAP"):
        options["precondition_frequency"] = 1  # release 1 does not tell
    if case.frozen:
        options["preconditioner_update_probability"] = 0
    return options


def converted(version: str, name: str) -> tuple[dict[str, Any], Migrated]:
    """A file's content, and its optimizer converted as the command does it."""
    content = load(version, name)
    described = sources.recognise(content["optimizer"]).describe(content["optimizer"])
    to = name if described.name is None else None
    known = None if name == "MuonAdamW" else weights.arranged(content["model"], described.shapes, described.names)
    return content, migrate(content["optimizer"], to, options=options_of(version, name), weights=known)


def parameters(content: dict[str, Any]) -> list[nn.Parameter]:
    """The model of a file."""
    return [nn.Parameter(t.clone()) for t in content["model"].values()]


def distances(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], path: Tensor) -> list[float]:
    """How far each step's weights are from HeavyBall's, relative to how far those have moved."""
    start, found = flat(params), []
    for k, theirs in enumerate(path):
        step(optimizer, params, BEFORE + k)
        found.append(float((flat(params) - theirs).norm() / (theirs - start).norm()))
    return found


def unnamed(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Without parameters' names, so that it is matched by position."""
    groups = [{k: v for k, v in g.items() if k != "param_names"} for g in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}
