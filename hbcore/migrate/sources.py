"""The libraries whose checkpoints can be converted, in the order in which they are asked."""

from __future__ import annotations

from typing import Any

from hbcore.errors import CheckpointError
from hbcore.migrate.from_dion import DION
from hbcore.migrate.from_muon import MUON
from hbcore.migrate.from_pytorch_optimizer import PYTORCH_OPTIMIZER
from hbcore.migrate.from_schedulefree import SCHEDULEFREE
from hbcore.migrate.from_torch import TORCH
from hbcore.migrate.heavyball import HEAVYBALL
from hbcore.migrate.source import Source

SOURCES: tuple[Source, ...] = (HEAVYBALL, SCHEDULEFREE, DION, PYTORCH_OPTIMIZER, MUON, TORCH)
"""Those whose marks cannot be mistaken come first; torch's format, which others imitate, comes last."""


def recognise(state_dict: Any) -> Source:
    """The source that a state dict comes from.

    Raises:
        CheckpointError: none of :data:`SOURCES` recognises it.
    """
    for source in SOURCES:
        if source.recognises(state_dict):
            return source
    known = ", ".join(source.name for source in SOURCES)
    raise CheckpointError(f"no library's optimizer state is recognised in it; name its library with --from: {known}.")


def named(name: str) -> Source:
    """The source of this name.

    Raises:
        CheckpointError: there is none.
    """
    for source in SOURCES:
        if source.name == name:
            return source
    raise CheckpointError(
        f"{name!r} is no library that hbcore converts from; choose from {', '.join(s.name for s in SOURCES)}."
    )
