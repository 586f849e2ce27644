"""``hbcore new-plugin NAME``: a package to publish, with one optimizer that works, its tests and its CI. Imports no torch.

The files are made of ``templates/``, with :class:`string.Template`'s placeholders: those in ``common``, with the rule and the
oracle of the chosen kind.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from importlib.util import find_spec
from keyword import iskeyword
from pathlib import Path
from string import Template
from typing import NamedTuple

from hbcore import __version__, registry
from hbcore import api as public
from hbcore.api import API_VERSION
from hbcore.errors import OptionError
from hbcore.registry import blocks, hints
from hbcore.registry.spec import fold, split


class Kind(NamedTuple):
    """What a new package begins with: a small rule from a paper, which its author replaces."""

    sees: str
    summary: str
    paper: str
    capability: str


KINDS = {
    "elementwise": Kind(
        "one element at a time",
        "Steps of one size along the sign of the momentum",
        "Bernstein et al. 2018, arXiv:1802.04434",
        "capturable",
    ),
    "tensor": Kind(
        "reductions over one parameter",
        "Momentum, divided by its norm",
        "Cutkosky and Mehta 2020, arXiv:2002.03305",
        "capturable",
    ),
    "matrix": Kind(
        "whole matrices",
        "Adam with one second moment for each row",
        "Zhang et al. 2024, arXiv:2406.16793",
        "matrix",
    ),
}
LONGEST = 40
"""Of a name, lest generated lines grow longer than the package's own linter allows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", metavar="NAME", help="the package: a lower-case identifier, such as hb_signum")
    parser.add_argument("--optimizer", metavar="CLASS", help="the optimizer's class; by default made of NAME: Signum")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path(), help="where NAME/ is made; by default, here")
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default="elementwise",
        help="what the rule sees: " + "; ".join(f"{name}, {kind.sees}" for name, kind in KINDS.items()),
    )
    parser.add_argument("--author", help="the holder of the copyright; by default, git's user.name")


def run(args: argparse.Namespace) -> int:
    """Write the package and print the next commands.

    Raises:
        OptionError: a name cannot be used, the folder is not empty, or it cannot be written.
    """
    module = _module(args.name)
    optimizer = args.optimizer or "".join(map(str.capitalize, module.removeprefix("hb_").split("_")))
    _check_package(args.name)
    _check_optimizer(optimizer)
    made = _write(args.out, args.name, _contents(args.name, module, optimizer, args.kind, _author(args.author, args.name)))
    print(f"{made} provides {optimizer}; the rule is {made / 'src' / args.name / module}.py. Next:\n")
    print(f'    cd {shlex.quote(str(made))}\n    {Path(sys.executable).name} -m pip install -e ".[dev]"\n    pytest')
    return 0


def _module(package: str) -> str:
    """The module of the rule: the package's name without ``hb_`` where that is a name of its own."""
    stem = package.removeprefix("hb_")
    return stem if re.fullmatch(r"[a-z][a-z0-9_]*", stem) and not iskeyword(stem) and stem != "plugin" else package


def _check_package(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]", name) or iskeyword(name) or len(name) > LONGEST:
        raise OptionError(
            f"{name!r} cannot name a package; choose 2 to {LONGEST} lower-case letters, digits and underscores: hb_signum"
        )
    known = {"hbcore", "plugin", *hints.FAMILIES, *hints.CODECS, *sys.stdlib_module_names}
    others = (
        [p.name for p in registry.plugins()] + [f.entry for f in registry.failures()] + [b.name for b in registry.blocked()]
    )
    if fold(name) in map(fold, [*known, *others]) or _installed(name):
        raise OptionError(f"{name!r} would hide a package or plugin of that name; choose another name")


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        spec = find_spec(name)
        return spec is not None and spec.origin is not None  # a folder without a package has no origin
    return True


