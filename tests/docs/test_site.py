"""The site builds without a warning, and its pages load nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("latex2mathml")
import docs_hooks
from docs_site import catalogue, charts, drawing, links, option_tables, prose, results
from latex2mathml.converter import convert

from hbcore.engine.shared_options import OPTIONS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", ROOT / "mkdocs.yml"]
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": path, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run([*command, "--site-dir", folder], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return folder


class Loads(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        fetched = [given.get(name) for name in ("src", "srcset", "data", "poster", "action")]
        if tag in ("link", "image", "use"):
            fetched += [given.get("href"), given.get("xlink:href")]
        self.found += [value for value in fetched if value]


@pytest.mark.broad
def test_the_site_builds_strictly_and_has_a_page_for_everything(site):
    for name in docs_hooks.entries():
        text = (site / "optimizers" / f"{name}.html").read_text()
        assert text.count('<svg role="img"') == 1, name
    for page in docs_hooks.sources().values():
        name = re.sub(r"README$", "index", page.removesuffix(".md"))
        assert (site / f"{name}.html").exists(), page
    left = {
        path.name: found
        for path in site.rglob("*.html")
        if (found := re.findall(r"<!-- \w+: |arithmatex|\\\[", path.read_text()))
    }
    assert not left
    performance = (site / "performance.html").read_text()
    assert all(f'aria-label="{chart.title}"' in performance for name, chart in charts.CHARTS.items() if name != "compare")


@pytest.mark.broad
def test_pages_load_nothing_from_elsewhere(site):
    pages = [*site.rglob("*.html")]
    assert len(pages) > 100
    for path in pages:
        loads = Loads()
        loads.feed(path.read_text())
        assert loads.found, path
        assert not [value for value in loads.found if re.match(r"(\w+:)?//", value)], path
    for path in [*site.rglob("*.css")]:
        assert not re.search(r"url\(\s*['\"]?(https?:)?//|@import\s+(url\()?['\"]?(https?:)?//", path.read_text()), path


def test_a_page_that_loads_from_elsewhere_is_noticed():
    loads = Loads()
    loads.feed(
        '<a href="https://a.org">x</a><link href="https://b.org/c.css"><script src="//d.org/e.js"></script><img src="f.png">'
    )
    assert loads.found == ["https://b.org/c.css", "//d.org/e.js", "f.png"]


def test_the_navigation_fills_in_folders():
    items = docs_hooks._navigation([{"A": [{"B": "nowhere.md"}]}, {"C": "index.md"}, {"E": "optimizers/"}])
    assert items[:2] == [{"A": [{"B": "nowhere.md"}]}, {"C": "index.md"}], "mkdocs complains about a page that is absent"
    assert items[2]["E"][0] == "optimizers/index.md"
    listed = [page for family in items[2]["E"][1:] for pages in family.values() for page in pages]
    assert sorted(listed) == sorted(f"optimizers/{e.name}.md" for e in catalogue.entries())


@pytest.mark.parametrize(
    ("link", "becomes"),
    [
        ("[a](../README.md)", "[a](index.md)"),
        ("[`a`](../plugins/hb_adam/README.md#x)", "[`a`](project/plugins/hb_adam.md#x)"),
        ("[a](../examples)", "[a](project/examples/index.md)"),
        ("[a](adr/README.md)", "[a](adr/README.md)"),
        ("[a](../hbcore/api.py)", "a"),
        ("[a](nowhere.md)", "[a](nowhere.md)"),
        ("[a](optimizers/AdamW.md)", "[a](optimizers/AdamW.md)"),
        ("[a](https://a.org/b.md)", "[a](https://a.org/b.md)"),
        ("![a](demo.png)", "![a](demo.png)"),
        ("```\n[a](../README.md)\n```", "```\n[a](../README.md)\n```"),
    ],
)
def test_links_lead_to_pages(link, becomes):
    assert links.rewrite(link, "docs/newton.md", ROOT, docs_hooks.sources()) == becomes


def test_every_option_is_in_one_table_of_the_page():
    filled = option_tables.fill((ROOT / "docs" / "options.md").read_text())
    for name, option in OPTIONS.items():
        assert len(re.findall(rf"^\| `{name}` \| `{re.escape(repr(option.default))}` \|.*\|$", filled, flags=re.MULTILINE)) == 1
    with pytest.raises(ValueError, match="look at caution"):
        option_tables.fill((ROOT / "docs" / "options.md").read_text().replace("caution, maximize", "maximize"))
    with pytest.raises(ValueError, match="look at caution"):
        option_tables.fill(
            (ROOT / "docs" / "options.md").read_text().replace("caution, maximize", "caution, caution, maximize")
        )
    for text in ("no tables", "`<!-- options: caution -->`"):
        assert option_tables.fill(text) == text


@pytest.mark.parametrize("entry", catalogue.entries(), ids=lambda entry: entry.name)
def test_every_formula_is_one_that_is_drawn(entry):
    text = " ".join(
        [(described := prose.describe(entry.cls, ())).text, *described.arguments.values(), *described.sections.values()]
    )
    for formula in re.findall(r"\\\[(.*?)\\\]|\\\((.*?)\\\)", text, flags=re.DOTALL):
        drawn = convert("".join(formula).strip())
        assert "\\" not in drawn, formula


def test_charts_are_of_the_figures_in_the_files():
    bars = {bar.label: bar.value for bar in charts.CHARTS["adamw"].bars()}
    rows = {(r["shapes"], r["label"]): r["summary"]["window_ms"] for r in results.load("h200-adamw-fp32")["rows"]}
    assert bars["GPT-2 124M: hbcore"] == rows["gpt2", "AdamW"] / rows["gpt2", "torch AdamW fused"]
    for name, chart in charts.CHARTS.items():
        assert len([*chart.bars()]) > 2, name
        assert all((results.RESULTS / f"{file}.json").exists() for file in chart.files)


def test_a_figure_is_compared_within_its_run_alone():
    compiled = [f for f in results.of("AdamW") if f.options == "compile='cpp'" and f.shapes == "GPT-2 124M"]
    peers = {f.device: (f.ms, peer.ms) for f in compiled if (peer := results.fastest_peer(f))}
    assert peers == {
        "1 CPU core": (pytest.approx(63.9, abs=0.05), pytest.approx(64.0, abs=0.05)),
        "2 CPU cores": (pytest.approx(34.8, abs=0.05), pytest.approx(36.3, abs=0.05)),
    }


def test_a_chart_is_the_same_each_time_and_styles_nothing_else():
    first, second = charts.draw("muon"), charts.draw("muon")
    assert first == second
    assert "<style" not in first and "#0102" not in first and drawing.THEME[drawing.FIRST] in first
    ids = re.findall(r'\bid="([^"]*)"', first)
    assert ids and all(name.startswith("chart-muon-") for name in ids)
    assert all(
        f'id="{target}"' in first
        for target in re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', first)
        for target in target
        if target
    )


def test_the_configuration_needs_no_network():
    text = (ROOT / "mkdocs.yml").read_text()
    assert "\n  font: false\n" in text and not re.search(r"https?://", text)
