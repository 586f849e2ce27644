"""NorMuon for hbcore. The class is imported on first use, and torch with it; discovery runs this module and needs neither."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hb_normuon.plugin import OPTIMIZERS
from hbcore.api import lazy

if TYPE_CHECKING:
    from hb_normuon.normuon import NormaliseNeurons as NormaliseNeurons
    from hb_normuon.normuon import NorMuon as NorMuon

__version__ = "0.1.0"

_TARGETS = {spec.name: spec.target for spec in OPTIMIZERS} | {"NormaliseNeurons": "hb_normuon.normuon:NormaliseNeurons"}
__getattr__, __dir__, __all__ = lazy(__name__, _TARGETS, ("__version__",))
