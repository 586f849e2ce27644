"""Gradient release: step each parameter during backward and free its gradient before the next is computed."""

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
from hbcore.engine.curvature import needed
from hbcore.engine.graph.scalar_inputs import NO_AMP
from hbcore.engine.group_scalars import GroupScalars
from hbcore.engine.param_codec import settle
from hbcore.engine.planning.sparse_plan import plan_for
from hbcore.errors import OptionError, ParameterError, RuleError
from hbcore.optimizer import Optimizer
from hbcore.rules.transform import Domain
from hbcore.wrappers.composite import Composite


def hook_into_backward(model: nn.Module | Iterable[Tensor], optimizer: Optimizer | Composite) -> Release:
    """Let ``loss.backward()`` step each parameter as soon as its gradient is ready, then free the gradient.

    Gradient memory shrinks to that of the largest gradient. Call ``optimizer.step()`` after each backward: it ends the step,
    and steps the parameters that are not hooked. A parameter's step is the same as without hooks, and a group counts one step
    however many of its parameters were stepped during backward. Gradients cannot be accumulated over several backwards: a
    second one before ``optimizer.step()`` is an error, so a trainer that accumulates is stopped. Nor can they be clipped over
    the model or unscaled afterwards, since nothing is left of them. ``torch.func`` transforms and ``retain_graph`` are not
    supported.

    Args:
        model: a module or parameters; trainable parameters that belong to the optimizer are hooked.
        optimizer: an optimizer, or several in a :class:`hbcore.SplitOpt`.

    Returns:
        A handle; ``remove()`` restores normal stepping. Also a context manager.

    Raises:
        OptionError: a rule needs the whole model, or a whole group (PSGDLRA, unless ``multi_tensor=False``), or
            ``capturable=True``, or the optimizer needs a closure (SAMWrapper).
        ParameterError: none of the parameters belong to the optimizer, or one is sharded over ranks.
        RuleError: (in backward) the second backward since the last ``optimizer.step()``, or one with the evaluation weights.
    """
    if isinstance(optimizer, Composite) and optimizer.requires_closure:
        raise OptionError(f"{type(optimizer).__name__} needs more than one backward per step; it cannot be hooked into one.")
    asked = set(model.parameters() if isinstance(model, nn.Module) else model)
    release = Release(optimizer)
    for child in optimizer.children if isinstance(optimizer, Composite) else [optimizer]:
        _check(child)
        for g, group in enumerate(child.param_groups):
            for i, p in enumerate(group["params"]):
                if p in asked and p.requires_grad:
                    release.hook(child, g, i, p)
    if not release.hooked:
        raise ParameterError(f"{type(optimizer).__name__} has none of these parameters; pass the model it was built for.")
    return release


class ParameterCore(OptimizerCore):
    """An optimizer's core restricted to one parameter, which steps alone; shares state, chain, report and modes.

    Args:
        core: the optimizer's core.
        g, i: the parameter's group and its index in that group.
    """

    def __init__(self, core: OptimizerCore, g: int, i: int) -> None:
        super().__init__(core.name, core.chain, core.sparse)
        self.whole, self.g, self.i = core, g, i
        self.report, self.modes, self.state = core.report, core.modes, core.state
        param = core.groups[g]["params"][i]
        view: Any = ChainMap({"params": [param]}, core.groups[g])  # reads the group's current hyperparameters
        self.groups = [view]

    def name_of(self, g: int, i: int) -> str:
        return self.whole.name_of(self.g, self.i)

    def seed_key(self, g: int, param: Tensor) -> str:
        return self.whole.seed_key(self.g, param)


