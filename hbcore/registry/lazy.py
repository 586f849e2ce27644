"""Names of a package that are imported when they are first used (PEP 562), so that importing the package costs nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

from hbcore.registry.spec import OptimizerSpec


def lazy(
    module: str, targets: Mapping[str, str] | Iterable[OptimizerSpec], more: Iterable[str] = (), hint: str = "it has"
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """A package's ``__getattr__``, ``__dir__`` and ``__all__``.

    ::

        __getattr__, __dir__, __all__ = lazy(__name__, OPTIMIZERS)

    Args:
        module: the package's ``__name__``.
        targets: name -> ``"module:attribute"``, or ``"module"`` for the module itself; or a manifest's optimizers.
        more: names that are public and there already.
        hint: what the error for another name says before the list of public ones.
    """
    homes = dict(targets) if isinstance(targets, Mapping) else {spec.name: spec.target for spec in targets}
    public = sorted({*homes, *more})

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}; {hint} {', '.join(public)}")
        home, _, attribute = homes[name].partition(":")
        value = getattr(import_module(home), attribute) if attribute else import_module(home)
        setattr(sys.modules[module], name, value)  # the next access does not come here
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[module]), *public})

    return __getattr__, __dir__, public
