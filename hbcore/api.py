"""The names that a plugin may import; everything else in hbcore may change without notice.

What a manifest needs comes at once and without torch. What a rule needs is imported on first use, so that
``from hbcore.api import OptimizerSpec, hookimpl`` stays light.

``API_VERSION`` follows what is listed here: a new name raises the minor number, a removed or changed one the major
number. A manifest states the version that it was written for as ``API = (1, 0)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hbcore.registry.hookspecs import API_VERSION as API_VERSION
from hbcore.registry.hookspecs import hookimpl as hookimpl
from hbcore.registry.lazy import lazy as lazy
from hbcore.registry.search import Choice as Choice
from hbcore.registry.search import Decay as Decay
from hbcore.registry.search import LogUniform as LogUniform
from hbcore.registry.search import Uniform as Uniform
from hbcore.registry.spec import Alias as Alias
from hbcore.registry.spec import CodecSpec as CodecSpec
from hbcore.registry.spec import OptimizerSpec as OptimizerSpec

if TYPE_CHECKING:
    from hbcore.checkpoint.counterpart import Counterpart as Counterpart
    from hbcore.checkpoint.migrations import Migration as Migration
    from hbcore.engine.shared_options import Options as Options
    from hbcore.errors import HyperparameterError as HyperparameterError
    from hbcore.errors import OptionError as OptionError
    from hbcore.optimizer import Optimizer as Optimizer
    from hbcore.rules import bases as bases
    from hbcore.rules import launching as launching
    from hbcore.rules import triangle as triangle
    from hbcore.rules.checks import check_whole as check_whole
    from hbcore.rules.curvature import Curvature as Curvature
    from hbcore.rules.domain import Domain as Domain
    from hbcore.rules.hyper import Role as Role
    from hbcore.rules.hyper import hyper as hyper
    from hbcore.rules.moments import Average as Average
    from hbcore.rules.moments import CorrectedDecay as CorrectedDecay
    from hbcore.rules.moments import Momentum as Momentum
    from hbcore.rules.moments import ScaleByAdam as ScaleByAdam
    from hbcore.rules.moments import ScaleByAdEMAMix as ScaleByAdEMAMix
    from hbcore.rules.moments import ScaleByLaProp as ScaleByLaProp
    from hbcore.rules.moments import ScaleByNAdam as ScaleByNAdam
    from hbcore.rules.numerics import Scalar as Scalar
    from hbcore.rules.numerics import at_least as at_least
    from hbcore.rules.numerics import compute_dtype as compute_dtype
    from hbcore.rules.numerics import debiased as debiased
    from hbcore.rules.numerics import debiased_second_moment as debiased_second_moment
    from hbcore.rules.numerics import ema as ema
    from hbcore.rules.numerics import second_moment as second_moment
    from hbcore.rules.parallel import Parallel as Parallel
    from hbcore.rules.parallel import graft as graft
    from hbcore.rules.products import Operand as Operand
    from hbcore.rules.products import Products as Products
    from hbcore.rules.route import Route as Route
    from hbcore.rules.route import is_matrix as is_matrix
    from hbcore.rules.schedule_free import ScaleByRms as ScaleByRms
    from hbcore.rules.schedule_free import ScheduleFree as ScheduleFree
    from hbcore.rules.slot import Slot as Slot
    from hbcore.rules.slot import scalar as scalar
    from hbcore.rules.slot import zeros as zeros
    from hbcore.rules.stages import CoupleDecay as CoupleDecay
    from hbcore.rules.stages import DecayWeights as DecayWeights
    from hbcore.rules.transform import Context as Context
    from hbcore.rules.transform import State as State
    from hbcore.rules.transform import Transform as Transform
    from hbcore.rules.views import Block as Block
    from hbcore.rules.views import grid_view as grid_view
    from hbcore.rules.views import matrix_view as matrix_view
    from hbcore.state.blocks import BLOCK as BLOCK
    from hbcore.state.blocks import block_amax as block_amax
    from hbcore.state.blocks import block_shape as block_shape
    from hbcore.state.blocks import root_code as root_code
    from hbcore.state.blocks import spread as spread
    from hbcore.state.codec import BlockCodec as BlockCodec
    from hbcore.state.codec import StateCodec as StateCodec
    from hbcore.warn import warn_at_caller as warn_at_caller
    from hbcore.wrappers.composite import Composite as Composite
    from hbcore.wrappers.extension import Extension as Extension

_HOMES = {
    "bases": "hbcore.rules.bases",
    "launching": "hbcore.rules.launching",
    "triangle": "hbcore.rules.triangle",
    "BLOCK": "hbcore.state.blocks:BLOCK",
    "Average": "hbcore.rules.moments:Average",
    "BlockCodec": "hbcore.state.codec:BlockCodec",
    "Block": "hbcore.rules.views:Block",
    "Composite": "hbcore.wrappers.composite:Composite",
    "Context": "hbcore.rules.transform:Context",
    "CorrectedDecay": "hbcore.rules.moments:CorrectedDecay",
    "Counterpart": "hbcore.checkpoint.counterpart:Counterpart",
    "CoupleDecay": "hbcore.rules.stages:CoupleDecay",
    "Curvature": "hbcore.rules.curvature:Curvature",
    "DecayWeights": "hbcore.rules.stages:DecayWeights",
    "Domain": "hbcore.rules.domain:Domain",
    "Extension": "hbcore.wrappers.extension:Extension",
    "HyperparameterError": "hbcore.errors:HyperparameterError",
    "Migration": "hbcore.checkpoint.migrations:Migration",
    "Momentum": "hbcore.rules.moments:Momentum",
    "Operand": "hbcore.rules.products:Operand",
    "Optimizer": "hbcore.optimizer:Optimizer",
    "OptionError": "hbcore.errors:OptionError",
    "Options": "hbcore.engine.shared_options:Options",
    "Parallel": "hbcore.rules.parallel:Parallel",
    "Products": "hbcore.rules.products:Products",
    "Role": "hbcore.rules.hyper:Role",
    "Route": "hbcore.rules.route:Route",
    "STAGES": "hbcore.rules.domain:ORDER",
    "Scalar": "hbcore.rules.numerics:Scalar",
    "ScaleByAdEMAMix": "hbcore.rules.moments:ScaleByAdEMAMix",
    "ScaleByAdam": "hbcore.rules.moments:ScaleByAdam",
    "ScaleByLaProp": "hbcore.rules.moments:ScaleByLaProp",
    "ScaleByNAdam": "hbcore.rules.moments:ScaleByNAdam",
    "ScaleByRms": "hbcore.rules.schedule_free:ScaleByRms",
    "ScheduleFree": "hbcore.rules.schedule_free:ScheduleFree",
    "Slot": "hbcore.rules.slot:Slot",
    "State": "hbcore.rules.transform:State",
    "StateCodec": "hbcore.state.codec:StateCodec",
    "Transform": "hbcore.rules.transform:Transform",
    "block_amax": "hbcore.state.blocks:block_amax",
    "block_shape": "hbcore.state.blocks:block_shape",
    "check_whole": "hbcore.rules.checks:check_whole",
    "at_least": "hbcore.rules.numerics:at_least",
    "compute_dtype": "hbcore.rules.numerics:compute_dtype",
    "debiased": "hbcore.rules.numerics:debiased",
    "debiased_second_moment": "hbcore.rules.numerics:debiased_second_moment",
    "ema": "hbcore.rules.numerics:ema",
    "graft": "hbcore.rules.parallel:graft",
    "grid_view": "hbcore.rules.views:grid_view",
    "hyper": "hbcore.rules.hyper:hyper",
    "is_matrix": "hbcore.rules.route:is_matrix",
    "matrix_view": "hbcore.rules.views:matrix_view",
    "root_code": "hbcore.state.blocks:root_code",
    "scalar": "hbcore.rules.slot:scalar",
    "second_moment": "hbcore.rules.numerics:second_moment",
    "spread": "hbcore.state.blocks:spread",
    "warn_at_caller": "hbcore.warn:warn_at_caller",
    "zeros": "hbcore.rules.slot:zeros",
}

_HERE = (
    *("API_VERSION", "Alias", "CodecSpec", "OptimizerSpec", "hookimpl", "lazy"),
    *("Choice", "Decay", "LogUniform", "Uniform"),
)
__getattr__, __dir__, __all__ = lazy(__name__, _HOMES, _HERE, "plugins may use")
