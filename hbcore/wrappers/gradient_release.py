"""Gradient release: each parameter is stepped inside backward, and its gradient freed before the next one is made."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from hbcore.distributed.placement import is_dtensor
from hbcore.engine.planning.plan import Plan
from hbcore.engine.progress import Progress
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


@dataclass
class Hooked:
    """One parameter and how it is stepped by itself."""

    optimizer: Optimizer
    group: int
    index: int
    plan: Plan | None = None

    def step(self, param: Tensor) -> Progress:
        """Step the parameter; return what its group then carries."""
        optimizer = self.optimizer
        if not optimizer.modes.training or optimizer.modes.averaging:
            raise RuleError(f"{type(optimizer).__name__}: backward with the weights to evaluate with; call optimizer.train().")
        if self.plan is None or self.plan.state is not optimizer.state:
            self.plan = self._new_plan(param)
        [carried] = self.plan.around.progress[:] = [dict(optimizer._progress[self.group])]
        self.plan.step()
        optimizer.modes.forget(training=True)
        if optimizer.settings.consume_grad:
            param.grad = None
        return carried

    def _new_plan(self, param: Tensor) -> Plan:
        optimizer, g, i = self.optimizer, self.group, self.index
        view: Any = ChainMap({"params": [param]}, optimizer.param_groups[g])  # its numbers stay the group's present ones
        return optimizer.plan_of(
            replace(
                optimizer.surroundings(),
                groups=[view],
                progress=[{}],
                name_of=lambda *_: optimizer._name_of(g, i),
                identity=lambda _, p: optimizer._identity(g, p),
            )
        )


class Release:
    """The hooks of one call; see :func:`hook_into_backward`.

    Attributes:
        hooked: the parameters.
    """

    def __init__(self, optimizer: Optimizer | Composite) -> None:
        self.hooked: dict[Tensor, Hooked] = {}
        self._optimizer = optimizer
        self._stepped: set[Tensor] = set()
        self._carried: dict[tuple[Optimizer, int], Progress] = {}
        self._handles: list[Any] = [optimizer.register_step_pre_hook(lambda *_: self._end_round())]

    def hook(self, optimizer: Optimizer, group: int, index: int, param: Tensor) -> None:
        """Step ``param`` in every backward from now on."""
        if is_dtensor(param):
            raise ParameterError(f"{optimizer._name_of(group, index)} is spread over ranks; gradient release needs whole ones.")
        self.hooked[param] = Hooked(optimizer, group, index)
        self._handles.append(param.register_post_accumulate_grad_hook(self._take))  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Step in ``optimizer.step()`` again."""
        self._end_round()
        for handle in self._handles:
            handle.remove()
        for hooked in self.hooked.values():
            hooked.optimizer._plan = None
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
        """All parameters of a round began with what their group carried; now it carries what came of it."""
        for (optimizer, g), progress in self._carried.items():
            optimizer._progress[g] = progress
        self._carried.clear()
        self._stepped.clear()


def _check(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    seeing = [t.name for group in optimizer.param_groups for t in optimizer.structure.every(group) if t.domain == Domain.MODEL]
    if seeing:
        raise OptionError(f"{name}: {seeing[0]} sees the whole model, of which backward has one gradient at a time.")
    if optimizer.settings.capturable:
        raise OptionError(f"{name}: capturable=True and gradient release exclude each other; pass capturable=False.")
