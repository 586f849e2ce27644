"""``hbcore show NAME``: everything about one optimizer or codec. Imports its class, and therefore torch."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterator
from typing import Any

from hbcore import __version__, registry
from hbcore.cli import text
from hbcore.errors import OptionError, UnknownCodecError, UnknownOptimizerError
from hbcore.registry import blocks

STORAGE = ("ecc", "param_ecc", "storage_dtype", "offload")
"""The arguments that are options of an optimizer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", metavar="NAME", help="an optimizer, alias or codec: 'AdamW', 'hb_adam:AdamW', 'bf16+8'")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--ecc", metavar="CODEC", help="show the state that an optimizer has with this codec: 'bf16+8'")
    parser.add_argument("--param-ecc", metavar="CODEC", help="the same, with parameters stored by this codec")
    parser.add_argument("--storage-dtype", metavar="DTYPE", help="the same, with state in this dtype: 'bfloat16'")
    parser.add_argument("--offload", metavar="WHERE", help="the same, with state in host memory: 'cpu'")
    parser.add_argument("--kernel", action="store_true", help="print the Triton kernels generated for float32 parameters")


def run(args: argparse.Namespace) -> int:
    """Print the description of the optimizer or codec, or its kernels.

    Raises:
        RegistryError: the name is unknown or ambiguous, or its plugin is broken.
        OptionError: ``--kernel`` for a class that hbcore generates no kernel for, or a codec for what has no state of its own.
        ModuleNotFoundError: torch is not installed.
    """
    if args.kernel:
        sources = _kernels(args.name)
        print(json.dumps({"name": args.name, "kernels": sources}, indent=2) if args.json else "\n\n".join(sources))
        return 0
    given = {name: getattr(args, name) for name in STORAGE if getattr(args, name) is not None}
    facts = _facts(args.name, given)
    if args.json:
        print(json.dumps(facts, indent=2, default=repr))
    else:
        text.show(_lines(facts, text.width()))
    return 0


def _kernels(name: str) -> list[str]:
    block = blocks.find(name)
    if block is None and _codec(name) is not None:
        raise OptionError(f"--kernel: {name!r} is a codec, which becomes part of an optimizer's kernel; name an optimizer")
    cls = block.load() if block else registry.resolve(name)
    from hbcore import introspect

    return introspect.kernels(cls)


def _facts(name: str, given: dict[str, Any]) -> dict[str, Any]:
    block = blocks.find(name)
    codec = _codec(name) if block is None else None
    if given and (block or codec):
        raise OptionError(f"--{next(iter(given)).replace('_', '-')}: {name!r} is no single optimizer; name one")
    if block:
        return _block_facts(block)
    if codec is not None:
        return codec
    info = registry.info(name)
    cls = registry.resolve(name)  # not get(): showing an alias must not warn about its use
    from hbcore import introspect  # after the registry: an unknown name fails without waiting for torch

    described = introspect.is_described(cls)
    if given and not described:
        raise OptionError(f"--{next(iter(given)).replace('_', '-')}: {name!r} is not built on hbcore's engine")
    facts: dict[str, Any] = dict(introspect.describe(cls, **given) if described else introspect.outline(cls))
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


def _block_facts(block: blocks.CoreBlock) -> dict[str, Any]:
    """A class of the core: it is made of other optimizers or rules, and has no state of its own."""
    cls = block.load()
    from hbcore import introspect

    facts = dict(introspect.outline(cls))
    summary, _, facts["doc"] = (inspect.getdoc(cls) or "").partition("\n\n")
    return facts | {
        "signature": f"{cls.__name__}{inspect.signature(cls)}",
        "summary": " ".join(summary.split()),
        "paper": "",
        "capabilities": [],
        "target": f"{block.module}:{block.name}",
        "plugin": "hbcore",
        "distribution": "hbcore",
        "version": __version__,
        "aliases": blocks.aliases_of(block.name),
    }


