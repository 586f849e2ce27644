"""The hooks that a plugin's manifest may implement, and the version of that contract.

The entry point names the manifest, a light module that does not import torch::

    from hbcore.api import OptimizerSpec, hookimpl

    API = (1, 0)  # the contract version it was written for; read before any hook runs

    @hookimpl
    def hb_optimizers(api):
        return [OptimizerSpec("AdamW", "hb_adam.adamw:AdamW", "Adam with decoupled weight decay")]

A hook may take fewer arguments than its specification, so a minor version can add arguments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pluggy

from hbcore.registry.spec import Alias, CodecSpec, OptimizerSpec

PROJECT = "hbcore"
GROUP = "hbcore.plugins"  # the one entry-point group
API_VERSION = (1, 9)  # (major, minor): a new major version breaks manifests, a minor one only adds to the API

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class Api:
    """Passed to the hooks: the API version of this hbcore, and the name of the plugin's entry point."""

    version: tuple[int, int]
    plugin: str


@dataclass
class DoctorReport:
    """Findings of a plugin's ``hb_doctor``. Problems fail ``hbcore doctor --strict``; notes do not."""

    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a harmless observation: a missing GPU, a slower code path."""
        self.notes.append(text)

    def problem(self, text: str) -> None:
        """Add something that should work and does not."""
        self.problems.append(text)


# The bodies never run: a specification is a name, arguments and a docstring.


@hookspec
def hb_optimizers(api: Api) -> Iterable[OptimizerSpec]:  # type: ignore[empty-body]
    """The optimizers that the plugin provides."""


@hookspec
def hb_aliases(api: Api) -> Iterable[Alias]:  # type: ignore[empty-body]
    """Other names for the plugin's own optimizers or for those of another plugin."""


@hookspec
def hb_codecs(api: Api) -> Iterable[CodecSpec]:  # type: ignore[empty-body]
    """The storage codecs that the plugin provides."""


@hookspec
def hb_migrations(api: Api) -> Iterable[object]:  # type: ignore[empty-body]
    """Conversions of older checkpoints. Called only while a checkpoint is loaded, so it may import torch."""


@hookspec
def hb_doctor(report: DoctorReport) -> None:
    """Check the plugin's health and add findings to the report. Called only by ``hbcore doctor``."""


HOOK_NAMES = ("hb_optimizers", "hb_aliases", "hb_codecs", "hb_migrations", "hb_doctor")
