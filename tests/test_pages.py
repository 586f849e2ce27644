"""The Python of the pages runs as it stands, and what they quote is in the sources."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUN = ("README.md", "docs/write-a-plugin.md", "docs/newton.md")
"""Pages whose blocks are programs."""
QUOTED = {"docs/architecture.md": "hbcore/engine/planning/plan.py"}
"""Pages whose blocks are lines of a file."""


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


BLOCKS = [(page, number) for page in RUN for number in range(len(snippets(page)))]


def run(page: str, number: int, folder: Path) -> ModuleType:
    """Import a block from a file of its own, as a reader would; dataclasses look their module up by name."""
    name = f"{Path(page).stem.replace('-', '_')}_snippet_{number}"
    path = folder / f"{name}.py"
    path.write_text(snippets(page)[number])
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def test_every_page_with_python_is_in_a_table():
    pages = {path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
    assert {page for page in pages if snippets(page)} == {*RUN, *QUOTED}


def test_the_first_snippet_of_the_readme_trains_in_eight_lines(tmp_path):
    code = [line for line in snippets("README.md")[0].splitlines() if line and not line.startswith(("import ", "from ", "#"))]
    assert len(code) <= 8
    module = run("README.md", 0, tmp_path)
    assert module.loss.item() < 1e-3
    assert all(parameter.grad is None for parameter in module.model.parameters()), "step() clears gradients by default"


@pytest.mark.filterwarnings("ignore:ForeachAdamW is another name:FutureWarning")
@pytest.mark.parametrize(("page", "number"), BLOCKS[1:])
def test_the_other_snippets_run(page, number, tmp_path):
    run(page, number, tmp_path)


@pytest.mark.parametrize("page", QUOTED)
def test_what_a_page_quotes_is_in_the_source(page):
    source = {line.split("  #")[0].strip() for line in (ROOT / QUOTED[page]).read_text().splitlines()}
    for block in snippets(page):
        assert not {line.split("  #")[0].strip() for line in block.splitlines()} - source


@pytest.mark.parametrize("page", ["docs/write-a-plugin.md", "examples/README.md"])
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    assert links and all(((ROOT / page).parent / link).exists() for link in links), links