def _check_optimizer(name: str) -> None:
    if not re.fullmatch(r"[A-Z][A-Za-z0-9_]*", name) or iskeyword(name) or len(name) > LONGEST:
        raise OptionError(
            f"{name!r} cannot name an optimizer; pass --optimizer with a capital, then up to {LONGEST - 1} letters, digits or "
            "underscores: --optimizer Signum"
        )
    if name in {
        *public.__all__,
        "Any",
        "Tensor",
        "Array",
        "OPTIONS",
        "SHAPES",
        "STEPS",
        "Callable",
        "NDArray",
        "TYPE_CHECKING",
    }:
        raise OptionError(f"the package's own modules use the name {name!r}; pass another one with --optimizer")
    taken = {split(n)[1]: f"plugin {registry.info(n).plugin}" for n in registry.list_optimizers(aliases=True)}
    taken |= {fold(n): family for family, names in hints.FAMILIES.items() for n in names}
    taken |= {fold(n): "hbcore" for n in blocks.NAMES}
    if owner := taken.get(fold(name)):
        raise OptionError(f"{owner} has an optimizer {name!r}; pass another name with --optimizer")


def _author(given: str | None, package: str) -> str:
    """The holder of the copyright, in one line."""
    if given is None:
        try:
            done = subprocess.run(["git", "config", "user.name"], capture_output=True, encoding="utf-8", timeout=10)
            given = done.stdout if done.returncode == 0 else ""
        except (OSError, ValueError, subprocess.TimeoutExpired):
            given = ""
    author = " ".join(given.split()) or f"the authors of {package}"
    if not author.isprintable():
        raise OptionError(f"--author {author!r} has characters that cannot be printed; pass a name in one line")
    return author


def _contents(package: str, module: str, optimizer: str, kind: str, author: str) -> dict[str, str]:
    """Path in the package -> text."""
    values = {
        **KINDS[kind]._asdict(),
        "package": package,
        "module": module,
        "optimizer": optimizer,
        "author": author,
        "author_toml": json.dumps(author, ensure_ascii=False),  # a TOML string is written as a JSON one
        "year": str(datetime.date.today().year),
        "api": repr(API_VERSION),
        "requirement": requirement(__version__),
    }
    values["oracle"] = _template(f"{kind}/oracle.py").substitute(values)
    source = f"src/{package}"
    templates = {
        "pyproject.toml": "common/pyproject.toml",
        "README.md": "common/README.md",
        "LICENSE": "common/LICENSE",
        ".gitignore": "common/gitignore",
        ".github/workflows/ci.yml": "common/ci.yml",
        f"{source}/__init__.py": "common/init.py",
        f"{source}/plugin.py": "common/plugin.py",
        f"{source}/{module}.py": f"{kind}/rule.py",
        f"tests/test_{module}.py": "common/test.py",
    }
    return {f"{source}/py.typed": "", **{path: _template(name).substitute(values) for path, name in templates.items()}}


def _template(name: str) -> Template:
    return Template(files("hbcore.cli").joinpath("templates", *f"{name}.tmpl".split("/")).read_text(encoding="utf-8"))


def requirement(version: str) -> str:
    """The range of hbcore's versions for a package that was written for this one: what has the same API, by its promise."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return f"hbcore>={major}.{minor},<{f'{major}.{minor + 1}' if major == 0 else major + 1}"


def _write(out: Path, name: str, contents: dict[str, str]) -> Path:
    """Write all files beside their place, and move them there together."""
    target = out / name
    if not out.is_dir():
        raise OptionError(f"--out {out} is not a folder")
    if os.path.lexists(target) and not (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
        raise OptionError(f"{target} exists and is not an empty folder; choose another name, or another folder with --out")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=out) as beside:
            made = Path(beside) / name  # not the temporary folder itself, which nobody else may read
            for path, text in contents.items():
                (made / path).parent.mkdir(parents=True, exist_ok=True)
                (made / path).write_text(text, encoding="utf-8", newline="\n")
            if target.exists():
                target.rmdir()
            made.rename(target)
    except OSError as error:
        raise OptionError(f"{target} cannot be written: {error}") from error
    return target
