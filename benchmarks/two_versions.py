"""Times steps of two checkouts of hbcore in turn, on the same device, in one run.

    python benchmarks/two_versions.py OLD NEW --cases AdamW:gpt2 AdamW:qwen Muon:qwen2d --out result.json

OLD and NEW are folders of checkouts; ``.`` is this one. Each checkout has a process of its own, and both take turns round by
round, so that a clock that drifts drifts for both. Gradients move: two sets of tensors take turns from step to step. Figures
are milliseconds, the median over all rounds:

* ``host``: until ``step()`` returned, with nothing in the device's queue before it;
* ``single``: the same until the device was done;
* ``window``: per step, ten steps back to back, until the device was done.

``NAME:small100`` is a hundred parameters of 16 x 16, ``NAME:one64`` one of 64 x 64; the other sets are ``hbcore bench``'s.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SYNTHETIC = {"small100": [(16, 16)] * 100, "one64": [(64, 64)]}
PLUGINS = ("hb_adam", "hb_muon", "hb_psgd", "hb_soap", "hb_ecc")


class Worker:
    """One checkout's process.

    Args:
        root: the checkout.
        arguments: of the worker: device and backend.
    """

    def __init__(self, root: Path, arguments: list[str]) -> None:
        folders = [str(root), *(str(root / "plugins" / name / "src") for name in PLUGINS)]
        path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-W", "ignore", __file__, "--worker", *arguments]
        self._process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, question: str) -> Any:
        """Send a line, and read one of JSON."""
        assert self._process.stdin is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        return self.hear()

    def hear(self) -> Any:
        """Read a line of JSON."""
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("a worker ended before it answered")
        return json.loads(answer)


class Case:
    """An optimizer and two sets of gradients, after a dozen steps, on one core.

    Args:
        text: ``NAME:SHAPES``.
        device: ``"cuda"`` or ``"cpu"``.
        compile: the backend.
    """

    def __init__(self, text: str, device: str, compile: str) -> None:
        import torch

        import hbcore
        from hbcore.cli.bench.shapes import names_of, shapes_of

        self._wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
        name, _, shapes_name = text.partition(":")
        shapes = SYNTHETIC.get(shapes_name) or shapes_of(shapes_name)
        generator = torch.Generator(device=device).manual_seed(0)
        values, *self._grads = [[torch.randn(s, device=device, generator=generator) * 0.02 for s in shapes] for _ in range(3)]
        self._params = [torch.nn.Parameter(p) for p in values]
        named = list(zip(names_of(shapes), self._params, strict=True))
        self.optimizer = hbcore.get(name)(named, lr=1e-3, compile=compile)
        for turn in range(12):
            self._set_gradients(turn)
            self._wait()
            self.optimizer.step()
        if hasattr(os, "sched_setaffinity"):  # this thread alone, and both processes' on one core: cores differ
            os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})

    def _set_gradients(self, turn: int) -> None:
        for p, g in zip(self._params, self._grads[turn % 2], strict=True):
            p.grad = g

    def round(self, steps: int) -> dict[str, list[float]]:
        """Milliseconds of ``steps`` single steps and of one window of ten."""
        rows: dict[str, list[float]] = {"host": [], "single": [], "window": []}
        gc.disable()
        for turn in range(steps):
            self._set_gradients(turn)
            self._wait()
            start = time.perf_counter()
            self.optimizer.step()
            returned = time.perf_counter()
            self._wait()
            done = time.perf_counter()
            rows["host"].append((returned - start) * 1e3)
            rows["single"].append((done - start) * 1e3)
        start = time.perf_counter()
        for turn in range(10):
            self._set_gradients(turn)
            self.optimizer.step()
        self._wait()
        rows["window"].append((time.perf_counter() - start) * 1e2)
        gc.enable()
        return rows


def work(device: str, compile: str) -> None:
    """Answer questions on standard input: ``case NAME:SHAPES``, then ``round STEPS`` as often as asked."""
    import torch

    import hbcore

    named_device = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or device
    print(
        json.dumps({"hbcore": str(Path(hbcore.__file__).parent), "torch": torch.__version__, "device": named_device}),
        flush=True,
    )
    case: Case | None = None
    for line in sys.stdin:
        verb, _, rest = line.strip().partition(" ")
        if verb == "case":
            case = None  # frees the last one's memory first
            gc.collect()
            case = Case(rest, device, compile)
            print(json.dumps({"backend": case.optimizer.report.backend}), flush=True)
        elif case is not None:
            print(json.dumps(case.round(int(rest))), flush=True)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every case with both checkouts, in turn."""
    roots = {"old": Path(options.old), "new": Path(options.new)}
    workers = {name: Worker(root.resolve(), [options.device, options.compile]) for name, root in roots.items()}
    heard = {name: worker.hear() for name, worker in workers.items()}
    for name, root in roots.items():
        if Path(heard[name]["hbcore"]) != root.resolve() / "hbcore":
            raise SystemExit(f"{name} runs {heard[name]['hbcore']} and not the code in {root}")
    result: dict[str, Any] = {"python": platform.python_version(), "device": heard["new"]["device"], "cases": {}}
    result["torch"] = heard["new"]["torch"]
    for case in options.cases:
        backends = {name: worker.ask(f"case {case}")["backend"] for name, worker in workers.items()}
        rows: dict[str, dict[str, list[float]]] = {name: {"host": [], "single": [], "window": []} for name in workers}
        for _ in range(options.rounds):
            for name, worker in workers.items():
                for key, values in worker.ask(f"round {options.steps}").items():
                    rows[name][key] += values
        medians = {name: {key: round(statistics.median(v), 4) for key, v in of.items()} for name, of in rows.items()}
        ratios = {key: round(medians["new"][key] / medians["old"][key], 3) for key in medians["new"]}
        result["cases"][case] = {"backend": backends, **medians, "new/old": ratios}
        print(case, json.dumps(result["cases"][case]), flush=True)
    return result


def main() -> None:
    """Parse arguments, measure, write."""
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--cases", nargs="+", required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = {"command": " ".join(["python", "benchmarks/two_versions.py", *sys.argv[1:]]), **compare(options)}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
