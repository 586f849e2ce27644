"""The Muon family of optimizers for hbcore.

``hbcore.get("Muon")`` finds these classes by name; ``from hb_muon import Muon`` works as well. The classes are imported on
first use: discovery reads :mod:`hb_muon.plugin`, which runs this module first, and must not import torch.

The rules ``MuonMomentum`` and ``Orthogonalize`` are there for chains of your own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hb_muon.plugin import OPTIMIZERS
from hbcore.api import lazy

if TYPE_CHECKING:
    from hb_muon.hyperball import HyperBallAdamW as HyperBallAdamW
    from hb_muon.laprop import MuonLaProp as MuonLaProp
    from hb_muon.muon import Muon as Muon
    from hb_muon.muon_adamw import MuonAdamW as MuonAdamW
    from hb_muon.orthograd import LaPropOrtho as LaPropOrtho
    from hb_muon.orthograd import OrthoLaProp as OrthoLaProp
    from hb_muon.rules import MuonMomentum as MuonMomentum
    from hb_muon.rules import Orthogonalize as Orthogonalize
    from hb_muon.scion import Scion as Scion
    from hb_muon.scion import init_scion_ as init_scion_

__version__ = "0.1.0"

_TARGETS = {spec.name: spec.target for spec in OPTIMIZERS} | {
    "MuonMomentum": "hb_muon.rules:MuonMomentum",
    "Orthogonalize": "hb_muon.rules:Orthogonalize",
    "init_scion_": "hb_muon.scion:init_scion_",
}
__getattr__, __dir__, __all__ = lazy(__name__, _TARGETS, ("__version__",))
