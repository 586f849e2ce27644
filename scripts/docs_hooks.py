"""What mkdocs calls while it builds the site: adds generated pages, formulas and pictures. ``mkdocs.yml`` names this file."""

from __future__ import annotations

import functools
import re
import warnings
from pathlib import Path
from typing import Any

from docs_site import catalogue, charts, links, optimizer_page, option_tables, path_picture, trajectories
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent

PROJECT = {
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "benchmarks/README.md": "project/benchmarks.md",
    "examples/README.md": "project/examples/index.md",
}
"""Files outside docs/ -> their pages. Every plugin and example has one too."""


@functools.cache
def sources() -> dict[str, str]:
    """File relative to the root -> page, of all pages that are files of the repository."""
    found = {
        path.relative_to(ROOT).as_posix(): path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")
    }
    found |= {"README.md": "index.md", **PROJECT}
    for kind in ("plugins", "examples"):
        found |= {
            f"{kind}/{p.parent.name}/README.md": f"project/{kind}/{p.parent.name}.md" for p in ROOT.glob(f"{kind}/*/README.md")
        }
    return {file: page for file, page in found.items() if not file.endswith("adr/template.md")}


@functools.cache
def entries() -> dict[str, catalogue.Entry]:
    """Name -> optimizer."""
    return {entry.name: entry for entry in catalogue.entries()}


@functools.cache
def walked(name: str) -> trajectories.Path:
    """The path of an optimizer."""
    return trajectories.walk(entries()[name].cls, entries()[name].info.spec)


def optimizer_pages() -> dict[str, str]:
    """Page -> its Markdown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of advice about the parameters that optimizers are shown with
        pages = {"optimizers/index.md": optimizer_page.listing(entries().values(), path_picture.explanation())}
        for name, entry in entries().items():
            caption = path_picture.caption(entry.info.spec, walked(name))
            pages[f"optimizers/{name}.md"] = optimizer_page.page(entry, entries().keys(), caption)
    return pages


def on_config(config: Any) -> Any:
    """Fill in the parts of the navigation that are folders."""
    config.nav = _navigation(config.nav)
    return config


def _navigation(items: list[Any]) -> list[Any]:
    kept: list[Any] = []
    for item in items:
        [(title, value)] = item.items()
        if isinstance(value, list):
            value = _navigation(value)
        elif value.endswith("/"):
            value = _folder(value)
        kept.append({title: value})
    return kept


def _folder(folder: str) -> list[Any]:
    """What belongs under a folder's title, its overview first."""
    if folder == "optimizers/":
        families = [
            {title: [f"optimizers/{e.name}.md" for e in entries().values() if e.info.plugin == plugin]}
            for plugin, title in catalogue.FAMILIES.items()
        ]
        return ["optimizers/index.md", *families]
    pages = sorted(page for page in sources().values() if page.startswith(folder))
    return sorted(pages, key=lambda page: page.rpartition("/")[2] not in ("index.md", "README.md"))


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    for page, text in optimizer_pages().items():
        files.append(File.generated(config, page, content=text))
    for file, page in sources().items():
        if not file.startswith("docs/") and page != "index.md":
            files.append(File.generated(config, page, content=(ROOT / file).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Resolve links between files, and fill in the tables of options."""
    origins = {shown: file for file, shown in sources().items() if file != "README.md"}
    origin = origins.get(page.file.src_uri)
    if origin is None:
        return markdown
    return option_tables.fill(links.rewrite(markdown, origin, ROOT, sources()))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Formulas as MathML, which browsers draw without a script."""
    html = re.sub(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', _displayed, html, flags=re.DOTALL)
    return re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda m: convert(_latex(m[1])), html, flags=re.DOTALL)


def _displayed(match: re.Match[str]) -> str:
    return f'<div class="formula">{convert(_latex(match[1]), display="block")}</div>'


def _latex(text: str) -> str:
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        text = text.replace(entity, character)
    return text.strip()


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Pictures, after the search index has been made: it would list the numbers of their axes."""
    output = re.sub(r"<!-- picture: (\w+) -->", lambda m: path_picture.draw(m[1], walked(m[1])), output)
    return re.sub(r"<!-- chart: ([\w-]+) -->", lambda m: charts.draw(m[1]), output)
