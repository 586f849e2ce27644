"""Times optimizers whose steps differ, because some of them refresh a preconditioner: every single step, in turn.

    python benchmarks/refreshing.py 'SOAP' 'SOAP matmul_precision="split"' --shapes gpt2_2d --out result.json

Each contender is a name and options: those of hbcore, or with ``file.py:Class`` those of a peer. All are alive at once and
take turns of ``--turn`` steps; gradients move, as two sets of tensors take turns. With turns of one step each finds what its
host code needs displaced from the processor's caches by the others, which makes a step's host time up to twice as long.
Milliseconds:

* ``host``: until ``step()`` returned, with nothing in the device's queue before it;
* ``single``: the same until the device was done: median, mean and longest over all steps;
* ``window``: per step, twenty steps back to back.

``peak`` and ``state`` are bytes per parameter: what the worst step allocates on top of what there is, and what it leaves.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import hbcore
from hbcore.cli.bench.shapes import names_of, shapes_of

WARM = 12


class Contender:
    """An optimizer with its own parameters.

    Args:
        text: ``NAME option=value ...`` or ``file.py:Class option=value ...``.
        shapes: a set of shapes by name.
        device: where.
    """

    def __init__(self, text: str, shapes: str, device: str) -> None:
        self.text, self.device = text, device
        name, *given = text.split()
        options = {key: json.loads(value) for key, _, value in (word.partition("=") for word in given)}
        sizes = shapes_of(shapes)
        generator = torch.Generator(device=device).manual_seed(0)
        values, *self._grads = [[torch.randn(s, device=device, generator=generator) * 0.02 for s in sizes] for _ in range(3)]
        self.params = [torch.nn.Parameter(p) for p in values]
        self.numel = sum(p.numel() for p in self.params)
        self.rows: dict[str, list[float]] = {"host": [], "single": [], "window": []}
        self.turn, self.peak = 0, 0
        self.wait()
        before, start = self.allocated(), time.perf_counter()
        if ".py:" in name:
            self.optimizer = _peer(name)(self.params, **options)
        else:
            named = list(zip(names_of(sizes), self.params, strict=True))
            self.optimizer = hbcore.get(name)(named, **options)
        for step in range(WARM):
            self.step()
            self.wait()
            if not step:
                self.first = time.perf_counter() - start
        self.state = (self.allocated() - before) / self.numel

    def wait(self) -> None:
        """Until the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def allocated(self) -> int:
        """Bytes on the device."""
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0

    def feed(self) -> None:
        """Set the gradients whose turn it is."""
        for p, g in zip(self.params, self._grads[self.turn % 2], strict=True):
            p.grad = g
        self.turn += 1

    def step(self) -> None:
        """One step on the next gradients."""
        self.feed()
        self.optimizer.step()

    def timed(self) -> None:
        """One step by itself."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = self.allocated()
        self.feed()
        self.wait()
        start = time.perf_counter()
        self.optimizer.step()
        returned = time.perf_counter()
        self.wait()
        self.rows["host"].append((returned - start) * 1e3)
        self.rows["single"].append((time.perf_counter() - start) * 1e3)
        if self.device == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - before)

    def window(self) -> None:
        """Twenty steps back to back."""
        self.wait()
        start = time.perf_counter()
        for _ in range(20):
            self.step()
        self.wait()
        self.rows["window"].append((time.perf_counter() - start) * 50)

    def figures(self) -> dict[str, Any]:
        """What was measured."""
        single, host = self.rows["single"], self.rows["host"]
        return {
            "contender": self.text,
            "single_median": statistics.median(single),
            "single_mean": statistics.fmean(single),
            "single_longest": max(single),
            "host_median": statistics.median(host),
            "window": statistics.median(self.rows["window"]) if self.rows["window"] else None,
            "first_step_s": self.first,
            "peak": self.peak / self.numel,
            "state": self.state,
            "singles": [round(x, 3) for x in single],
            "hosts": [round(x, 3) for x in host],
        }


def _peer(text: str) -> Any:
    path, _, name = text.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def profile(contender: Contender, steps: int) -> list[dict[str, Any]]:
    """The kernels that take longest, in milliseconds a step."""
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CUDA if contender.device == "cuda" else kind.CPU]) as found:
        for _ in range(steps):
            contender.step()
        contender.wait()
    rows = [
        {"kernel": e.key[:90], "ms": round(e.self_device_time_total / 1e3 / steps, 3), "calls": round(e.count / steps, 1)}
        for e in found.key_averages()
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:25]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="+")
    parser.add_argument("--shapes", default="gpt2_2d")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--turn", type=int, default=20, help="single steps that a contender makes in a row")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS", help="also name the kernels that take longest")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    everyone = [Contender(text, arguments.shapes, arguments.device) for text in arguments.contenders]
    gc.collect()
    gc.disable()
    for start in range(0, arguments.steps, arguments.turn):
        for contender in everyone:
            for _ in range(min(arguments.turn, arguments.steps - start)):
                contender.timed()
    for _ in range(arguments.windows):
        for contender in everyone:
            contender.window()
    results = [contender.figures() for contender in everyone]
    for contender, row in zip(everyone, results, strict=True):
        if arguments.profile:
            row["kernels"] = profile(contender, arguments.profile)
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k not in ("singles", "hosts")}
        print(json.dumps(shown))
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    about = {
        "device": device,
        "torch": torch.__version__,
        "command": shlex.join(["python", *sys.argv]),
        "shapes": arguments.shapes,
    }
    assert all(math.isfinite(row["single_mean"]) for row in results)
    if arguments.out:
        arguments.out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
