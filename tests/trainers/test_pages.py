"""The pages on trainers run: each page's Python, from top to bottom, in one namespace and a folder of its own."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).resolve().parents[2] / "docs" / "trainers").glob("*.md"))
NEEDS = {
    "accelerate": ["accelerate"],
    "hydra": ["hydra"],
    "lightning": ["lightning", "jsonargparse"],
    "peft": ["peft", "transformers"],
    "timm": ["timm", "torchvision"],
    "transformers": ["transformers", "accelerate"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page, tmp_path, monkeypatch):
    if missing := [name for name in NEEDS.get(page.stem, ()) if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for i, block in enumerate(blocks):
        exec(compile(block, f"{page.name}, block {i}", "exec", dont_inherit=True), module.__dict__)


def test_every_page_has_an_example_and_says_what_to_know():
    assert len(PAGES) == 8
    for page in PAGES:
        text = page.read_text()
        assert "```python\n" in text and "\n## What to know\n" in text
