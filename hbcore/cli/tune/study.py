"""The trials of a search, each a run of the training loop, kept in a file that an interrupted search goes on from."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.pruners import BasePruner
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, Trial, TrialState

from hbcore.cli.compare.record import Run
from hbcore.cli.compare.task import Task
from hbcore.cli.compare.train import Hooks, OptimizerFactory, train
from hbcore.cli.tune.samplers import Builtin
from hbcore.cli.tune.space import suggest
from hbcore.errors import OptionError
from hbcore.registry.search import Searched

NAME = "tune.journal"
_PATIENCE = 5  # seconds for which a lock is respected: whoever holds one is writing a line, or was killed
_STUDY = "tune"
_OUTCOME, _ARGUMENTS, _IDENTITY = "outcome", "arguments", "identity"


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: ``state`` is ``"complete"``, ``"pruned"`` or ``"failed"``; ``why`` is empty for complete ones."""

    number: int
    arguments: dict[str, Any]
    state: str
    loss: float | None
    steps: int
    why: str
    curve: list[tuple[int, float]]


_STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


@dataclass
class Search:
    """A search in progress.

    Args:
        study: Optuna's.
        task, build: what a trial trains, and arguments -> the optimizer's constructor.
        space: what is searched.
        sampler, seed: what proposes hyperparameters.
        guess: Optuna's parameters of the first trial.
    """

    study: optuna.Study
    task: Task
    build: Callable[[Mapping[str, Any]], OptimizerFactory]
    space: Mapping[str, Searched]
    sampler: Builtin
    seed: int
    guess: Mapping[str, Any]

    def outcomes(self) -> list[Outcome]:
        """The trials that ended, in order."""
        return [_outcome(i, trial) for i, trial in enumerate(t for t in self.study.trials if _counts(t))]

    def run(self, budget: int, say: Callable[[Outcome], None]) -> bool:
        """Try until there are ``budget`` outcomes; True if Ctrl-C interrupted it. ``say`` is told each new outcome."""
        self._settle()
        while (done := len(self.outcomes())) < budget:
            if done == 0 or self.sampler.reseed:
                self.study.sampler = self.sampler.make(self.seed + done)
            if done == 0 and not self.study.get_trials(states=(TrialState.WAITING,)):
                self.study.enqueue_trial(dict(self.guess))
            trial = self.study.ask()
            try:
                ended = self._try(trial, done)
            except KeyboardInterrupt:
                self.study.tell(trial, state=TrialState.FAIL)  # without an outcome: it is tried again
                return True
            plain = {"state": ended.state, "loss": ended.loss, "steps": ended.steps, "why": ended.why}
            trial.set_user_attr(_OUTCOME, plain)
            self._tell(trial, plain)
            say(ended)
        return False

    def _settle(self) -> None:
        """End the trial during which an earlier process was killed: as it had ended, or as if it had never been."""
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            self._tell(trial.number, trial.user_attrs.get(_OUTCOME) or {"state": "failed"})

    def _tell(self, trial: Trial | int, plain: Mapping[str, Any]) -> None:
        complete = plain["state"] == "complete"
        self.study.tell(trial, plain["loss"] if complete else None, None if complete else _STATES[plain["state"]])

    def _try(self, trial: Trial, number: int) -> Outcome:
        arguments = suggest(trial, self.space)
        trial.set_user_attr(_ARGUMENTS, json.dumps(arguments))
        run, curve = Run("trial", "", seed=self.task.seed), list[tuple[int, float]]()

        def validated(step: int, loss: float) -> None:
            curve.append((step, loss))
            trial.report(loss, step)
            if trial.should_prune():
                raise optuna.TrialPruned(f"at step {step}, loss {loss:.4f}")

        def ended(state: str, why: str = "") -> Outcome:
            loss = run.final_val_loss if state == "complete" else None
            points = [(p.step, p.loss) for p in run.validations[1:] if math.isfinite(p.loss)]
            return Outcome(number, arguments, state, loss, len(run.steps), why, points)

        try:
            train(self.build(arguments), self.task, run, Hooks(validation=validated))
        except optuna.TrialPruned as error:
            return ended("pruned", str(error))
        except Exception as error:  # out of memory, a rule that refuses its arguments, or whatever a plugin raises
            _release(self.task.device)
            return ended("failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
        if run.final_val_loss is None:
            return ended("pruned", f"diverged at step {len(run.steps)}")
        trial.report(run.final_val_loss, self.task.steps)
        return ended("complete")


def _release(device: torch.device) -> None:
    """After running out of memory, the next trial must find all of it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _counts(trial: FrozenTrial) -> bool:
    return trial.state.is_finished() and _OUTCOME in trial.user_attrs


def _outcome(number: int, trial: FrozenTrial) -> Outcome:
    plain = trial.user_attrs[_OUTCOME]
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(trial.user_attrs[_ARGUMENTS]).items()}
    curve = sorted((step, loss) for step, loss in trial.intermediate_values.items() if math.isfinite(loss))
    return Outcome(number, arguments, plain["state"], plain["loss"], plain["steps"], plain["why"], curve)


def open_study(out: Path, identity: Mapping[str, Any], pruner: BasePruner) -> optuna.Study:
    """The study kept in ``out``, or a new one.

    Args:
        out: an existing folder.
        identity: everything that decides what a trial leads to, as plain data.
        pruner: Optuna's.

    Raises:
        OptionError: the file cannot be read, or is of another search; the message names the first difference.
    """
    path = out / NAME
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    try:
        _mend(path)
        storage = JournalStorage(JournalFileBackend(str(path), JournalFileSymlinkLock(str(path), _PATIENCE)))
        study = _load(storage, pruner)
        known = study.user_attrs.get(_IDENTITY)
    except Exception as error:  # whatever reading somebody else's file raises
        raise OptionError(f"{path} cannot be read ({type(error).__name__}: {error}); move it away") from error
    wanted = json.loads(json.dumps(identity))
    if known is None and not study.trials:
        study.set_user_attr(_IDENTITY, wanted)
    elif known != wanted:
        before = known if isinstance(known, dict) else {}
        key = next(key for key in (*wanted, *before) if before.get(key) != wanted.get(key))
        raise OptionError(
            f"{path} is of another search: its {key} is {before.get(key)!r}, not {wanted.get(key)!r}; repeat its arguments, "
            "or use another --out"
        )
    return study


def _load(storage: JournalStorage, pruner: BasePruner) -> optuna.Study:
    try:
        return optuna.load_study(study_name=_STUDY, storage=storage, pruner=pruner)
    except KeyError:
        return optuna.create_study(study_name=_STUDY, storage=storage, pruner=pruner)


def _mend(path: Path) -> None:
    """Drop the line that an earlier process was killed in the middle of writing; ValueError if the file is no journal."""
    content = path.read_bytes() if path.exists() else b""
    end = content.rfind(b"\n") + 1
    for line in content[:end].splitlines():  # Optuna would write behind them, and find out later
        if not isinstance(entry := json.loads(line), dict) or "op_code" not in entry:
            raise ValueError("not a journal of Optuna's")
    if content[end:].startswith(b"{") or not content:
        with path.open("ab") as journal:
            journal.truncate(end)
    elif content[end:]:
        raise ValueError("not a journal of Optuna's")


def best(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The complete trial with the lowest loss; the earliest of equals."""
    complete = [o for o in outcomes if o.loss is not None]
    return min(complete, key=lambda o: (o.loss, o.number), default=None)
