"""The style sheet of ``report.html``: a light and a dark theme, by what the reader's system prefers."""

from __future__ import annotations

from collections.abc import Sequence

# Okabe and Ito's palette, as in the PNG; on a dark page lighter blues and greens, and white for black.
_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_DARK = ("#4aa8e0", "#f07c2c", "#2fc79b", "#e09cc3", "#f0b53c", "#93d2f7", "#ffffff")
_RULES = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 3rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0; } .faint { color: var(--faint); }
code { display: block; overflow-x: auto; white-space: pre; padding: .5rem .7rem; background: var(--panel); border-radius: 6px;
  font: 13px/1.4 ui-monospace, monospace; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .8rem 0; }
.key span { display: inline-flex; align-items: center; gap: .4rem; } .key svg { width: 26px; height: 10px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; padding-left: 0; } .best { font-weight: 700; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem; }
.many { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: .8rem; }
figure { margin: 0; padding: .5rem; background: var(--panel); border-radius: 8px; }
svg { display: block; width: 100%; height: auto; } summary { cursor: pointer; font-weight: 600; margin: 1rem 0 .6rem; }
.title { fill: var(--ink); font: 600 13px system-ui, sans-serif; }
.tick, .axis { fill: var(--faint); font: 11.5px system-ui; }
.grid { stroke: var(--grid); stroke-width: 1; }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.band { fill: var(--c); opacity: .2; } .point { fill: var(--c); stroke: var(--panel); stroke-width: 1; }
line.d1, .line.d1 { stroke-dasharray: 6 3; } line.d2, .line.d2 { stroke-dasharray: 1.5 3; }
.bars { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr max-content; gap: .35rem .7rem;
  align-items: center; }
.bar { height: .9rem; border-radius: 3px; background: var(--c); min-width: 2px; }
"""


def sheet() -> str:
    """The style sheet. Series are the classes ``s0`` to ``s6``, and dashed with ``d1`` and ``d2``."""

    def theme(colours: Sequence[str], back: str, panel: str, ink: str, faint: str, grid: str) -> str:
        named = {"back": back, "panel": panel, "ink": ink, "faint": faint, "grid": grid}
        every = {**named, **{f"c{i}": colour for i, colour in enumerate(colours)}}
        return ":root { " + " ".join(f"--{name}: {value};" for name, value in every.items()) + " }"

    light = theme(_LIGHT, "#ffffff", "#f6f7f8", "#1c2024", "#5b646d", "#dfe3e6")
    dark = theme(_DARK, "#14171a", "#1d2125", "#e8eaed", "#a2abb4", "#363c42")
    series = "\n".join(f".s{i} {{ --c: var(--c{i}); }}" for i in range(len(_LIGHT)))
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n{series}{_RULES}"
