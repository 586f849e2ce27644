"""scripts/set_version.py: one place decides the version, and every other one agrees or is named."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from hbcore._version import __version__
from hbcore.cli.new_plugin import requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PLACES = (
    "hbcore/_version.py",
    "pyproject.toml",
    "plugins/*/pyproject.toml",
    "plugins/*/src/*/__init__.py",
    "examples/*/pyproject.toml",
)


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("set_version", ROOT / "scripts" / "set_version.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the files that state versions or ranges."""
    for path in (path for place in PLACES for path in ROOT.glob(place)):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return tmp_path


def project(path: Path) -> dict:
    return tomllib.loads(path.read_text())["project"]


def test_every_place_agrees_with_the_one_that_decides(script: ModuleType) -> None:
    assert script.main([]) == 0 and script.current() == __version__


@pytest.mark.parametrize(("version", "allowed"), [("0.2.0", "<0.3,>=0.2"), ("0.1.7", "<0.2,>=0.1"), ("1.4.0rc1", "<2,>=1.4")])
def test_it_sets_every_version_and_range(version: str, allowed: str, script: ModuleType, tree: Path) -> None:
    assert script.main([version], tree) == 0 and script.main([], tree) == 0
    assert f'__version__ = "{version}"' in (tree / "hbcore" / "_version.py").read_text()
    own = {"hbcore", *script.PLUGINS}
    for path in tree.rglob("pyproject.toml"):
        about = project(path)
        stays = path.parent.parent.name == "examples"  # a third party's
        assert about["version"] == ("0.1.0" if stays else version)
        extras = about.get("optional-dependencies", {}).values()
        stated = [*about["dependencies"], *(requirement for extra in extras for requirement in extra)]
        ranges = {r.name: str(r.specifier) for r in map(Requirement, stated) if r.name in own and not r.extras}
        assert set(ranges.values()) == {allowed}, (path, ranges)
    assert {r.name for r in map(Requirement, project(tree / "pyproject.toml")["optional-dependencies"]["all"])} == {
        *script.PLUGINS
    }


VERSION = f'"{__version__}"'
RANGE = requirement(__version__).removeprefix("hbcore")


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("plugins/hb_soap/pyproject.toml", f"version = {VERSION}", 'version = "9.9.9"'),
        ("plugins/hb_ecc/src/hb_ecc/__init__.py", VERSION, '"0.0.9"'),
        ("plugins/hb_adam/pyproject.toml", f"hbcore{RANGE}", "hbcore>=0.1"),
        ("pyproject.toml", f'"hb_muon{RANGE}"', '"hb_muon>=0.0,<9"'),
        ("examples/hb_normuon/pyproject.toml", f'"hb_muon{RANGE}"', '"hb_muon==0.1"'),
    ],
)
def test_a_place_that_disagrees_is_named(
    path: str, old: str, new: str, script: ModuleType, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tree / path).read_text()
    assert old in before
    (tree / path).write_text(before.replace(old, new))
    assert script.main([], tree) == 1
    assert re.search(rf" in {re.escape(path)}\n$", capsys.readouterr().err)


@pytest.mark.parametrize(("tag", "status"), [(f"v{__version__}", 0), (__version__, 1), ("v9.9.9", 1), ("", 1)])
def test_a_tag_must_be_the_versions(tag: str, status: int, script: ModuleType) -> None:
    assert script.main(["--tag", tag]) == status


@pytest.mark.parametrize("version", ["2", "1.0", "v1.0.0", "1.0.0; rm", "1.0.0 "])
def test_what_is_no_version_is_refused(version: str, script: ModuleType, tree: Path) -> None:
    before = {path: path.read_text() for path in tree.rglob("*.*") if path.is_file()}
    with pytest.raises(SystemExit):
        script.main([version], tree)
    assert before == {path: path.read_text() for path in before}


def test_a_file_without_a_version_stops_it_before_anything_is_written(script: ModuleType, tree: Path) -> None:
    (tree / "plugins/hb_soap/src/hb_soap/__init__.py").write_text("")
    before = (tree / "pyproject.toml").read_text()
    with pytest.raises(ValueError, match=r"hb_soap/__init__\.py states its version 0 times"):
        script.main(["0.2.0"], tree)
    assert (tree / "pyproject.toml").read_text() == before
