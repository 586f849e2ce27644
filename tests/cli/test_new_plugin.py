"""``hbcore new-plugin``: what it writes passes its own linters and tests, and what it refuses leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from hbcore import __version__
from hbcore.cli import new_plugin
from hbcore.cli.main import main
from hbcore.cli.new_plugin import KINDS, LONGEST, requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def make(folder: Path, name: str = "hb_sigma", *options: str) -> Path:
    assert main(["new-plugin", name, "--out", str(folder), *options]) == 0
    return folder / name


def run(package: Path, *command: str | Path) -> str:
    """Run in the package as if it were installed: found by its entry point, and imported from ``src``."""
    info = package / "src" / f"{package.name}-0.1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.name}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[hbcore.plugins]\n{package.name} = {package.name}.plugin\n")
    path = os.pathsep.join([str(package / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=package, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


LONG = ("hb_" + "l" * (LONGEST - 3), "--optimizer", "L" * LONGEST)


@pytest.mark.parametrize("names", [("hb_sigma",), LONG], ids=["short", "long"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_writes_is_lint_free(kind: str, names: tuple[str, ...], tmp_path: Path) -> None:
    package = make(tmp_path, *names, "--kind", kind)
    run(package, BIN / "ruff", "check", "--no-cache")
    run(package, BIN / "ruff", "format", "--check", "--no-cache")


@pytest.mark.broad
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_writes_has_types(kind: str, tmp_path: Path) -> None:
    package = make(tmp_path, "hb_sigma", "--kind", kind)
    run(package, sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "mypy"))


SOME = ("-k", "papers or resum or state")


@pytest.mark.parametrize(
    ("kind", "chosen"),
    [("elementwise", SOME), *(pytest.param(k, (), marks=pytest.mark.broad, id=f"{k}-all") for k in KINDS)],
)
def test_what_it_writes_passes_its_own_tests(kind: str, chosen: tuple[str, ...], tmp_path: Path) -> None:
    """With the conformance kit: more tests run than the four that the file has."""
    package = make(tmp_path, "hb_sigma", "--kind", kind)
    said = run(package, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen)
    passed = int(said.rpartition(" passed")[0].split()[-1])
    assert passed > (8 if chosen else 40) and "failed" not in said and "xfailed" not in said, said[-500:]


@pytest.mark.broad  # a package's tests in a process
def test_a_broken_rule_fails_the_tests_that_came_with_it(tmp_path: Path) -> None:
    package = make(tmp_path)
    rule = package / "src" / "hb_sigma" / "sigma.py"
    rule.write_text(rule.read_text().replace("return torch.sign(m)", "return torch.sign(u)"))
    with pytest.raises(AssertionError, match="test_it_is_the_papers"):
        run(package, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "papers")


def test_hbcore_lists_the_new_optimizer_without_torch(tmp_path: Path) -> None:
    package = make(tmp_path)
    code = "import sys; from hbcore.cli.main import main; main(['list', 'Sigma']); print('torch' in sys.modules)"
    said = run(package, sys.executable, "-c", code)
    assert "Sigma" in said and KINDS["elementwise"].summary in said and said.endswith("False\n")


def test_the_command_imports_no_torch(tmp_path: Path) -> None:
    code = f"""if True:
        import sys
        from hbcore.cli.main import main
        assert main(["new-plugin", "hb_sigma", "--out", {str(tmp_path)!r}]) == 0
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


def test_it_says_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = make(tmp_path, "hb_sigma")
    lines = capsys.readouterr().out.splitlines()
    assert str(package / "src" / "hb_sigma" / "sigma.py") in lines[0] and (package / "src" / "hb_sigma" / "sigma.py").exists()
    commands = [line.strip() for line in lines if line.startswith("    ")]
    assert commands[0] == f"cd {package}" and commands[1].endswith('-m pip install -e ".[dev]"') and commands[2] == "pytest"


@pytest.mark.parametrize("author", ["Ada Lovelace", 'A "B" \\C', "Ørsted, 李"])
def test_the_author_holds_the_copyright(author: str, tmp_path: Path) -> None:
    package = make(tmp_path, "hb_sigma", "--author", author)
    assert f", {author}\n" in (package / "LICENSE").read_text(encoding="utf-8")
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["authors"] == [{"name": author}] and project["license"] == "BSD-2-Clause"
    assert project["entry-points"] == {"hbcore.plugins": {"hb_sigma": "hb_sigma.plugin"}}
    assert project["dependencies"] == [requirement(__version__)]


