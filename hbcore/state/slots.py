"""``optimizer.state``: plain dicts to everybody, which also count how often somebody put something else into them.

The engine keeps pointers to state tensors between steps. Looking a thousand of them up again in each step, to see whether one
was replaced, takes longer than launching the kernel; comparing one number does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


class Revision:
    """How often a mapping, or one inside it, was written to."""

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
    """One parameter's state. Pickles, and deep-copies, as the plain dict that it is to everybody else."""

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
    """Parameter -> its :class:`Slots`, which appear when they are first asked for, as in ``defaultdict(dict)``."""

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
        """As of a dict."""
        return self[param] if param in self or slots is None else self._put(param, slots)

    def update(self, content: Mapping[Tensor, Mapping[str, Any]]) -> None:  # type: ignore[override]
        """As of a dict, from a mapping."""
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


def own(value: Any) -> Any:
    """A tensor without the rest of the slab that it is a row of."""
    shares = isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.numel() * value.element_size()
    return value.clone() if shares else value
