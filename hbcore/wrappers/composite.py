"""Optimizers composed of optimizers: one object, one list of param groups, one state dict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from hbcore.checkpoint import load, save, wellformed
from hbcore.engine.core import Group
from hbcore.engine.curvature import evaluate, needed
from hbcore.engine.norms import Norms, read
from hbcore.engine.param_codec import restoring
from hbcore.engine.report import Report
from hbcore.engine.skipping import nonfinite
from hbcore.engine.step_hooks import step_outside_graphs
from hbcore.errors import OptionError
from hbcore.optimizer import Optimizer


class Composite(torch.optim.Optimizer):
    """Several optimizers as one.

    ``param_groups`` holds the children's own dicts, so schedulers, ``zero_grad`` and loggers act on the children directly. The
    state dict has torch's layout, with groups in the order of ``param_groups``.

    A subclass may keep entries of its own in ``self.state[p]``, under names that its children do not use, and in the groups:
    they are saved, and loaded as they were. A counter belongs there too, because attributes are not saved.

    Args:
        children: hbcore optimizers that share no parameter.

    Attributes:
        children: the optimizers.
    """

    requires_closure: ClassVar[bool] = False
    """Whether ``step`` needs a closure to compute gradients."""

    def __init__(self, children: Iterable[Optimizer]) -> None:
        self.children = list(children)
        if self.requires_closure and (curved := next((c for c in self.children if needed(c.core)), None)):
            raise OptionError(
                f"{type(self).__name__} calls the closure itself, at other parameters, and {type(curved).__name__} needs "
                "Hessian-vector products from it; use one of the two."
            )
        defaults = [child.defaults for child in self.children]
        shared = {k: v for k, v in defaults[0].items() if all(k in d and _equal(d[k], v) for d in defaults)}
        super().__init__([group for child in self.children for group in child.param_groups], shared)

    @property
    def param_groups(self) -> list[Group]:
        """The children's own groups, in the order in which they were added."""
        for child in self.children:
            save.refresh_records(child.core)
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        self._groups = groups

    @property  # type: ignore[override]
    def state(self) -> MutableMapping[Tensor, dict[str, Any]]:
        """Parameter -> its state in the child that owns it."""
        return States(self)

    @state.setter
    def state(self, content: Mapping[Tensor, dict[str, Any]]) -> None:
        if "_groups" not in vars(self):  # torch's constructor, which begins with none: the children may have theirs already
            return
        for child in self.children:
            params = (p for group in child.param_groups for p in group["params"])
            child.state = {p: content[p] for p in params if p in content}
        keys: list[Any] = list(content)
        self.children[0].state.update({key: content[key] for key in keys if not isinstance(key, Tensor)})

    @property
    def report(self) -> Report:
        """How the last step ran, over all children."""
        return Report.joined([child.report for child in self.children])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every child; ``closure`` recomputes the loss and is called as often as :meth:`Optimizer.step` says."""
        if torch.compiler.is_compiling():
            return step_outside_graphs(self, closure)
        self._hand_down()
        for core in (child.core for child in self.children):
            load.adopt(core)
        loss = None if closure is None else evaluate([child.core for child in self.children], closure)
        self._hand_down()
        with self._skipping_together():
            for child in self.children:
                _step_part(child)
        return loss

    @contextmanager
    def _skipping_together(self) -> Iterator[None]:
        """A step that one child skips for its gradients is skipped by all that were built with ``skip_nonfinite=True``."""
        skipping = [child.core for child in self.children if child.settings.skip_nonfinite]
        if len(skipping) > 1:
            found = nonfinite(p for core in skipping for group in core.groups for p in group["params"])
            for core in skipping:
                core.skipping.elsewhere = found
        try:
            yield
        finally:  # a child may also step by itself
            for core in skipping:
                core.skipping.elsewhere = None

    def restoring(self) -> AbstractContextManager[None]:
        """For a block that moves parameters and puts the same bits back: ``param_ecc`` would drop corrections otherwise."""
        return restoring([child.core for child in self.children])

    def train(self, mode: bool = True) -> Self:
        """See :meth:`hbcore.optimizer.Optimizer.train`; applies to all children."""
        for child in self.children:
            child.train(mode)
        return self

    def eval(self) -> Self:
        """``train(False)``."""
        return self.train(False)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """See :meth:`hbcore.optimizer.Optimizer.ema_weights`; applies to children built with ``use_ema=True``.

        Raises:
            OptionError: no child was built with ``use_ema=True``.
        """
        keeping = [child for child in self.children if child.settings.use_ema]
        if not keeping:
            raise OptionError(f"{type(self).__name__} keeps no average of the parameters; pass use_ema=True.")
        with ExitStack() as stack:
            for child in keeping:
                stack.enter_context(child.ema_weights())
            yield

    def norms(self) -> dict[str | int, Norms]:
        """See :meth:`hbcore.optimizer.Optimizer.norms`; of the children built with ``report_norms=True``."""
        return read([child.core for child in self.children], self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the child returned by :meth:`child_for`.

        Raises:
            HyperparameterError, ParameterError: as :meth:`hbcore.optimizer.Optimizer.add_param_group`.
        """
        if any(group is param_group for child in self.children for group in child.param_groups):
            self.param_groups.append(param_group)  # torch's constructor adds the children's own groups
            return
        self._hand_over(self.child_for(param_group), param_group)

    def _hand_over(self, child: Optimizer, param_group: dict[str, Any]) -> None:
        """Add a group to one child, which may split it into several."""
        before = len(child.param_groups)
        child.add_param_group(param_group)
        self.param_groups.extend(child.param_groups[before:])

    def child_for(self, param_group: Mapping[str, Any]) -> Optimizer:
        """The child that takes a new group: the last one."""
        return self.children[-1]

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`hbcore.optimizer.Optimizer.state_dict`: complete, plain data, in torch's layout."""
        return save.with_hooks(self, self._merged)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """See :meth:`hbcore.optimizer.Optimizer.load_state_dict`: exact, matched by name within each group, all or nothing.

        Raises:
            CheckpointError: the state dict does not fit; nothing was changed.
        """
        with load.hooks(self, state_dict) as given:
            contents = [load.read(child, part, strict, composite=True) for child, part in self._parts(given)]
            for child, content in zip(self.children, contents, strict=True):
                load.put(child.core, content)

    def _merged(self) -> dict[str, Any]:
        self._hand_down()
        state: dict[int, Any] = {}
        groups: dict[int, dict[str, Any]] = {}
        users: dict[Any, Any] = {}
        for child in self.children:
            saved = child.state_dict()
            users.update({key: value for key, value in saved["state"].items() if not isinstance(key, int)})
            for own, group in zip(child.param_groups, saved["param_groups"], strict=True):
                groups[id(own)] = {**group, "entries": [saved["state"].get(i) for i in group["params"]]}
        merged: list[dict[str, Any]] = []
        for own in self.param_groups:
            group = groups[id(own)]
            entries, start = group.pop("entries"), sum(len(done["params"]) for done in merged)
            merged.append({**group, "params": list(range(start, start + len(entries)))})
            state.update({start + i: entry for i, entry in enumerate(entries) if entry})
        return {"state": {**state, **users}, "param_groups": merged}

    def _parts(self, state_dict: Mapping[str, Any]) -> Iterator[tuple[Optimizer, dict[str, Any]]]:
        """Each child and its part of a state dict."""
        self._hand_down()
        wellformed.check(type(self).__name__, state_dict, len(self.param_groups))
        saved, state = state_dict["param_groups"], state_dict["state"]
        listed = {key for group in saved for key in group["params"]}
        strangers = {key: entry for key, entry in state.items() if key not in listed}
        for i, child in enumerate(self.children):
            if i == 1:  # the first child has the user's own entries, and raises if there are others
                strangers = {}
            mine = {id(group) for group in child.param_groups}
            groups = [theirs for own, theirs in zip(self.param_groups, saved, strict=True) if id(own) in mine]
            keys = {key for group in groups for key in group["params"]}
            yield child, {"state": {**{k: v for k, v in state.items() if k in keys}, **strangers}, "param_groups": groups}

    def _hand_down(self) -> None:
        """Pass on group dicts that a wrapper may have substituted for the children's."""
        known = {id(group) for child in self.children for group in child.param_groups}
        if len(known) == len(self.param_groups) and all(id(group) in known for group in self.param_groups):
            return
        groups = iter(self.param_groups)
        for child in self.children:
            child.param_groups = [next(groups) for _ in child.param_groups]

    def __getstate__(self) -> dict[str, Any]:
        return {"children": self.children, "defaults": self.defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "children" not in state:  # some users reset an optimizer so, with {"state": ...} and perhaps "param_groups"
            self.param_groups = state.get("param_groups", self.param_groups)
            self._hand_down()
            self.state = state.get("state", self.state)
            return
        self.children = state["children"]
        self._groups = [group for child in self.children for group in child.param_groups]
        super().__setstate__(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__} of\n" + "\n".join(map(repr, self.children))


class States(MutableMapping[Tensor, dict[str, Any]]):
    """The children's states as one mapping; writes go to the child that owns the parameter."""

    def __init__(self, composite: Composite) -> None:
        self._children = composite.children

    def __getitem__(self, param: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self._owner(param).state[param]
        return state

    def __setitem__(self, param: Tensor, slots: dict[str, Any]) -> None:
        self._owner(param).state[param] = slots

    def __delitem__(self, param: Tensor) -> None:
        del self._owner(param).state[param]

    def __iter__(self) -> Iterator[Tensor]:
        return (param for child in self._children for param in child.state)

    def __len__(self) -> int:
        return sum(len(child.state) for child in self._children)

    def __contains__(self, param: object) -> bool:
        return any(param in child.state for child in self._children)

    def __repr__(self) -> str:
        return repr(dict(self))

    def _owner(self, param: Any) -> Optimizer:
        if not isinstance(param, Tensor):  # an entry of the user's own
            return self._children[0]
        for child in self._children:
            if param in child.state or any(p is param for group in child.param_groups for p in group["params"]):
                return child
        raise KeyError(param)


def _step_part(child: Optimizer) -> None:
    """A child's step, with the hooks that were registered on it; the global ones see the composite's step, once."""
    for pre in tuple(child._optimizer_step_pre_hooks.values()):
        pre(child, (child,), {})
    child._step()
    for post in tuple(child._optimizer_step_post_hooks.values()):
        post(child, (child,), {})


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)
