"""What ``skip_nonfinite=True`` costs on a GPU: milliseconds a step with it and without, alternating.

python benchmarks/skip_nonfinite.py --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import hbcore
from hbcore.cli.bench.shapes import shapes_of

CASES = (("AdamW", "gpt2"), ("SFAdamW", "gpt2"), ("Muon", "gpt2_2d"))
STEPS, WINDOWS = 25, 8


def contender(name: str, shapes: str, skip: bool) -> Any:
    """An optimizer that has stepped ten times, its gradients kept."""
    generator = torch.Generator("cuda").manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, device="cuda", generator=generator) * 0.02) for s in shapes_of(shapes)]
    optimizer = hbcore.get(name)(params, lr=1e-4, consume_grad=False, skip_nonfinite=skip)
    for p in params:
        p.grad = torch.randn(p.shape, device="cuda", generator=generator)
    for _ in range(10):
        optimizer.step()
    return optimizer


def window(optimizer: Any) -> float:
    """Milliseconds a step, over a window of steps."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        optimizer.step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS * 1e3


def measure(name: str, shapes: str) -> dict[str, float]:
    """The median window of each."""
    both = {skip: contender(name, shapes, skip) for skip in (False, True)}
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(WINDOWS):
        for skip, optimizer in both.items():
            times[skip].append(window(optimizer))
    return {"without": round(statistics.median(times[False]), 4), "with": round(statistics.median(times[True]), 4)}


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    result = {
        "command": f"python {' '.join(sys.argv)}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "cases": {f"{name}:{shapes}": measure(name, shapes) for name, shapes in CASES},
    }
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["cases"], indent=2))


if __name__ == "__main__":
    main()
