"""The measured figures of ``benchmarks/results``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

SHAPES = {
    "square": "32 x 2048²",
    "sq8": "8 x 1024²",
    "gpt2": "GPT-2 124M",
    "gpt2_2d": "GPT-2's hidden matrices",
    "qwen": "Qwen2.5-0.5B",
    "qwen2d": "Qwen2.5-0.5B's hidden matrices",
    "resnet50": "ResNet-50",
    "vit_b": "ViT-B/16",
}
"""The bench's name for a set of shapes -> a reader's."""


class Figure(NamedTuple):
    """One measured configuration of an optimizer.

    Attributes:
        optimizer: the class's name.
        label: what the run called it.
        own: whether it is hbcore's.
        options: what was passed, as arguments of a call.
        device: where it ran.
        shapes: the parameters, in words.
        dtype: their dtype, as the bench abbreviates it.
        ms: milliseconds a step, in the mean of many.
        file: the file's name.
        time: when it was measured; later figures of the same kind replace earlier ones.
    """

    optimizer: str
    label: str
    own: bool
    options: str
    device: str
    shapes: str
    dtype: str
    ms: float
    file: str
    time: str


@cache
def load(name: str) -> Any:
    """The contents of ``benchmarks/results/<name>.json``."""
    return json.loads((RESULTS / f"{name}.json").read_text())


@cache
def figures() -> tuple[Figure, ...]:
    """Every step time in the files of ``hbcore bench`` and of ``benchmarks/refreshing.py``."""
    return tuple(figure for path in sorted(RESULTS.glob("*.json")) for figure in _of(path.stem))


def of(optimizer: str) -> list[Figure]:
    """hbcore's figures of one optimizer, the latest of each kind, in a fixed order.

    A run that was made for something else, such as the first step, counts only if no other has that kind.
    """
    latest: dict[tuple[str, ...], Figure] = {}
    own = (f for f in figures() if f.own and f.optimizer == optimizer)
    for figure in sorted(own, key=lambda f: (not re.search(r"(first|first-step|host|singles)$", f.file), f.time, f.file)):
        latest[figure.device, figure.shapes, figure.dtype, figure.options] = figure
    return sorted(latest.values(), key=lambda f: (f.device, f.shapes, f.dtype, f.options))


def fastest_peer(figure: Figure) -> Figure | None:
    """Another library's fastest in the same run on the same parameters, of the same rule; None if there is none."""
    same = [
        f
        for f in figures()
        if (f.file, f.device, f.shapes, f.dtype) == (figure.file, figure.device, figure.shapes, figure.dtype)
    ]
    return min((f for f in same if not f.own and f.optimizer == figure.optimizer), key=lambda f: f.ms, default=None)


def _of(name: str) -> Iterator[Figure]:
    data = load(name)
    if data.get("schema") == "hbcore.bench/1":
        yield from _benched(name, data)
    elif isinstance(data.get("results"), list):
        yield from _refreshed(name, data)
    else:  # a file of several runs
        for key, run in data.items():
            if not key.endswith("first") and isinstance(run, dict) and run.get("schema") == "hbcore.bench/1":
                yield from _benched(name, run)


def _benched(name: str, data: Any) -> Iterator[Figure]:
    where = data["environment"]
    cores = f"{where['threads']} CPU core" + "s" * (where["threads"] > 1)
    device = cores if where["device"] == "cpu" else where["device_name"].split(" ")[1]
    for row in data["rows"]:
        if row["status"] != "ok" or row["summary"].get("window_ms") is None or row["shapes"] not in SHAPES:
            continue
        options = ", ".join(f"{key}={value!r}" for key, value in sorted(row["kwargs"].items()) if key != "consume_grad")
        own = row["source"] == "hbcore"
        yield Figure(
            optimizer=row["optimizer"] if own else row["family"],
            label=row["label"],
            own=own,
            options=options,
            device=device,
            shapes=SHAPES[row["shapes"]],
            dtype=row["dtype"],
            ms=row["summary"]["window_ms"],
            file=name,
            time=where["time"],
        )


def _refreshed(name: str, data: Any) -> Iterator[Figure]:
    for row in data["results"]:
        subject, _, options = row["contender"].partition(" ")
        yield Figure(
            optimizer=subject.rpartition(":")[2],
            label=row["contender"],
            own=":" not in subject,
            options=", ".join(sorted(options.split())),
            device=data["device"].split(" ")[1],
            shapes=SHAPES[data["shapes"]],
            dtype="fp32",
            ms=row["single_mean"],
            file=name,
            time="",
        )
