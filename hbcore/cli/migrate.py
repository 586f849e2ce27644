"""``hbcore migrate IN OUT --to NAME``: another library's optimizer checkpoint as one of hbcore's."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbcore.cli import text
from hbcore.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from hbcore.migrate.apply import Migrated
    from hbcore.migrate.source import Note

KINDS = {
    "mapped": "mapped",
    "assumed": "assumed, because the checkpoint does not tell",
    "dropped": "left out",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "source", metavar="IN", help="a file that torch.save wrote: an optimizer's state dict, or what contains it"
    )
    parser.add_argument("out", metavar="OUT", nargs="?", help="the file to write; the rest of IN is copied to it")
    parser.add_argument("--to", metavar="NAME", help="the optimizer to convert it for; by default, what the checkpoint tells")
    parser.add_argument("--from", metavar="LIBRARY", dest="library", help="the library that saved it, if it is not recognised")
    parser.add_argument("--key", metavar="A.B", help="where the optimizer's state dict is in the file: 'optimizer_states.0'")
    parser.add_argument("--option", metavar="KEY=VALUE", action="append", default=[], help="an argument of the optimizer")
    parser.add_argument(
        "--model", metavar="FILE", help="the model's state dict: for names and shapes, and state that needs weights"
    )
    parser.add_argument("--model-key", metavar="A.B", help="where that is in FILE")
    parser.add_argument("--dry-run", action="store_true", help="report what would be done, and write nothing")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")
    parser.add_argument("--json", metavar="FILE", help="write the report to FILE as JSON; '-' prints it instead of the text")


def run(args: argparse.Namespace) -> int:
    """Convert the file, and report what became of every entry.

    Raises:
        CheckpointError: a file cannot be read or written, or the state dict cannot be converted; nothing is written then.
        HbcoreError: the optimizer's name or arguments are wrong.
        ModuleNotFoundError: torch is not installed.
    """
    if args.out is None and not args.dry_run:
        raise OptionError("name the file to write, or pass --dry-run")
    from hbcore.migrate import files
    from hbcore.migrate.apply import migrate

    if args.out is not None and not args.dry_run:
        files.check_free(args.out, args.force)
    found = files.find(files.read(args.source), args.key)
    weights = _weights(args, found.state_dict) if args.model else None
    done = migrate(found.state_dict, args.to, args.library, _options(args.option), weights)
    if not args.dry_run:
        files.write(args.out, files.replaced(found, done.state_dict), args.force)
    _report(args, done)
    return 0


def _options(words: Sequence[str]) -> dict[str, Any]:
    from hbcore.cli.compare.options import parse_value

    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise OptionError(f"--option: expected KEY=VALUE, got {word!r}")
        options[key] = parse_value(value)
    return options


def _weights(args: argparse.Namespace, state_dict: Any) -> Any:
    from hbcore.migrate import files, plain, sources, weights

    content = files.read(args.model)
    if args.model_key:
        content = files.find(content, args.model_key).state_dict
    plain.check(content if isinstance(content, dict) else {})
    source = sources.named(args.library) if args.library else sources.recognise(state_dict)
    plain.check(state_dict)
    described = source.describe(state_dict)
    return weights.arranged(content, described.shapes, described.names)


def _report(args: argparse.Namespace, done: Migrated) -> None:
    facts = {
        "source": done.source,
        "optimizer": done.optimizer,
        "options": done.options,
        "written": None if args.dry_run else str(args.out),
        "notes": [note._asdict() for note in done.notes],
    }
    if args.json == "-":
        print(json.dumps(facts, indent=2, default=repr))
        return
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(facts, indent=2, default=repr) + "\n", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"--json {args.json}: {error.strerror or error}.") from None
    text.show(_lines(args, done, text.width()))
    sys.stdout.flush()


def _lines(args: argparse.Namespace, done: Migrated, columns: int | None) -> Iterator[text.Line]:
    built = ", ".join(f"{k}={v!r}" for k, v in done.options.items())
    what = "would become" if args.dry_run else "is now"
    where = "" if args.dry_run else f" in {args.out}"
    yield from text.paragraph(f"{args.source}, by {done.source}, {what} {done.optimizer}'s{where}", columns, "bold")
    yield from text.paragraph(f"resume with {done.optimizer}(params{', ' if built else ''}{built})", columns)
    for kind, title in KINDS.items():
        notes: list[Note] = [note for note in done.notes if note.kind == kind]
        if notes:
            yield []
            yield from text.paragraph(f"{title}:", columns, "bold")
            yield from text.table([(note.where, "", note.what) for note in notes], columns)
