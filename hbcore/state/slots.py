"""``optimizer.state``: dicts that also count their writes.

The engine keeps pointers to state tensors between steps. Checking a thousand dict entries per step for replaced tensors takes
longer than launching the kernel; comparing one counter does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


class Revision:
    """Number of writes to a mapping or to the mappings inside it."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


def _counted(method: F) -> F:
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.revision.count += 1
        return method(self, *args, **kwargs)

    counted.__doc__ = method.__doc__
    return counted  # type: ignore[return-value]


class Slots(dict[Any, Any]):
    """One parameter's state. Pickles and deep-copies as a plain dict."""

    def __init__(self, revision: Revision, content: Mapping[Any, Any] | Iterable[Any] = ()) -> None:
        super().__init__(content)
        self.revision = revision

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
    """Parameter -> its :class:`Slots`, created on first access as in ``defaultdict(dict)``."""

    def __init__(self, content: Mapping[Tensor, Mapping[str, Any]]) -> None:
        super().__init__()
        self.revision = Revision()
        self.update(content)

    def __missing__(self, param: Tensor) -> Slots:
        self[param] = {}
        return self[param]

    def __setitem__(self, param: Tensor, slots: Mapping[str, Any]) -> None:
        self.revision.count += 1
        super().__setitem__(param, Slots(self.revision, slots))

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

    __delitem__ = _counted(dict.__delitem__)
    pop = _counted(dict.pop)
    popitem = _counted(dict.popitem)
    clear = _counted(dict.clear)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def compact(value: Any) -> Any:
    """A copy of ``value`` if it is a tensor that views part of a larger storage; otherwise ``value``."""
    shares = isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.numel() * value.element_size()
    return value.clone() if shares else value
