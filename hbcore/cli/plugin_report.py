"""The part of ``hbcore doctor`` about plugins: what each declares, and what of it does not work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hbcore import registry
from hbcore.cli.second_process import Answer, ask
from hbcore.registry import Plugin, PluginFailure
from hbcore.registry.discovery import installed
from hbcore.registry.loading import Entry


def examine(targets: bool) -> tuple[dict[str, Any], list[str]]:
    """The report's entries ``plugins``, ``conflicts``, ``shadows`` and ``blocked``, and a line for everything broken.

    Args:
        targets: whether to import what the plugins declare; pointless if torch does not work.
    """
    manifests, crashed = _manifests()
    for entry in crashed:
        registry.block(entry["name"])  # loading it here would end this process too
    working = registry.plugins()
    answers = ask([q for plugin in working for q in _questions(plugin)], [e["name"] for e in crashed]) if targets else {}
    plugins = [_working(plugin, manifests, answers) for plugin in working]
    broken = [f"plugin {p['name']} ({p['distribution']} {p['version']}): {text}" for p in plugins for text in p["problems"]]
    plugins += [*map(_failed, registry.failures()), *crashed]
    broken += [f"plugin {p['name']} ({p['distribution']} {p['version']}): {p['cause']}" for p in plugins if "cause" in p]
    conflicts = [str(conflict) for conflict in registry.conflicts()]
    blocked = [
        {"name": b.name, "distribution": b.distribution, "reason": b.reason}
        for b in registry.blocked()
        if b.name not in {entry["name"] for entry in crashed}
    ]
    shadows = [str(shadow) for shadow in registry.shadows()]
    return {"plugins": plugins, "conflicts": conflicts, "shadows": shadows, "blocked": blocked}, broken + conflicts


def _manifests() -> tuple[dict[str, Answer], list[dict[str, Any]]]:
    """What a process of its own says of each manifest, and the report's entries of those that ended their process."""
    points = [found for found in installed() if not isinstance(found, PluginFailure)]
    entries = {point.name: Entry(point) for point in points if not registry.reason_blocked(point.name)}
    answers = {name: ask([f"manifest {name}"])[f"manifest {name}"] for name in sorted(entries)}
    crashed = [
        {
            "name": name,
            "status": "disabled",
            "distribution": entries[name].distribution,
            "version": entries[name].version,
            "location": entries[name].location,
            "phase": "import",
            "cause": answer.problems[0],
            "traceback": "",
        }
        for name, answer in answers.items()
        if answer.ended
    ]
    return answers, crashed


def _questions(plugin: Plugin) -> Iterable[str]:
    """One question for each thing that is imported only when it is used."""
    yield from (f"optimizer {plugin.name}:{spec.name}" for spec in plugin.optimizers)
    missing = {alias.name for alias, _ in registry.dangling(plugin)}
    yield from (f"optimizer {plugin.name}:{a.name}" for a in plugin.aliases if a.preset and a.name not in missing)
    yield from (f"codec {plugin.name}:{codec.name}" for codec in plugin.codecs)
    yield f"migrations {plugin.name}"


def _working(plugin: Plugin, manifests: Mapping[str, Answer], answers: Mapping[str, Answer]) -> dict[str, Any]:
    health = registry.examine(plugin)
    found = [manifests.get(plugin.name, Answer()), *(answers.get(question, Answer()) for question in _questions(plugin))]
    problems = [*health.problems, *(text for answer in found for text in answer.problems)]
    return {
        "name": plugin.name,
        "status": "problem" if problems else "ok",
        "distribution": plugin.distribution,
        "version": plugin.version,
        "location": plugin.location,
        "optimizers": len(plugin.optimizers),
        "aliases": len(plugin.aliases),
        "codecs": len(plugin.codecs),
        "notes": health.notes,
        "problems": problems,
    }


def _failed(failure: PluginFailure) -> dict[str, Any]:
    return {
        "name": failure.entry,
        "status": "disabled",
        "distribution": failure.distribution,
        "version": failure.version,
        "location": failure.location,
        "phase": failure.phase,
        "cause": failure.cause,
        "traceback": failure.traceback,
    }