@dataclass
class Hooked:
    """One parameter that steps alone."""

    optimizer: Optimizer
    group: int
    index: int
    core: ParameterCore | None = None

    def step(self, param: Tensor) -> GroupScalars:
        """Step the parameter; return those of its group's scalars that its step changed."""
        whole = self.optimizer.core
        if not whole.modes.training or whole.modes.averaging:
            raise RuleError(f"{whole.name}: backward ran with the evaluation weights; call optimizer.train() first.")
        if self.core is None or self.core.state is not whole.state:
            self.core = ParameterCore(whole, self.group, self.index)
            self.core.plan = plan_for(self.core)
        assert self.core.plan is not None
        if whole.corrections.waiting or not whole.corrections.knows(param):
            settle(whole)
        self.core.group_scalars[:], self.core.exposed = [dict(whole.scalars_of(self.group))], whole.exposed
        self.core.plan.step(NO_AMP)
        whole.corrections.note_one(param)
        whole.modes.reset(training=True)
        if whole.settings.consume_grad:
            param.grad = None
        before = whole.scalars_of(self.group)
        return {name: value for name, value in self.core.scalars_of(0).items() if before.get(name) != value}


class Release:
    """The hooks of one call; see :func:`hook_into_backward`.

    Attributes:
        hooked: the hooked parameters.
    """

    def __init__(self, optimizer: Optimizer | Composite) -> None:
        self.hooked: dict[Tensor, Hooked] = {}
        self._optimizer = optimizer
        self._stepped: set[Tensor] = set()
        self._carried: dict[tuple[Optimizer, int], GroupScalars] = {}
        self._handles: list[Any] = [
            # after the step, which begins with the same scalars for parameters of the group that are not hooked
            optimizer.register_step_post_hook(lambda *_: self._end_round()),
            optimizer.register_load_state_dict_post_hook(lambda *_: self._begin_round()),
        ]

    def hook(self, optimizer: Optimizer, group: int, index: int, param: Tensor) -> None:
        """Step ``param`` during every backward from now on."""
        if is_dtensor(param):
            raise ParameterError(
                f"{optimizer.core.name_of(group, index)} is sharded over ranks; gradient release needs unsharded parameters."
            )
        self.hooked[param] = Hooked(optimizer, group, index)
        self._handles.append(param.register_post_accumulate_grad_hook(self._take))  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Remove the hooks: ``optimizer.step()`` steps the parameters again."""
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
        hooked = self.hooked[param]
        if param in self._stepped:
            raise RuleError(
                f"{hooked.optimizer.core.name_of(hooked.group, hooked.index)} was stepped by the last backward already. "
                "Gradient release steps during backward: gradients cannot be accumulated over several. Call optimizer.step() "
                "after each backward, or accumulate without hook_into_backward."
            )
        self._carried.setdefault((hooked.optimizer, hooked.group), {}).update(hooked.step(param))
        self._stepped.add(param)

    def _end_round(self) -> None:
        """Commit each group's scalars once per backward, so that every parameter saw the same ones."""
        for (optimizer, g), scalars in self._carried.items():
            optimizer.core.scalars_of(g).update(scalars)
        self._begin_round()

    def _begin_round(self) -> None:
        self._carried.clear()
        self._stepped.clear()


def _check(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    seeing = [t.name for group in optimizer.param_groups for t in optimizer.core.chain.every(group) if t.domain == Domain.MODEL]
    if optimizer.settings.multi_tensor:
        seeing += [t.name for group in optimizer.param_groups for t in optimizer.core.chain.every(group) if t.flat]
    if seeing:
        raise OptionError(f"{name}: {seeing[0]} needs the whole model or group, but backward has one gradient at a time.")
    if curved := needed(optimizer.core):
        raise OptionError(
            f"{name}: {curved} needs Hessian-vector products, which step(closure) makes of all gradients; backward has one at "
            "a time."
        )
    if optimizer.settings.skip_nonfinite:
        raise OptionError(
            f"{name}: skip_nonfinite=True needs all gradients before the first parameter moves, but backward has one at a time."
        )
    if optimizer.settings.report_norms:
        raise OptionError(f"{name}: report_norms=True speaks of one step of all parameters; backward steps each one by itself.")
    if optimizer.settings.capturable:
        raise OptionError(f"{name}: gradient release does not support capturable=True; pass capturable=False.")
