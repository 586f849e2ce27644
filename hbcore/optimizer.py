"""The one optimizer class. A rule subclasses it, names its hyperparameters and returns its chain; the rest is here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import optimizer as hooks
from torch.optim.optimizer import ParamsT
from typing_extensions import Self

from hbcore.checkpoint import checkpoint
from hbcore.engine.chain_spec import Structure
from hbcore.engine.graph.scalar_inputs import Amp, capturing
from hbcore.engine.options import OPTIONS, Settings, resolve
from hbcore.engine.param_codec import pack
from hbcore.engine.params import check_params, describe_param
from hbcore.engine.planning.plan import Plan
from hbcore.engine.planning.sparse_plan import SparsePlan, check
from hbcore.engine.progress import Progress
from hbcore.engine.report import Report
from hbcore.engine.surroundings import Surroundings
from hbcore.engine.weight_modes import Modes, averaged
from hbcore.errors import OptionError, ParameterTypeError, RuleError
from hbcore.rules.transform import Transform
from hbcore.state.slots import StateMap, own


class Optimizer(torch.optim.Optimizer):
    """Base of every hbcore optimizer, and a full ``torch.optim.Optimizer``.

    A subclass names its hyperparameters in ``__init__``, passes them on as one dict together with ``**options``, and returns
    its transforms from :meth:`chain`::

        class Lion(Optimizer):
            def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), **options: Unpack[Options]):
                super().__init__(params, {"lr": lr, "betas": betas}, options)

            @staticmethod
            def chain(h):
                return (ScaleByLion(h.betas),)

    An entry of the dict that a transform declares with ``hyper()`` may change every step, by a scheduler or by hand, and
    compiles nothing anew; every other entry is structure.

    Attributes:
        report: how the last step ran: backend, reasons for falling back, compiles, launches.
        structure: what its chains are, and what follows from them.
        modes: which set of weights the parameters hold.

    Raises:
        HyperparameterError: a hyperparameter is outside its bounds.
        OptionError: an option does not exist, was removed, or has no such value.
        ParameterError: ``params`` is empty, holds a duplicate, or something that is no floating-point tensor.
    """

    option_defaults: ClassVar[Mapping[str, Any]] = {}
    """Shared options whose default differs in this class: ``{"weight_decay": 0.01}``."""

    sparse_gradients: ClassVar[bool] = False
    """Whether it takes sparse gradients, and only those; its rules are elementwise then."""

    own: ClassVar[tuple[str, ...]] = ()
    """The names of the class's own constructor parameters."""

    def __init__(self, params: ParamsT, hyperparameters: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        name = type(self).__name__
        settings, scheduled = resolve(name, self.own, {**self.option_defaults, **options})
        if self.sparse_gradients:
            check(name, settings)
        self.report = Report()
        self.modes = Modes()
        self._plan: Plan | None = None
        self._progress: list[Progress] = []
        defaults = {k: _tupled(v) for k, v in {**scheduled, **hyperparameters}.items()}
        self.structure = Structure(type(self).chain, settings, defaults)
        super().__init__(check_params(name, params), defaults)
        self.state: Any = StateMap(self.state)

    @property
    def settings(self) -> Settings:
        """The options, resolved."""
        return self.structure.settings

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__ and "__signature__" not in cls.__dict__:
            parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
            named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
            taken = {p.name for p in named}
            shared = [
                inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=cls.option_defaults.get(n, option.default))
                for n, option in OPTIONS.items()
                if n not in taken
            ]
            cls.own = tuple(p.name for p in named if p.name != "params")
            cls.__signature__ = inspect.Signature([*named, *shared])  # type: ignore[attr-defined]

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        """The rule's transforms for a group's hyperparameters ``h`` (attribute access). No branch on a ``hyper`` entry."""
        raise NotImplementedError("an Optimizer subclass defines chain(h)")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss anew and returns it; called once, with gradients enabled.

        Returns:
            The closure's loss, or None.
        """
        if _observed(self):
            return self._observed_step(closure)
        with torch.no_grad():
            return self._step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # torch then leaves it unwrapped: _observed_step is what it would make

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.modes.training:
            raise RuleError(f"{type(self).__name__}.step() with the weights to evaluate with; call optimizer.train() first.")
        if self.modes.averaging:
            raise RuleError(f"{type(self).__name__}.step() within ema_weights(); step outside.")
        if not self.state and checkpoint.is_dry(self):
            checkpoint.allocate(self)
            return loss
        plan = self._plan
        if plan is None or plan.groups is not self.param_groups or plan.state is not self.state:  # wrappers assign both
            plan = self._plan = self._new_plan()
        self.modes.forget(training=True)
        stepped = plan.step(Amp(getattr(self, "grad_scale", None), getattr(self, "found_inf", None)))
        if self.settings.consume_grad and not capturing():
            for p in stepped:
                p.grad = None
        return loss

    _observed_step = torch.optim.Optimizer.profile_hook_step(torch.no_grad()(_step))

    @torch.no_grad()
    def train(self, mode: bool = True) -> Self:
        """Put the weights to train with into the parameters; with ``mode=False`` those to evaluate with. Idempotent.

        Schedule-free rules have two sets; other optimizers have one, and nothing happens. Call it as you call
        ``model.train()``. Coming back to training restores the weights bit for bit.
        """
        self.modes.switch(self, bool(mode))
        return self

    def eval(self) -> Self:
        """``train(False)``."""
        return self.train(False)

    def ema_weights(self) -> AbstractContextManager[None]:
        """``with optimizer.ema_weights():`` the parameters hold the averages that ``use_ema=True`` keeps, bias corrected.

        Raises:
            OptionError: the optimizer keeps none.
        """
        return averaged(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time. Its hyperparameters default to the constructor's.

        Raises:
            HyperparameterError: one of its hyperparameters is outside its bounds.
            ParameterError: a parameter is a duplicate, or no floating-point tensor.
        """
        name, index = type(self).__name__, len(self.param_groups)
        if not isinstance(param_group, dict):
            raise ParameterTypeError(f"{name}: a param group must be a dict, not a {type(param_group).__name__}.")
        group = dict(param_group)
        if misplaced := sorted(k for k in group if k in OPTIONS and k not in self.structure.keys):
            raise OptionError(
                f"{name}, parameter group {index}: {', '.join(misplaced)} holds for the whole optimizer and cannot be set "
                f"for one group; pass it to {name}(...)."
            )
        [group["params"]] = [g["params"] for g in check_params(name, [group], self.param_groups)]
        for key in self.structure.keys:
            group[key] = _tupled(group.get(key, self.defaults[key]))
        self.structure.check(group, f"{name}, parameter group {index}")
        members = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        self.structure.refuse_complex({**group, "params": members}, f"{name}, parameter group {index}")
        super().add_param_group(group)
        added = self.param_groups[-1]
        added["hbcore"] = checkpoint.record_of(self, index).dump()
        pack(self, added["params"])
        self._plan = None

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state and the param groups as plain data, in torch's layout. Changes nothing.

        Every trained parameter has all of its slots, zeros and step 0 before its first step. With parameters that are spread
        over ranks this is collective.
        """
        return checkpoint.save(self)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Load a state dict exactly: every value as it was saved, whatever the parameters' dtype. All or nothing.

        Parameters are matched by name where both sides have names, by position otherwise. Numbers come from the checkpoint;
        structure (``nesterov=True``, a codec) from this optimizer, and a rule that the checkpoint does not know starts afresh.
        Checkpoints of torch.optim's optimizers are welcome.

        Args:
            state_dict: as :meth:`state_dict` returned it, from any device, other ranks or an older version.
            strict: refuse what is missing or unexpected. Otherwise what is missing starts afresh, and what nobody asks for
                is left out with a warning.

        Raises:
            CheckpointError: it does not fit; the message names the parameter, and nothing was changed.
        """
        checkpoint.load(self, state_dict, strict)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """torch.amp.GradScaler then hands over its scale and lets the step itself skip infinite gradients."""
        return self.settings.capturable

    def _new_plan(self) -> Plan:
        return self.plan_of(self.surroundings())

    def plan_of(self, around: Surroundings) -> Plan:
        """A plan for the gradients that this optimizer takes."""
        return (SparsePlan if self.sparse_gradients else Plan)(around)

    def surroundings(self) -> Surroundings:
        """What a plan is to know of this optimizer."""
        self._progress += [{} for _ in self.param_groups[len(self._progress) :]]
        return Surroundings(
            groups=self.param_groups,
            state=self.state,
            progress=self._progress,
            recipe=self.structure.recipe,
            chain=self.structure.forked,
            name_of=self._name_of,
            identity=self._identity,
            report=self.report,
            settings=self.settings,
        )

    def _name_of(self, group: int, index: int) -> str:
        return f"{type(self).__name__}: {describe_param(self.param_groups, group, index)}"

    def _identity(self, group: int, param: Tensor) -> str:
        """What a parameter's noise is drawn by: the seed, and its name, or its place where it has none."""
        index = next(i for i, p in enumerate(self.param_groups[group]["params"]) if p is param)
        names = self.param_groups[group].get("param_names")
        return f"{self.settings.seed}/{names[index] if names else f'{group}.{index}'}"

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle carry: no plan, no compiled code, and each step counter on its own."""
        state = {p: {k: own(v) for k, v in s.items()} for p, s in self.state.items()}
        return {
            "_progress": self._progress,
            "_training": self.modes.training,
            "defaults": self.defaults,
            "state": state,
            "param_groups": self.param_groups,
            "_structure": (self.settings, self.structure.defaults, self.structure.hyper),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "state": StateMap(state["state"])})
        self.structure = Structure(type(self).chain, *self.__dict__.pop("_structure"))
        self.report = Report()
        self.modes = Modes()
        self.modes.forget(self.__dict__.pop("_training", True))
        self._plan = None

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{self.report}"


def _observed(optimizer: Optimizer) -> bool:
    """Whether hooks or a profiler want to see the step. Asking takes a tenth of the time that torch's wrapper takes."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or hooks._global_optimizer_pre_hooks
        or hooks._global_optimizer_post_hooks
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    )


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
