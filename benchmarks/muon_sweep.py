"""Measurements behind hb_muon's tables: symmetric products against cuBLAS, and orthogonalization methods, on one CUDA device.

    python benchmarks/muon_sweep.py --out muon-sweep.json [--seconds 240] [--only check,products,methods]

``check`` compares the kernel with float64, ``products`` times each tiling against ``torch.baddbmm`` by size, and ``methods``
times whole orthogonalizations of the hidden matrices of two models and reports the resulting singular values for matrices of
condition number 100. Failures become rows with their error. Measurements skipped for lack of time are listed at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hb_muon import symmetric
from hb_muon.orthogonalize import orthogonalize, orthogonalize_stacks
from hb_muon.symmetric import Tiling, Winner, half_and_mirror
from hbcore.cli.bench.shapes import shapes_of

DTYPES = (torch.float16, torch.bfloat16)
SIZES = (128, 256, 512, 768, 896, 1024, 1536, 2048, 2560, 3072, 4096)
RATIOS = (1, 2, 4)
TILINGS = (
    Tiling(128, 64, 8, 3),
    Tiling(128, 64, 8, 4),
    Tiling(128, 64, 4, 3),
    Tiling(128, 64, 4, 4),
    Tiling(64, 64, 4, 4),
    Tiling(128, 64, 8, 3, described=True),
    Tiling(128, 64, 8, 4, described=True),
    Tiling(128, 64, 4, 4, described=True),
    Tiling(128, 128, 8, 3, described=True),
    Tiling(64, 128, 4, 3, described=True),
)
CANDIDATES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("newton_schulz you 5 bf16", {"method": "newton_schulz"}),
    ("newton_schulz jordan 5 bf16", {"method": "newton_schulz", "ns_coefficients": "jordan"}),
    ("newton_schulz polar_express 5 bf16", {"method": "newton_schulz", "ns_coefficients": "polar_express"}),
    ("gram_newton_schulz 5 fp16", {"method": "gram_newton_schulz"}),
    ("gram_newton_schulz 4 fp16", {"method": "gram_newton_schulz", "ns_steps": 4}),
    ("minimax 4 fp16", {"method": "minimax"}),
    ("minimax 4 bf16", {"method": "minimax", "dtype": torch.bfloat16}),
    ("minimax 5 fp16", {"method": "minimax", "ns_steps": 5}),
)
SETS = ("gpt2_2d", "qwen2d", "sq8")
SPECTRA = ("geometric", "linear", "one small")


class Clock:
    """A time budget, and the measurements skipped once it is used up."""

    def __init__(self, seconds: float) -> None:
        self.end, self.missed = time.monotonic() + seconds, list[str]()

    def allows(self, what: str) -> bool:
        if time.monotonic() < self.end:
            return True
        self.missed.append(what)
        return False


def milliseconds(run: Callable[[], Any], windows: int = 5, about: float = 8.0) -> float:
    """Median time per call in ms over windows of back-to-back calls, each about ``about`` ms long, by CUDA events."""

    def window(calls: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / calls

    run()
    calls = min(max(int(about / max(window(2), 1e-3)), 1), 200)
    return statistics.median(window(calls) for _ in range(windows))


def tried(run: Callable[[], Any]) -> Any:
    """The result of ``run``, or its error as text."""
    try:
        return run()
    except Exception as error:  # a tiling that does not compile or fit must not stop the others
        torch.cuda.synchronize()
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def stack(batch: int, n: int, k: int, dtype: torch.dtype, columns: bool = False) -> torch.Tensor:
    """Gaussian matrices ``[batch, n, k]`` with rows of norm 1, stored by rows or by columns."""
    x = torch.randn(batch, *((k, n) if columns else (n, k)), device="cuda") / k**0.5
    return x.to(dtype).mT if columns else x.to(dtype)


# --- check --------------------------------------------------------------------------------------------------------------


def check(clock: Clock) -> list[dict[str, Any]]:
    """Each tiling, dtype and storage order, with even and ragged sizes, against float64; NaN surrounds the input."""
    rows = []
    for tiling in TILINGS:
        for dtype in DTYPES:
            if clock.allows(f"check {tiling} {dtype}"):
                for n, k in ((256, 512), (896, 896), (200, 328), (131, 77)):
                    for columns in (False, True):
                        error = tried(lambda n=n, k=k, c=columns, d=dtype, t=tiling: worst_error(n, k, d, c, t))
                        fine = not isinstance(error, str) and error < 1.05
                        rows.append({"tiling": str(tiling), "dtype": str(dtype), "n": n, "k": k, "columns": columns})
                        rows[-1] |= {"error": error, "fine": fine}
                        if not fine:
                            print("WRONG", rows[-1])
    print(f"check: {sum(r['fine'] for r in rows)} of {len(rows)} right")
    return rows


def worst_error(n: int, k: int, dtype: torch.dtype, columns: bool, tiling: Tiling) -> float:
    """The largest error of ``X X^T`` and of a product plus a matrix, in units of half an ulp of the entry.

    Entries that are small through cancellation are compared with the largest entry instead: tensor cores accumulate in fewer
    bits than float32.
    """
    x = stack(3, n, k, dtype, columns)
    if n % 64:  # even sizes stay contiguous, as descriptors require
        around = torch.full((3, k + 16, n + 16) if columns else (3, n + 16, k + 16), torch.nan, dtype=dtype, device="cuda")
        x = (around.mT if columns else around)[:, :n, :k].copy_(x)
    gram = half_and_mirror(x, x.mT, tiling=tiling)
    errors = [(gram, x.double() @ x.double().mT)]
    every = half_and_mirror(gram, gram, gram, 0.7, -1.3, tiling)
    errors.append((every, 0.7 * gram.double() @ gram.double() - 1.3 * gram.double()))
    half = torch.finfo(dtype).eps / 2
    return max(float(((o - e).abs() / (half * e.abs() + 5e-5 * e.abs().max())).max()) for o, e in errors)


# --- products -----------------------------------------------------------------------------------------------------------


def products(clock: Clock) -> list[dict[str, Any]]:
    """Times of cuBLAS, every tiling and the best one, by size."""
    rows = []
    for n in SIZES:
        for ratio in RATIOS:
            for batch in sorted({1, max(1, int(4e7 / n**2))}):
                for dtype in DTYPES:
                    for columns in (False, True) if ratio > 1 else (False,):
                        name = f"n={n} k={n * ratio} batch={batch} {str(dtype)[6:]} {'columns' if columns else 'rows'}"
                        if clock.allows(name):
                            rows.append({"name": name, "n": n, "k": n * ratio, "batch": batch, "dtype": str(dtype)[6:]})
                            rows[-1] |= {"columns": columns, **compared(n, n * ratio, batch, dtype, columns)}
                            show(rows[-1])
    return rows


def compared(n: int, k: int, batch: int, dtype: torch.dtype, columns: bool) -> dict[str, Any]:
    """``X X^T`` if ``k`` is larger than ``n``, otherwise ``c R R + b R`` for symmetric matrices."""
    x = tried(lambda: stack(batch, n, k, dtype, columns))
    if isinstance(x, str):
        return {"error": x}
    if k > n:
        cublas = milliseconds(lambda: torch.bmm(x, x.mT))
        ours = {str(t): tried(lambda t=t: milliseconds(lambda: half_and_mirror(x, x.mT, tiling=t))) for t in TILINGS}
    else:
        x = torch.bmm(x, x.mT)
        cublas = milliseconds(lambda: torch.baddbmm(x, x, x, beta=-1.3, alpha=0.7))
        ours = {str(t): tried(lambda t=t: milliseconds(lambda: half_and_mirror(x, x, x, 0.7, -1.3, tiling=t))) for t in TILINGS}
    best = min((ms for ms in ours.values() if not isinstance(ms, str)), default=None)
    return {"cublas": cublas, "ours": ours, "best": best, "tiling": next((t for t, ms in ours.items() if ms == best), None)}


def show(row: dict[str, Any]) -> None:
    """Print one row of products."""
    if row.get("best") is None:
        print(f"{row['name']:48s} FAILED {row.get('error') or next(iter(row['ours'].values()))}")
        return
    rate = 2 * row["batch"] * row["n"] ** 2 * row["k"] / row["cublas"] / 1e9
    against = f"{row['best']:8.4f} x{row['best'] / row['cublas']:.2f} {row['tiling']}"
    print(f"{row['name']:48s} cublas {row['cublas']:8.4f} ms {rate:5.0f} TF/s  best {against}")


# --- methods ------------------------------------------------------------------------------------------------------------


def methods(clock: Clock) -> list[dict[str, Any]]:
    """Whole orthogonalizations of each set's stacks in bfloat16, with cuBLAS only and with the current tables."""
    rows = []
    for name in SETS:
        counts = Counter(tuple(shape) for shape in shapes_of(name))
        stacks = [torch.randn(count, *shape, device="cuda").to(torch.bfloat16) for shape, count in counts.items()]
        for label, options in CANDIDATES:
            for table in ("cublas", "table"):
                if clock.allows(f"{name} {label} {table}"):
                    with winners(() if table == "cublas" else symmetric.WINNERS):
                        ms = tried(lambda s=stacks, o=options: milliseconds(lambda: list(orthogonalize_stacks(s, **o)), 5, 60))
                    rows.append({"set": name, "candidate": label, "products": table, "ms": ms})
                    print(f"{name:8s} {label:36s} {table:7s} {ms if isinstance(ms, str) else format(ms, '8.3f')}")
    for label, options in CANDIDATES:
        for n, k in ((768, 768), (896, 4864), (2048, 2048)):
            if clock.allows(f"range {label} {n} x {k}"):
                found = tried(lambda o=options, n=n, k=k: {s: span(orthogonalize(of_spectrum(s, n, k), **o)) for s in SPECTRA})
                rows.append({"candidate": label, "shape": [n, k], "range": found})
                print(f"range {label:36s} {n} x {k}  {found}")
    return rows


