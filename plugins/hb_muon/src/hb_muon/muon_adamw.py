"""MuonAdamW: Muon for the hidden matrices of a model, AdamW for all else."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from hb_muon.muon import Muon
from hb_muon.orthogonalize import Coefficients
from hb_muon.routing import members, routing
from hb_muon.rules import as_data
from hbcore.api import Optimizer, Options, ScaleByAdam, Transform, is_matrix

ADAMW_PATTERNS = (
    "*embed*", "*emb", "*emb.*", "*wte*", "*wpe*", "shared.*",
    "*lm_head*", "head.*", "*.head.*", "*classifier*", "*logits*", "score.*", "output.*", "fc.*",
)  # fmt: skip
"""What embeddings and last layers are called in common models, of GPT-2, Llama, T5, torchvision and timm among others."""

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module.")
"""What torch.compile, FSDP, activation checkpointing and DDP put into names."""


class MuonAdamW(Optimizer):
    r"""Muon (Jordan et al. 2024) for hidden matrices, AdamW (Loshchilov and Hutter 2019) for all else, as Muon's author has it.

    Each param group that is given becomes one of matrices, with ``use_muon=True``, and one of the rest, with
    ``use_muon=False``; either is left out where it would be empty. Both are ordinary groups with an ``lr`` of their own, so
    that schedulers scale both. A matrix has two dimensions or more that are larger than 1. It is left to AdamW if its name
    matches one of ``adamw_patterns``, or its numbers are complex.

    **Without names** (``model.parameters()`` in the place of ``model.named_parameters()``) no pattern can match: then
    everything with two dimensions is for Muon, embeddings and the last layer too. ``repr`` prints who goes where.

    A group may have its own ``use_muon``: True sends all of its matrices to Muon, False all of it to AdamW, whatever their
    names. It may have its own ``adamw_lr`` and ``lr``; with ``use_muon=False`` the latter is AdamW's.

    Args:
        params: named parameters, parameters or groups of them; any floating dtype and shape.
        lr: Muon's learning rate.
        betas: decay rates of Adam's two moments, in [0, 1); the first is Muon's momentum too unless ``momentum`` is given.
        eps: the smallest divisor, at least 0: of Adam's step, and of a matrix's norm.
        nesterov, heavyball_momentum, momentum, beta, method, ns_steps, ns_coefficients, ns_dtype, scale_mode, adjust_lr_fn,
            flatten, split_sizes: as of :class:`hb_muon.Muon`.
        adamw_lr: AdamW's learning rate; None for ``lr``.
        adamw_patterns: names with ``*`` of matrices for AdamW; names are looked at without what wrappers put into them.
        **options: ``weight_decay`` is both optimizers'; for all of them see :class:`hbcore.api.Options`.

    State: ``momentum_buffer``, or ``exp_avg`` and ``exp_avg_sq``, of the parameter's shape, and ``step``.

    Warns:
        UserWarning: there are matrices, and the patterns leave none of them to Muon.

    Raises:
        HyperparameterError: a hyperparameter is outside its bounds, or a setting does not exist.
        OptionError: an option does not exist.
        ParameterError: ``params`` is unusable.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.0025,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        nesterov: bool = True,
        heavyball_momentum: bool = False,
        momentum: float | None = None,
        beta: float | None = None,
        method: str = "auto",
        ns_steps: int | None = None,
        ns_coefficients: Coefficients = None,
        ns_dtype: str | torch.dtype | None = None,
        scale_mode: str = "scale",
        adjust_lr_fn: str | None = None,
        flatten: bool = True,
        split_sizes: Sequence[int] | None = None,
        adamw_lr: float | None = None,
        adamw_patterns: Sequence[str] = ADAMW_PATTERNS,
        **options: Unpack[Options],
    ) -> None:
        self._adamw_lr = adamw_lr
        self._patterns = (adamw_patterns,) if isinstance(adamw_patterns, str) else tuple(adamw_patterns)
        hyperparameters = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "nesterov": nesterov,
            "heavyball_momentum": heavyball_momentum,
            "momentum": momentum if beta is None else beta,
            "method": method,
            "ns_steps": ns_steps,
            "scale_mode": scale_mode,
            "adjust_lr_fn": adjust_lr_fn,
            "flatten": flatten,
            "use_muon": True,
            **as_data(ns_coefficients, ns_dtype, split_sizes),
        }
        super().__init__(params, hyperparameters, options)
        if lost := self._lost():
            warnings.warn(lost, UserWarning, stacklevel=2)

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return Muon.chain(h) if h.use_muon else (ScaleByAdam(h.betas, h.eps),)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time: as two, as the constructor does. All or nothing.

        Raises:
            as of any optimizer.
        """
        before = len(self.param_groups)
        try:
            for part in self._split(param_group):
                super().add_param_group(part)
        except Exception:
            del self.param_groups[before:]
            raise

    def _split(self, group: Any) -> list[Any]:
        """The group's matrices for Muon, and the rest of it; what is no good group comes back for the base class to refuse."""
        if not isinstance(group, dict) or isinstance(group.get("params"), (type(None), set, frozenset)):
            return [group]
        shared = {k: v for k, v in group.items() if k not in ("use_muon", "adamw_lr", "params", "param_names")}
        given = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        if names := group.get("param_names"):
            given = list(zip(names, given, strict=True))
        if not all(isinstance(tensor_of(member), Tensor) for member in given):
            return [{**shared, "params": given}]
        asked = group.get("use_muon")
        parts: dict[bool, list[Any]] = {True: [], False: []}
        for member in given:
            p = tensor_of(member)
            matrix = is_matrix(p) and not p.is_complex()
            parts[matrix and (not self._named(member) if asked is None else bool(asked))].append(member)
        # AdamW has no momentum but betas[0], which mars asks for.
        rest = {**shared, "use_muon": False, "momentum": None, "params": parts[False]}
        for lr in (group.get("adamw_lr"), group.get("lr") if asked is False else None, self._adamw_lr):
            if lr is not None:
                rest["lr"] = lr
                break
        matrices = {**shared, "use_muon": True, "params": parts[True]}
        return [part for part in (matrices, rest) if part["params"]] or [rest if asked is False else matrices]

    def _named(self, member: Any) -> bool:
        """Whether a member of a group has a name that one of the patterns matches."""
        if not isinstance(member, tuple):
            return False
        name = member[0]
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        return any(fnmatchcase(name, pattern) for pattern in self._patterns)

    def _lost(self) -> str | None:
        """What to say if the patterns left Muon without a matrix."""
        lost = [name for _, name, p in self._matrices() if self._named((name, p))]
        if not lost or any(group["use_muon"] for group, _, _ in self._matrices()):
            return None
        more = ", ..." if len(lost) > 3 else ""
        return (
            f"MuonAdamW: all matrices go to AdamW; {len(lost)} match adamw_patterns by name ({', '.join(lost[:3])}{more}); "
            "pass adamw_patterns that match embeddings and the last layer only, or set use_muon for a group."
        )

    def _matrices(self) -> Iterator[tuple[Mapping[str, Any], str, Tensor]]:
        return (entry for entry in members(self.param_groups) if is_matrix(entry[2]))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_adamw_lr": self._adamw_lr, "_patterns": self._patterns}

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{routing(self.param_groups, lambda group, _: group['use_muon'], 'Muon', 'AdamW')}"


def tensor_of(member: Any) -> Any:
    """The parameter of a member of a group, which may be a pair of a name and it."""
    return member[1] if isinstance(member, tuple) and len(member) == 2 else member
