"""Times what a launch of a Triton kernel costs the host, in microseconds: by Triton's ways, and by hbcore's.

    python benchmarks/launching.py --out benchmarks/results/NAME.json

The kernel is that which splits two stacks of matrices into float16 parts (:mod:`hbcore.rules.products_kernel`), on matrices so
small that the device is done before the host has launched the next one:

* ``jit``: ``kernel[grid](...)``, which looks the compiled kernel up by its arguments;
* ``compiled``: ``compiled[grid](...)`` with tensors, whose addresses it asks for;
* ``addresses``: the same with addresses;
* ``direct``: :func:`hbcore.rules.direct_launch.launcher_of`;
* ``run``: :func:`hbcore.rules.launching.run`, which looks the launcher up and asks for the addresses;
* ``driver``: the driver's function alone; null if Triton's launcher was not understood, and then ``direct`` is ``addresses``;
* ``torch``: an operation of torch on one of these tensors, for comparison.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from hbcore.rules import direct_launch, launching
from hbcore.rules.parts import EXPONENTS
from hbcore.rules.products_kernel import BLOCK, PIECES, split_kernel

COUNT, ROWS = 2, 32
"""How many matrices, and their size."""

START = 8
"""Where the largest magnitudes begin, after the scales of two stacks."""

GRID, WARPS = (1, 2 * COUNT, 1), 8
LAUNCHES, WINDOWS = 200, 50


def tensors() -> tuple[torch.Tensor, ...]:
    """What the kernel reads and writes."""
    a, b = (torch.randn(COUNT, ROWS, ROWS, device="cuda") for _ in range(2))
    parts = [torch.empty(COUNT, 2 * ROWS, ROWS, device="cuda", dtype=torch.float16) for _ in range(2)]
    return a, b, *parts, torch.ones(START + 2 * COUNT * PIECES, device="cuda")


def ways() -> dict[str, Callable[[], Any] | None]:
    """What is timed."""
    given = tensors()
    sizes = (ROWS * ROWS, ROWS * ROWS, ROWS * ROWS, ROWS * ROWS, COUNT, 0, START // 2, START)
    constants = (PIECES, 0, 0, *EXPONENTS, BLOCK)
    whole, addresses = (*given, *sizes, *constants), (*(t.data_ptr() for t in given), *sizes, *constants)
    kernel: Any = split_kernel
    compiled = kernel.warmup(*whole, grid=GRID, num_warps=WARPS, num_stages=3)
    device = torch.cuda.current_device()
    launcher = direct_launch.launcher_of(compiled, device)
    return {
        "jit": lambda: kernel[GRID](*whole, num_warps=WARPS, num_stages=3),
        "compiled": lambda: compiled[GRID](*whole),
        "addresses": lambda: compiled[GRID](*addresses),
        "direct": lambda: launcher(GRID, addresses),
        "run": lambda: launching.run(kernel, GRID, given, (), sizes, constants, num_warps=WARPS),
        "driver": driver_call(compiled, device, addresses),
        "torch": lambda: given[0].mul_(1.0),
    }


def driver_call(compiled: Any, device: int, arguments: tuple[Any, ...]) -> Callable[[], Any] | None:
    """The driver's function with all of its arguments."""
    try:
        launch, middle, together = direct_launch._passed_on(compiled)
    except Exception:
        return None
    rest = (arguments,) if together else arguments
    passed = (*GRID, torch.cuda.current_stream(device).cuda_stream, compiled.function, *middle, *rest)
    return lambda: launch(*passed)


def window(call: Callable[[], Any]) -> float:
    """Microseconds of the host for one call, over a window of calls that starts with nothing in the device's queue."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(LAUNCHES):
        call()
    return (time.perf_counter() - start) / LAUNCHES * 1e6


def main() -> None:
    """Measure in turns, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    calls = ways()
    known = {name: call for name, call in calls.items() if call is not None}
    for call in known.values():
        window(call)
    times: dict[str, list[float]] = {name: [] for name in known}
    for _ in range(WINDOWS):
        for name, call in known.items():
            times[name].append(window(call))
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "microseconds": {name: round(statistics.median(times[name]), 2) if name in times else None for name in calls},
    }
    print(json.dumps(result["microseconds"]))
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
