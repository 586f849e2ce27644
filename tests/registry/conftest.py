"""Plugins made up in a temporary folder: a package, and the dist-info that makes it count as installed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from hbcore.registry import Registry, origin
from hbcore.registry.discovery import installed

MANIFEST = """\
from hbcore.api import Alias, CodecSpec, OptimizerSpec, hookimpl
API = (1, 0)
"""


@pytest.fixture(autouse=True)
def from_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages read as if hbcore had been installed from an index; ``test_origin.py`` has the other cases."""
    monkeypatch.setattr(origin, "HOME", tmp_path)
    monkeypatch.setattr(origin, "recorded", dict)


class Site:
    """A folder of installed plugins, first on sys.path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.packages: set[str] = set()
        self._real: dict[str, ModuleType] = {}

    def install(self, name: str, manifest: str, version: str = "1.0", dist: str = "", **modules: str) -> None:
        """Write or overwrite package ``name``: its manifest (after the usual imports and API) and its modules."""
        package = self.path / name
        package.mkdir(exist_ok=True)
        removed = _forget({name})
        if name not in self.packages:  # a real plugin of that name, imported by an earlier test
            self._real |= removed
            self.packages.add(name)
        files = {"__init__": "", "plugin": MANIFEST + textwrap.dedent(manifest)} | modules
        for module, text in files.items():
            (package / f"{module}.py").write_text(textwrap.dedent(text))
        dist = dist or name
        info = self.path / f"{dist}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[hbcore.plugins]\n{name} = {name}.plugin\n")

    def offer(self, name: str, *optimizers: str, aliases: str = "[]", **keywords: str) -> None:
        """A working plugin whose optimizers live in its module ``rules``."""
        specs = ", ".join(f"OptimizerSpec('{o}', '{name}.rules:{o}', '{o} of {name}')" for o in optimizers)
        manifest = f"@hookimpl\ndef hb_optimizers(api): return [{specs}]\n@hookimpl\ndef hb_aliases(api): return {aliases}\n"
        code = "\n".join(
            f"class {o}:\n    def __init__(self, params, lr=0.1, flag=False, *, rank=None, **options):\n"
            "        self.seen = dict(params=params, lr=lr, flag=flag, rank=rank, **options)"
            for o in optimizers
        )
        self.install(name, manifest, **({"rules": code} | keywords))

    def close(self) -> None:
        """Later tests import the real plugins, and those that did so find the same modules and classes."""
        _forget(self.packages)
        sys.modules.update(self._real)

    def registry(self) -> Registry:
        """A registry that sees this folder and nothing else."""
        return Registry(partial(installed, [str(self.path)]))


def _forget(packages: set[str]) -> dict[str, ModuleType]:
    """Remove all modules of these packages from ``sys.modules``."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in packages}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for variable in ("HBCORE_STRICT", "HBCORE_PLUGINS", "HBCORE_DISABLE_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a repaired file of equal size and second is read again
    made = Site(tmp_path)
    yield made
    made.close()


@pytest.fixture
def run_python(site: Site) -> Callable[[str], str]:
    """Run code in a fresh interpreter that has the folder's plugins and no others; returns what it printed."""
    root = Path(__file__).resolve().parents[2]

    def run(code: str) -> str:
        environment = os.environ | {
            "PYTHONPATH": f"{site.path}{os.pathsep}{root}",
            "HBCORE_PLUGINS": ",".join(site.packages) or "none",
        }
        command = [sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run
