"""Charts as SVG text that takes its colours from the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

INK, FAINT, FIRST, SECOND, THIRD = "#010203", "#010204", "#010205", "#010206", "#010207"
"""Colours that stand for the theme's until a chart becomes text."""

THEME = {
    INK: "var(--md-default-fg-color)",
    FAINT: "var(--md-default-fg-color--lighter)",
    FIRST: "var(--md-typeset-a-color)",
    SECOND: "#e8710a",
    THIRD: "var(--md-default-fg-color--light)",
}

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hbcore",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextmanager
def figure(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """A figure of that many inches and its axes, in the site's style; closed at the end."""
    with matplotlib.rc_context(STYLE):
        shown, axes = plt.subplots(figsize=(width, height), layout="constrained")
        try:
            yield shown, axes
        finally:
            plt.close(shown)


def svg(shown: Any, name: str, label: str) -> str:
    """The figure as an element for a page, the same for the same figure. ``name`` keeps its ids apart from other figures'."""
    text = io.StringIO()
    shown.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", drawn, flags=re.DOTALL
    )  # styles are the whole page's
    drawn = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", drawn)
    drawn = re.sub(r"font-family: [^;]*;", "font-family: inherit;", drawn)
    for colour, themed in THEME.items():
        drawn = drawn.replace(colour, themed)
    drawn = re.sub(
        r'(<svg[^>]*?) width="[^"]*pt"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", drawn, count=1), count=1
    )
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', drawn)[1])  # type: ignore[index]
    opening = f'<svg role="img" aria-label="{label}" style="width: {width * 4 / 3:.0f}px"'
    return f'<div class="picture">{drawn.strip().replace("<svg", opening, 1)}</div>'
