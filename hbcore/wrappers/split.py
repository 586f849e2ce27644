"""Different optimizers for different parameters of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from hbcore import registry
from hbcore.engine.params import check_params
from hbcore.errors import OptionError, ParameterError
from hbcore.optimizer import Optimizer
from hbcore.rules.transform import Domain
from hbcore.wrappers.composite import Composite

Spec = Mapping[str, Any]
ROUTING = ("optimizer", "match", "when", "params")
"""The entries of a spec that are not keyword arguments of its optimizer."""


class SplitOpt(Composite):
    """Route each parameter to one of several optimizers, by name or predicate; one optimizer object, one state dict.

    ::

        SplitOpt(model.named_parameters(), [
            {"optimizer": "AdamW", "match": ["*embed*", "lm_head*"], "lr": 3e-4},
            {"optimizer": "Muon", "when": lambda p: p.ndim > 1, "lr": 0.02},
            {"optimizer": "AdamW", "lr": 1e-3},
        ])

    A parameter goes to the first spec that matches it; ``repr`` shows the assignment. Model-wide quantities, such as
    MSAMLaProp's norm of the momentum, are computed over each optimizer's own parameters.

    Args:
        params: parameters, named parameters or groups of them; or, without ``specs``, groups that each name their optimizer:
            ``[{"params": [...], "optimizer": "Muon", "lr": 0.02}, ...]``.
        specs: dicts with ``"optimizer"``, a class or a name that :func:`hbcore.get` accepts; optionally ``"match"``, one or
            several ``*`` patterns for parameter names, and ``"when"``, a predicate on the parameter; and keyword arguments of
            the optimizer.
        **shared: keyword arguments for all optimizers; a spec's own take precedence.

    Raises:
        ParameterError: a parameter matches no spec, a spec matches no parameter, or a pattern needs missing names.
        OptionError: a spec is incomplete, or has a clip over the whole model, of which each optimizer sees only a part.
        RegistryError: an optimizer's name is unknown.
    """

    def __init__(self, params: Any, specs: Sequence[Spec] | None = None, **shared: Any) -> None:
        groups = _groups(params)
        self.specs = [Routed(i, spec, shared, specs is None) for i, spec in enumerate(groups if specs is None else specs)]
        routed = self._route(groups) if specs is not None else [[{"params": group["params"]}] for group in groups]
        for i, spec in enumerate(self.specs):
            if not routed[i]:
                raise ParameterError(f"SplitOpt: {spec} takes no parameter; drop it, or move it further up.")
        children = [spec.build(routed[i]) for i, spec in enumerate(self.specs)]
        self._refuse_global_clips(children)
        super().__init__(children)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters are routed like those of the constructor."""
        if any(group is param_group for child in self.children for group in child.param_groups):
            super().add_param_group(param_group)
            return
        routed = self._route(check_params("SplitOpt", [param_group], self.param_groups))
        for child, groups in zip(self.children, routed, strict=True):
            for group in groups:
                self._hand_over(child, group)

    def _route(self, groups: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """For each spec, ``groups`` restricted to the parameters it takes."""
        routed: list[list[dict[str, Any]]] = [[] for _ in self.specs]
        left: list[str] = []
        for group in groups:
            taken: list[list[Any]] = [[] for _ in self.specs]
            for member in group["params"]:
                name, p = member if isinstance(member, tuple) else (None, member)
                spec = next((s for s in self.specs if s.takes(name, p)), None)
                if spec is None:
                    left.append(f"{name or 'one'} of shape {tuple(p.shape)}")
                else:
                    taken[spec.index].append(member)
            for i, members in enumerate(taken):
                if members:
                    routed[i].append({**group, "params": members})
        if left:
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise ParameterError(
                f"SplitOpt: no spec takes {', '.join(left[:5])}{more}; end with a spec that has neither match nor when."
            )
        return routed

    @staticmethod
    def _refuse_global_clips(children: Sequence[Optimizer]) -> None:
        for child in children:
            if len(children) > 1 and any(clip.domain == Domain.MODEL for clip in child.settings.clips):
                raise OptionError(
                    f"SplitOpt: a clip over the whole model, in {type(child).__name__}, would see one optimizer's parameters; "
                    "call torch.nn.utils.clip_grad_norm_ before step()."
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "specs": self.specs}

    def __repr__(self) -> str:
        lines = [f"SplitOpt of {len(self.children)} optimizers"]
        for child in self.children:
            lines.append(f"  {type(child).__name__}: {summary(child.param_groups)}")
        return "\n".join([*lines, str(self.report)])


class Routed:
    """One spec: matches parameters and builds their optimizer.

    Args:
        index: the spec's index.
        spec: the spec as passed by the user.
        shared: default keyword arguments.
        closed: whether the spec lists its own parameters and takes no others.
    """

    def __init__(self, index: int, spec: Spec, shared: Mapping[str, Any], closed: bool) -> None:
        if "optimizer" not in spec:
            raise OptionError(f"SplitOpt: spec {index} must be a dict with an 'optimizer', a class or a name; it is {spec!r}.")
        named = spec["optimizer"]
        self.index, self.closed = index, closed
        self.cls: Any = registry.get(named) if isinstance(named, str) else named
        if not (isinstance(self.cls, type) and issubclass(self.cls, Optimizer)):
            raise OptionError(f"SplitOpt: spec {index} has the optimizer {named!r}, which is not an hbcore optimizer class.")
        match: str | Iterable[str] | None = spec.get("match")
        self.match = None if match is None else (match,) if isinstance(match, str) else tuple(match)
        self.when: Callable[[Tensor], bool] | None = spec.get("when")
        self.options = {**shared, **{k: v for k, v in spec.items() if k not in ROUTING}}

    def __str__(self) -> str:
        return f"spec {self.index} ({self.cls.__name__})"

    def takes(self, name: str | None, param: Tensor) -> bool:
        """Whether a parameter belongs to this optimizer."""
        if self.match is not None:
            if name is None:
                raise ParameterError(f"SplitOpt: {self} matches names; pass model.named_parameters().")
            if not any(fnmatchcase(name, pattern) for pattern in self.match):
                return False
        return not self.closed and (self.when is None or bool(self.when(param)))

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Build the optimizer for its groups."""
        optimizer: Optimizer = self.cls(groups, **self.options)
        return optimizer


def summary(groups: Iterable[Mapping[str, Any]], first: int = 4) -> str:
    """``"12 parameters, 7,077,888 elements: h.0.attn.weight (768, 768), ..."``."""
    members = [
        (p, name) for g in groups for p, name in zip(g["params"], g.get("param_names") or [""] * len(g["params"]), strict=True)
    ]
    named = [f"{name} {tuple(p.shape)}".strip() for p, name in members[:first]] + ["..."] * (len(members) > first)
    elements = sum(p.numel() for p, _ in members)
    return f"{len(members)} parameters, {elements:,} elements: {', '.join(named)}"


def _groups(params: Any) -> list[dict[str, Any]]:
    """Any valid ``params`` argument, as groups."""
    checked = check_params("SplitOpt", params)
    return checked if isinstance(checked[0], dict) else [{"params": checked}]
