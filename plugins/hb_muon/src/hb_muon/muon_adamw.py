"""MuonAdamW: Muon for the hidden matrices of a model, AdamW for everything else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hb_muon.muon import Muon
from hb_muon.routing import members, routing
from hbcore.api import OptionError, ScaleByAdam, Transform, is_matrix, warn_at_caller

ADAMW_PATTERNS = (
    "*embed*", "*emb", "*emb.*", "*wte*", "*wpe*", "shared.*",
    "*lm_head*", "head.*", "*.head.*", "*classifier*", "*logits*", "score.*", "output.*", "fc.*",
)  # fmt: skip
"""Names of embeddings and last layers in common models, among them GPT-2, Llama, T5, torchvision's and timm's."""

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module.")
"""Parts that torch.compile, FSDP, activation checkpointing and DDP insert into names."""


class MuonAdamW(Muon):
    r"""Muon (Jordan et al. 2024) for hidden matrices, AdamW (Loshchilov and Hutter 2019) for the rest, as Muon's author does.

    Each param group becomes two: one of matrices, with ``use_muon=True``, and one of the rest, with ``use_muon=False``; an
    empty one is left out. Both are ordinary groups with an ``lr`` of their own, so that schedulers scale both. A matrix has
    two dimensions or more that are larger than 1. It is left to AdamW if its name matches one of ``adamw_patterns``, or if
    it is complex.

    **Without names** (``model.parameters()`` instead of ``model.named_parameters()``) no pattern can match: every matrix then
    goes to Muon, embeddings and the last layer too, with a warning. Shapes alone then tell who goes where, and a group stays
    one, with ``use_muon=True``, unless AdamW has a learning rate of its own or gets a complex matrix.
    ``hbcore.create("MuonAdamW", model)`` also finds embedding layers whose names match no pattern. ``repr`` shows which
    parameters go where.

    torch's ``ZeroRedundancyOptimizer`` has no names and needs groups that stay one. To give AdamW a learning rate of its own
    there, pass two groups: of matrices, and of the rest with ``use_muon=False`` and an ``lr``.

    A group may have its own ``use_muon``: True sends all of its matrices to Muon, False the whole group to AdamW, regardless
    of names; timm's ``use_fallback`` says the opposite. It may have its own ``adamw_lr`` and ``lr``; with ``use_muon=False``
    the latter is AdamW's.

    Args:
        params: named, so that ``adamw_patterns`` can match.
        lr: Muon's learning rate.
        betas, eps, nesterov, heavyball_momentum, momentum, beta, method, ns_steps, ns_coefficients, ns_dtype, scale_mode,
            adjust_lr_fn, flatten, split_sizes: as in :class:`hb_muon.Muon`.
        adamw_lr: AdamW's learning rate; None for ``lr``.
        adamw_patterns: names of matrices for AdamW, with ``*`` for anything; :data:`WRAPPERS` are removed from names first.
        weight_decay: of both optimizers.

    State: ``momentum_buffer``, or ``exp_avg`` and ``exp_avg_sq``, of the parameter's shape, and ``step``.

    Warns:
        UserWarning: the patterns send every matrix to AdamW; or parameters have no names, and no group says
            that its matrices are AdamW's, so that every matrix goes to Muon.
    """

    adamw_lr: float | None = None
    adamw_patterns: Sequence[str] = ADAMW_PATTERNS
    group_entries: ClassVar[tuple[str, ...]] = ("use_muon",)  # what groups may have besides the constructor's arguments
    _unnamed = 0

    def normalise(self, h: dict[str, Any]) -> dict[str, Any]:
        self._patterns = _patterns(h.pop("adamw_patterns"))
        self._adamw_lr = h.pop("adamw_lr")
        return {**super().normalise(h), "use_muon": True}

    def after_init(self) -> None:
        if lost := self._lost():
            warn_at_caller(lost, UserWarning)
        told = any(not group["use_muon"] and not p.is_complex() for group, _, p in self._matrices())
        if self._unnamed and self._patterns and not told:
            warn_at_caller(
                f"MuonAdamW: the parameters have no names, so all {self._unnamed} matrices go to Muon, embeddings and the last "
                "layer too; pass model.named_parameters(), call hbcore.create('MuonAdamW', model), or set use_muon per group.",
                UserWarning,
            )

    @classmethod
    def params_of(cls, model: nn.Module) -> list[Any]:
        """A model's named parameters, its embedding layers' in a group of their own for AdamW, whatever their names."""
        layers = (m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
        embeddings = {p for m in layers for p in m.parameters(recurse=False)}
        named = list(model.named_parameters())
        groups: list[dict[str, Any]] = [{"params": [pair for pair in named if pair[1] not in embeddings]}]
        groups.append({"params": [pair for pair in named if pair[1] in embeddings], "use_muon": False})
        return [group for group in groups if group["params"]]

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return Muon.chain(h) if h.use_muon else (ScaleByAdam(h.betas, h.eps),)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time, split in two as by the constructor. All or nothing; raises what any optimizer raises."""
        before = len(self.param_groups)
        try:
            for part in self._split(param_group):
                super().add_param_group(part)
        except Exception:
            del self.param_groups[before:]
            raise

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """See :meth:`hbcore.api.Optimizer.load_state_dict`; groups that are one here may have been saved in two by 0.1.0."""
        super().load_state_dict(rejoined(state_dict, self.param_groups), strict)

    def _split(self, group: Any) -> list[Any]:
        """A group's matrices for Muon, and its rest, or the whole group if Muon's chain would treat the rest the same.

        Invalid groups are returned unchanged, and the base class rejects them.
        """
        if not isinstance(group, dict) or isinstance(group.get("params"), (type(None), set, frozenset)):
            return [group]
        shared = {k: v for k, v in group.items() if k not in ("use_muon", "use_fallback", "adamw_lr", "params", "param_names")}
        given = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        if names := group.get("param_names"):
            given = list(zip(names, given, strict=True))
        if not all(isinstance(tensor_of(member), Tensor) for member in given):
            return [{**shared, "params": given}]
        asked = group.get("use_muon", None if group.get("use_fallback") is None else not group["use_fallback"])
        parts: dict[bool, list[Any]] = {True: [], False: []}
        for member in given:
            p = tensor_of(member)
            matrix = is_matrix(p) and not p.is_complex()
            parts[matrix and (not self._named(member) if asked is None else bool(asked))].append(member)
        self._unnamed += sum(asked is None and not isinstance(member, tuple) for member in parts[True])
        rates = (group.get("adamw_lr"), group.get("lr") if asked is False else None, self._adamw_lr)
        matrices = {**shared, "use_muon": True, "params": parts[True]}
        own = [rate for rate in rates if rate is not None]
        by_shape = asked is not False and not any(isinstance(m, tuple) or is_matrix(m) for m in parts[False])
        if by_shape and not own and not any(isinstance(m, tuple) for m in parts[True]):
            return [{**matrices, "params": given}]
        # AdamW's only momentum is betas[0], which mars reads.
        rest = {**shared, "use_muon": False, "momentum": None, "params": parts[False]}
        if own:
            rest["lr"] = own[0]
        return [part for part in (matrices, rest) if part["params"]] or [rest if asked is False else matrices]

    def _named(self, member: Any) -> bool:
        """Whether a member of a group has a name that matches one of the patterns."""
        if not isinstance(member, tuple):
            return False
        name = member[0]
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        return any(fnmatchcase(name, pattern) for pattern in self._patterns)

    def _lost(self) -> str | None:
        """The warning, if the patterns left Muon without a matrix."""
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
        own = {"_adamw_lr": self._adamw_lr, "_patterns": self._patterns, "_unnamed": self._unnamed}
        return {**super().__getstate__(), **own}

    def _routing(self) -> str:
        return routing(self.param_groups, lambda group, p: group["use_muon"] and is_matrix(p), "Muon", "AdamW")


