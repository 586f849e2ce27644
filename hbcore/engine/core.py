"""What the engine knows of one optimizer, and owns: the one object that plans, checkpoints and wrappers are handed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from hbcore.engine.chain_spec import ChainSpec
from hbcore.engine.corrections import Corrections
from hbcore.engine.graph.scalar_inputs import Amp
from hbcore.engine.group_scalars import GroupScalars
from hbcore.engine.options import Settings
from hbcore.engine.params import describe_param
from hbcore.engine.report import Report
from hbcore.engine.skipping import Skipping
from hbcore.state.slots import StateMap

Group = dict[str, Any]


class StepPlan(Protocol):
    """What runs a step; :class:`hbcore.engine.planning.plan.Plan` and its subclass."""

    def step(self, amp: Amp) -> list[Tensor]:
        """Run one step for every parameter that has a gradient; return those parameters."""

    def reread(self) -> None:
        """State tensors were written to in place: read the step counters again."""


@dataclass
class Modes:
    """Which weights the parameters hold; :mod:`hbcore.engine.weight_modes` changes them.

    Attributes:
        training: those to train with, of rules that have a second set to evaluate with.
        averaging: their moving averages, within ``ema_weights()``.
        kept: after a switch, each parameter's weights from before it, so that switching back restores them bit for bit.
    """

    training: bool = True
    averaging: bool = False
    kept: dict[Tensor, dict[str, Tensor]] = field(default_factory=dict)

    def reset(self, training: bool) -> None:
        """The parameters now hold the weights of this kind, newly stepped or loaded."""
        self.training = training
        if self.kept:
            self.kept = {}


@dataclass
class Pairs:
    """Hessian-vector products, for rules that need them; :mod:`hbcore.engine.curvature` makes them.

    Attributes:
        made: for the coming step, parameter -> a vector and the Hessian's product with it.
        differences: why products are made by finite differences from now on; empty while nothing says so.
    """

    made: dict[Tensor, tuple[Tensor, Tensor]] = field(default_factory=dict)
    differences: str = ""

    def hand_over(self) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """The products, which are let go of."""
        made, self.made = self.made, {}
        return made


class OptimizerCore:
    """One optimizer's groups, state and chain, and the plan made of them.

    Args:
        name: the optimizer's class name, for messages.
        chain: its rule with its options' stages around it.
        sparse: whether its gradients are sparse.

    Attributes:
        building: the constructor is adding its groups, whose parameters it has checked.
        groups: the param groups, the very list that the optimizer shows.
        state: parameter -> its slots.
        exposed: whether somebody outside the engine was handed state tensors, and may put other memory under them at any time.
        options: the options that the user gave, as far as text can hold them.
        recorded: for which of :attr:`Modes.training` the strings in the groups are current; None if they are not.
        seen: :attr:`state`'s count of writes after the last step.
        group_scalars: what each group carries from step to step, by the group's index.
        report: how steps ran.
        skipping: the steps that ``skip_nonfinite=True`` skipped.
        modes: which weights the parameters hold.
        plan: what runs a step; None before the first one, and after :meth:`invalidate`.
    """

    def __init__(self, name: str, chain: ChainSpec, sparse: bool = False) -> None:
        self.name, self.chain, self.sparse, self.building = name, chain, sparse, False
        self.groups: list[Group] = []
        self.state = StateMap({})
        self.exposed = False
        self.options: Mapping[str, Any] = {}
        self.recorded: bool | None = None
        self.seen = 0
        self.group_scalars: list[GroupScalars] = []
        self.report, self.modes, self.skipping = Report(), Modes(), Skipping()
        self.plan: StepPlan | None = None

    @cached_property
    def pairs(self) -> Pairs:
        """Hessian-vector products, which few optimizers have."""
        return Pairs()

    @cached_property
    def corrections(self) -> Corrections:
        """Whether what ``param_ecc`` keeps beside parameters belongs to them; :mod:`hbcore.engine.param_codec` keeps it so."""
        return Corrections()

    @property
    def settings(self) -> Settings:
        """The options, resolved."""
        return self.chain.settings

    def invalidate(self) -> None:
        """Groups, or where their tensors lie, changed: the next step plans anew."""
        self.plan = None

    def expose(self) -> StateMap:
        """The state, for somebody outside the engine."""
        self.skipping.settle()
        self.exposed = True
        self.state.revision.lent()
        return self.state

    def replace_groups(self, groups: list[Group]) -> None:
        """Use another list of groups, as wrappers of optimizers assign."""
        if groups is not self.groups:
            self.groups, self.recorded = groups, None
            self.invalidate()

    def replace_state(self, state: Mapping[Tensor, Any]) -> None:
        """Use another state; an empty one makes a fresh optimizer, whose groups count from the start too."""
        self.skipping.settle()
        if state is not self.state:
            self.state = state if isinstance(state, StateMap) else StateMap(state)
            self.invalidate()
        if not state:
            self.group_scalars.clear()
            self.recorded = None
            self.modes.reset(training=True)

    def scalars_of(self, g: int) -> GroupScalars:
        """What group ``g`` carries from step to step, to be read or changed."""
        self.recorded = None
        while len(self.group_scalars) <= g:
            self.group_scalars.append({})
        return self.group_scalars[g]

    def all_scalars(self) -> list[GroupScalars]:
        """What every group carries, to be read or changed."""
        if self.groups:
            self.scalars_of(len(self.groups) - 1)
        return self.group_scalars

    def carried(self, g: int) -> Mapping[str, float]:
        """The same, to be read only; empty before the group's first step."""
        return self.group_scalars[g] if g < len(self.group_scalars) else {}

    def name_of(self, g: int, i: int) -> str:
        """What messages call parameter ``i`` of group ``g``."""
        return f"{self.name}: {describe_param(self.groups, g, i)}"

    def seed_key(self, g: int, param: Tensor) -> str:
        """What a parameter's noise is drawn by: the seed, and its name, or its position where it has none."""
        return self.seed_key_at(g, next(i for i, p in enumerate(self.groups[g]["params"]) if p is param))

    def seed_key_at(self, g: int, i: int) -> str:
        """The same for parameter ``i`` of group ``g``."""
        names = self.groups[g].get("param_names")
        return f"{self.settings.seed}/{names[i] if names else f'{g}.{i}'}"
