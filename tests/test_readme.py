"""The README's Python runs as it stands."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def run(number: int, folder: Path):
    """Import snippet ``number`` from a file of its own, as a reader would; dataclasses look their module up by name."""
    name = f"readme_snippet_{number}"
    path = folder / f"{name}.py"
    path.write_text(SNIPPETS[number])
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def test_the_first_snippet_trains_in_eight_lines(tmp_path):
    code = [line for line in SNIPPETS[0].splitlines() if line and not line.startswith(("import ", "from ", "#"))]
    assert len(code) <= 8
    module = run(0, tmp_path)
    assert module.loss.item() < 1e-3
    assert all(parameter.grad is None for parameter in module.model.parameters()), "step() clears gradients by default"


@pytest.mark.filterwarnings("ignore:ForeachAdamW is another name:FutureWarning")
@pytest.mark.parametrize("number", range(1, len(SNIPPETS)))
def test_the_other_snippets_run(number, tmp_path):
    run(number, tmp_path)