@pytest.mark.parametrize(
    ("config", "author"), [("[user]\nname = Grace Hopper\n", "Grace Hopper"), ("", "the authors of hb_sigma")]
)
def test_the_author_is_gits(config: str, author: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text(config)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert author in (make(tmp_path) / "LICENSE").read_text()


def test_without_git_there_is_an_author_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "the authors of hb_sigma" in (make(tmp_path) / "LICENSE").read_text()


@pytest.mark.parametrize(
    ("version", "inside", "outside"),
    [("0.1.0", ("0.1.0", "0.1.9"), ("0.0.9", "0.2.0")), ("1.4.2", ("1.4.0", "1.9"), ("1.3.9", "2.0"))],
)
def test_the_range_of_cores(version: str, inside: tuple[str, ...], outside: tuple[str, ...]) -> None:
    allowed = SpecifierSet(requirement(version).removeprefix("hbcore"))
    assert all(map(allowed.contains, inside)) and not any(map(allowed.contains, outside))


@pytest.mark.parametrize(
    ("name", "module", "optimizer"),
    [
        ("hb_sign_sgd", "sign_sgd", "SignSgd"),
        ("mine", "mine", "Mine"),
        ("hb_8bit", "hb_8bit", "8bit"),
        ("hb_plugin", "hb_plugin", "Plugin"),
        ("hb_lambda", "hb_lambda", "Lambda"),
    ],
)
def test_the_modules_name_is_one(name: str, module: str, optimizer: str, tmp_path: Path) -> None:
    package = make(tmp_path, name, "--optimizer", "Sigma") if optimizer[0].isdigit() else make(tmp_path, name)
    source = (package / "src" / name / f"{module}.py").read_text()
    assert optimizer[0].isdigit() or f"class {optimizer}(Optimizer)" in source
    compile(source, module, "exec")


BAD = {
    "": "lower-case",
    "hb-sigma": "lower-case",
    "Hb_sigma": "lower-case",
    "hb sigma": "lower-case",
    "hb_σ": "lower-case",
    "../up": "lower-case",
    "lambda": "lower-case",
    "x" * (LONGEST + 1): "lower-case",
    "hb_adam": "hide a package or plugin",
    "hbadam": "hide a package or plugin",
    "hb_ecc": "hide a package or plugin",
    "hbcore": "hide a package or plugin",
    "torch": "hide a package or plugin",
    "json": "hide a package or plugin",
    "plugin": "hide a package or plugin",
}


@pytest.mark.parametrize("name", BAD)
def test_names_of_packages_that_cannot_be(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-plugin", name, "--out", str(tmp_path)]) == 2
    assert BAD[name] in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ("sigma", "with a capital"),
        ("8bit", "with a capital"),
        ("Sig-ma", "with a capital"),
        ("None", "with a capital"),
        ("S" * (LONGEST + 1), "with a capital"),
        ("Transform", "own modules use the name"),
        ("Tensor", "own modules use the name"),
        ("AdamW", "hb_adam has an optimizer"),
        ("ADAMW", "hb_adam has an optimizer"),
        ("ForeachSOAP", "hb_soap has an optimizer"),
        ("SplitOpt", "hbcore has an optimizer"),
    ],
)
def test_names_of_optimizers_that_cannot_be(
    optimizer: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new-plugin", "hb_sigma", "--optimizer", optimizer, "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_a_folder_with_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hb_sigma").mkdir()
    (tmp_path / "hb_sigma" / "mine.txt").write_text("mine")
    assert main(["new-plugin", "hb_sigma", "--out", str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob("*")] == ["hb_sigma", "mine.txt"]


@pytest.mark.parametrize("there", ["file", "link", "broken link"])
def test_what_is_no_folder_is_left_alone(there: str, tmp_path: Path) -> None:
    target = tmp_path / "hb_sigma"
    (tmp_path / "elsewhere").mkdir()
    if there == "file":
        target.write_text("")
    else:
        target.symlink_to(tmp_path / ("elsewhere" if there == "link" else "nowhere"))
    before = target.lstat()
    assert main(["new-plugin", "hb_sigma", "--out", str(tmp_path)]) == 2
    assert target.lstat() == before and not any((tmp_path / "elsewhere").iterdir())


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "hb_sigma").mkdir()
    assert (make(tmp_path) / "pyproject.toml").exists()


@pytest.mark.parametrize("out", ["missing", "file"])
def test_out_must_be_a_folder(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["new-plugin", "hb_sigma", "--out", str(tmp_path / out)]) == 2
    assert "is not a folder" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failure_on_the_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(new_plugin.Path, "rename", full)
    assert main(["new-plugin", "hb_sigma", "--out", str(tmp_path)]) == 2
    assert "No space left on device" in capsys.readouterr().err and not any(tmp_path.iterdir())
