"""What ``param_ecc`` keeps beside parameters belongs to the very bits that they hold: what tells whether it still does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hbcore.distributed.placement import is_dtensor
from hbcore.state.codec import StateCodec

PREFIX = "param#"
"""What the names of the stored tensors beside a parameter begin with."""

FINGERPRINT = "param#sum"
"""In a saved entry, the :func:`fingerprint` of the parameter that the corrections beside it belong to."""


class Loaded(NamedTuple):
    """The corrections of one parameter in a checkpoint, whose weights may be loaded later than they are.

    Attributes:
        codec: wrote them.
        parts: the stored tensors, without the parameter itself; None if they are in the state already.
        sum: the fingerprint of the weights that they belong to; None if the checkpoint is too old to have it.
    """

    codec: StateCodec
    parts: Mapping[str, Tensor] | None
    sum: Tensor | None


class Corrections:
    """When the parameters that have corrections were last known to belong to them.

    In-place writes are counted by torch, and a dtype is a parameter's own: neither waits for the device. What is written
    through ``p.data`` goes unseen.

    Attributes:
        params: the parameters that have corrections.
        versions: torch's counts of the writes to them, by then.
        revision: the state's count of writes for which ``params`` is the list; None if it has to be made.
        stale: after how many steps in a row somebody wrote to a parameter.
        waiting: what a checkpoint brought, until the next step: its weights may be loaded before that, once or again.
    """

    def __init__(self) -> None:
        self.params: list[Tensor] = []
        self.versions: list[int] = []
        self.revision: int | None = None
        self.stale = 0
        self.waiting: dict[Tensor, Loaded] = {}
        self._places: dict[Tensor, int] = {}
        self._met: dict[Tensor, int] = {}

    def current(self, dtype: torch.dtype) -> bool:
        """Whether nobody wrote to a parameter, and all have ``dtype``."""
        written = [p._version for p in self.params] != self.versions
        return not written and all(p.dtype == dtype for p in self.params)

    def keep_to(self, params: Iterable[Tensor], revision: int) -> None:
        """Keep to other parameters, which belong to their corrections now."""
        self.params = [p for p in params if not p.is_inference()]
        self.revision = revision
        self._places = {p: i for i, p in enumerate(self.params)}
        self.note()

    def note(self) -> None:
        """All parameters belong to their corrections now."""
        self.versions = [p._version for p in self.params]

    def note_one(self, param: Tensor) -> None:
        """One parameter does."""
        if param in self._places:
            self.versions[self._places[param]] = param._version

    def knows(self, param: Tensor) -> bool:
        """Whether nobody wrote to a parameter that is one of them."""
        return param not in self._places or self.versions[self._places[param]] == param._version

    def await_weights(self, loaded: dict[Tensor, Loaded]) -> None:
        """Take what a checkpoint brought, in place of what an earlier one did."""
        self.waiting, self._met = loaded, {}

    def met(self, param: Tensor) -> None:
        """What a checkpoint brought for a parameter belongs to what it holds, and was put to use."""
        self._met[param] = param._version
        self.note_one(param)

    def waits(self, param: Tensor) -> bool:
        """Whether a checkpoint's correction of a parameter has not met the weights that it holds now."""
        return param in self.waiting and self._met.get(param) != param._version

    def forgive(self, before: list[int]) -> None:
        """The parameters were written to since they had the versions ``before``, and hold the same bits again."""
        if len(before) == len(self.params):
            now = [p._version for p in self.params]
            self.versions = [v + n - b for v, n, b in zip(self.versions, now, before, strict=True)]


def fingerprint(weights: Tensor) -> Tensor | None:
    """The sum of a parameter's bits, two bytes at a time: int64, 0-d, on its device; None for a part of a sharded one.

    Weights that differ have different sums, but for one set in very many.
    """
    if is_dtensor(weights):
        return None
    return weights.detach().contiguous().view(-1).view(torch.int16).sum(dtype=torch.int64)
