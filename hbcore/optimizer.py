"""The base class of every optimizer. A subclass declares its hyperparameters and returns its chain; the rest is here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Self

from hbcore.checkpoint import dry_step, load, pickled, save, schema
from hbcore.checkpoint.counterpart import Counterpart
from hbcore.declaration import Declaration, declare, entries
from hbcore.engine import weight_modes
from hbcore.engine.chain_spec import ChainSpec
from hbcore.engine.core import Group, OptimizerCore
from hbcore.engine.curvature import evaluate, needed
from hbcore.engine.entry_forms import fixed
from hbcore.engine.graph.scalar_inputs import Amp, capturing
from hbcore.engine.idle_options import begin
from hbcore.engine.new_group import completed
from hbcore.engine.norms import Norms, read
from hbcore.engine.options import Settings, resolve
from hbcore.engine.param_codec import narrow, note, settle
from hbcore.engine.params import check_params
from hbcore.engine.planning.sparse_plan import check, plan_for
from hbcore.engine.report import Report
from hbcore.engine.shared_options import SharedOptions
from hbcore.engine.step_hooks import observed, step_outside_graphs
from hbcore.rules.transform import Transform
from hbcore.state.slots import StateMap


class Optimizer(SharedOptions, torch.optim.Optimizer):
    """Base of every hbcore optimizer, and a full ``torch.optim.Optimizer``.

    A subclass declares its hyperparameters as annotated fields with defaults, and returns its transforms from :meth:`chain`::

        class Lion(Optimizer):
            lr: float = 1e-4
            betas: tuple[float, float] = (0.9, 0.99)

            @staticmethod
            def chain(h):
                return (ScaleByLion(h.betas),)

    The constructor is derived from them: ``Lion(params, lr, betas, *, weight_decay=..., caution=..., ...)``. An assignment
    without annotation changes the default of a shared option (``weight_decay = 0.01``). :meth:`normalise` translates fields
    that are not entries of a param group, and :meth:`after_init` runs last. A subclass may write ``__init__`` itself, with
    ``**options: Unpack[Options]``, and call ``super().__init__(params, {"lr": lr, ...}, options)``.
    Entries declared with ``hyper()`` may change in every step without recompilation; all others are structure.

    Attributes:
        core: the engine's part of the optimizer: groups, state, chain and plan. Not part of the API.

    Raises:
        HyperparameterError: a hyperparameter is outside its bounds.
        OptionError: an option does not exist, was removed, or has no such value.
        ParameterError: ``params`` is empty, holds a duplicate, or a tensor that is not of a floating-point dtype.
    """

    option_defaults: ClassVar[Mapping[str, Any]] = {}
    """For classes that write ``__init__`` themselves: shared options with another default, ``{"weight_decay": 0.01}``."""
    formerly: ClassVar[Mapping[str, Any]] = {}
    """Fields that stand for something else than their default in optimizers pickled before the class had them."""
    counterpart: ClassVar[Counterpart | None] = None  # torch.optim's optimizer of the same rule
    sparse_gradients: ClassVar[bool] = False
    """Whether it takes sparse gradients, and only those; its rules are elementwise then."""

    _declared: ClassVar[Declaration] = Declaration({}, {}, {})  # the fields that the class and its bases declare
    own: ClassVar[tuple[str, ...]] = ()  # the names of the class's own constructor parameters

    def __init__(self, params: ParamsT, hyperparameters: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        name = type(self).__name__
        checked = check_params(name, params)
        options = {**schema.given_again(name, checked), **options}
        settings, scheduled = resolve(name, self.own, {**self.option_defaults, **options})
        if self.sparse_gradients:
            check(name, settings)
        added = vars(self).pop("_added", {})  # by fields declared over a constructor written out
        defaults = {k: fixed(v) for k, v in {**scheduled, **hyperparameters, **added}.items()}
        self.core = OptimizerCore(name, ChainSpec(type(self).chain, settings, defaults), self.sparse_gradients)
        self.core.options = schema.textual(options)
        self.core.building = True
        torch.optim.Optimizer.__init__(self, checked, defaults)
        self.core.building = False
        begin(self.core, options)

    @property
    def param_groups(self) -> list[Group]:
        """The param groups: dicts of parameters and hyperparameters, which schedulers and users may write to."""
        save.refresh_records(self.core)
        return self.core.groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        self.core.replace_groups(groups)

    @property  # type: ignore[override]
    def state(self) -> StateMap:
        """Parameter -> its state tensors by name, torch's names where torch has the slot."""
        return self.core.expose()

    @state.setter
    def state(self, state: Mapping[Any, Any]) -> None:
        self.core.replace_state(state)

    @property
    def settings(self) -> Settings:
        """The options, resolved."""
        return self.core.settings

    @property
    def report(self) -> Report:
        """How the last step ran, and why so."""
        self.core.report.skipped = self.core.skipping.count
        return self.core.report

    @property
    def requires_closure(self) -> bool:
        """Whether ``step`` takes a closure: some rule needs Hessian-vector products, :mod:`hbcore.engine.curvature`."""
        return bool(needed(self.core))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        declare(cls, Optimizer.__init__)

    def normalise(self, h: dict[str, Any]) -> dict[str, Any]:
        """Translate declared fields, as the user passed them, into the entries of the param groups.

        A field that is only another spelling is removed here, and its value moved to the entry it stands for.

        Raises:
            HyperparameterError, OptionError: a field has a value that does not exist.
        """
        return h

    def after_init(self) -> None:
        """Runs at the end of a constructor made of declared fields."""

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        """The rule's transforms for a group's hyperparameters ``h`` (attribute access). No branch on a ``hyper`` entry."""
        raise NotImplementedError("an Optimizer subclass defines chain(h)")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss anew and returns it, with gradients enabled; called twice for finite differences only.

        Returns:
            The closure's loss, or None.
        """
        if torch.compiler.is_compiling():
            return step_outside_graphs(self, closure)
        if observed(self):
            return self._observed_step(closure)
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        try:
            return self._step(closure)
        finally:
            torch.set_grad_enabled(before)

    step.hooked = True  # type: ignore[attr-defined]  # torch then leaves it unwrapped: _observed_step is what it would make

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        core = self.core
        if core.recorded is not None:
            load.adopt(core)
        loss = None if closure is None else evaluate((core,), closure)
        try:
            weight_modes.check(core)
            if not core.state and dry_step.is_dry(core):
                dry_step.allocate(core)
                return loss
            if core.chain.settings.param_codec is not None or core.corrections.waiting:
                settle(core)
            if core.plan is None:
                core.plan = plan_for(core)
            core.modes.reset(training=True)
            stepped = core.plan.step(Amp(getattr(self, "grad_scale", None), getattr(self, "found_inf", None)))
        finally:
            core.pairs.made = {}
        if core.chain.settings.param_codec is not None:
            note(core)
        core.seen = core.state.revision.count
        if core.settings.consume_grad and not capturing():
            for p in stepped:
                p.grad = None
        return loss

    _observed_step = torch.optim.Optimizer.profile_hook_step(torch.no_grad()(_step))

    @torch.no_grad()
    def train(self, mode: bool = True) -> Self:
        """Put the weights to train with into the parameters; with ``mode=False`` those to evaluate with. Idempotent.

        Schedule-free rules have two sets; others have one, and nothing happens. Coming back restores the weights bit for bit.
        """
        weight_modes.switch(self.core, bool(mode))
        return self

    def eval(self) -> Self:
        """``train(False)``."""
        return self.train(False)

    def ema_weights(self) -> AbstractContextManager[None]:
        """``with optimizer.ema_weights():`` the parameters hold the averages that ``use_ema=True`` keeps, bias corrected.

        Raises:
            OptionError: the optimizer keeps none.
        """
        return weight_modes.averaged(self.core)

    def norms(self) -> dict[str | int, Norms]:
        """How far the last step moved each parameter, and how large it is: root mean squares over its elements, as floats.

        The change is that of the weights that steps compute with: with ``lr`` and decay, before it is rounded to a 16-bit
        parameter, and in full with ``param_ecc``. A complex element counts as two numbers. Asking waits for the device.

        Returns:
            ``(update, weight)`` of every parameter in the last step, by its name, or by its place in all groups.

        Raises:
            OptionError: the optimizer was not built with ``report_norms=True``.
        """
        return read((self.core,), self.core.groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time. Its hyperparameters default to the constructor's.

        Raises:
            HyperparameterError: one of its hyperparameters is outside its bounds.
            ParameterError: a parameter is a duplicate, or no floating-point tensor.
        """
        core, groups = self.core, self.param_groups
        group = completed(core, param_group, self.defaults)
        core.groups = groups[:1]  # torch would go through all of them for duplicates, which were looked for
        try:
            super().add_param_group(group)
            groups.append(added := core.groups[-1])
        finally:
            core.groups = groups
        added["hbcore"] = save.record_of(core, len(groups) - 1, live=True).dump()
        if any(map(weight_modes.has_modes, core.chain.every(added))):
            added[save.MODE] = core.modes.training
        narrow(core, added["params"])
        core.invalidate()

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state and the param groups as plain data, in torch's layout. Changes nothing.

        Every trained parameter has all of its slots, zeros and step 0 before its first step. Collective if some are sharded.
        """
        self.core.expose()
        return save.with_hooks(self, lambda: save.state_dict(self.core))

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Load a state dict exactly: every value as it was saved, whatever the parameters' dtype. All or nothing.

        Parameters are matched by name where both sides have names, by position otherwise. Numbers come from the checkpoint;
        structure (``nesterov=True``, a codec) from this optimizer, and a rule that the checkpoint does not know starts afresh.
        Those of torch.optim's :attr:`counterpart` are welcome, with a StateWarning where its structure differs.

        Args:
            state_dict: as :meth:`state_dict` returned it, from any device, other ranks or an older version.
            strict: refuse what is missing or unexpected; else it starts afresh, or is left out with a warning.

        Raises:
            CheckpointError: it does not fit; the message names the parameter, and nothing was changed.
        """
        with load.hooks(self, state_dict) as given:
            load.put(self.core, load.read(self, given, strict))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """torch.amp.GradScaler then hands over its scale and lets the step itself skip infinite gradients."""
        return self.settings.capturable

    def __getstate__(self) -> dict[str, Any]:
        return {**pickled.content(self.core), "defaults": self.defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        rest = dict(state)
        if "_structure" not in rest:  # some users reset an optimizer so, with {"state": ...} and perhaps "param_groups"
            self.param_groups, self.state = rest.get("param_groups", self.param_groups), rest.get("state", self.core.state)
            return
        newer = {k: self.formerly.get(k, v) for k, v in entries(self).items() if k not in rest["_structure"][1]}
        self.core = pickled.restored(type(self), rest, newer)
        rest["defaults"] = {**newer, **rest["defaults"]}
        super().__setstate__(rest)

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{self.report}"
