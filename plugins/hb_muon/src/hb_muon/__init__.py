"""The Muon family of optimizers for hbcore.

``hbcore.get("Muon")`` finds these classes by name; ``from hb_muon import Muon`` works as well. The classes are imported on
first use: discovery reads ``hb_muon.plugin``, which runs this module first, and must not pay for importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hb_muon.hyperball import HyperBallAdamW
    from hb_muon.laprop import MuonLaProp
    from hb_muon.muon import Muon
    from hb_muon.muon_adamw import MuonAdamW
    from hb_muon.orthograd import LaPropOrtho, OrthoLaProp
    from hb_muon.scion import Scion, init_scion_

__all__ = [
    "HyperBallAdamW",
    "LaPropOrtho",
    "Muon",
    "MuonAdamW",
    "MuonLaProp",
    "OrthoLaProp",
    "Scion",
    "__version__",
    "init_scion_",
]

__version__ = "0.1.0"

_HOME = {
    "HyperBallAdamW": "hb_muon.hyperball",
    "LaPropOrtho": "hb_muon.orthograd",
    "Muon": "hb_muon.muon",
    "MuonAdamW": "hb_muon.muon_adamw",
    "MuonLaProp": "hb_muon.laprop",
    "OrthoLaProp": "hb_muon.orthograd",
    "Scion": "hb_muon.scion",
    "init_scion_": "hb_muon.scion",
}


def __getattr__(name: str) -> Any:
    """Import the module that holds ``name`` (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
