"""State in host memory, ``offload="cpu"``: where it lives, and how it travels to the device and back within a step.

Each tensor of offloaded state is two. Its *home*, pinned, is what ``optimizer.state`` holds, so that whoever reads, saves or
replaces state meets an ordinary tensor. Its *twin* on the parameter's device is the engine's own, and has memory only around
the operations that use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbcore.distributed.placement import is_dtensor

TARGETS = ("cpu",)
"""What the option may be, besides None."""

APPLIES = ("cuda",)
"""The device types of parameters whose state can live elsewhere."""

SHARE = 32 << 20
"""Bytes of state that visit the device together: those of a segment's parameters, or of a piece of one where it can be cut.
The first share is fetched, and the last one stored, while nothing travels the other way, so it should be small beside the
whole; and what the host does for a share should be little beside the half of a millisecond that its copies take."""

RESIDENT = 4 * SHARE
"""Bytes that twins may have on a device before a fetch waits for a store: one share comes, one is worked on, two leave."""

Operation = Callable[[], int]


def applies(offload: str | None, device: torch.device) -> bool:
    """Whether the state of parameters on ``device`` lives in host memory."""
    return offload is not None and device.type in APPLIES


def homed(t: Tensor, device: torch.device) -> Tensor:
    """``t`` as state of a parameter on ``device`` lives in host memory: itself, if it lives there by now, or a pinned copy."""
    pin = device.type == "cuda"
    if t.device.type == "cpu" and not t.is_inference() and (t.is_pinned() or not pin):
        return t
    with torch.inference_mode(False):  # such tensors could not be written to in ordinary steps
        home = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="cpu", pin_memory=pin)
        return home.copy_(t)


def sent_home(offload: str | None, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state, about to become the optimizer's, with its tensors in host memory; single numbers as they are."""
    if is_dtensor(param) or not applies(offload, param.device):
        return state
    return {name: homed(t, param.device) if isinstance(t, Tensor) and t.ndim else t for name, t in state.items()}


@dataclass(eq=False, repr=False)  # a tensor without memory has no repr
class Twin:
    """A state tensor's place on the device.

    Args:
        homes, name: where its home is found, which users may replace.
        tensor: the place, which has memory while it is open.
        size: the bytes of that.
        elements: which of the home's elements it has, if it has not all of them.
    """

    homes: Mapping[str, Tensor]
    name: str
    tensor: Tensor
    size: int
    elements: slice | None = None

    @classmethod
    def of(cls, homes: Mapping[str, Tensor], name: str, device: torch.device, elements: slice | None = None) -> Twin:
        """A closed twin of ``homes[name]``, with its strides, or of some elements of it."""
        home = _some(homes[name], elements)
        with torch.inference_mode(False):
            tensor = torch.empty_strided(home.size(), home.stride(), dtype=home.dtype, device=device)
        twin = cls(homes, name, tensor, tensor.untyped_storage().nbytes(), elements)
        twin.close()
        return twin

    @property
    def home(self) -> Tensor:
        """The tensor in host memory."""
        return _some(self.homes[self.name], self.elements)

    def open(self) -> None:
        """Take memory, uninitialised."""
        self.tensor.untyped_storage().resize_(self.size)

    def close(self) -> None:
        """Give it back."""
        self.tensor.untyped_storage().resize_(0)


def _some(t: Tensor, elements: slice | None) -> Tensor:
    return t if elements is None else t.view(-1)[elements]


def twins_of(homes: dict[str, Tensor], names: Iterable[str], device: torch.device) -> dict[str, Twin]:
    """Send tensors home, of parameters on ``device``; return their twins."""
    homes.update({name: homed(homes[name], device) for name in names})
    return {name: Twin.of(homes, name, device) for name in names}


class Needs(NamedTuple):
    """The twins that an operation uses.

    Attributes:
        read, written: those whose old values it needs, and those that it gives new ones.
        follow: told when they have memory, before the operation runs.
    """

    read: Sequence[Twin]
    written: Sequence[Twin]
    follow: Callable[[], None]

    def on(self, device: torch.device) -> Needs:
        """Those on one device."""
        read, written = ([t for t in some if t.tensor.device == device] for some in self[:2])
        return Needs(read, written, self.follow)

    @property
    def twins(self) -> dict[Twin, None]:
        """All of them, once."""
        return dict.fromkeys((*self.read, *self.written))


