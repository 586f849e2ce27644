"""Where this hbcore came from, and so where its plugins can be installed from: what ``pip install`` lines in messages say.

An index has the plugins of an hbcore that was installed from it. Who installed a checkout, a wheel of one or a repository has
them there, and perhaps nowhere else.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

HOME = Path(__file__).resolve().parents[2]
"""The folder that hbcore is imported from: a checkout, or an environment's packages."""


def pip_line(plugin: str, upgrade: bool = False) -> str:
    """The command that installs one of hbcore's own plugins; that works where this hbcore was installed."""
    return " ".join(["pip install", *(["--upgrade"] if upgrade else []), *arguments(plugin, HOME, recorded())])


def recorded() -> dict[str, Any]:
    """What pip noted of the origin (PEP 610); empty for an index, or if nothing is known."""
    try:
        noted = json.loads(distribution("hbcore").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError, OSError):
        return {}
    return noted if isinstance(noted, dict) and isinstance(noted.get("url"), str) else {}


def arguments(plugin: str, home: Path, noted: dict[str, Any]) -> list[str]:
    """What ``pip install`` is to be given.

    Args:
        plugin: the distribution's name.
        home: see :data:`HOME`.
        noted: see :func:`recorded`.
    """
    return next((words for words in _direct(plugin, home, noted) if words), [plugin])


def _direct(plugin: str, home: Path, noted: dict[str, Any]) -> Iterator[list[str]]:
    """Each source that has the plugin; an empty list where one has not."""
    yield _folder(home / "plugins" / plugin, editable=True)
    url = noted.get("url", "")
    if url.startswith("file:"):
        path = Path(url2pathname(urlsplit(url).path))
        yield _folder(path / "plugins" / plugin, editable=bool((noted.get("dir_info") or {}).get("editable")))
        if path.suffix == ".whl":
            yield [shlex.quote(str(wheel)) for wheel in sorted(path.parent.glob(f"{plugin}-*.whl"))[-1:]]
    elif version_control := noted.get("vcs_info"):
        at = f"{version_control.get('vcs', 'git')}+{url}@{version_control.get('commit_id', '')}".rstrip("@")
        yield [shlex.quote(f"{plugin} @ {at}#subdirectory=plugins/{plugin}")]


def _folder(folder: Path, editable: bool) -> list[str]:
    if not (folder / "pyproject.toml").is_file():
        return []
    return [*(["-e"] if editable else []), shlex.quote(str(folder))]
