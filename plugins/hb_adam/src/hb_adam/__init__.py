"""The Adam family of optimizers for hbcore.

``hbcore.get("AdamW")`` finds these classes by name; ``from hb_adam import AdamW`` works as well. The classes are
imported on first use: discovery reads ``hb_adam.plugin``, which runs this module first, and must not pay for importing
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hb_adam.adafactor import Adafactor
    from hb_adam.adam import Adam
    from hb_adam.adamc import AdamC
    from hb_adam.adams import Adams
    from hb_adam.adamw import AdamW
    from hb_adam.ademamix import AdEMAMix
    from hb_adam.adopt import ADOPT
    from hb_adam.laprop import LaProp, SignLaProp
    from hb_adam.lion import Lion
    from hb_adam.msam import MSAMLaProp
    from hb_adam.nadam import NAdam
    from hb_adam.rmsprop import RMSprop
    from hb_adam.sam import SAMWrapper
    from hb_adam.schedule_free import SFAdamW
    from hb_adam.sgd import SGD
    from hb_adam.sparse_adam import SparseAdam
    from hb_adam.suds import SUDSAdamW
    from hb_adam.unscaled import UnscaledAdamW

__all__ = [
    "ADOPT",
    "SGD",
    "AdEMAMix",
    "Adafactor",
    "Adam",
    "AdamC",
    "AdamW",
    "Adams",
    "LaProp",
    "Lion",
    "MSAMLaProp",
    "NAdam",
    "RMSprop",
    "SAMWrapper",
    "SFAdamW",
    "SUDSAdamW",
    "SignLaProp",
    "SparseAdam",
    "UnscaledAdamW",
    "__version__",
]

__version__ = "0.1.0"

_HOME = {
    "ADOPT": "hb_adam.adopt",
    "AdEMAMix": "hb_adam.ademamix",
    "Adafactor": "hb_adam.adafactor",
    "Adam": "hb_adam.adam",
    "AdamC": "hb_adam.adamc",
    "AdamW": "hb_adam.adamw",
    "Adams": "hb_adam.adams",
    "LaProp": "hb_adam.laprop",
    "Lion": "hb_adam.lion",
    "MSAMLaProp": "hb_adam.msam",
    "NAdam": "hb_adam.nadam",
    "RMSprop": "hb_adam.rmsprop",
    "SAMWrapper": "hb_adam.sam",
    "SFAdamW": "hb_adam.schedule_free",
    "SGD": "hb_adam.sgd",
    "SUDSAdamW": "hb_adam.suds",
    "SignLaProp": "hb_adam.laprop",
    "SparseAdam": "hb_adam.sparse_adam",
    "UnscaledAdamW": "hb_adam.unscaled",
}


def __getattr__(name: str) -> Any:
    """Import the module that holds the class ``name`` (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
