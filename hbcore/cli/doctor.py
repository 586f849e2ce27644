"""``hbcore doctor``: reports what is installed and what is broken, and why. Works even in a badly broken environment."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hbcore import __version__

PROBE_SECONDS = 120  # the first import of torch from a cold network disk is slow
_COMPILERS = ("c++", "g++", "clang++", "cl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if anything is broken")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report. Returns 1 if ``--strict`` is given and a plugin, a name or torch is broken, else 0."""
    report = examine()
    print(json.dumps(report, indent=2, default=repr) if args.json else "\n".join(_lines(report)))
    return 1 if args.strict and report["broken"] else 0


def examine() -> dict[str, Any]:
    """The whole report as plain data; ``broken`` lists the problems that make ``--strict`` fail.

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
    report |= _registry_report(broken)
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
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(Path(__file__).with_name("probe.py"))]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROBE_SECONDS)
        facts: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        return facts
    except subprocess.TimeoutExpired:
        reason = f"the import took more than {PROBE_SECONDS} s"
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        reason = f"the process that imported it exited with status {done.returncode}: {last}"
    except OSError as error:
        reason = f"cannot start a second process: {error}"
    return {"torch": "", "torch_error": reason, "gpu": "unknown", "triton": "unknown"}


def _registry_report(broken: list[str]) -> dict[str, Any]:
    """Plugins, conflicts and blocked plugins; appends their problems to ``broken``."""
    empty: dict[str, Any] = {"plugins": [], "conflicts": [], "blocked": []}
    try:
        from hbcore import registry
    except Exception as error:  # pluggy missing or damaged
        broken.append(f"cannot import hbcore's registry: {type(error).__name__}: {error}")
        return empty | {"registry_error": traceback.format_exc()}
    plugins: list[dict[str, Any]] = []
    for plugin in registry.plugins():
        health = registry.examine(plugin)
        broken += [f"plugin {plugin}: {problem}" for problem in health.problems]
        plugins.append(
            {
                "name": plugin.name,
                "status": "problem" if health.problems else "ok",
                "distribution": plugin.distribution,
                "version": plugin.version,
                "location": plugin.location,
                "optimizers": len(plugin.optimizers),
                "aliases": len(plugin.aliases),
                "codecs": len(plugin.codecs),
                "notes": health.notes,
                "problems": health.problems,
            }
        )
    for failure in registry.failures():
        broken.append(f"plugin {failure.entry} ({failure.distribution} {failure.version}): {failure.cause}")
        plugins.append(
            {
                "name": failure.entry,
                "status": "disabled",
                "distribution": failure.distribution,
                "version": failure.version,
                "location": failure.location,
                "phase": failure.phase,
                "cause": failure.cause,
                "traceback": failure.traceback,
            }
        )
    conflicts = [str(conflict) for conflict in registry.conflicts()]
    broken += conflicts
    blocked = [{"name": b.name, "distribution": b.distribution, "reason": b.reason} for b in registry.blocked()]
    return {"plugins": plugins, "conflicts": conflicts, "blocked": blocked}


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


def _indented(text: str) -> Iterator[str]:
    return (f"    {line}" for line in text.splitlines())
