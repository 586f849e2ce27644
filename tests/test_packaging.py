"""The six distributions fit together: versions, ranges, pins, entry points, typing, and what an import may cost."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = ("hb_adam", "hb_muon", "hb_psgd", "hb_soap", "hb_ecc")
OWN = {canonicalize_name(name) for name in ("hbcore", *PLUGINS)}


def home(name: str) -> Path:
    """The folder of a distribution's pyproject.toml."""
    return ROOT if name == "hbcore" else ROOT / "plugins" / name


def package(name: str) -> Path:
    """The folder of a distribution's import package."""
    return ROOT / name if name == "hbcore" else home(name) / "src" / name


def pyproject(name: str) -> dict:
    return tomllib.loads((home(name) / "pyproject.toml").read_text())["project"]


def pins() -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def pinned_here() -> dict[str, Version]:
    """Name -> pinned version, of the pins whose markers hold for this interpreter."""
    return {
        canonicalize_name(pin.name): Version(next(iter(pin.specifier)).version)
        for pin in pins()
        if pin.marker is None or pin.marker.evaluate()
    }


def third_party(name: str) -> list[Requirement]:
    project = pyproject(name)
    stated = itertools.chain(project["dependencies"], *project.get("optional-dependencies", {}).values())
    return [r for r in map(Requirement, stated) if canonicalize_name(r.name) not in OWN]


@pytest.mark.parametrize("name", ["hbcore", *PLUGINS])
class TestEachDistribution:
    def test_installed_version_is_the_checkout_s(self, name):
        assert importlib.metadata.version(name) == pyproject(name)["version"] == pyproject("hbcore")["version"]
        assert importlib.import_module(name).__version__ == pyproject(name)["version"]

    def test_python_range_and_licence_agree(self, name):
        assert pyproject(name)["requires-python"] == pyproject("hbcore")["requires-python"]
        assert pyproject(name)["license"] == "BSD-2-Clause"
        assert (home(name) / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()

    def test_is_typed(self, name):
        assert (package(name) / "py.typed").exists()

    def test_no_folder_is_left_out_of_the_wheel(self, name):
        """setuptools finds packages by ``__init__.py``; an editable install works without it, a wheel does not."""
        folders = {path.parent for path in package(name).rglob("*.py")}
        assert not [folder for folder in folders if not (folder / "__init__.py").exists()]

    def test_no_data_is_left_out_of_the_wheel(self, name):
        """Files that are not Python are packaged if a pattern of ``package-data`` names them."""
        tool = tomllib.loads((home(name) / "pyproject.toml").read_text())["tool"]["setuptools"]
        patterns = tool["package-data"][name]
        packaged = {path for pattern in patterns for path in package(name).glob(pattern)}
        data = {p for p in package(name).rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
        assert data and not data - packaged

    def test_editable_install_is_a_plain_path(self, name):
        """An import-hook finder would hide py.typed from type checkers."""
        files = importlib.metadata.distribution(name).files or []
        assert files, f"{name} records no files"
        assert not [f for f in files if f.name.endswith("_finder.py")]

    def test_every_requirement_is_pinned_within_its_range(self, name):
        known = pinned_here()
        for requirement in third_party(name):
            pin = known[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pin), f"{requirement} does not admit the pinned {pin}"


@pytest.mark.parametrize("name", PLUGINS)
class TestEachPlugin:
    def test_depends_on_this_core_only(self, name):
        (core,) = map(Requirement, pyproject(name)["dependencies"])
        assert core.name == "hbcore"
        assert core.specifier.contains(pyproject("hbcore")["version"])
        assert not core.specifier.contains("0.2.0"), "a minor release before 1.0 may break plugins"

    def test_the_all_extra_admits_it(self, name):
        extra = {r.name: r for r in map(Requirement, pyproject("hbcore")["optional-dependencies"]["all"])}
        assert set(extra) == set(PLUGINS)
        assert extra[name].specifier.contains(pyproject(name)["version"])

    def test_entry_point_names_the_manifest(self, name):
        (entry,) = importlib.metadata.entry_points(group="hbcore.plugins", name=name)
        assert entry.value == f"{name}.plugin"

    def test_manifest_states_its_api(self, name):
        major, minor = importlib.import_module(f"{name}.plugin").API
        assert (major, minor) >= (1, 0)


def test_manifests_import_no_torch():
    """``hbcore list`` has to answer at once, and where torch is broken."""
    modules = ", ".join(f"{name}.plugin" for name in PLUGINS)
    code = f"import sys, hbcore.api, {modules}; print(sorted({{'torch', 'triton', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_hb_adam_offers_its_classes_lazily():
    import hb_adam

    assert {"AdamW", "SGD"} <= set(dir(hb_adam))
    assert hb_adam.AdamW.__module__ == "hb_adam.adamw"
    assert hb_adam.SGD.__module__ == "hb_adam.sgd"
    with pytest.raises(AttributeError, match="NoSuchThing"):
        _ = hb_adam.NoSuchThing


def test_console_script():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="hbcore")
    assert callable(script.load())


def test_constraints_pin_exactly_and_once():
    for pin in pins():
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        assert "*" not in specifier.version, pin
        assert pin.url is None, pin
    for python in ("3.10", "3.11", "3.12", "3.13"):
        there = [pin.name for pin in pins() if pin.marker is None or pin.marker.evaluate({"python_version": python})]
        assert sorted(there) == sorted(set(there)), f"pinned twice on Python {python}"


def test_everything_installed_by_make_is_pinned():
    """Walks what ``hbcore[cli,dev]`` draws in here. CUDA builds of torch bring their own exact pins along."""
    known, seen = pinned_here(), set()
    queue = [("hbcore", frozenset({"cli", "dev"}))]
    while queue:
        name, extras = queue.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # hbcore was installed without its extras; that it needs this one is known all the same
        for requirement in map(Requirement, requires):
            wanted = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in (extras or {""})
            )
            if wanted and not re.match("nvidia|cuda", requirement.name):
                queue.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    names = {name for name, _ in seen} - OWN
    assert len(names) > len(third_party("hbcore")), "the walk found next to nothing; is hbcore's metadata complete?"
    assert not names - set(known), "installed, and missing from constraints.txt"


