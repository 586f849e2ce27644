"""The one optimizer class. A rule subclasses it, names its hyperparameters and returns its chain; the rest is here."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import optimizer as hooks
from torch.optim.optimizer import ParamsT
from typing_extensions import Self

from hbcore.engine.lanes import Group
from hbcore.engine.modes import Modes
from hbcore.engine.options import OPTIONS, Settings, resolve
from hbcore.engine.params import check_params, describe_param
from hbcore.engine.plan import Plan, Surroundings
from hbcore.engine.progress import Progress
from hbcore.engine.recipe import Recipe, length_of
from hbcore.engine.report import Report
from hbcore.engine.values import Amp, capturing
from hbcore.errors import HyperparameterError, OptionError, ParameterTypeError, RuleError, StateWarning
from hbcore.rules import route
from hbcore.rules.transform import Transform
from hbcore.state import checkpoint
from hbcore.state.expected import Logical, expected
from hbcore.state.slots import StateMap, own


class Assembly:
    """A class's rule with its options' stages around it, as one callable that compares equal to itself only.

    Each optimizer has one, so that its groups share lanes and two optimizers never do.
    """

    def __init__(self, rule: Callable[[Any], tuple[Transform, ...]], settings: Settings) -> None:
        self.rule, self.settings = rule, settings

    def __call__(self, h: Any, branches: tuple[bool, ...]) -> tuple[Transform, ...]:
        """The whole chain of the parameters that take ``branches`` at its forks."""
        return self.settings.stages(h, route.resolve(self.rule(h), branches))

    def forked(self, h: Any) -> tuple[Transform, ...]:
        """The whole chain with its forks unresolved."""
        return self.settings.stages(h, self.rule(h))


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

    Raises:
        HyperparameterError: a hyperparameter is outside its bounds.
        OptionError: an option does not exist, was removed, or has no such value.
        ParameterError: ``params`` is empty, holds a duplicate, or something that is no floating-point tensor.
    """

    option_defaults: ClassVar[Mapping[str, Any]] = {}
    """Shared options whose default differs in this class: ``{"weight_decay": 0.01}``."""

    own: ClassVar[tuple[str, ...]] = ()
    """The names of the class's own constructor parameters."""

    def __init__(self, params: ParamsT, hyperparameters: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        name = type(self).__name__
        self.settings, scheduled = resolve(name, self.own, {**self.option_defaults, **options})
        self._assembly = Assembly(type(self).chain, self.settings)
        self.report = Report()
        self.modes = Modes()
        self._plan: Plan | None = None
        self._progress: list[Progress] = []
        defaults = {**scheduled, **hyperparameters}
        self._keys = tuple(defaults)
        self._hyper: set[str] = set()
        super().__init__(check_params(name, params), {k: _tupled(v) for k, v in defaults.items()})
        self.state: Any = StateMap(self.state)

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
        if not self.state and checkpoint.is_dry(self):
            checkpoint.allocate(self)
            return loss
        plan = self._plan
        if plan is None or plan.groups is not self.param_groups or plan.state is not self.state:  # wrappers assign both
            plan = self._plan = self._new_plan()
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
        if misplaced := sorted(k for k in group if k in OPTIONS and k not in self._keys):
            raise OptionError(
                f"{name}, parameter group {index}: {', '.join(misplaced)} holds for the whole optimizer and cannot be set "
                f"for one group; pass it to {name}(...)."
            )
        [group["params"]] = [g["params"] for g in check_params(name, [group], self.param_groups)]
        for key in self._keys:
            group[key] = _tupled(group.get(key, self.defaults[key]))
        self._check_hyperparameters(group, index)
        super().add_param_group(group)
        added = self.param_groups[-1]
        added["hbcore"] = checkpoint.record_of(self, index).dump()
        self._pack(added["params"])
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

    @torch.no_grad()
    def _pack(self, params: list[Tensor]) -> None:
        """Store float32 parameters as ``param_ecc`` says: the tensor itself becomes narrower, the rest goes to the state."""
        codec = self.settings.param_codec
        wide = [p for p in params if codec is not None and p.dtype == torch.float32]
        for p in wide:
            assert codec is not None
            parts = {name: torch.empty_like(p, dtype=dtype) for name, dtype in codec.parts("param", p.dtype).items()}
            for name, value in codec.write(parts, "param", p.detach()).items():
                parts[name].copy_(value)
            grad, p.grad = p.grad, None  # torch holds a gradient to its parameter's dtype, before the change and after it
            p.data = parts.pop("param")
            p.grad = None if grad is None else grad.to(p.dtype)
            self.state[p].update(parts)
        if wide:
            self.report.note(f"param_ecc={self.settings.param_codec.name!r} stores float32 parameters as {wide[0].dtype}")  # type: ignore[union-attr]
            warnings.warn(
                f"{type(self).__name__}: param_ecc turned {len(wide)} float32 parameters into {wide[0].dtype}; the model now "
                "computes in that dtype, and the optimizer keeps the bits that are missing.",
                StateWarning,
                stacklevel=3,
            )

    def _recipe(self, group: Group) -> Recipe:
        """The static description of a group; equal for groups that differ only in numbers."""
        dynamic = self._dynamic(group)
        return Recipe(
            chain=self._assembly,
            static=tuple((k, group[k]) for k in self._keys if k not in dynamic and k != "maximize"),
            dynamic=tuple(dynamic.items()),
            divide=self.settings.divide,
            codec=self.settings.codec,
            maximize=bool(group["maximize"]),
            param_codec=self.settings.param_codec,
            scaled=self.settings.capturable,
            stochastic=self.settings.stochastic_rounding,
        )

    def _dynamic(self, group: Group) -> dict[str, int | None]:
        """The group's entries that some transform of its chain declares with ``hyper``; None for a plain number."""
        names = {n for t in self._transforms(group) for n, _, _ in t.hypers()}
        return {k: length_of(group[k]) for k in self._keys if k in names and group[k] is not None}

    def _transforms(self, group: Group) -> tuple[Transform, ...]:
        """The group's chain, its forks unresolved. Its numbers are the defaults: whatever a scheduler wrote, it has a chain."""
        fixed = {k for k, v in self.defaults.items() if v is None} | set(self._keys) - self._hyper
        values = {k: group[k] if k in fixed or group[k] is None else self.defaults[k] for k in self._keys}
        return self._assembly.forked(SimpleNamespace(**values))

    def _bound_chain(self, group: Group, p: Tensor) -> tuple[Transform, ...]:
        """The chain of one parameter with its present numbers as tensors, as rules have them."""
        values = {k: _tensors(group[k]) if k in self._hyper and group[k] is not None else group[k] for k in self._keys}
        return self._assembly(SimpleNamespace(**values), route.branches(self._transforms(group), p))

    def _every_transform(self, group: Group) -> tuple[Transform, ...]:
        """What some parameter of the group may meet."""
        return tuple(route.every(self._transforms(group)))

    def _versions(self, group: Group) -> dict[str, int]:
        """The rules of a group by name, with their versions."""
        packed = {"param_ecc": 1} if self.settings.param_codec is not None else {}
        return {**packed, **{t.name: t.version for t in self._every_transform(group)}}

    def _primes(self) -> bool:
        """Whether some rule's first gradient only prepares the state."""
        return any(t.primes for group in self.param_groups for t in self._every_transform(group))

    def _expected(self, group: Group, p: Tensor) -> list[Logical]:
        """The slots of one parameter of the group."""
        return expected(self._chain_of(group, p), p, self.settings.codec, self.settings.param_codec)

    def _chain_of(self, group: Group, p: Tensor) -> tuple[Transform, ...]:
        """The chain of one parameter of the group."""
        return route.resolve(self._transforms(group), route.branches(self._transforms(group), p))

    def _check_hyperparameters(self, group: Group, index: int) -> None:
        where = f"{type(self).__name__}, parameter group {index}"
        for key in self._keys:
            value = group[key]
            if isinstance(value, Tensor) and value.numel() != 1:
                raise HyperparameterError(f"{where}: {key} is a tensor of shape {tuple(value.shape)}; pass one element.")
        try:
            checked = self._assembly.forked(SimpleNamespace(**{k: _plain(group[k]) for k in self._keys}))
        except HyperparameterError as error:
            raise HyperparameterError(f"{where}: {error}") from None
        self._hyper |= {name for t in checked for name, _, _ in t.hypers()} & set(self._keys)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """torch.amp.GradScaler then hands over its scale and lets the step itself skip infinite gradients."""
        return self.settings.capturable

    def _new_plan(self) -> Plan:
        self._progress += [{} for _ in self.param_groups[len(self._progress) :]]
        around = Surroundings(
            groups=self.param_groups,
            state=self.state,
            progress=self._progress,
            recipe=self._recipe,
            chain=self._transforms,
            name_of=self._name_of,
            identity=self._identity,
            report=self.report,
            settings=self.settings,
        )
        return Plan(around)

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
            "settings": self.settings,
            "_keys": self._keys,
            "_hyper": self._hyper,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "state": StateMap(state["state"])})
        self._assembly = Assembly(type(self).chain, self.settings)
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


def _tensors(value: Any) -> Any:
    """Numbers as 0-d float64 tensors."""
    return tuple(map(_tensors, value)) if isinstance(value, tuple) else torch.as_tensor(value, dtype=torch.float64)


def _plain(value: Any) -> Any:
    """Tensors as the numbers they hold."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, Tensor) else value


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
