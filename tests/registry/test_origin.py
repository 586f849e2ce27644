"""What messages say to install is there, wherever hbcore came from: a checkout, a wheel, a repository, an index."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from hbcore.errors import UnknownCodecError, UnknownOptimizerError
from hbcore.registry import hints, origin

ROOT = Path(__file__).resolve().parents[2]
RECORDED = origin.recorded  # the fixture of this folder replaces it
PLUGINS = [*hints.FAMILIES, *hints.CODECS]


def a_checkout(folder: Path) -> Path:
    for plugin in PLUGINS:
        (folder / "plugins" / plugin).mkdir(parents=True)
        (folder / "plugins" / plugin / "pyproject.toml").write_text("")
    return folder


def wheels(folder: Path, *versions: str) -> Path:
    folder.mkdir(parents=True)
    for version in versions:
        for name in ("hbcore", *PLUGINS):
            (folder / f"{name}-{version}-py3-none-any.whl").write_text("")
    return folder / f"hbcore-{versions[-1]}-py3-none-any.whl"


def noted(path: Path, **more: Any) -> dict[str, Any]:
    return {"url": path.as_uri(), **more}


def imported_from_a_checkout(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    home = a_checkout(folder / "here")
    return home, {}, ["-e", str(home / "plugins/hb_soap")]


def editable(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    checkout = a_checkout(folder / "a b")
    return folder, noted(checkout, dir_info={"editable": True}), ["-e", str(checkout / "plugins/hb_soap")]


def copied_from_a_checkout(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    checkout = a_checkout(folder / "it's here")
    return folder, noted(checkout, dir_info={}), [str(checkout / "plugins/hb_soap")]


def a_checkout_that_is_gone(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    return folder, noted(folder / "gone", dir_info={}), ["hb_soap"]


def a_wheel_beside_others(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    wheel = wheels(folder / "dist", "0.1.0", "0.2.0")
    return folder, noted(wheel, archive_info={}), [str(wheel.with_name("hb_soap-0.2.0-py3-none-any.whl"))]


def a_wheel_alone(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    return folder, noted(folder / "hbcore-0.1.0-py3-none-any.whl", archive_info={}), ["hb_soap"]


def a_repository(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    info = {"url": "https://host.test/hb/hbcore.git", "vcs_info": {"vcs": "git", "commit_id": "abc123"}}
    return folder, info, ["hb_soap @ git+https://host.test/hb/hbcore.git@abc123#subdirectory=plugins/hb_soap"]


def an_index(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    return folder, {}, ["hb_soap"]


CASES = (
    *(imported_from_a_checkout, editable, copied_from_a_checkout, a_checkout_that_is_gone),
    *(a_wheel_beside_others, a_wheel_alone, a_repository, an_index),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_line_installs_what_there_is(case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is one that a shell reads so, in every message."""
    home, found, expected = case(tmp_path)
    monkeypatch.setattr(origin, "HOME", home)
    monkeypatch.setattr(origin, "recorded", lambda: found)
    assert shlex.split(origin.pip_line("hb_soap")) == ["pip", "install", *expected]
    assert shlex.split(origin.pip_line("hb_soap", upgrade=True)) == ["pip", "install", "--upgrade", *expected]


def unknown(site: Any, name: str) -> str:
    with pytest.raises(UnknownOptimizerError) as caught:
        site.registry().get(name)
    return str(caught.value)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_message_has_that_line(case: Any, site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, found, _ = case(tmp_path / "origin")
    monkeypatch.setattr(origin, "HOME", home)
    monkeypatch.setattr(origin, "recorded", lambda: found)
    site.offer("hb_x", "Base")
    line, newer = origin.pip_line("hb_soap"), origin.pip_line("hb_soap", upgrade=True)
    assert f"SOAP comes with hb_soap: {line}. " in unknown(site, "SOAP")
    assert f"SOAP ({line})" in unknown(site, "SOAQ")
    assert origin.pip_line("hb_psgd") in unknown(site, "ForeachPSGD")
    with pytest.raises(UnknownCodecError, match=re.escape(origin.pip_line("hb_ecc"))):
        site.registry().load_codec("int8")
    site.offer("hb_soap", "Older")
    assert f": {newer}. " in unknown(site, "SOAP")


@pytest.mark.parametrize("text", [None, "", "{", "[]", "3", '{"url": 3}', '{"dir_info": {}}'])
def test_a_record_that_says_nothing_is_none(text: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Distribution:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return text

    monkeypatch.setattr(origin, "distribution", lambda name: Distribution())
    assert RECORDED() == {}


def test_an_hbcore_that_pip_does_not_know_has_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise origin.PackageNotFoundError(name)

    monkeypatch.setattr(origin, "distribution", missing)
    assert RECORDED() == {}


def test_one_place_decides_what_a_message_says() -> None:
    """An extra of hbcore is installed by its name wherever hbcore came from, since hbcore is there; other packages too."""
    allowed = {
        "registry/origin.py": "",
        "cli/compare/progress.py": "PIP_LINE = 'pip install \"hbcore[cli]\"'",
        "cli/tune/__init__.py": 'pip install "hbcore[tune]"',
        "cli/tune/command.py": 'pip install "hbcore[tune]"',
        "cli/tune/samplers.py": "pip install optunahub",
    }
    found = {path.relative_to(ROOT / "hbcore").as_posix(): path.read_text() for path in (ROOT / "hbcore").rglob("*.py")}
    said = {path for path, text in found.items() if "pip install" in text}
    assert said - {"cli/new_plugin.py"} == allowed.keys()
    assert all(line in found[path] for path, line in allowed.items())