def test_makefile_and_ci_name_no_package_index():
    for file in ("Makefile", "constraints.txt", ".ci/run", ".github/workflows/ci.yml", "scripts/check_wheels.sh"):
        assert not re.search(r"index-url|find-links|https?://", (ROOT / file).read_text()), file


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_installs_again_only_when_a_deciding_file_changes(tmp_path):
    deciding = [home(name).relative_to(ROOT) / "pyproject.toml" for name in ("hbcore", *PLUGINS)]
    for file in map(Path, ["Makefile", "constraints.txt", *deciding]):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)

    def make(*options):
        # Under `make test` the outer make's variables are in the environment, and would reach this one.
        outer = ("MAKEFLAGS", "MAKELEVEL", "CONSTRAINTS")
        environment = {name: value for name, value in os.environ.items() if name not in outer}
        command = ["make", "-C", tmp_path, *options, f"PYTHON={sys.executable}", "VENV=venv", "install"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)

    planned = make("--dry-run").stdout
    assert planned.count("pip install") == 3
    for stamp in re.findall(r"^touch (\S+)$", planned, flags=re.MULTILINE):
        (tmp_path / stamp).parent.mkdir(exist_ok=True)
        (tmp_path / stamp).touch()
    (tmp_path / "constraints.txt").touch()
    assert make("--question").returncode == 0, "a newer file with the same contents is no reason"
    for file in ("constraints.txt", "plugins/hb_ecc/pyproject.toml"):
        before = (tmp_path / file).read_text()
        (tmp_path / file).write_text(before + "# changed\n")
        assert make("--question").returncode == 1, file
        (tmp_path / file).write_text(before)
    assert make("--question").returncode == 0


class TestCodeHash:
    """scripts/code_hash.py: what a full result is tied to."""

    @pytest.fixture
    def code_hash(self):
        spec = importlib.util.spec_from_file_location("code_hash", ROOT / "scripts" / "code_hash.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.code_hash

    @pytest.fixture
    def tree(self, tmp_path):
        for name, text in {
            "hbcore/a.py": "a = 1\n",
            "plugins/hb_x/src/hb_x/b.py": "b = 1\n",
            "tests/test_a.py": "",
        }.items():
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    def test_changes_with_contents_and_names(self, code_hash, tree):
        seen = {code_hash(tree)}
        (tree / "hbcore/a.py").write_text("a = 2\n")
        seen.add(code_hash(tree))
        (tree / "hbcore/a.py").rename(tree / "hbcore/c.py")
        seen.add(code_hash(tree))
        (tree / "plugins/hb_x/src/hb_x/b.py").unlink()
        seen.add(code_hash(tree))
        assert len(seen) == 4

    def test_ignores_tests_and_builds(self, code_hash, tree):
        before = code_hash(tree)
        (tree / "tests/test_a.py").write_text("assert True\n")
        stale = tree / "plugins/hb_x/build/lib/hb_x"
        stale.mkdir(parents=True)
        (stale / "b.py").write_text("b = 0\n")
        assert code_hash(tree) == before
