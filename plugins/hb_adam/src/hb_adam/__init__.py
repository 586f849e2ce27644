"""The Adam family of optimizers for hbcore.

``hbcore.get("AdamW")`` finds these classes by name; ``from hb_adam import AdamW`` works as well. The classes are
imported on first use: discovery reads ``hb_adam.plugin``, which runs this module first, and must not pay for importing
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hb_adam.adamw import AdamW
    from hb_adam.schedule_free import SFAdamW
    from hb_adam.sgd import SGD

__all__ = ["SGD", "AdamW", "SFAdamW", "__version__"]

__version__ = "0.1.0"

_HOME = {"AdamW": "hb_adam.adamw", "SFAdamW": "hb_adam.schedule_free", "SGD": "hb_adam.sgd"}


def __getattr__(name: str) -> Any:
    """Import the module that holds the class ``name`` (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
