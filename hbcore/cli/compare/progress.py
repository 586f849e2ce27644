"""The live display: a progress bar per run on a terminal, otherwise a line per tenth of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, TextIO

from hbcore.cli.compare.record import Run

PIP_LINE = 'pip install "hbcore[cli]"'


class Display(Protocol):
    """Receives progress from the training loop. A context manager, so that the terminal is always restored."""

    def __enter__(self) -> Display: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def start(self, label: str) -> None:
        """The run ``label`` starts."""

    def update(self, step: int, loss: float) -> None:
        """``step`` steps are done; ``loss`` is a moving average of the training loss."""

    def say(self, text: str) -> None:
        """Something to know of the current run, before it trains."""

    def finish(self, run: Run) -> None:
        """The current run ended; ``run.status`` says how."""


def outcome(run: Run) -> str:
    """How a run ended, in a few words."""
    if run.status == "failed":
        return f"failed: {run.error}"
    if run.status == "diverged":
        return f"diverged at step {len(run.steps)}"
    loss = "no validation loss yet" if run.final_val_loss is None else f"val loss {run.final_val_loss:.4f}"
    return loss if run.status == "completed" else f"stopped at step {len(run.steps)}, {loss}"


class PlainDisplay:
    """About ten lines of text per run: for logs, pipes and terminals without rich."""

    def __init__(self, labels: Sequence[str], steps: int, stream: TextIO) -> None:
        self._width, self._steps, self._stream = max(map(len, labels)), steps, stream
        self._label = ""

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def start(self, label: str) -> None:
        """Set the label of the following lines."""
        self._label = label

    def update(self, step: int, loss: float) -> None:
        """Print a line after each tenth of the run."""
        if step * 10 // self._steps > (step - 1) * 10 // self._steps:
            self._print(f"step {step:>{len(str(self._steps))}}/{self._steps}  train loss {loss:.4f}")

    def say(self, text: str) -> None:
        """Print it."""
        self._print(text)

    def finish(self, run: Run) -> None:
        """Print how the run ended."""
        self._print(outcome(run))

    def _print(self, text: str) -> None:
        print(f"{self._label:<{self._width}}  {text}", file=self._stream, flush=True)


class RichDisplay:
    """One progress bar per run, with the current loss. Raises ImportError if rich is not installed."""

    def __init__(self, labels: Sequence[str], steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[news]}", markup=False),
            refresh_per_second=4,  # the bar shares the cores with what it measures
        )
        self._width, self._steps = max(map(len, labels)), steps
        self._bar: Any = None

    def __enter__(self) -> RichDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, label: str) -> None:
        """Add a bar for this run below the earlier ones."""
        self._bar = self._progress.add_task(label.ljust(self._width), total=self._steps, news="")

    def update(self, step: int, loss: float) -> None:
        """Advance the bar."""
        self._progress.update(self._bar, completed=step, news=f"train loss {loss:.4f}")

    def say(self, text: str) -> None:
        """Show it beside the bar."""
        self._progress.update(self._bar, news=text)

    def finish(self, run: Run) -> None:
        """Stop the clock and show how the run ended."""
        self._progress.update(self._bar, news=outcome(run))
        self._progress.stop_task(self._bar)


def make_display(labels: Sequence[str], steps: int, stream: TextIO) -> Display:
    """Bars on a terminal, lines elsewhere. Without rich, lines and a hint on stderr."""
    if stream.isatty():
        try:
            return RichDisplay(labels, steps)
        except ImportError:
            print(f"no progress bar: rich is not installed ({PIP_LINE})", file=sys.stderr)
    return PlainDisplay(labels, steps, stream)
