"""The Adam family of optimizers for hbcore.

``hbcore.get("AdamW")`` finds these classes by name; ``from hb_adam import AdamW`` works as well. The classes are imported on
first use: discovery reads :mod:`hb_adam.plugin`, which runs this module first, and must not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hb_adam.plugin import OPTIMIZERS
from hbcore.api import lazy

if TYPE_CHECKING:
    from hb_adam.adafactor import Adafactor as Adafactor
    from hb_adam.adam import Adam as Adam
    from hb_adam.adamc import AdamC as AdamC
    from hb_adam.adams import Adams as Adams
    from hb_adam.adamw import AdamW as AdamW
    from hb_adam.ademamix import AdEMAMix as AdEMAMix
    from hb_adam.adopt import ADOPT as ADOPT
    from hb_adam.laprop import LaProp as LaProp
    from hb_adam.laprop import SignLaProp as SignLaProp
    from hb_adam.lion import Lion as Lion
    from hb_adam.msam import MSAMLaProp as MSAMLaProp
    from hb_adam.nadam import NAdam as NAdam
    from hb_adam.rmsprop import RMSprop as RMSprop
    from hb_adam.sam import SAMWrapper as SAMWrapper
    from hb_adam.schedule_free import SFAdamW as SFAdamW
    from hb_adam.sgd import SGD as SGD
    from hb_adam.sparse_adam import SparseAdam as SparseAdam
    from hb_adam.suds import SUDSAdamW as SUDSAdamW
    from hb_adam.unscaled import UnscaledAdamW as UnscaledAdamW

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy(__name__, OPTIMIZERS, ("__version__",))
