"""Times the first step in a fresh process: how long a user waits until training starts.

``python -m hbcore.cli.bench.first_step JSON`` runs one; the last line of its output is JSON. Torch and optimizers are imported
late, because importing them is timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from typing import Any

from hbcore.cli.bench.contenders import PRECISIONS, Contender, Precision
from hbcore.cli.bench.shapes import shapes_of

CACHES = ("HBCORE_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
"""Environment variables that locate the caches of compiled code."""


def measure_first_step(
    contender: Contender, shapes: str, precision: Precision, device: str, *, threads: int | None, timeout: float
) -> dict[str, dict[str, Any]]:
    """Run two fresh processes with the same cache folders: empty for the first, filled by the first for the second.

    Returns:
        For ``cold`` and ``warm``: ``seconds`` (importing the optimizer, constructor, first step, synchronized), its parts, and
        ``torch_seconds`` (importing torch and initializing the device), which ``seconds`` excludes. Or ``error``.
    """
    payload: dict[str, Any] = {"contender": {**vars(contender), "kwargs": dict(contender.kwargs)}, "shapes": shapes}
    payload |= {"precision": precision.name, "device": device, "threads": threads}
    with tempfile.TemporaryDirectory(prefix="hbcore-bench-") as folder:
        caches = {name: os.path.join(folder, name.lower()) for name in CACHES}
        return {kind: _process(payload, caches, timeout) for kind in ("cold", "warm")}


def _process(payload: dict[str, Any], caches: dict[str, str], timeout: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "hbcore.cli.bench.first_step", json.dumps(payload)]
    try:
        done = subprocess.run(command, env={**os.environ, **caches}, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"timed out after {timeout:g} s"}
    try:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = done.stderr.strip().splitlines() or ["no output"]
        return {"error": f"exit status {done.returncode}: {lines[-1]}"}
    return result


def first_step(payload: dict[str, Any]) -> dict[str, Any]:
    """Time the first step in this process. ``payload`` comes from :func:`measure_first_step`."""
    contender, precision = Contender(**payload["contender"]), PRECISIONS[payload["precision"]]
    start = time.perf_counter()
    import torch

    if payload["threads"] is not None:
        torch.set_num_threads(payload["threads"])
    device = torch.device(payload["device"])
    torch.zeros(1, device=device).add_(1).item()  # creates the context and runs a kernel
    torch_seconds = time.perf_counter() - start

    from hbcore.cli.bench.measure import Noise, Stopwatch

    watch = Stopwatch(device)
    noise = Noise(shapes_of(payload["shapes"]), getattr(torch, precision.param), device, seed=0)
    params = [torch.nn.Parameter(p) for p in noise.params]
    for p, grad in zip(params, noise.grads[0], strict=True):
        p.grad = grad
    watch.wait()
    marks = [time.perf_counter()]
    cls = contender.load()
    marks.append(time.perf_counter())
    optimizer = cls(params, **contender.arguments(cls, precision))
    marks.append(time.perf_counter())
    optimizer.step()
    watch.wait()
    marks.append(time.perf_counter())
    parts = [later - earlier for earlier, later in pairwise(marks)]
    names = ("import_seconds", "constructor_seconds", "step_seconds")
    return {"seconds": marks[-1] - marks[0], **dict(zip(names, parts, strict=True)), "torch_seconds": torch_seconds}


def _thawed(value: Any) -> Any:
    """``value`` with tuples instead of JSON's lists, because optimizers compare and hash their betas."""
    if isinstance(value, dict):
        return {key: _thawed(item) for key, item in value.items()}
    return tuple(map(_thawed, value)) if isinstance(value, list) else value


if __name__ == "__main__":
    try:
        answer = first_step(_thawed(json.loads(sys.argv[1])))
    except Exception as error:  # reported by the parent process
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))
