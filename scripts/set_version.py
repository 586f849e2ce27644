"""The version of the six distributions, which ``hbcore/_version.py`` decides.

    python scripts/set_version.py            checks that every other place agrees
    python scripts/set_version.py 0.2.0      sets it everywhere, and the ranges with which they depend on each other
    python scripts/set_version.py --tag v0.2.0      checks, and that it is the version of this tag

A plugin is built alone, from its own folder, and so states the version itself.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from hbcore.cli.new_plugin import requirement

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = ("hb_adam", "hb_muon", "hb_psgd", "hb_soap", "hb_ecc")
SOURCE = "hbcore/_version.py"
VERSION = re.compile(r"\d+\.\d+\.\d+((a|b|rc)\d+)?")
STATED = re.compile(r'^(?P<before>(?:__version__|version) = ")(?P<text>[^"]*)(?P<after>")', flags=re.MULTILINE)
RANGE = re.compile(rf'(?P<before>"(?:hbcore|{"|".join(PLUGINS)}))(?P<text>[<>=][^"]*)(?P<after>")')


def main(words: list[str] | None = None, root: Path = ROOT) -> int:
    """Run the command; 1 if places disagree, or the tag is another version's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", nargs="?", help="set this one")
    parser.add_argument("--tag", help="a tag that must be the version's, v0.2.0")
    args = parser.parse_args(words)
    version = args.version or current(root)
    if not VERSION.fullmatch(version):
        parser.error(f"{version!r} is not a version such as 0.2.0 or 0.2.0rc1")
    if args.tag is not None and args.tag != f"v{version}":
        print(f"the tag {args.tag} is not v{version}, the version in {SOURCE}", file=sys.stderr)
        return 1
    changed = changes(version, root)
    if args.version:
        for path, text in changed.items():
            (root / path).write_text(text, encoding="utf-8")
    elif changed:
        print(f"not those of {SOURCE}, {version}: the versions or ranges in {', '.join(changed)}", file=sys.stderr)
        return 1
    return 0


def current(root: Path = ROOT) -> str:
    """The version that decides."""
    found = STATED.search((root / SOURCE).read_text(encoding="utf-8"))
    return found["text"] if found else ""


def changes(version: str, root: Path = ROOT) -> dict[str, str]:
    """Path -> new text, of the files that do not agree with ``version``.

    Raises:
        ValueError: a file does not state its version once.
    """
    allowed = requirement(version).removeprefix("hbcore")
    states = [SOURCE, "pyproject.toml"]
    states += [f"plugins/{name}/{path}" for name in PLUGINS for path in ("pyproject.toml", f"src/{name}/__init__.py")]
    depend = sorted(path.relative_to(root).as_posix() for path in root.glob("examples/*/pyproject.toml"))
    found = {}
    for path in (*states, *depend):
        text = new = (root / path).read_text(encoding="utf-8")
        if path in states:
            new, count = STATED.subn(rf"\g<before>{version}\g<after>", new)
            if count != 1:
                raise ValueError(f"{path} states its version {count} times")
        new = RANGE.sub(rf"\g<before>{allowed}\g<after>", new)
        if new != text:
            found[path] = new
    return found


if __name__ == "__main__":
    sys.exit(main())