class Lane:
    """The way between one device and the host, with a stream in each direction; on a CPU, copies are made at once.

    Memory is taken and given back in the order of the device's main stream, from which a model's own tensors have theirs: a
    fetch starts when that stream has come to where the memory was taken, and the stream waits for a store before the memory of
    what was stored is used again.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._cuda = device, device.type == "cuda"
        self._streams: list[Any] = [torch.cuda.Stream(device) for _ in range(2)] if self._cuda else []  # type: ignore[no-untyped-call]
        self._here: dict[Twin, None] = {}
        self._leaving: dict[Twin, Any] = {}
        self._changed: set[Twin] = set()
        self._bytes = 0

    def fetch(self, needs: Needs) -> Any:
        """Begin to bring what an operation needs; return what :meth:`await_` waits for."""
        twins = needs.twins
        for t in [t for t in twins if t in self._leaving]:
            self.await_(self._leaving.pop(t))
            self._here[t] = None
        missing = [t for t in twins if t not in self._here]
        self._make_room(sum(t.size for t in missing))
        for t in missing:
            t.open()
            self._here[t] = None
            self._bytes += t.size
        read = set(needs.read)
        return self._travel(0, [(t.tensor, t.home) for t in missing if t in read])

    def await_(self, event: Any) -> None:
        """Have the main stream wait for copies."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def leave(self, written: Iterable[Twin], kept: Iterable[Twin]) -> None:
        """An operation was enqueued that writes these: store all that is here but for ``kept``."""
        self._changed.update(written)
        kept = set(kept)
        going = [t for t in self._here if t not in kept]
        changed = [t for t in going if t in self._changed]
        event = self._travel(1, [(t.home, t.tensor) for t in changed])
        for t in going:
            del self._here[t]
            if t in self._changed:
                self._leaving[t] = event
            else:
                self._close(t)
        self._changed.difference_update(changed)

    def close(self) -> None:
        """Store what is left, wait until all is at home, and give all memory back."""
        if not self._here and not self._leaving:
            return
        if self._cuda:
            self._streams[0].synchronize()  # of a step that failed, whose fetches nobody waited for
        self.leave((), ())
        if self._cuda:
            self._streams[1].synchronize()
        for t in self._leaving:
            self._close(t)
        self._leaving.clear()

    def _make_room(self, size: int) -> None:
        """Give back the memory of what left first, if there is too much of it."""
        last = None
        while self._leaving and self._bytes + size > RESIDENT:
            t = next(iter(self._leaving))
            event = self._leaving.pop(t)
            if event is not last:
                self.await_(event)
            last = event
            self._close(t)

    def _close(self, t: Twin) -> None:
        t.close()
        self._bytes -= t.size

    def _travel(self, way: int, copies: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Copy sources to targets after all that the main stream has to do by now."""
        if not self._cuda:
            for target, source in copies:
                target.copy_(source)
            return None
        if not copies:
            return None
        stream = self._streams[way]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for target, source in copies:
                target.copy_(source, non_blocking=True)
            return stream.record_event()


class Operations(list[Operation]):
    """The operations of a step, in order; those that use offloaded state run within its journeys.

    Args:
        operations: the operations.
        needs: the state that some of them use, by their index.

    Attributes:
        journeys: those of the state; None if there is none.
    """

    def __init__(self, operations: Sequence[Operation] = (), needs: Mapping[int, Needs] = MappingProxyType({})) -> None:
        super().__init__(operations)
        using = {i: n for i, n in needs.items() if n.twins}
        journeys = Journeys(list(using.values()))
        for k, i in enumerate(using):
            self[i] = partial(journeys.run, k, self[i])
        self.journeys = journeys if using else None


class Journeys:
    """What brings state to operations, and takes it home.

    While an operation runs, the next one's state is on its way here and the last one's on its way back. At the end of a step
    the host waits for the stores, so that ``optimizer.state`` is true for whoever reads it.
    """

    def __init__(self, needs: Sequence[Needs]) -> None:
        every = [t for n in needs for t in n.twins]
        for t in every:
            t.close()  # compiling may have given it memory
        self._lanes = {device: Lane(device) for device in dict.fromkeys(t.tensor.device for t in every)}
        self._order = [{lane: n.on(device) for device, lane in self._lanes.items()} for n in needs]
        self._follow = [n.follow for n in needs]
        self._coming: list[tuple[Lane, Any]] = []

    def begin(self) -> None:
        """Fetch the first operation's state, while the host has yet to fill in the step's numbers."""
        self._coming = self._fetch(0)

    def run(self, k: int, operation: Operation) -> int:
        """Run the ``k``-th of the operations that use state; fetch the next one's before, and store what it changed after."""
        events = self._coming or self._fetch(k)
        self._coming = self._fetch(k + 1)
        for lane, event in events:
            lane.await_(event)
        self._follow[k]()
        launches = operation()
        coming = self._order[k + 1] if k + 1 < len(self._order) else {}
        for lane, needs in self._order[k].items():
            lane.leave(needs.written, coming[lane].twins if coming else ())
        return launches

    def close(self) -> None:
        """Wait until all state is at home."""
        self._coming = []
        for lane in self._lanes.values():
            lane.close()

    def _fetch(self, k: int) -> list[tuple[Lane, Any]]:
        if k == len(self._order):
            return []
        return [(lane, lane.fetch(needs)) for lane, needs in self._order[k].items()]
