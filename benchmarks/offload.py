"""What ``offload="cpu"`` costs on a GPU: milliseconds a step, beside what the copies alone would take.

python benchmarks/offload.py --out benchmarks/results/NAME.json [--shapes gpt2] [--optimizers AdamW]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hbcore
from hbcore.cli.bench.shapes import shapes_of

STEPS, WINDOWS, COMPARED = 10, 7, 5
BLOCK, BLOCKS = 32 << 20, 16
"""The copies that bandwidth is measured with: as large as a share of state, several to a window."""


def contender(name: str, shapes: str, **options: Any) -> tuple[list[torch.nn.Parameter], Any]:
    """Parameters with gradients, which are kept, and their optimizer."""
    generator = torch.Generator("cuda").manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, device="cuda", generator=generator) * 0.02) for s in shapes_of(shapes)]
    optimizer = hbcore.get(name)(params, lr=1e-4, consume_grad=False, **options)
    for p in params:
        p.grad = torch.randn(p.shape, device="cuda", generator=generator)
    return params, optimizer


def timed(run: Callable[[], Any], repeats: int) -> float:
    """Seconds a call, over a window of calls."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


class Copies:
    """Pinned and device memory, and copies between them: each way alone, and both at once, on a stream each."""

    def __init__(self) -> None:
        self.host = [torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True) for _ in range(2 * BLOCKS)]
        self.here = [torch.empty(BLOCK, dtype=torch.uint8, device="cuda") for _ in range(2 * BLOCKS)]
        self.streams = [torch.cuda.Stream(), torch.cuda.Stream()]

    def run(self, ways: tuple[int, ...]) -> None:
        """Copy: 0 is to the device, 1 to the host."""
        for i in range(BLOCKS):
            for way in ways:
                pair = (self.here[i], self.host[i]) if way == 0 else (self.host[BLOCKS + i], self.here[BLOCKS + i])
                with torch.cuda.stream(self.streams[way]):
                    pair[0].copy_(pair[1], non_blocking=True)

    def bandwidth(self, *ways: int) -> float:
        """Bytes a second, of each way."""
        self.run(ways)
        return BLOCK * BLOCKS / statistics.median(timed(lambda: self.run(ways), 2) for _ in range(WINDOWS))


def measure(name: str, shapes: str) -> dict[str, Any]:
    """One optimizer with state on the device and in host memory; what is compared with what is said in the README."""
    copies = Copies()
    to_device, to_host = copies.bandwidth(0), copies.bandwidth(1)
    both = copies.bandwidth(0, 1)
    (expected, plain), (params, away) = contender(name, shapes), contender(name, shapes, offload="cpu")
    for _ in range(COMPARED):
        plain.step()
        away.step()
    equal = all(map(torch.equal, params, expected))
    times: dict[str, list[float]] = {"on the device": [], "offloaded": []}
    for _ in range(WINDOWS):
        times["on the device"].append(timed(plain.step, STEPS) * 1e3)
        times["offloaded"].append(timed(away.step, STEPS) * 1e3)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    away.step()
    moved = sum(t.nbytes for slots in away.state.values() for n, t in slots.items() if n != "step" and t.is_pinned())
    step = statistics.median(times["offloaded"])
    one_after_the_other = moved * (1 / to_device + 1 / to_host) * 1e3
    at_once = moved / both * 1e3
    return {
        "parameters": sum(p.numel() for p in params),
        "bytes_each_way": moved,
        "gigabytes_a_second": {
            "to the device": round(to_device / 1e9, 2),
            "to the host": round(to_host / 1e9, 2),
            "each way, both at once": round(both / 1e9, 2),
        },
        "milliseconds": {k: round(statistics.median(v), 3) for k, v in times.items()},
        "all_milliseconds": {k: [round(x, 3) for x in v] for k, v in times.items()},
        "milliseconds_of_copies": {"one after the other": round(one_after_the_other, 3), "at once": round(at_once, 3)},
        "ratio": {"one after the other": round(step / one_after_the_other, 4), "at once": round(step / at_once, 4)},
        "peak_bytes_within_a_step": torch.cuda.max_memory_allocated() - before,
        "weights_equal_after_5_steps": equal,
    }


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=["gpt2"])
    parser.add_argument("--optimizers", nargs="+", default=["AdamW"])
    given = parser.parse_args()
    result = {
        "command": f"python {' '.join(sys.argv)}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "cases": {f"{name}:{shapes}": measure(name, shapes) for name in given.optimizers for shapes in given.shapes},
    }
    given.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["cases"], indent=2))


if __name__ == "__main__":
    main()
