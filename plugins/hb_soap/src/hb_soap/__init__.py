"""The SOAP family of optimizers for hbcore.

``hbcore.get("SOAP")`` finds these classes by name; ``from hb_soap import SOAP`` works as well. The classes are imported on
first use: discovery reads :mod:`hb_soap.plugin`, which runs this module first, and must not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hb_soap.plugin import OPTIMIZERS
from hbcore.api import lazy

if TYPE_CHECKING:
    from hb_soap.heavy import HeavyKLShampoo as HeavyKLShampoo
    from hb_soap.heavy import HeavyKLSOAP as HeavyKLSOAP
    from hb_soap.heavy import HeavySOAP as HeavySOAP
    from hb_soap.heavy import HeavySOAPAdEMAMix as HeavySOAPAdEMAMix
    from hb_soap.heavy import HeavySOAPNAdam as HeavySOAPNAdam
    from hb_soap.heavy import HeavySOLP as HeavySOLP
    from hb_soap.kl import KLSOAP as KLSOAP
    from hb_soap.kl import KLShampoo as KLShampoo
    from hb_soap.rule import PreconditionBySOAP as PreconditionBySOAP
    from hb_soap.soap import SFSOAP as SFSOAP
    from hb_soap.soap import SOAP as SOAP
    from hb_soap.soap import SOLP as SOLP
    from hb_soap.soap import SOAPAdEMAMix as SOAPAdEMAMix
    from hb_soap.soap import SOAPNAdam as SOAPNAdam

__version__ = "0.1.0"

_TARGETS = {spec.name: spec.target for spec in OPTIMIZERS} | {"PreconditionBySOAP": "hb_soap.rule:PreconditionBySOAP"}
__getattr__, __dir__, __all__ = lazy(__name__, _TARGETS, ("__version__",))
