"""What the documents for contributors name exists: make targets, files, hooks; and CI runs what a change must pass."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)[1].split())
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_in_documents_exist(name):
    named = set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", (ROOT / name).read_text(), flags=re.MULTILINE))
    assert {"test", "test-full", "lint"} <= named
    for target in named:
        assert re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE), f"{name} names `make {target}`"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_in_documents_lead_to_files(name):
    for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text()):
        assert (ROOT / link).exists(), link


def test_paths_in_the_guide_exist():
    paths = set(re.findall(r"(?<![\w/])(?:tests|scripts|\.ci|hbcore|docs)/[\w./*-]*\w", (ROOT / "CONTRIBUTING.md").read_text()))
    assert len(paths) > 10
    for path in paths:
        assert list(ROOT.glob(path)), path


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_help_lists_every_target():
    done = subprocess.run(["make", "-s", "-C", ROOT, "help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    listed = re.findall(r"^ +make ([a-z-]+)", done.stdout, flags=re.MULTILINE)
    assert set(listed) == TARGETS


def test_github_runs_the_ci_script_on_every_supported_python():
    assert re.search(r"^ +- run: \.ci/run$", WORKFLOW, flags=re.MULTILINE)
    (matrix,) = re.findall(r"python: \[(.*)\]", WORKFLOW)
    supported = re.findall(r"Programming Language :: Python :: (3\.\d+)", PROJECT)
    assert re.findall(r"[\d.]+", matrix) == supported
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100, ".ci/run must be executable"


def test_github_tests_the_lower_bound_of_torch():
    (bound,) = re.findall(r'"torch>=([\d.]+)"', PROJECT)
    assert f"'torch=={bound}.0'" in WORKFLOW


def test_github_has_read_access_alone_and_pins_its_actions():
    assert re.findall(r"^permissions:\n((?: .*\n)+)", WORKFLOW, flags=re.MULTILINE) == ["  contents: read\n"]
    assert "permissions" not in WORKFLOW.replace("\npermissions:", "", 1)
    actions = re.findall(r"uses: (\S+)", WORKFLOW)
    assert actions and all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in actions), actions


def test_hooks_run_what_make_lint_runs():
    hooks = re.findall(r"entry: \.venv/bin/(.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    linters = re.findall(r"^\t\$\(BIN\)/((?:ruff|mypy).*)", MAKEFILE, flags=re.MULTILINE)
    assert [hook.removesuffix(" --force-exclude") for hook in hooks] == ["ruff check", "ruff format", "mypy"]
    assert linters == ["ruff check .", "ruff format --check .", "mypy"]


RELEASE = (ROOT / ".github" / "workflows" / "release.yml").read_text()


def jobs_of(workflow: str) -> dict[str, str]:
    """Name -> text of each job."""
    parts = re.split(r"^  ([\w-]+):\n", workflow.split("\njobs:\n")[1], flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_a_release_publishes_what_was_checked_in_the_order_of_dependence():
    assert re.search(r"^on:\n  push:\n    tags: \[\"v\*\"\]\n\n", RELEASE, flags=re.MULTILINE), "nothing but a tag releases"
    jobs = jobs_of(RELEASE)
    needs = {name: re.findall(r"^    needs: (.*)$", text, flags=re.MULTILINE) for name, text in jobs.items()}
    assert needs == {"build": [], "attest": ["build"], "hbcore": ["attest"], "plugins": ["hbcore"]}
    build = jobs["build"]
    for script in (
        "scripts/set_version.py --tag",
        "scripts/check_wheels.sh",
        "scripts/check_sdists.py",
        "twine check --strict",
    ):
        assert script in build and build.index(script) < build.index("upload-artifact")
    (plugins,) = re.findall(r"plugin: \[(.*)\]", jobs["plugins"])
    assert (
        plugins.split(", ") == re.search(r"^PLUGINS := (.*)$", MAKEFILE, flags=re.MULTILINE)[1].replace("plugins/", "").split()
    )


def test_a_release_gives_a_token_to_the_jobs_that_need_one():
    assert re.findall(r"^permissions:\n((?: .*\n)+)", RELEASE, flags=re.MULTILINE) == ["  contents: read\n"]
    for name, text in jobs_of(RELEASE).items():
        granted = set(re.findall(r"^      ([\w-]+): write", text, flags=re.MULTILINE))
        assert granted == {"build": set(), "attest": {"id-token", "attestations"}}.get(name, {"id-token"}), name
        assert not granted or " -m pip" not in text, f"{name} has a token, and installs packages"
    actions = set(re.findall(r"uses: (\S+)", RELEASE))
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+|pypa/gh-action-pypi-publish@release/v1", action) for action in actions), (
        actions
    )
    assert "secrets." not in RELEASE and "password" not in re.sub("#.*", "", RELEASE)


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").rglob("*.py")), ids=lambda path: path.name)
def test_importing_a_script_sets_no_environment_variable(path):
    """Tests import scripts, and a variable would hold for all later ones: it once switched compiling off for a whole run."""
    for statement in ast.parse(path.read_text()).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        called = [statement.value.func] if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call) else []
        assert not any("environ" in ast.unparse(part) for part in [*targets, *called])