@contextmanager
def winners(rows: tuple[Winner, ...]) -> Iterator[None]:
    """Temporarily replace the table of measured winners."""
    before = symmetric.WINNERS
    symmetric.WINNERS = rows
    try:
        yield
    finally:
        symmetric.WINNERS = before


def of_spectrum(kind: str, n: int, k: int) -> torch.Tensor:
    """A random matrix of condition number 100, in bfloat16 like an update."""
    generator = torch.Generator("cuda").manual_seed(n + k)
    u, v = (torch.linalg.qr(torch.randn(side, n, device="cuda", generator=generator))[0] for side in (n, k))
    values = torch.linspace(0, 1, n, device="cuda")
    if kind == "geometric":
        values = 100**-values
    elif kind == "linear":
        values = 1 - 0.99 * values
    else:
        values = torch.where(values == 1, 0.01, 1.0)
    return ((u * values) @ v.mT).to(torch.bfloat16)[None]


def span(factor: torch.Tensor) -> tuple[float, float]:
    """The smallest and the largest singular value."""
    values = torch.linalg.svdvals(factor[0].float())
    return round(float(values.min()), 4), round(float(values.max()), 4)


def main() -> None:
    """Run the parts named by ``--only``, print the results and write them to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("muon-sweep.json"))
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--only", default="check,methods,products")
    arguments = parser.parse_args()
    clock, results = Clock(arguments.seconds), dict[str, Any]()
    results["environment"] = {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
    }
    print(results["environment"])
    parts = {"check": check, "products": products, "methods": methods}
    with torch.no_grad():
        for name in arguments.only.split(","):
            results[name] = tried(lambda name=name: parts[name](clock))
            results["missed"] = clock.missed
            arguments.out.write_text(json.dumps(results, indent=1))
            print(f"{name}: {results[name]}" if isinstance(results[name], str) else f"{name}: {len(results[name])} rows")
    print(f"not measured for lack of time: {clock.missed or 'nothing'}")


if __name__ == "__main__":
    main()
