"""The PSGD family of optimizers for hbcore.

``hbcore.get("PSGDKron")`` finds these classes by name; ``from hb_psgd import PSGDKron`` works as well. The classes are
imported on first use: discovery reads ``hb_psgd.plugin``, which runs this module first, and must not pay for importing
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hb_psgd.psgd import PSGDKron

__all__ = ["PSGDKron", "__version__"]

__version__ = "0.1.0"

_HOME = {"PSGDKron": "hb_psgd.psgd"}


def __getattr__(name: str) -> Any:
    """Import the module that holds the class ``name`` (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
