"""What compressed state and parameters cost on a GPU: milliseconds a step, cases in turn, beside torch and FlashOptim.

python benchmarks/compressed.py --out benchmarks/results/NAME.json [--shapes square gpt2] [--only int8]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hbcore
from hbcore.cli.bench.shapes import shapes_of

STEPS, WINDOWS = 20, 9
PACKED = {"param_ecc": "bf16+8", "ecc": "bf16+8"}
EIGHT = {"param_ecc": "bf16+8", "ecc": "int8"}
CASES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "fp32": ("AdamW", torch.float32, {}),
    "fp32, ecc bf16+8": ("AdamW", torch.float32, {"ecc": "bf16+8"}),
    "fp32, ecc bf16+16": ("AdamW", torch.float32, {"ecc": "bf16+16"}),
    "fp32, ecc int8": ("AdamW", torch.float32, {"ecc": "int8"}),
    "fp32, storage bfloat16": ("AdamW", torch.float32, {"storage_dtype": "bfloat16"}),
    "bf16": ("AdamW", torch.bfloat16, {}),
    "bf16, stochastic": ("AdamW", torch.bfloat16, {"stochastic_rounding": True}),
    "bf16+8, ecc bf16+8": ("AdamW", torch.bfloat16, PACKED),
    "bf16+8, ecc bf16+8, stochastic": ("AdamW", torch.bfloat16, {**PACKED, "stochastic_rounding": True}),
    "bf16+8, ecc int8": ("AdamW", torch.bfloat16, EIGHT),
    "AdEMAMix bf16+8": ("AdEMAMix", torch.float32, {"ecc": "bf16+8"}),
    "SFAdamW bf16+8": ("SFAdamW", torch.float32, {"ecc": "bf16+8"}),
    "torch fused fp32": ("torch", torch.float32, {}),
    "FlashOptim": ("flash", torch.bfloat16, {}),
    "Muon": ("Muon", torch.float32, {}),
    "Muon, ecc int8": ("Muon", torch.float32, {"ecc": "int8"}),
}


def build(name: str, params: list[torch.nn.Parameter], options: dict[str, Any]) -> Any:
    """The optimizer of a case."""
    if name == "torch":
        return torch.optim.AdamW(params, lr=1e-4, fused=True)
    if name == "flash":
        import flashoptim

        return flashoptim.FlashAdamW(params, lr=1e-4)
    return hbcore.get(name)(params, lr=1e-4, consume_grad=False, **options)


class Contender:
    """An optimizer that has stepped ten times, its gradients kept; ``facts`` are its bytes and its first step's seconds."""

    def __init__(self, name: str, dtype: torch.dtype, options: dict[str, Any], shapes: str) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        made = [torch.randn(s, device="cuda", generator=generator) * 0.02 for s in shapes_of(shapes)]
        params = [torch.nn.Parameter(t.to(dtype)) for t in made]
        numel = sum(p.numel() for p in params)
        del made
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.optimizer = build(name, params, options)
        for p in params:
            p.grad = torch.randn(p.shape, device="cuda", generator=generator).to(p.dtype)
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.optimizer.step()
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        for _ in range(9):
            self.optimizer.step()
        self.params = params
        state = sum(
            t.numel() * t.element_size()
            for s in self.optimizer.state.values()
            for t in (s.values() if isinstance(s, dict) else ())
            if isinstance(t, torch.Tensor)
        )
        kept = sum(p.numel() * p.element_size() for p in params)
        self.facts = {
            "first_step_s": round(first, 3),
            "state_bytes": round(state / numel, 4),
            "bytes": round((state + kept) / numel, 4),
        }

    def window(self) -> float:
        """Milliseconds a step, over a window of steps."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            self.optimizer.step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / STEPS * 1e3


def measure(shapes: str, wanted: Callable[[str], bool]) -> dict[str, Any]:
    """Each case's median window."""
    contenders: dict[str, Contender] = {}
    results: dict[str, Any] = {}
    for case, (name, dtype, options) in CASES.items():
        if not wanted(case) or ("Muon" in case) != shapes.endswith("_2d"):
            continue
        try:
            contenders[case] = Contender(name, dtype, options, shapes)
        except ImportError as error:
            results[case] = {"missing": str(error)}
    times: dict[str, list[float]] = {case: [] for case in contenders}
    for _ in range(WINDOWS):
        for case, contender in contenders.items():
            times[case].append(contender.window())
    for case, contender in contenders.items():
        results[case] = {"ms": round(statistics.median(times[case]), 4), **contender.facts, **kernels_of(contender.optimizer)}
    return results


def kernels_of(optimizer: Any) -> dict[str, Any]:
    """Block, chunk and registers of hbcore's kernels."""
    if not isinstance(optimizer, hbcore.Optimizer):
        return {}
    found = []
    for segment in optimizer.core.plan.segments.values():
        executable = segment.executable
        for kernel in getattr(executable, "_variants", {}).values():
            found.append([executable.block, executable.chunk, getattr(kernel, "n_regs", None)])
    return {"kernels": found}


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=["square", "gpt2", "gpt2_2d"])
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for shapes in options.shapes:
        result[shapes] = measure(shapes, lambda case: options.only in case)
        for case, facts in result[shapes].items():
            print(shapes, case, facts, flush=True)
        torch.cuda.empty_cache()
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
