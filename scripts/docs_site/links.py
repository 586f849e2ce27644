"""Links between files of the repository, as links between pages of the site."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path

_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def rewrite(markdown: str, origin: str, root: Path, pages: Mapping[str, str]) -> str:
    """The page with links that work where it is shown.

    A link to a file that is a page leads there. One to any other file of the repository becomes its text, since the site has no
    sources. One to nothing stays as it is, for mkdocs to complain about.

    Args:
        markdown: the page.
        origin: the file that it comes from, relative to ``root``.
        root: the repository.
        pages: file relative to ``root`` -> page.
    """
    here = posixpath.dirname(pages[origin])

    def replace(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        file = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        if file.startswith("docs/optimizers/"):  # generated, and links to them are checked by mkdocs
            return match[0]
        for known in (file, f"{file}/README.md"):
            if known in pages:
                return f"[{text}]({posixpath.relpath(pages[known], here)}{anchor})"
        return text if (root / file).exists() else match[0]

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)  # code has no links
    return "".join(part if part.startswith("```") else _LINK.sub(replace, part) for part in parts)
