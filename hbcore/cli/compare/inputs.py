"""``--model`` and ``--data`` by path: functions of the user's, checked before training, with errors of one line."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hbcore.cli.compare.data import Batch, Data, TextData, load_corpus
from hbcore.cli.compare.model import GPT, SIZES
from hbcore.errors import OptionError

Objective: TypeAlias = Callable[..., Tensor]
"""``objective(model, *batch)``: the loss to minimise, a 0-d tensor."""

MOST_VALIDATION_BATCHES = 1000  # an iterable that never ends would otherwise fill the memory
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def load_function(option: str, path: str) -> Callable[..., Any]:
    """The function at ``"package.module:function"``; the current folder is searched too.

    Raises:
        OptionError: the path is malformed, the module cannot be imported, or it has no such function.
    """
    if not _PATH.fullmatch(path):
        raise OptionError(f"{option} {path}: expected package.module:function")
    name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # for good: the function may import its neighbours when it is called
    try:
        found: Any = importlib.import_module(name)
    except Exception as error:  # a module's own code may raise anything
        raise OptionError(f"{option} {path}: cannot import {name!r}: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise OptionError(f"{option} {path}: {name!r} has no {attribute!r}")
        found = getattr(found, part)
    if not callable(found):
        raise OptionError(f"{option} {path}: {attribute!r} is of type {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ModelSource:
    """Where the model comes from: ``make()`` draws its weights from torch's global generator, which :meth:`build` seeds."""

    name: str
    make: Callable[[], Any]
    facts: dict[str, Any]

    @classmethod
    def of(cls, path: str | None, size: str) -> ModelSource:
        """The model at ``path``, or the built-in GPT of ``size``. Raises OptionError as :func:`load_function` does."""
        if path is None:
            config = SIZES[size]
            return cls("Byte-level GPT", lambda: GPT(config), {"size": size, **vars(config)})
        return cls(path, load_function("--model", path), {"size": None})

    def build(self, seed: int) -> tuple[nn.Module, Objective]:
        """A newly initialised model, determined by ``seed``, and its loss. Does not change the global generator.

        Raises:
            OptionError: the function raises, or returns neither a module with a method ``loss`` nor a pair of module and loss.
        """
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                made = self.make()
        except Exception as error:
            raise OptionError(f"--model {self.name}: it raised {type(error).__name__}: {error}") from error
        model, objective = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if not isinstance(model, nn.Module):
            raise OptionError(
                f"--model {self.name}: expected a torch.nn.Module, or a pair of module and loss; it returned {_kind(made)}"
            )
        if objective is None:
            if not callable(getattr(model, "loss", None)):
                raise OptionError(
                    f"--model {self.name}: {type(model).__name__} has no method loss(*batch); add one, or return a pair "
                    "(module, loss) with loss(module, *batch)"
                )
            objective = _own_loss
        elif not callable(objective):
            raise OptionError(f"--model {self.name}: the second of the pair must be a function loss(module, *batch)")
        if not any(p.requires_grad for p in model.parameters()):
            raise OptionError(f"--model {self.name}: the model has no parameter that requires a gradient")
        return model, objective


def _own_loss(model: Any, *batch: Tensor) -> Tensor:
    loss: Tensor = model.loss(*batch)
    return loss


@dataclass(frozen=True)
class FunctionData:
    """Batches from a function ``(split, batch_size, seed)`` of the user's; ``split`` is ``"train"`` or ``"validation"``."""

    name: str
    function: Callable[..., Any]

    @property
    def size(self) -> str:
        """Nothing is known of it."""
        return ""

    @property
    def facts(self) -> dict[str, Any]:
        """For ``compare.json``; the keys are those of a text."""
        return {"name": self.name, "bytes": None, "sha256": None}

    def training(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """The batches of one run, from the beginning.

        Raises:
            OptionError: the function raises or ends, or a batch is no tuple of tensors of one length.
        """
        count = 0
        for batch in self._batches("train", batch_size, seed):
            count += 1
            yield batch
        raise OptionError(f"--data {self.name}: its training batches ended after {count}; yield one for every step")

    def validation(self, batch_size: int) -> list[Batch]:
        """The held-out batches, the same for every seed. Raises OptionError as :meth:`training` does, or if there are none."""
        batches = list(itertools.islice(self._batches("validation", batch_size, 0), MOST_VALIDATION_BATCHES + 1))
        if not 0 < len(batches) <= MOST_VALIDATION_BATCHES:
            found = "none" if not batches else f"more than {MOST_VALIDATION_BATCHES}"
            raise OptionError(
                f"--data {self.name}: expected 1 to {MOST_VALIDATION_BATCHES} validation batches; it yields {found}"
            )
        return batches

    def _batches(self, split: str, batch_size: int, seed: int) -> Iterator[Batch]:
        try:
            made: Iterable[Any] = self.function(split=split, batch_size=batch_size, seed=seed)
            batches = iter(made)
        except Exception as error:
            raise OptionError(
                f"--data {self.name}: calling it with split={split!r}, batch_size={batch_size}, seed={seed} "
                f"raised {type(error).__name__}: {error}"
            ) from error
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                raise OptionError(f"--data {self.name}: its {split} batches raised {type(error).__name__}: {error}") from error
            yield self._checked(batch, split)

    def _checked(self, batch: Any, split: str) -> Batch:
        where = f"--data {self.name}: a {split} batch must be a tuple of tensors"
        if not isinstance(batch, (tuple, list)) or not batch or not all(isinstance(part, Tensor) for part in batch):
            raise OptionError(f"{where}; got {_kind(batch)}")
        lengths = {len(part) if part.ndim else 0 for part in batch}
        if len(lengths) > 1 or 0 in lengths:
            shapes = ", ".join(str(list(part.shape)) for part in batch)
            raise OptionError(f"{where} of one length, the number of examples, and not empty; got shapes {shapes}")
        return tuple(batch)


def load_data(path: str | None, context: int) -> Data:
    """The text of the standard library for None, the bytes of a file, or the batches of a function.

    A file is preferred to a function of the same name.

    Raises:
        OptionError: there is neither, the file cannot be read, or it is too short.
    """
    if path is not None and not Path(path).exists() and _PATH.fullmatch(path):
        return FunctionData(path, load_function("--data", path))
    return TextData(load_corpus(path, context), context)


def check_loss(loss: Any, name: str) -> None:
    """Raise OptionError unless ``loss`` is what ``backward`` needs: a 0-d floating-point tensor with a graph."""
    if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point() or not loss.requires_grad:
        raise OptionError(
            f"--model {name}: the loss must be a 0-d floating-point tensor that requires a gradient; got {_kind(loss)}"
        )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        detached = "" if value.requires_grad else ", which requires no gradient"
        return f"a tensor of shape {list(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}{detached}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(part).__name__ for part in value) or 'nothing'}"
    return "None" if value is None else f"a {type(value).__name__}"
