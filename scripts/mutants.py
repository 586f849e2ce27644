"""Break the engine in small ways, one at a time, and see which of them the tests notice.

    python scripts/mutants.py --count 40 --seed 0       prints the survivors, and how many were killed
    python scripts/mutants.py --json                    the same as JSON

A mutant is the engine with one small change: a comparison flipped, ``and`` for ``or``, a condition negated, a ``not`` dropped,
an integer plus 1, an arithmetic operator swapped, a call or an augmented assignment left out. It is killed if a test fails,
crashes or takes too long, and survives otherwise. A survivor is a hole in the tests, or changes nothing that anybody could see
(an equivalent mutant), or is in code that does not run here, such as a GPU's; a person has to judge. The changes are made
to a temporary copy, never to the checkout.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import queue
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from code_hash import ROOT

ENGINE = "hbcore/engine"

CORE = (
    "tracing input_errors replans refreshes old_slots split palm parallel checkpoints ema oracles host_scalars schedulers "
    "state complex matrix_chains bound_rules user_faults contract gradient_release fallback triton_codegen stacks scalar_slots "
    "draws backends rule_refresh rule_errors idle_options flat newton offload offloaded offload_streams"
)
RULES = (
    "soap/test_soap_rule muon/test_muon_adamw muon/test_scion psgd/test_kron "
    "adam/test_sparse_steps adam/test_sam adam/test_rules adam/test_option_effects"
)
SLOW = "inductor outside_the_vocabulary compiles_all whole_chunks are_read_element spill 64_bits one_source sgd- 50]"
"""Words in the names of tests that compile C++ or machine code, or say little that faster ones do not say."""
TESTS = (
    *(f"tests/core/test_{name}.py" for name in CORE.split()),
    *(f"tests/{name}.py" for name in RULES.split()),
    *("-k", f"not ({' or '.join(SLOW.split())})"),
)
"""What pytest gets: tests that know the engine, and take a minute or two together."""

FLIPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
SWAPPED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change to one file: the bytes from ``start`` to ``end`` become ``new``."""

    file: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def __str__(self) -> str:
        old, new = (textwrap.shorten(text, 120, placeholder=" ...") for text in (self.old, self.new))
        return f"{self.file}:{self.line}: {old} -> {new}"

    def apply(self, source: str) -> str:
        """The file with the change."""
        text = source.encode()
        return (text[: self.start] + self.new.encode() + text[self.end :]).decode()


