"""Tunes and trains every contender, several at a time, then times each alone; see README.md.

python benchmarks/convergence/study.py --out result.json [--only AdamW SOAP] [--workers 6] [--cpu] [--steps 500]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from contenders import NAMES, Search, Trial
from train import CPU, GPU, Setting, Text, timed, train

import hbcore
from hbcore.cli.compare.model import build_model

_texts: dict[Setting, Text] = {}
"""A worker's text, read once."""


def pursue(name: str, setting: Setting, runs: Path) -> list[dict[str, Any]]:
    """All trials of one optimizer; those that ``runs`` has are not repeated."""
    text = _texts.setdefault(setting, Text(setting))
    done = {r["key"]: r for r in map(json.loads, runs.read_text().splitlines())} if runs.exists() else {}
    search, found = Search(name), list[dict[str, Any]]()
    for trial in search.trials():
        result = done.get(trial.key)
        if result is None:
            try:
                result = {"key": trial.key, **train(trial, text)}
            except Exception as error:  # one optimizer's failure is a finding, and not the end of the study
                result = {"key": trial.key, **vars(trial), "loss": math.inf, "curve": [], "error": f"{error!r:.300}"}
            with runs.open("a") as file:
                file.write(json.dumps(result) + "\n")
        search.results[trial] = result["loss"]
        found.append(result)
    print(f"{name:12} {[round(r['loss'], 4) for r in found]}", flush=True)
    return found


def main() -> None:
    """Run the study and write its result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=NAMES)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--steps", type=int, default=0)
    given = parser.parse_args()
    setting = CPU if given.cpu else GPU
    setting = dataclasses.replace(setting, steps=given.steps or setting.steps)
    runs = given.out.with_suffix(given.out.suffix + ".runs")
    with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
        pending = [pool.apply_async(pursue, (name, setting, runs)) for name in given.only]
        found = [result for p in pending for result in p.get()]
    text = Text(setting)
    winners = {r["name"]: Trial(r["name"], r["lr"], r["weight_decay"], r["seed"]) for r in found if r["seed"] == 1}
    times = {name: timed(trial, text) for name, trial in winners.items() if "error" not in _of(found, trial)}
    result = {
        "device": torch.cuda.get_device_name() if setting.device == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "hbcore": hbcore.__version__,
        "command": " ".join(["python", *sys.argv]),
        "setting": dataclasses.asdict(setting),
        "parameters": sum(p.numel() for p in build_model(setting.config, 0).parameters()),
        "bytes_of_text": text.bytes,
        "ms_per_step": times,
        "runs": [{k: v for k, v in r.items() if k != "key"} for r in found],
    }
    given.out.write_text(json.dumps(result))


def _of(found: list[dict[str, Any]], trial: Trial) -> dict[str, Any]:
    return next(r for r in found if r["key"] == trial.key)


if __name__ == "__main__":
    main()
