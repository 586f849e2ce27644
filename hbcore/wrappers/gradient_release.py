"""Gradient release: each parameter is stepped inside backward, and its gradient freed before the next one is made."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from hbcore.distributed.placement import is_dtensor
from hbcore.engine.core import OptimizerCore
from hbcore.engine.graph.scalar_inputs import NO_AMP
from hbcore.engine.group_scalars import GroupScalars
from hbcore.engine.planning.sparse_plan import plan_for
from hbcore.errors import OptionError, ParameterError, RuleError
from hbcore.optimizer import Optimizer
from hbcore.rules.transform import Domain
from hbcore.wrappers.composite import Composite


def hook_into_backward(model: nn.Module | Iterable[Tensor], optimizer: Optimizer | Composite) -> Release:
    """Let ``loss.backward()`` step each parameter as soon as its gradient is there, and free that gradient.

    The memory of all gradients becomes that of the largest. Call ``optimizer.step()`` after each backward as before, so that
    schedulers count; it finds nothing left to do. A parameter's step is the same as in ``optimizer.step()``; a step counts once
    for a group, however many parameters took it. Gradients cannot be accumulated over several backwards, clipped over the model
    or unscaled afterwards. ``torch.func``'s transforms and ``retain_graph`` know nothing of this.

    Args:
        model: a module or parameters; those of them that the optimizer has and that are trained are hooked.
        optimizer: an optimizer, or several in a :class:`hbcore.SplitOpt`.

    Returns:
        A handle whose ``remove()`` ends it; also a context manager.

    Raises:
        OptionError: a rule sees the whole model, or steps may be captured, or the optimizer steps in its own way (SAMWrapper).
        ParameterError: the optimizer has none of the parameters, or one is spread over ranks.
    """
    if isinstance(optimizer, Composite) and optimizer.requires_closure:
        raise OptionError(f"{type(optimizer).__name__} needs more than one backward for a step; it cannot be hooked into one.")
    asked = set(model.parameters() if isinstance(model, nn.Module) else model)
    release = Release(optimizer)
    for child in optimizer.children if isinstance(optimizer, Composite) else [optimizer]:
        _check(child)
        for g, group in enumerate(child.param_groups):
            for i, p in enumerate(group["params"]):
                if p in asked and p.requires_grad:
                    release.hook(child, g, i, p)
    if not release.hooked:
        raise ParameterError(f"{type(optimizer).__name__} has none of these parameters; pass the model that it was built for.")
    return release


class ParameterCore(OptimizerCore):
    """An optimizer's core, narrowed to one parameter, which steps by itself: it shares state, chain, report and modes.

    Args:
        core: the optimizer's.
        g, i: the parameter's group, and its index there.
    """

    def __init__(self, core: OptimizerCore, g: int, i: int) -> None:
        super().__init__(core.name, core.chain, core.sparse)
        self.whole, self.g, self.i = core, g, i
        self.report, self.modes, self.state = core.report, core.modes, core.state
        param = core.groups[g]["params"][i]
        view: Any = ChainMap({"params": [param]}, core.groups[g])  # its numbers stay the group's present ones
        self.groups = [view]

    def name_of(self, g: int, i: int) -> str:
        return self.whole.name_of(self.g, self.i)

    def seed_key(self, g: int, param: Tensor) -> str:
        return self.whole.seed_key(self.g, param)


@dataclass
class Hooked:
    """One parameter that steps by itself."""

    optimizer: Optimizer
    group: int
    index: int
    core: ParameterCore | None = None

    def step(self, param: Tensor) -> GroupScalars:
        """Step the parameter; return what its group then carries."""
        whole = self.optimizer.core
        if not whole.modes.training or whole.modes.averaging:
            raise RuleError(f"{whole.name}: backward with the weights to evaluate with; call optimizer.train().")
        if self.core is None or self.core.state is not whole.state:
            self.core = ParameterCore(whole, self.group, self.index)
            self.core.plan = plan_for(self.core)
        assert self.core.plan is not None
        self.core.group_scalars[:] = [dict(whole.scalars_of(self.group))]
        self.core.plan.step(NO_AMP)
        whole.modes.reset(training=True)
        if whole.settings.consume_grad:
            param.grad = None
        return self.core.scalars_of(0)


class Release:
    """The hooks of one call; see :func:`hook_into_backward`.

    Attributes:
        hooked: the parameters.
    """

    def __init__(self, optimizer: Optimizer | Composite) -> None:
        self.hooked: dict[Tensor, Hooked] = {}
        self._optimizer = optimizer
        self._stepped: set[Tensor] = set()
        self._carried: dict[tuple[Optimizer, int], GroupScalars] = {}
        self._handles: list[Any] = [optimizer.register_step_pre_hook(lambda *_: self._end_round())]

    def hook(self, optimizer: Optimizer, group: int, index: int, param: Tensor) -> None:
        """Step ``param`` in every backward from now on."""
        if is_dtensor(param):
            raise ParameterError(
                f"{optimizer.core.name_of(group, index)} is spread over ranks; gradient release needs whole ones."
            )
        self.hooked[param] = Hooked(optimizer, group, index)
        self._handles.append(param.register_post_accumulate_grad_hook(self._take))  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Step in ``optimizer.step()`` again."""
        self._end_round()
        for handle in self._handles:
            handle.remove()
        for hooked in self.hooked.values():
            hooked.optimizer.core.invalidate()
        self.hooked.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @torch.no_grad()
    def _take(self, param: Tensor) -> None:
        if param in self._stepped:  # nobody called optimizer.step() since the last backward
            self._end_round()
        hooked = self.hooked[param]
        self._carried[hooked.optimizer, hooked.group] = hooked.step(param)
        self._stepped.add(param)

    def _end_round(self) -> None:
        """Commit what each group carries once for a backward, so that every parameter saw the same numbers."""
        for (optimizer, g), scalars in self._carried.items():
            optimizer.core.group_scalars[g] = dict(scalars)
        self._carried.clear()
        self._stepped.clear()


def _check(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    seeing = [t.name for group in optimizer.param_groups for t in optimizer.core.chain.every(group) if t.domain == Domain.MODEL]
    if seeing:
        raise OptionError(f"{name}: {seeing[0]} sees the whole model, of which backward has one gradient at a time.")
    if optimizer.settings.capturable:
        raise OptionError(f"{name}: capturable=True and gradient release exclude each other; pass capturable=False.")
