"""The classes of aliases that carry a preset: ``DelayedPSGD`` is a subclass of ``PSGDKron`` with ``delayed=True``.

They are real subclasses, not partials: trainers test ``issubclass(cls, torch.optim.Optimizer)``, and tools read the
signature. They exist only once asked for. This module's ``__getattr__`` makes each one importable under its own name,
which is all that pickle needs.
"""

from __future__ import annotations

from typing import Any

from hbcore.errors import AmbiguousNameError, UnknownOptimizerError


def __getattr__(name: str) -> Any:
    if not name[0].isupper():  # __path__, __wrapped__ and whatever else tools probe for must not scan for plugins
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hbcore import registry

    try:
        return registry.preset_class(name)
    except (UnknownOptimizerError, AmbiguousNameError) as error:
        raise AttributeError(str(error)) from None
