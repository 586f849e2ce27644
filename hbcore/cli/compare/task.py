"""What all runs of a comparison share."""

from __future__ import annotations

import copy
import ctypes
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hbcore._version import __version__
from hbcore.cli.compare.data import Batch, Data
from hbcore.cli.compare.inputs import ModelSource, Objective, check_loss
from hbcore.errors import OptionError


@dataclass(frozen=True)
class Task:
    """Initial weights, batches, held-out batches, schedule.

    ``norms_every`` is the number of steps between measurements of each parameter's weights and updates; 0 for none.
    """

    source: ModelSource
    initial: nn.Module
    objective: Objective
    data: Data
    held_out: list[Batch]
    batch_size: int
    steps: int
    eval_every: int
    seed: int
    device: torch.device
    norms_every: int = 0

    @classmethod
    def build(
        cls,
        source: ModelSource,
        data: Data,
        *,
        batch_size: int,
        steps: int,
        eval_every: int,
        seed: int,
        device: torch.device,
        norms_every: int = 0,
    ) -> Task:
        """Initialise the model (on the CPU, so that every device starts from the same weights) and cut the batches.

        Raises:
            OptionError: the model or the data do not keep their contract.
        """
        held_out = [tuple(part.to(device) for part in batch) for batch in data.validation(batch_size)]
        initial, objective = source.build(seed)
        return cls(source, initial, objective, data, held_out, batch_size, steps, eval_every, seed, device, norms_every)

    def with_seed(self, seed: int) -> Task:
        """The same task from other weights and with other batches; the held-out batches stay."""
        if seed == self.seed:
            return self
        initial, objective = self.source.build(seed)
        return replace(self, initial=initial, objective=objective, seed=seed)

    @property
    def unit(self) -> str:
        """Of the losses: known of the built-in model on a text."""
        return "nats per byte" if self.source.facts["size"] and self.data.facts["bytes"] else ""

    @property
    def num_parameters(self) -> int:
        """Number of parameters (scalars) of the model."""
        return sum(p.numel() for p in self.initial.parameters())

    def new_model(self) -> nn.Module:
        """A copy of the initial model on the device."""
        return copy.deepcopy(self.initial).to(self.device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of one batch, a 0-d tensor."""
        return self.objective(model, *batch)

    def batches(self) -> Iterator[Batch]:
        """The batches of a run, from the beginning, on the device."""
        for batch in self.data.training(self.batch_size, self.seed):
            yield tuple(part.to(self.device) for part in batch)

    def warm_up(self) -> None:
        """One forward and backward pass on a throwaway model, so that no run pays for torch's one-time initialisation.

        Raises:
            OptionError: the loss cannot be computed, or is none.
        """
        model = self.new_model()
        for batch in (next(self.batches()), self.held_out[0]):
            try:
                loss = self.loss(model, batch)
            except Exception as error:  # somebody else's model may raise anything
                shapes = ", ".join(f"{list(part.shape)} {str(part.dtype).removeprefix('torch.')}" for part in batch)
                raise OptionError(
                    f"--model {self.source.name}: its loss of a batch of {self.data.name} ({shapes}) "
                    f"raised {type(error).__name__}: {error}"
                ) from error
            check_loss(loss, self.source.name)
            loss.backward()  # type: ignore[no-untyped-call]

    def identity(self) -> dict[str, Any]:
        """Everything that decides the numbers of a run besides its optimizer, as plain data."""
        first = next(iter(self.data.training(self.batch_size, self.seed)))
        return {
            "model": self.source.name,
            "weights": _digest(self.initial.state_dict().values()),
            "data": self.data.name,
            "batches": _digest([*first, *(part for batch in self.held_out for part in batch)]),
            "batch_size": self.batch_size,
            "steps": self.steps,
            "eval_every": self.eval_every,
            "norms_every": self.norms_every,
            "seed": self.seed,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "hbcore": __version__,
        }


def _digest(tensors: Any) -> str:
    """A hash of the values of all tensors."""
    seen = hashlib.sha256()
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            plain = tensor.detach().cpu().contiguous()
            seen.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
            # not through NumPy, which torch does not need and may not find
            seen.update(ctypes.string_at(plain.data_ptr(), plain.numel() * plain.element_size()) if plain.numel() else b"")
    return seen.hexdigest()[:16]