def mutants(source: str, file: str = "") -> list[Mutant]:
    """Every mutant of ``source``, in the order of its text; ``file`` is only handed on."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node in _running(ast.parse(source)):
        for old, new in _changes(node):
            assert old.end_lineno is not None and old.end_col_offset is not None
            start, end = starts[old.lineno - 1] + old.col_offset, starts[old.end_lineno - 1] + old.end_col_offset
            text = ast.unparse(new) if isinstance(new, ast.stmt) else f"({ast.unparse(new)})"
            found.append(Mutant(file, old.lineno, start, end, ast.unparse(old), text))
    return sorted(found, key=lambda m: (m.start, m.end, m.new))


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """``node`` and what is below it, without what does not run or only makes text: annotations, messages, f-strings."""
    if isinstance(node, (ast.Raise, ast.JoinedStr)):
        return
    unseen = {"annotation", "returns"}
    if isinstance(node, ast.Assert):
        unseen.add("msg")
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        unseen |= {"test", "body"}
    else:
        yield node
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if field not in unseen and isinstance(child, ast.AST):
                yield from _running(child)


def _changes(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, ast.AST]]:
    """What may be changed at ``node`` itself: what stands there, and what could stand there instead."""
    match node:
        case ast.Compare(left, ops, right):
            for i, op in enumerate(ops):
                yield node, ast.Compare(left, [*ops[:i], FLIPPED[type(op)](), *ops[i + 1 :]], right)
        case ast.BoolOp(op, values):
            yield node, ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.UnaryOp(ast.Not(), operand):
            yield node, operand
        case ast.Constant(int(value)) if not isinstance(value, bool):
            yield node, ast.Constant(value + 1)
        case ast.BinOp(left, op, right) if type(op) in SWAPPED and not (_is_sequence(left) or _is_sequence(right)):
            yield node, ast.BinOp(left, SWAPPED[type(op)](), right)
        case ast.Expr(ast.Call()) | ast.AugAssign():
            yield node, ast.Pass()
        case ast.If(test) | ast.While(test) | ast.IfExp(test):
            yield from _negated(test)
        case ast.comprehension(_, _, conditions):
            for condition in conditions:
                yield from _negated(condition)


def _negated(test: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """The opposite of a condition, unless flipping its one operator says that already."""
    ordered = isinstance(test, ast.Compare) and isinstance(test.ops[0], (ast.Lt, ast.LtE, ast.Gt, ast.GtE))
    if ordered or not isinstance(test, (ast.Compare, ast.UnaryOp)):
        yield test, ast.UnaryOp(ast.Not(), test)


def _is_sequence(node: ast.expr) -> bool:
    """Whether text or a list is written there: swapping its operator raises, which tells nothing about the tests."""
    if isinstance(node, ast.BinOp):
        return _is_sequence(node.left) or _is_sequence(node.right)
    text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return text or isinstance(node, (ast.JoinedStr, ast.List, ast.ListComp, ast.Tuple))


def tests_pass(tree: Path, arguments: Sequence[str], limit: float) -> bool:
    """Run pytest in ``tree``, a copy of the checkout, for ``limit`` seconds at most; what it prints goes to tests.log there.

    The copy's packages come before the installed ones. The tests see no GPU, so that Triton's interpreter runs its kernels.
    """
    packages = [tree, *tree.glob("plugins/*/src")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(map(str, packages)), "HBCORE_CACHE_DIR": str(tree / "cache"),
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # two mutants of one second and one size would look alike
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    with (tree / "tests.log").open("w") as log:
        # A session of its own, so that what the tests start ends with them.
        process = subprocess.Popen(command, cwd=tree, env=environment, stdout=log, stderr=log, start_new_session=True)
        with contextlib.suppress(
            AttributeError, OSError
        ):  # a mutant may ask for memory without end, where only Linux bounds it
            resource.prlimit(process.pid, resource.RLIMIT_AS, (2**33, 2**33))  # the tests take one gigabyte
        try:
            return process.wait(limit) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def survey(
    count: int, seed: int, jobs: int = 1, *, root: Path = ROOT, folder: str = ENGINE, arguments: Sequence[str] = TESTS
) -> dict[str, Any]:
    """Try ``count`` mutants of the files in ``folder``, drawn with ``seed``, and say on stderr how each fares.

    ``jobs`` of them are tried at a time.

    Raises:
        RuntimeError: the tests do not pass on the code as it is.
    """
    files = {path.relative_to(root).as_posix(): path.read_text() for path in sorted((root / folder).rglob("*.py"))}
    everything = [mutant for file, source in files.items() for mutant in mutants(source, file)]
    chosen = random.Random(seed).sample(everything, min(count, len(everything)))
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary) / "copy"
        shutil.copytree(root, tree, ignore=_left_behind)
        started = time.monotonic()
        if not tests_pass(tree, arguments, 3600):
            raise RuntimeError(f"the tests fail without a mutant:\n{(tree / 'tests.log').read_text()[-2000:]}")
        limit = 60 + 4 * (time.monotonic() - started)
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for i in range(jobs):
            trees.put(tree if i == 0 else shutil.copytree(tree, tree.with_name(f"copy{i}")))

        def survives(mutant: Mutant) -> bool:
            tree = trees.get()
            (tree / mutant.file).write_text(mutant.apply(files[mutant.file]))
            survived = tests_pass(tree, arguments, limit)
            (tree / mutant.file).write_text(files[mutant.file])
            trees.put(tree)
            sys.stderr.write(f"{'SURVIVED' if survived else 'killed  '} {mutant}\n")  # in one piece, whatever others write
            sys.stderr.flush()
            return survived

        with ThreadPoolExecutor(jobs) as pool:
            survivors = [str(mutant) for mutant, survived in zip(chosen, pool.map(survives, chosen), strict=True) if survived]
    killed = len(chosen) - len(survivors)
    rate = round(killed / max(len(chosen), 1), 3)
    return {
        "possible": len(everything), "seed": seed, "count": len(chosen), "killed": killed, "rate": rate, "survivors": survivors,
    }  # fmt: skip


def _left_behind(folder: str, names: list[str]) -> set[str]:
    """What a copy of the checkout does without: what is hidden or built, and virtual environments."""
    built = {"build", "dist", "__pycache__"}
    return {n for n in names if n in built or n.startswith(".") or Path(folder, n, "pyvenv.cfg").exists()}


def main(arguments: list[str] | None = None) -> None:
    """Print what came of a sample."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=40, help="how many mutants to try (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="which sample to take (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, help="how many to try at a time (default: 1)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    chosen = parser.parse_args(arguments)
    result = survey(chosen.count, chosen.seed, chosen.jobs)
    if chosen.json:
        print(json.dumps(result, indent=2))
    else:
        print(*result["survivors"], sep="\n")
        print(f"{result['killed']} of {result['count']} killed ({result['rate']:.0%}), in a sample of {result['possible']}")


if __name__ == "__main__":
    main()
