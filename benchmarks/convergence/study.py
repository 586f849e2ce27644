"""Tunes and trains every contender, several at a time, then times each alone; see README.md.

python benchmarks/convergence/study.py --out result.json [--only AdamW SOAP] [--workers 3] [--model small] [--device cpu]
    [--steps 500] [--finish]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from contenders import NAMES, SEEDS, Search, Trial
from train import SETTINGS, Pass, Setting, Text, timed, train

import hbcore
from hbcore.cli.compare.model import build_model


@cache
def prepared(setting: Setting) -> Pass:
    """A process's text and model, made once."""
    return Pass(Text(setting))


def pursue(name: str, setting: Setting, runs: Path) -> None:
    """Run all trials of one optimizer and add them to the file ``runs``; those that it has are not repeated."""
    pass_, done = prepared(setting), {r["key"]: r for r in held(runs)}
    search = Search(name)
    for trial in search.trials():
        result = done.get(trial.key)
        if result is None:
            try:
                result = {"key": trial.key, **train(trial, pass_)}
            except Exception as error:  # one optimizer's failure is a finding, and not the end of the study
                result = {"key": trial.key, **vars(trial), "loss": math.inf, "curve": [], "error": f"{error!r:.300}"}
            with runs.open("a") as file:
                file.write(json.dumps(result) + "\n")
        search.results[trial] = result["loss"]
    print(f"{name:12} {[round(loss, 4) for loss in search.results.values()]}", flush=True)


def held(runs: Path) -> list[dict[str, Any]]:
    """The runs that are done."""
    return [json.loads(line) for line in runs.read_text().splitlines()] if runs.exists() else []


def finish(setting: Setting, runs: Path, out: Path) -> None:
    """Time a step of each optimizer that has all of its runs, and write the result."""
    pass_, found = prepared(setting), held(runs)
    whole = [n for n in NAMES if sum(r["name"] == n and r["seed"] in SEEDS for r in found) == len(SEEDS)]
    times = {}
    for name in whole:
        first = next(r for r in found if r["name"] == name and r["seed"] == SEEDS[0])
        if "error" not in first:
            times[name] = timed(Trial(name, first["lr"], first["weight_decay"], first["seed"]), pass_)
    result = {
        "device": torch.cuda.get_device_name() if setting.device == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "hbcore": hbcore.__version__,
        "command": " ".join(["python", *sys.argv]),
        "setting": dataclasses.asdict(setting),
        "parameters": sum(p.numel() for p in build_model(setting.config, 0).parameters()),
        "bytes_of_text": pass_.text.bytes,
        "ms_per_step": times,
        "runs": [{k: v for k, v in r.items() if k != "key"} for r in found if r["name"] in whole],
    }
    out.write_text(json.dumps(result))


def main() -> None:
    """Run the study and write its result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=NAMES)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--model", choices=SETTINGS, default="large")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="by default a GPU for the large model, and the CPU for the small one"
    )
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--finish", action="store_true", help="run nothing more: time and write what is there")
    given = parser.parse_args()
    setting = SETTINGS[given.model]
    setting = dataclasses.replace(setting, steps=given.steps or setting.steps, device=given.device or setting.device)
    runs = given.out.with_suffix(given.out.suffix + ".runs")
    if not given.finish:
        with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
            for pending in [pool.apply_async(pursue, (name, setting, runs)) for name in given.only]:
                pending.get()
    finish(setting, runs, given.out)


if __name__ == "__main__":
    main()
