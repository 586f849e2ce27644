"""The PSGD family of optimizers for hbcore.

``hbcore.get("PSGDKron")`` finds these classes by name; ``from hb_psgd import PSGDKron`` works as well. The classes are imported
on first use: discovery reads :mod:`hb_psgd.plugin`, which runs this module first, and must not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hb_psgd.plugin import OPTIMIZERS
from hbcore.api import lazy

if TYPE_CHECKING:
    from hb_psgd.lather import LATHER as LATHER
    from hb_psgd.lra_rule import PSGDLRA as PSGDLRA
    from hb_psgd.psgd import PSGDPRO as PSGDPRO
    from hb_psgd.psgd import QSGD as QSGD
    from hb_psgd.psgd import PSGDKron as PSGDKron

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy(__name__, OPTIMIZERS, ("__version__",))
