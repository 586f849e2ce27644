"""The SOAP family of optimizers for hbcore.

``hbcore.get("SOAP")`` finds these classes by name; ``from hb_soap import SOAP`` works as well. The classes are imported on
first use: discovery reads :mod:`hb_soap.plugin`, which runs this module first, and must not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hb_soap.plugin import OPTIMIZERS
from hbcore.api import lazy

if TYPE_CHECKING:
    from hb_soap.soap import SOAP as SOAP
    from hb_soap.soap import PreconditionBySOAP as PreconditionBySOAP

__version__ = "0.1.0"

_TARGETS = {spec.name: spec.target for spec in OPTIMIZERS} | {"PreconditionBySOAP": "hb_soap.soap:PreconditionBySOAP"}
__getattr__, __dir__, __all__ = lazy(__name__, _TARGETS, ("__version__",))
