"""``hbcore list``: the installed optimizers. Imports neither torch nor any optimizer."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from hbcore import registry
from hbcore.cli import text
from hbcore.registry import hints
from hbcore.registry.origin import pip_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("pattern", nargs="?", default="*", metavar="GLOB", help="list only matching names, such as 'PSGD*'")
    parser.add_argument("--aliases", action="store_true", help="list aliases too")
    parser.add_argument("--json", action="store_true", help="print a JSON array with one object per name")


def run(args: argparse.Namespace) -> int:
    """Print the names. Returns 0 even if no name matches.

    Raises:
        PluginError: a plugin is broken and ``HBCORE_STRICT`` is set.
    """
    rows = [_row(name) for name in registry.list_optimizers(args.pattern, aliases=args.aliases)]
    if args.json:
        print(json.dumps(rows, indent=2, default=repr))
    elif rows:
        text.show(text.table(((row["name"], row["plugin"], _summary(row)) for row in rows), text.width(), indent=""))
    elif registry.plugins():
        print(f"no optimizer matches {args.pattern!r}; 'hbcore list' shows all", file=sys.stderr)
    else:
        others = ", ".join(family for family in hints.FAMILIES if family != "hb_adam")
        print(f"no plugins found; {pip_line('hb_adam')} (or {others})", file=sys.stderr)
    return 0


def _row(name: str) -> dict[str, Any]:
    info = registry.info(name)
    spec = info.spec
    row: dict[str, Any] = {
        "name": name,
        "plugin": info.plugin,
        "distribution": info.distribution,
        "version": info.version,
        "summary": spec.summary,
        "paper": spec.paper,
        "capabilities": sorted(spec.capabilities),
        "target": spec.target,
    }
    if info.alias is None:
        return row | {"aliases": list(info.aliases)}
    return row | {"alias_of": spec.name, "preset": dict(info.alias.preset), "preset_text": info.alias.preset_text}


def _summary(row: dict[str, Any]) -> str:
    if "alias_of" not in row:
        return str(row["summary"])
    return f"= {row['alias_of']}({row['preset_text']})" if row["preset"] else f"= {row['alias_of']}"
