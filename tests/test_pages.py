"""The Python of the pages runs as it stands, so do their commands, and what they quote is in the sources."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

from hbcore.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
QUOTED = {"docs/architecture.md": "hbcore/engine/planning/plan.py"}
"""Pages whose blocks are lines of a file. Those of others are programs; ``<!-- needs: NAME -->`` before one names a package."""

_PYTHON = re.compile(r"^(?:<!-- needs: ([\w.]+) -->\n)?```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
_CONSOLE = re.compile(r"^(<!-- takes long -->\n)?```console\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def snippets(page: str) -> list[tuple[str, str]]:
    """The package that a block needs, or "", and its code."""
    return _PYTHON.findall((ROOT / page).read_text())


def commands(page: str) -> list[tuple[bool, str]]:
    """Whether a command takes long, and its line, of the lines that call hbcore."""
    blocks = _CONSOLE.findall((ROOT / page).read_text())
    return [(bool(long), line) for long, text in blocks for line in re.findall(r"^\$ (hbcore .*)$", text, flags=re.MULTILINE)]


BLOCKS = [(page, number) for page in PAGES if page not in QUOTED for number in range(len(snippets(page)))]
COMMANDS = [
    pytest.param(line, marks=[pytest.mark.full] * long) for long, line in sorted({c for p in PAGES for c in commands(p)})
]


def run(page: str, number: int, folder: Path) -> ModuleType:
    """Import a block from a file of its own, as a reader would; dataclasses look their module up by name."""
    needed, code = snippets(page)[number]
    if needed:
        pytest.importorskip(needed)
    name = f"{Path(page).stem.replace('-', '_')}_snippet_{number}"
    path = folder / f"{name}.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with warnings.catch_warnings():  # what a page does to the filters is its own affair
            spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def test_pages_have_programs_and_commands():
    assert {"README.md", "docs/index.md", "docs/newton.md", "docs/options.md"} <= {page for page, _ in BLOCKS}
    assert len(COMMANDS) > 5


def test_the_first_snippet_of_the_readme_trains_in_eight_lines(tmp_path):
    _, first = snippets("README.md")[0]
    code = [line for line in first.splitlines() if line and not line.startswith(("import ", "from ", "#"))]
    assert len(code) <= 8
    module = run("README.md", 0, tmp_path)
    assert module.loss.item() < 1e-3
    assert all(parameter.grad is None for parameter in module.model.parameters()), "step() clears gradients by default"


@pytest.mark.filterwarnings("ignore:ForeachAdamW is another name:FutureWarning")
@pytest.mark.parametrize(("page", "number"), [block for block in BLOCKS if block != ("README.md", 0)])
def test_the_other_snippets_run(page, number, tmp_path):
    run(page, number, tmp_path)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_run(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)[1:]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", QUOTED)
def test_what_a_page_quotes_is_in_the_source(page):
    source = {line.split("  #")[0].strip() for line in (ROOT / QUOTED[page]).read_text().splitlines()}
    for _, block in snippets(page):
        assert not {line.split("  #")[0].strip() for line in block.splitlines()} - source


@pytest.mark.parametrize("page", [*PAGES, "examples/README.md"])
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    generated = "optimizers/"
    absent = {link for link in links if not ((ROOT / page).parent / link).exists() and not link.startswith(generated)}
    assert not absent
