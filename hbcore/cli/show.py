"""``hbcore show NAME``: everything about one optimizer. Imports its class, and therefore torch."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterable
from typing import Any

from hbcore import registry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", metavar="NAME", help="an optimizer or alias, such as 'AdamW' or 'hb_adam:AdamW'")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--kernel", action="store_true", help="print the Triton kernels generated for float32 parameters")


def run(args: argparse.Namespace) -> int:
    """Print the description of the optimizer.

    Raises:
        RegistryError: the name is unknown or ambiguous, or its plugin is broken.
        ModuleNotFoundError: torch is not installed.
    """
    if args.kernel:
        cls = registry.resolve(args.name)
        from hbcore import introspect

        print("\n\n".join(introspect.kernels(cls)))
        return 0
    facts = _facts(args.name)
    print(json.dumps(facts, indent=2, default=repr) if args.json else _text(facts))
    return 0


def _facts(name: str) -> dict[str, Any]:
    info = registry.info(name)
    cls = registry.resolve(name)  # not get(): showing an alias must not warn about its use
    from hbcore import introspect  # after the registry: an unknown name fails without waiting for torch

    facts: dict[str, Any] = dict(introspect.describe(cls))
    facts |= {
        "name": info.name,
        "signature": f"{cls.__name__}{inspect.signature(cls)}",
        "summary": info.spec.summary,
        "paper": info.spec.paper,
        "capabilities": sorted(info.spec.capabilities),
        "target": info.spec.target,
        "plugin": info.plugin,
        "distribution": info.distribution,
        "version": info.version,
        "aliases": list(info.aliases),
    }
    if info.alias is not None:
        alias = info.alias
        facts |= {"asked_for": alias.name, "preset": dict(alias.preset), "preset_text": alias.preset_text}
    return facts


def _text(facts: dict[str, Any]) -> str:
    title = f"{facts['name']}: {facts['summary']}"
    if "asked_for" in facts:
        title = f"{facts['asked_for']} is another name for {facts['name']}({facts['preset_text']})\n\n{title}"
    pairs = [
        ("plugin", f"{facts['plugin']} ({facts['distribution']} {facts['version']}), {facts['target']}"),
        ("paper", facts["paper"]),
        ("aliases", ", ".join(facts["aliases"])),
        ("capabilities", ", ".join(facts["capabilities"])),
        ("chain", " -> ".join(facts["chain"])),
    ]
    state = f"state ({facts['bytes_per_parameter']:g} bytes per parameter)"
    parts = [
        title,
        facts["doc"],
        "\n".join(f"{key:<13} {value}" for key, value in pairs if value),
        facts["signature"],
        _table("hyperparameters", map(_hyperparameter, facts["hyperparameters"])),
        _table("options", ((o["name"], f"= {o['default']!r}", o["doc"]) for o in facts["options"])),
        _table(state, map(_slot, facts["slots"])),
    ]
    return "\n\n".join(part for part in parts if part)


def _hyperparameter(row: dict[str, Any]) -> tuple[str, str, str]:
    notes = [f"in {row['bounds']}" if row["bounds"] else "", "may be scheduled" if row["scheduled"] else ""]
    return row["name"], f"= {row['default']!r}", ", ".join(note for note in notes if note)


def _slot(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["name"], f"{row['dtype']}, {row['bytes_per_parameter']:g} B", f"of {row['transform']}"


def _table(title: str, rows: Iterable[tuple[str, str, str]]) -> str:
    """A heading and aligned columns; empty if there are no rows."""
    lines = list(rows)
    if not lines:
        return ""
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    body = (f"  {first:<{widths[0]}}  {second:<{widths[1]}}  {third}".rstrip() for first, second, third in lines)
    return "\n".join([f"{title}:", *body])
