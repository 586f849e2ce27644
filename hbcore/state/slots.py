"""``optimizer.state``: dicts that also count their writes, and tell of them.

The engine keeps pointers to state tensors between steps. Checking a thousand dict entries per step for replaced tensors takes
longer than launching the kernel; comparing one counter does not. And whoever replaces a tensor, to move it to another device,
expects its memory back at once: plans hear of every write, and let go of what was replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


class Watcher(Protocol):
    """Who keeps state tensors between steps."""

    def forget(self, param: Tensor | None) -> None:
        """The state of ``param``, or of all parameters, was written to: keep none of its tensors."""

    def lend(self) -> None:
        """Somebody was handed state tensors: keep them, and no view of their memory."""


class Revision:
    """Number of writes to a mapping or to the mappings inside it, and who hears of them."""

    __slots__ = ("count", "watchers")

    def __init__(self) -> None:
        self.count = 0
        self.watchers: WeakSet[Watcher] = WeakSet()

    def written(self, param: Tensor | None) -> None:
        """Count a write to the state of ``param``; of all parameters if it is None."""
        self.count += 1
        for watcher in tuple(self.watchers):
            watcher.forget(param)

    def lent(self) -> None:
        """Somebody was handed state tensors."""
        for watcher in tuple(self.watchers):
            watcher.lend()


def _counted(method: F) -> F:
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.revision.written(self.param)
        return method(self, *args, **kwargs)

    counted.__doc__ = method.__doc__
    return counted  # type: ignore[return-value]


class Slots(dict[Any, Any]):
    """The state of ``param``. Pickles and deep-copies as a plain dict."""

    def __init__(self, revision: Revision, param: Tensor, content: Mapping[Any, Any] | Iterable[Any] = ()) -> None:
        super().__init__(content)
        self.revision, self.param = revision, param

    __setitem__ = _counted(dict.__setitem__)
    __delitem__ = _counted(dict.__delitem__)
    __ior__ = _counted(dict.__ior__)
    update = _counted(dict.update)
    setdefault = _counted(dict.setdefault)
    pop = _counted(dict.pop)
    popitem = _counted(dict.popitem)
    clear = _counted(dict.clear)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class StateMap(dict[Tensor, Slots]):
    """Parameter -> its :class:`Slots`, created on first access as in ``defaultdict(dict)``; and entries of the user's own."""

    param = None  # its own writes concern all parameters

    def __init__(self, content: Mapping[Tensor, Mapping[str, Any]]) -> None:
        super().__init__()
        self.revision = Revision()
        self.update(content)

    def __missing__(self, param: Tensor) -> Slots:
        self[param] = {}
        return self[param]

    def __setitem__(self, param: Tensor, slots: Mapping[str, Any]) -> None:
        if not isinstance(param, Tensor):  # the user's own entry
            super().__setitem__(param, slots)
            return
        self.revision.written(param)
        super().__setitem__(param, Slots(self.revision, param, slots))

    def setdefault(self, param: Tensor, slots: Mapping[str, Any] | None = None) -> Slots:
        """Like ``dict.setdefault``."""
        return self[param] if param in self or slots is None else self._put(param, slots)

    def update(self, content: Mapping[Tensor, Mapping[str, Any]]) -> None:  # type: ignore[override]
        """Like ``dict.update``, from a mapping."""
        for param, slots in content.items():
            self[param] = slots

    def _put(self, param: Tensor, slots: Mapping[str, Any]) -> Slots:
        self[param] = slots
        return self[param]

    def own(self) -> dict[Any, Any]:
        """The user's entries, whose keys are no parameters."""
        keys: list[Any] = list(self)
        return {key: self[key] for key in keys if not isinstance(key, Tensor)}

    def __delitem__(self, param: Tensor) -> None:
        self.revision.written(param)
        super().__delitem__(param)

    pop = _counted(dict.pop)
    popitem = _counted(dict.popitem)
    clear = _counted(dict.clear)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def compact(value: Any) -> Any:
    """A copy of ``value`` if it is a tensor that views part of a larger storage; otherwise ``value``."""
    shares = isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.numel() * value.element_size()
    return value.clone() if shares else value


def compacted(slots: Any) -> Any:
    """A parameter's state with :func:`compact` tensors, as a plain dict; the user's own entries as they are."""
    return {k: compact(v) for k, v in slots.items()} if isinstance(slots, Slots) else slots
