"""The first hour of a newcomer: the README's install line is enough for its blocks, and its picture is what the demo draws."""

from __future__ import annotations

import re
from pathlib import Path

from hbcore import registry

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def test_one_line_installs_what_every_block_under_it_needs() -> None:
    (line,) = re.findall(r"^    pip install (.*)$", README, flags=re.MULTILINE)
    core, *plugins = line.split()
    assert core == '".[cli]"', "compare and bench draw pictures"
    blocks = "\n".join(re.findall(r"^(?:```python\n.*?^```|(?:    .*\n)+)", README, flags=re.MULTILINE | re.DOTALL))
    used = {registry.info(name).plugin for name in registry.list_optimizers() if re.search(rf"\b{name}\b", blocks)}
    used |= {registry.codec_info(codec.name)[1].name for codec in registry.codecs() if f'"{codec.name}"' in blocks}
    assert used >= {"hb_adam", "hb_muon", "hb_soap", "hb_ecc"}
    assert {f"./plugins/{name}" for name in used} <= set(plugins)
    assert all((ROOT / plugin / "pyproject.toml").exists() for plugin in plugins)


def test_the_picture_is_small_and_the_text_says_how_to_read_it() -> None:
    picture, *_ = re.findall(r"!\[[^]]+\]\((docs/[\w.]+\.png)\)", README)
    data = (ROOT / picture).read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) < 150_000
    before = " ".join(README.partition(f"]({picture})")[0].split())[-600:]
    for said in ("lower is better", r"about \d+ minutes", "0.47 million parameters"):
        assert re.search(said, before)


def test_the_demo_compares_optimizers_that_the_readme_recommends() -> None:
    (demo,) = re.findall(r"hbcore compare ((?:[A-Z]\w+ )+)--steps", MAKEFILE)
    table = README.partition("## Which one")[2].partition("\n## ")[0]
    for name in re.findall(r"`([A-Z]\w+)`", table):
        assert registry.info(name).name == name
    assert set(demo.split()) - {"SGD", "Muon"} <= set(re.findall(r"`([A-Z]\w+)`", table))
