"""The house: which way imports point, and how large a file, a function or a class may grow before it has to say why."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hbcore.engine.shared_options import OPTIONS, Options, SharedOptions

ROOT = Path(__file__).parent.parent
PLACES = ("hbcore/**/*.py", "plugins/*/src/**/*.py", "examples/*/src/**/*.py", "benchmarks/**/*.py", "scripts/**/*.py")
SOURCES = sorted(path for place in PLACES for path in ROOT.glob(place))
PLANNING = ("Plan", "SparsePlan", "Layout", "Watch", "Compiler", "StateInit", "OptimizerCore", "Level", "RuleCall")
"""What a step is made of; one class with 26 attributes was all of it once."""

LINES, FUNCTION, ATTRIBUTES = 300, 50, 15


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"], cwd=folder, capture_output=True, text=True
    )


def test_imports_point_downwards_and_in_no_circle():
    pytest.importorskip("importlinter")
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_fit_on_a_few_screens(path):
    text = path.read_text()
    assert text.count("\n") <= LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
            docstring = ast.get_docstring(node, clean=False) or ""
            assert node.end_lineno - node.lineno + 1 - docstring.count("\n") <= FUNCTION, node.name


def test_no_class_of_the_engine_has_many_attributes():
    found = {}
    for path in ROOT.glob("hbcore/engine/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                targets = (t for t in ast.walk(node) if isinstance(t, ast.Attribute) and isinstance(t.ctx, ast.Store))
                found[node.name] = {t.attr for t in targets if isinstance(t.value, ast.Name) and t.value.id == "self"}
    for name in PLANNING:
        assert 0 < len(found[name]) <= ATTRIBUTES, (name, sorted(found[name]))


def test_the_options_of_constructors_written_out_are_the_declared_ones():
    declared = {n: a for n, a in SharedOptions.__annotations__.items() if n in OPTIONS}
    assert Options.__annotations__.keys() == declared.keys() == OPTIONS.keys()
    written = {n: getattr(a, "__forward_arg__", a) for n, a in Options.__annotations__.items()}
    assert written == declared


def test_the_architecture_page_names_files_that_exist():
    """Paths in backquotes: whole ones, those below ``hbcore/``, and bare file names of the engine."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:[\w.]+/)*[\w.]+(?:\.py|/))`", page))
    assert len(named) > 20
    known = [p.relative_to(ROOT).as_posix() for p in SOURCES]
    missing = {n for n in named if not any(f"/{n}" in f"/{path}" for path in known)}
    assert not missing
