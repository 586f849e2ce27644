"""LAMB for hbcore. The class is imported on first use, and torch with it; discovery runs this module and needs neither."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hb_lamb.plugin import OPTIMIZERS
from hbcore.api import lazy

if TYPE_CHECKING:
    from hb_lamb.lamb import LAMB as LAMB
    from hb_lamb.lamb import ScaleByTrust as ScaleByTrust

__version__ = "0.1.0"

_TARGETS = {spec.name: spec.target for spec in OPTIMIZERS} | {"ScaleByTrust": "hb_lamb.lamb:ScaleByTrust"}
__getattr__, __dir__, __all__ = lazy(__name__, _TARGETS, ("__version__",))
