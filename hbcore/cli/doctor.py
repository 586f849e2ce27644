"""``hbcore doctor``: reports what is installed and what is broken, and why. Works even in a badly broken environment."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import traceback
from collections.abc import Iterator
from typing import Any

from hbcore import __version__
from hbcore.cli import second_process, text

_COMPILERS = ("c++", "g++", "clang++", "cl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if anything is broken")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report. Returns 1 if ``--strict`` is given and a plugin, a name or torch is broken, else 0."""
    report = examine()
    if args.json:
        print(json.dumps(report, indent=2, default=repr))
    else:
        text.show(line for written in _lines(report) for line in _wrapped(written, text.width()))
    return 1 if args.strict and report["broken"] else 0


def examine() -> dict[str, Any]:
    """The whole report as plain data; ``broken`` lists the problems that make ``--strict`` fail.

    Everything that plugins declare is imported, in second processes, and manifests are watched for imports of torch.

    A missing GPU, C++ compiler or Triton is not a problem: the other backends give the same results.
    """
    facts = _probe()
    report: dict[str, Any] = {
        "versions": {
            "python": platform.python_version(),
            "hbcore": __version__,
            "torch": facts.get("torch") or _version("torch"),
            "triton": _version("triton"),
            "pluggy": _version("pluggy"),
        },
        "machine": {
            "platform": platform.platform(),
            "c++ compiler": _compiler(),
            "gpu": facts["gpu"],
            "triton": facts["triton"],
        },
    }
    broken = [f"torch does not work: {facts['torch_error']}"] if facts["torch_error"] else []
    report |= _plugins(broken, targets=not facts["torch_error"])
    report["broken"] = broken
    return report


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except Exception:  # absent, or its metadata is damaged; there is no version to show in either case
        return "not installed"


def _compiler() -> str:
    candidates = (os.environ.get("CXX", ""), *_COMPILERS)
    return next((path for name in candidates if name and (path := shutil.which(name))), "none on PATH")


def _probe() -> dict[str, str]:
    """Check torch and Triton in a second process, so that a crash of torch does not end this one."""
    printed, failure = second_process.python("probe.py")
    try:
        facts: dict[str, str] = json.loads(printed.splitlines()[-1])
        return facts
    except (IndexError, ValueError):
        reason = f"the process that imported it {failure or 'printed nothing'}"
    return {"torch": "", "torch_error": reason, "gpu": "unknown", "triton": "unknown"}


def _plugins(broken: list[str], targets: bool) -> dict[str, Any]:
    """Plugins, conflicts, shadows and blocked plugins; appends their problems to ``broken``."""
    empty: dict[str, Any] = {"plugins": [], "conflicts": [], "shadows": [], "blocked": []}
    try:
        from hbcore.cli import plugin_report
    except Exception as error:  # pluggy missing or damaged
        broken.append(f"cannot import hbcore's registry: {type(error).__name__}: {error}")
        return empty | {"registry_error": traceback.format_exc()}
    report, problems = plugin_report.examine(targets)
    broken += problems
    return report


def _lines(report: dict[str, Any]) -> Iterator[str]:
    for section in ("versions", "machine"):
        yield f"{section}:"
        yield from (f"  {key:<13} {value}" for key, value in report[section].items())
    yield "plugins:"
    for plugin in report["plugins"]:
        yield from _plugin_lines(plugin)
    if not report["plugins"]:
        yield "  none"
    if "registry_error" in report:
        yield from _indented(report["registry_error"])
    if report["conflicts"]:
        yield "conflicts:"
        yield from (f"  {conflict}" for conflict in report["conflicts"])
    if report["shadows"]:
        yield "names that lost to others:"
        yield from (f"  {shadow}" for shadow in report["shadows"])
    if report["blocked"]:
        yield "blocked:"
        yield from (f"  {b['name']} ({b['distribution']}), by {b['reason']}" for b in report["blocked"])
    yield "broken:" if report["broken"] else "nothing is broken"
    yield from (f"  {item}" for item in report["broken"])


def _plugin_lines(plugin: dict[str, Any]) -> Iterator[str]:
    yield f"  {plugin['name']}: {plugin['status']} ({plugin['distribution']} {plugin['version']}, {plugin['location']})"
    if plugin["status"] == "disabled":
        yield f"    failed at {plugin['phase']}: {plugin['cause']}"
        yield from _indented(plugin["traceback"])
        return
    yield f"    {plugin['optimizers']} optimizers, {plugin['aliases']} aliases, {plugin['codecs']} codecs"
    yield from (f"    note: {note}" for note in plugin["notes"])
    yield from (f"    problem: {problem}" for problem in plugin["problems"])


def _indented(lines: str) -> Iterator[str]:
    return (f"    {line}" for line in lines.splitlines())


def _wrapped(line: str, columns: int | None) -> Iterator[text.Line]:
    """A line of the report, broken at spaces; section titles are bold."""
    indent = " " * (len(line) - len(line.lstrip()))
    style = "" if indent else "bold"
    for part in text.wrapped(line.strip(), columns, indent, indent + "  ") if columns and len(line) > columns else [line]:
        yield [(part, style)]