def _codec(name: str) -> dict[str, Any] | None:
    """The facts of a codec; None if the name is an optimizer's, or nobody's."""
    try:
        registry.info(name)
        return None
    except UnknownOptimizerError:
        try:
            spec, owner = registry.codec_info(name)
        except UnknownCodecError:
            return None
    codec = registry.load_codec(name)()
    import torch

    from hbcore.state.blocks import BLOCK
    from hbcore.state.codec_choice import per_block_of

    shared = per_block_of(codec, "exp_avg")
    parts = codec.parts("exp_avg", torch.float32)
    sizes = {part: dtype.itemsize / BLOCK if part in shared else dtype.itemsize for part, dtype in parts.items()}
    return {
        "name": spec.name,
        "kind": "codec",
        "summary": spec.summary,
        "doc": (inspect.getdoc(type(codec)) or "").split("\n\n")[0],
        "target": spec.target,
        "plugin": owner.name,
        "distribution": owner.distribution,
        "version": owner.version,
        "rounds": bool(codec.rounds),
        "parts": [
            {"name": part, "dtype": str(dtype).removeprefix("torch."), "bytes_per_value": sizes[part]}
            for part, dtype in parts.items()
        ],
        "bytes_per_value": sum(sizes.values()),
        "use": f'ecc="{spec.name}"',
    }


def _lines(facts: dict[str, Any], columns: int | None) -> Iterator[text.Line]:
    """The description, sections separated by empty lines."""
    if "asked_for" in facts:
        yield from text.paragraph(f"{facts['asked_for']} is another name for {facts['name']}({facts['preset_text']})", columns)
        yield []
    yield from text.paragraph(f"{facts['name']}: {facts['summary']}", columns, "bold")
    for section in _codec_sections(facts, columns) if facts.get("kind") == "codec" else _sections(facts, columns):
        if lines := list(section):
            yield []
            yield from lines


def _origin(facts: dict[str, Any]) -> tuple[str, str]:
    return "plugin", f"{facts['plugin']} ({facts['distribution']} {facts['version']}), {facts['target']}"


def _codec_sections(facts: dict[str, Any], columns: int | None) -> Iterator[Iterator[text.Line]]:
    yield text.paragraph(facts["doc"], columns)
    noise = "stochastic, if the optimizer's option asks for it" if facts["rounds"] else "to nearest"
    yield text.pairs([_origin(facts), ("use", f"{facts['use']}, for an optimizer's state"), ("rounding", noise)], columns)
    rows = [(p["name"], f"{p['dtype']}, {p['bytes_per_value']} B", "") for p in facts["parts"]]
    yield _titled(f"a float32 slot 'exp_avg' is stored as ({facts['bytes_per_value']} bytes per value)", rows, columns)


def _sections(facts: dict[str, Any], columns: int | None) -> Iterator[Iterator[text.Line]]:
    yield text.docstring(facts["doc"], columns)
    rows = [
        _origin(facts),
        ("paper", facts["paper"]),
        ("aliases", ", ".join(facts["aliases"])),
        ("capabilities", ", ".join(facts["capabilities"])),
        ("chain", " -> ".join(facts["chain"])),
        ("note", facts.get("note", "")),
    ]
    yield text.pairs(rows, columns)
    yield text.paragraph(facts["signature"], columns, rest="    ")
    yield _titled("hyperparameters", map(_hyperparameter, facts["hyperparameters"]), columns)
    yield _titled("options", ((o["name"], f"= {o['default']!r}", o["doc"]) for o in facts["options"]), columns)
    title = f"state ({facts['bytes_per_parameter']:g} bytes per parameter)"
    yield _titled(title, map(_slot, facts["slots"]), columns)
    sizes = ((name, f"{size:g} B", "") for name, size in facts.get("memory", {}).items() if size)
    yield _titled("memory per parameter, of a 32 x 32 float32 matrix", sizes, columns)


def _titled(title: str, rows: Any, columns: int | None) -> Iterator[text.Line]:
    """A heading and a table; nothing if there are no rows."""
    if lines := list(text.table(rows, columns)):
        yield from text.paragraph(f"{title}:", columns, "bold")
        yield from lines


def _hyperparameter(row: dict[str, Any]) -> tuple[str, str, str]:
    notes = [f"in {row['bounds']}" if row["bounds"] else "", "may be scheduled" if row["scheduled"] else ""]
    value = row.get("default")
    shown = value.__qualname__ if inspect.isroutine(value) else repr(value)
    default = f"= {shown}" if "default" in row else "required"
    return row["name"], default, ", ".join(note for note in notes if note)


def _slot(row: dict[str, Any]) -> tuple[str, str, str]:
    rule = f"of {row['transform']}" if row["transform"] else ""
    rule += ", derived from the others and not saved" if row.get("derived") else ""
    return row["name"], f"{row['dtype']}, {row['bytes_per_parameter']:g} B", rule
