"""Going on with an interrupted comparison: finished runs are read from ``compare.json``, the others go on from a checkpoint."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hbcore.cli.compare import report
from hbcore.cli.compare.record import Norms, Run, Step, Trial, Validation
from hbcore.cli.compare.train import Saved
from hbcore.errors import OptionError

NAME = "compare.checkpoint"
_KEY = ("label", "optimizer", "kwargs", "seed")


def read(out: Path, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs of the comparison in ``out``; none if there is none.

    Raises:
        OptionError: the file is not one of ours, or it is of another comparison; the message names the first difference.
    """
    path = out / "compare.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known, runs = content["identity"], content["runs"]
        assert content["schema"] == report.SCHEMA and isinstance(known, dict) and isinstance(runs, list)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise OptionError(
            f"--resume: {path} cannot be resumed, it is incomplete or of another version: move it away"
        ) from error
    for key, value in identity.items():
        if known.get(key) != value:
            raise OptionError(
                f"--resume: {path} is of another comparison: its {key} is {known.get(key)!r}, not {value!r}; "
                "repeat its arguments, or use another --out"
            )
    return runs


def restore(runs: Sequence[Run], entries: Sequence[dict[str, Any]], tuning: bool, out: Path) -> None:
    """Fill in the runs that had finished.

    Raises:
        OptionError: an entry is none of ``runs``, and would be lost.
    """
    waiting = {_key(vars(run)): run for run in runs}
    for entry in entries:
        run = waiting.get(_key(entry))
        if run is None or not (entry["lr"] == run.lr or (tuning and entry["lr_from"] == "tuned")):
            raise OptionError(
                f"--resume: {out / 'compare.json'} also has a run {entry['label']} (seed {entry['seed']}, lr {entry['lr']}), "
                "which this comparison would drop; name it too, with the same arguments, or use another --out"
            )
        if entry["status"] in ("completed", "diverged"):
            fill(run, entry)


def fill(run: Run, entry: Mapping[str, Any]) -> None:
    """Copy everything that :func:`hbcore.cli.compare.report.entry` wrote; a loss that was no number is NaN again."""
    train, validation, norms = entry["train"], entry["validation"], entry["norms"]
    for name in ("lr", "lr_from", "status", "error", "resumed", "constructor_seconds"):
        setattr(run, name, entry[name])
    for name in ("state_bytes_per_param", "backend", "peak_bytes"):
        setattr(run, name, entry["summary"][name])
    run.trials = [Trial(**trial) for trial in entry["trials"]]
    run.steps = [Step(*map(_number, row)) for row in zip(*(train[name] for name in Step._fields), strict=True)]
    run.validations = [
        Validation(step, _number(loss), seconds)
        for step, loss, seconds in zip(*(validation[name] for name in Validation._fields), strict=True)
    ]
    run.norm_names = list(norms["update_rms"])
    columns = [list(map(_number, column)) for which in ("update_rms", "weight_rms") for column in norms[which].values()]
    half = len(run.norm_names)
    run.norms = [
        Norms(step, [column[i] for column in columns[:half]], [column[i] for column in columns[half:]])
        for i, step in enumerate(norms["step"])
    ]


@dataclass(frozen=True)
class Checkpoint:
    """The file that the unfinished run goes on from; there is one run at a time. Unusable ones are reported and ignored."""

    path: Path
    identity: Mapping[str, Any]

    def save(self, run: Run, saved: Saved) -> None:
        """Replace the file. A state that cannot be written costs the checkpoint, with a warning, not the run."""
        record = json.dumps(report.plain(report.entry(run)), allow_nan=False)
        try:
            with report.replacing(self.path) as unfinished:
                torch.save({"identity": dict(self.identity), "record": record, **saved}, unfinished)
        except Exception as error:  # a full disk, or an optimizer whose state is no data
            self._complain("written", error)

    def load(self, run: Run) -> Saved | None:
        """What ``run`` goes on from, after filling in its record; None if the file is of another run, or there is none."""
        if not self.path.exists():
            return None
        try:
            saved: Saved = torch.load(self.path, weights_only=True)  # plain data only: nothing of it is run
            entry = json.loads(saved["record"])
            if saved["identity"] != dict(self.identity) or _key(entry) != _key(vars(run)):
                return None
            if entry["lr"] != run.lr and entry["lr_from"] != "tuned":
                return None
            fill(run, entry)
        except Exception as error:  # truncated, or not a file of ours
            self._complain("read", error)
            return None
        return saved

    def discard(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)

    def _complain(self, what: str, error: Exception) -> None:
        reason = (str(error).strip().splitlines() or [""])[0]
        print(f"{self.path} could not be {what} ({type(error).__name__}: {reason})", file=sys.stderr)


def _key(run: Mapping[str, Any]) -> str:
    return json.dumps([report.plain(run[name]) for name in _KEY], sort_keys=True)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