def _patterns(given: Any) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    if any(not isinstance(pattern, str) for pattern in patterns):
        raise OptionError(f"adamw_patterns={given!r} is not a list of patterns of names, such as ['*embed*'].")
    return patterns


def tensor_of(member: Any) -> Any:
    """The parameter of a group's member, which is a parameter or a pair of its name and it."""
    return member[1] if isinstance(member, tuple) and len(member) == 2 else member


def rejoined(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """A state dict whose saved groups are joined in pairs where ``groups`` has one: version 0.1.0 split nameless groups too."""
    saved = state_dict.get("param_groups")
    if not isinstance(saved, (list, tuple)) or len(saved) <= len(groups):
        return state_dict
    left, joined = list(saved), []
    for own in groups:
        if _are_halves(left[:2], own):
            left[:2] = [_whole(left[0], left[1], own["params"])]
        joined += left[:1]
        del left[:1]
    return {**state_dict, "param_groups": [*joined, *left]}


def _are_halves(pair: Sequence[Any], own: Mapping[str, Any]) -> bool:
    """Whether two saved groups are the matrices and the rest of ``own``, with one learning rate."""
    if len(pair) < 2 or "param_names" in own or not all(isinstance(half, Mapping) for half in pair):
        return False
    matrices = sum(is_matrix(p) for p in own["params"])
    wanted = [(True, matrices), (False, len(own["params"]) - matrices)]
    halves = [(half.get("use_muon"), len(half.get("params", ()))) for half in pair]
    return own["use_muon"] and halves == wanted and pair[0].get("lr") == pair[1].get("lr")


def _whole(matrices: Mapping[str, Any], rest: Mapping[str, Any], params: Sequence[Tensor]) -> dict[str, Any]:
    """One saved group of two. The record of the matrices' names the rules of both, since Muon has some for vectors too."""
    keys = {True: iter(matrices["params"]), False: iter(rest["params"])}
    whole = {**matrices, "params": [next(keys[is_matrix(p)]) for p in params]}
    try:
        record = json.loads(whole["hbcore"])
        frozen = {half["params"][i] for half in (matrices, rest) for i in json.loads(half["hbcore"]).get("frozen", ())}
    except (KeyError, IndexError, TypeError, ValueError):  # damaged, which loading it will say
        return whole
    if frozen:
        record["frozen"] = [i for i, key in enumerate(whole["params"]) if key in frozen]
        whole["hbcore"] = json.dumps(record)
    return whole
