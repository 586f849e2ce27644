"""The hooks a plugin's manifest may implement, and the version of the contract.

A manifest is a light module (no torch) that the entry point names::

    from hbcore.api import OptimizerSpec, hookimpl

    API = (1, 0)  # the contract it was written for, as data: read before any of its hooks runs

    @hookimpl
    def hb_optimizers(api):
        return [OptimizerSpec("AdamW", "hb_adam.adamw:AdamW", "Adam with decoupled weight decay")]

A hook implementation may take fewer arguments than its specification; that is how a minor version can add arguments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pluggy

from hbcore.registry.spec import Alias, CodecSpec, OptimizerSpec

PROJECT = "hbcore"
GROUP = "hbcore.plugins"  # the one entry-point group
API_VERSION = (1, 3)  # (major, minor): a major breaks manifests, a minor adds to what they may use

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class Api:
    """What a hook is told about its host: the contract's version and the plugin's own entry name."""

    version: tuple[int, int]
    plugin: str


@dataclass
class DoctorReport:
    """What a plugin's ``hb_doctor`` writes into. A problem fails ``hbcore doctor --strict``; a note does not."""

    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a line that is worth reading and breaks nothing: a missing GPU, a slower path in use."""
        self.notes.append(text)

    def problem(self, text: str) -> None:
        """Add a line about something that does not work and should."""
        self.problems.append(text)


# The bodies never run: a specification is its name, its arguments and its docstring.


@hookspec
def hb_optimizers(api: Api) -> Iterable[OptimizerSpec]:  # type: ignore[empty-body]
    """The optimizers that the plugin provides."""


@hookspec
def hb_aliases(api: Api) -> Iterable[Alias]:  # type: ignore[empty-body]
    """Other names for optimizers, its own or those of another plugin."""


@hookspec
def hb_codecs(api: Api) -> Iterable[CodecSpec]:  # type: ignore[empty-body]
    """The storage codecs that the plugin provides."""


@hookspec
def hb_migrations(api: Api) -> Iterable[object]:  # type: ignore[empty-body]
    """Conversions of older checkpoints. Called only when a checkpoint is loaded, so it may import torch."""


@hookspec
def hb_doctor(report: DoctorReport) -> None:
    """Look at the plugin's own health and write into the report. Called by ``hbcore doctor`` alone."""


HOOK_NAMES = ("hb_optimizers", "hb_aliases", "hb_codecs", "hb_migrations", "hb_doctor")
