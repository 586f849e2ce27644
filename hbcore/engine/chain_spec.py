"""What the groups of one optimizer are made of: chains, and everything that follows from a chain without running it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from hbcore.distributed.placement import local
from hbcore.engine.entry_forms import check_length, fixed, getter, length_of, lengths
from hbcore.engine.graph.draws import draw_names
from hbcore.engine.graph.segment_spec import Hypers, SegmentSpec
from hbcore.engine.options import Settings
from hbcore.engine.params import is_lazy
from hbcore.engine.shared_options import SCHEDULED
from hbcore.errors import HyperparameterError, OptionError, ParameterError, RuleError
from hbcore.rules import palm, route
from hbcore.rules.contract import scalar_names, slot_names, slots_of, title, transforms_of
from hbcore.rules.flat import rests
from hbcore.rules.transform import Domain, Transform
from hbcore.state.blocks import BLOCK
from hbcore.state.codec_choice import PerSlot, codec_of
from hbcore.state.expected import Logical, expected

Group = dict[str, Any]
Rule = Callable[[Any], tuple[Transform, ...]]
Getter = Callable[[Mapping[str, Any]], tuple[Any, ...]]


class ChainSpec:
    """A class's rule with its options' stages around it. Compares equal to itself only, so that optimizers share no segments.

    Args:
        rule: hyperparameters of a group -> the rule's transforms, forks unresolved.
        settings: the options.
        defaults: the group's entries and their defaults.
        hyper: which of them some transform declares with ``hyper``; :meth:`admit` adds to them.

    Attributes:
        checked: the kinds of groups whose rules were asked for their slots.
    """

    def __init__(self, rule: Rule, settings: Settings, defaults: Mapping[str, Any], hyper: Iterable[str] = ()) -> None:
        self.rule, self.settings, self.defaults = rule, settings, dict(defaults)
        self.keys, self.hyper = tuple(self.defaults), set(hyper)
        self._lengths = lengths(self.defaults)
        self._forked: dict[tuple[Any, ...], tuple[Transform, ...]] = {}
        self._versions: dict[tuple[Any, ...], dict[str, int]] = {}
        self._getters: tuple[Getter, Getter, list[str]] | None = None
        self.checked: set[Any] = set()

    def __call__(self, h: Any, branches: tuple[bool, ...], step: Tensor | None = None) -> tuple[Transform, ...]:
        """The whole chain, for hyperparameters ``h``, of the parameters that take ``branches`` at its forks.

        With ``palm=True`` a chain is one step's; without ``step`` it has a constant second decay, and is to be looked at only.
        """
        rule = route.resolve(self.rule(h), branches)
        if self.settings.palm and step is not None:
            rule = palm.raised(rule, step, h.beta2_scale)
        return self.settings.stages(h, rule)

    def forked(self, group: Group) -> tuple[Transform, ...]:
        """The group's chain, its forks unresolved. Its numbers are the defaults: whatever a scheduler wrote, it has a chain."""
        key = self.structure(group)
        if key is None:
            return self._stages(self.usual(group))
        if key not in self._forked:  # most of hundreds of groups differ in numbers alone
            self._forked[key] = self._stages(self.usual(group))
        return self._forked[key]

    def structure(self, group: Group) -> tuple[Any, ...] | None:
        """What groups with the same chain have in common; None if an entry has no hash."""
        if self._getters is None:
            numbers = [k for k, default in self.defaults.items() if k in self.hyper and default is not None]
            self._getters = getter(k for k in self.keys if k not in numbers), getter(numbers), numbers
        entries, values, names = self._getters
        key: tuple[Any, ...] = entries(group)
        present = values(group)
        if NoneType in map(type, present):  # such a number is an entry like the others
            key = *key, tuple(name for name, value in zip(names, present, strict=True) if value is None)
        try:
            hash(key)
        except TypeError:
            return None
        return key

    def chain(self, group: Group, p: Tensor) -> tuple[Transform, ...]:
        """The chain of one parameter of the group, with default numbers."""
        return self(Hypers(**self.usual(group)), route.branches(self.forked(group), p))

    def bound(self, group: Group, p: Tensor) -> tuple[Transform, ...]:
        """The chain of one parameter with the group's present numbers as tensors, as rules have them."""
        values = {k: _tensors(group[k]) if k in self.hyper and group[k] is not None else group[k] for k in self.keys}
        return self(Hypers(**values), route.branches(self.forked(group), p))

    def every(self, group: Group) -> tuple[Transform, ...]:
        """What some parameter of the group may meet."""
        return tuple(route.every(self.forked(group)))

    def refuse_complex(self, group: Group, where: str) -> None:
        """Look whether the group's complex parameters have elementwise rules, which see them as pairs of real numbers.

        Raises:
            ParameterError: a matrix rule would get one; the message begins with ``where``.
        """
        for p in (p for p in group["params"] if p.is_complex()):
            if rules := [t.name for t in self.chain(group, p) if t.domain == Domain.MATRIX]:
                raise ParameterError(
                    f"{where} has a complex parameter of shape {tuple(p.shape)}, which {rules[0]!r} would take for a real "
                    "matrix; give complex parameters an elementwise optimizer, such as AdamW."
                )

    def versions(self, group: Group) -> dict[str, int]:
        """The group's rules by name, with their versions."""
        key = self.structure(group)
        if key is None or key not in self._versions:
            packed = {"param_ecc": 1} if self.settings.param_codec is not None else {}
            versions = {**packed, **{t.name: t.version for t in self.every(group)}}
            if key is None:
                return versions
            self._versions[key] = versions
        return self._versions[key]

    def expected(self, group: Group, p: Tensor) -> list[Logical]:
        """The slots of one parameter of the group."""
        return expected(self.chain(group, p), seen(p), self.settings.codec, self.settings.param_codec)

    def dynamic(self, group: Group) -> dict[str, int | None]:
        """The entries that may change every step, and how many numbers each is; None for a plain number."""
        names = {n for t in self.forked(group) for n, _, _ in t.hypers()} | {*SCHEDULED}
        return {k: length_of(group[k]) for k in self.keys if k in names and group[k] is not None}

    def spec(self, group: Group) -> SegmentSpec:
        """The static description of a group; equal for groups that differ only in numbers."""
        dynamic = self.dynamic(group)
        return SegmentSpec(
            chain=self,
            static=tuple((k, fixed(group[k])) for k in self.keys if k not in dynamic and k != "maximize"),
            dynamic=tuple(dynamic.items()),
            divide=self.settings.divide,
            codec=self.settings.codec,
            maximize=bool(group["maximize"]),
            param_codec=self.settings.param_codec,
            scaled=self.settings.capturable,
            skip_nonfinite=self.settings.skip_nonfinite,
            stochastic=self.settings.stochastic_rounding,
            norms=self.settings.report_norms,
        )

    def admit(self, group: Group, where: str) -> None:
        """Check a new group, and note which of its entries are hyperparameters.

        Raises:
            HyperparameterError, RuleError: as :meth:`check` does.
            RuleError: a rule's slots do not fit the group's parameters, or each other.
        """
        declared = {name for t in self.check(group, where) for name, _, _ in t.hypers()}
        if fresh := (declared | {*SCHEDULED}) & {*self.keys} - self.hyper:
            self.hyper |= fresh
            self._getters = None
        check_slots(self, group)

    def check(self, group: Group, where: str) -> tuple[Transform, ...]:
        """Check a group's numbers; return its chain with them, forks unresolved.

        Raises:
            HyperparameterError: one is outside its bounds, or not a number; the message begins with ``where``.
            RuleError: the class's ``chain`` returned something else than rules that are fit to run.
        """
        for key in self.keys:
            value = group[key]
            if isinstance(value, Tensor) and value.numel() != 1:
                raise HyperparameterError(f"{where}: {key} is a tensor of shape {tuple(value.shape)}; pass one element.")
        try:
            for key, length in self._lengths.items():
                check_length(key, group[key], length)
            return self._stages({k: _plain(group[k]) for k in self.keys})
        except HyperparameterError as error:
            raise HyperparameterError(f"{where}: {error}") from None

    def usual(self, group: Group) -> dict[str, Any]:
        """The group's entries, with the defaults for its numbers."""
        defaults, hyper = self.defaults, self.hyper
        return {k: group[k] if k not in hyper or v is None or group[k] is None else v for k, v in defaults.items()}

    def _stages(self, values: Mapping[str, Any]) -> tuple[Transform, ...]:
        h = Hypers(**values)
        rule = transforms_of(self.rule(h), self.rule)
        if self.settings.palm:
            palm.check(rule, h.beta2_scale)  # of the whole fork: one branch may have no second moment
        return self.settings.stages(h, rule)


def check_slots(chain: ChainSpec, group: Group) -> None:
    """Ask the rules of a new group for their slots, once for each kind of parameter.

    Raises:
        RuleError: a slot has a name or shape that is not supported, or two owners; blocks do not add up to their parameter; an
            elementwise rule has other slots for one parameter than for another.
    """
    forked = chain.forked(group)
    kinds: dict[tuple[tuple[bool, ...], torch.Size, torch.dtype], Tensor] = {}
    members = [p[1] if isinstance(p, tuple) else p for p in group["params"]]  # torch takes the names off later
    for p in (
        p for p in members if p.requires_grad and not is_lazy(p) and p.numel()
    ):  # others may never get state, whatever their shape
        kinds.setdefault((route.branches(forked, p), p.shape, p.dtype), p)
    structure = chain.structure(group)
    if structure is not None and (structure, *kinds) in chain.checked:
        return
    chains = {branches: chain(Hypers(**chain.usual(group)), branches) for branches in {b for b, _, _ in kinds}}
    first: dict[tuple[int, tuple[bool, ...]], tuple[torch.Size, set[str]]] = {}
    vectors: dict[tuple[int, tuple[bool, ...], torch.dtype], Tensor] = {}
    for (branches, shape, _), p in kinds.items():
        owners: dict[str, str] = {}
        for i, t in enumerate(chains[branches]):
            if t.domain == Domain.MATRIX and p.is_complex():
                continue  # :meth:`ChainSpec.refuse_complex` says so
            names = slot_names(t, seen(p))
            for name in (*names, *scalar_names(t)):
                if name in owners:
                    raise RuleError(f"{owners[name]!r} and {t.name!r} both claim the slot {name!r}; rename one of them.")
                owners[name] = t.name
            for name in draw_names(t):
                if name in owners:
                    raise RuleError(f"two rules are called {t.name!r} and would draw the same random numbers; rename one.")
                owners[name] = t.name
            before, known = first.setdefault((i, branches), (shape, names))
            if t.flat and chain.settings.multi_tensor:
                check_rests(t, seen(p), vectors.setdefault((i, branches, p.dtype), seen(p)))
            if t.domain != Domain.MATRIX and names != known:
                raise RuleError(
                    f"{title(t, 'slots')} has the slots {sorted(known)} for shape {tuple(before)} and {sorted(names)} for "
                    f"{tuple(shape)}; parameters of one chain have the same slots: use a Route to give them different rules."
                )
    check_codec(chain, group)
    if structure is not None:
        chain.checked.add((structure, *kinds))


def check_codec(chain: ChainSpec, group: Group) -> None:
    """Ask the codec for each slot that a parameter of the group may have.

    Raises:
        OptionError: it does not store one of them, or is for slots that nobody has.
    """
    codec = chain.settings.codec
    if not isinstance(codec, PerSlot) and not hasattr(codec, "of"):
        return
    like = torch.empty(BLOCK, BLOCK, device="meta")
    slots = {name: slot for t in chain.every(group) for name, slot in slots_of(t, like).items()}
    for name, slot in slots.items():
        codec_of(name, slot, codec)
    if isinstance(codec, PerSlot) and (unknown := sorted({*codec.codecs} - {*slots})):
        raise OptionError(f"ecc names the slot {unknown[0]!r}; this optimizer has {', '.join(sorted(slots)) or 'none'}.")


def check_rests(t: Transform, p: Tensor, other: Tensor) -> None:
    """Raise :class:`RuleError` unless a flat rule's slots for two parameters differ only in the parameters' own shapes."""
    ours, theirs = rests(t, t.slots(p), p.shape), rests(t, t.slots(other), other.shape)
    if ours != theirs:
        raise RuleError(
            f"{title(t, 'slots')} has slots of the shapes {theirs} beside shape {tuple(other.shape)} and {ours} beside "
            f"{tuple(p.shape)}; one vector is made of both: give them the same."
        )


def seen(p: Tensor) -> Tensor:
    """A parameter as rules see it: a complex one as pairs of real numbers."""
    return local(p.detach()) if p.is_complex() else p


def _tensors(value: Any) -> Any:
    """Numbers as 0-d float64 tensors; on the host, unless they are tensors elsewhere."""
    if isinstance(value, tuple):
        return tuple(map(_tensors, value))
    return value.double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")


def _plain(value: Any) -> Any:
    """Tensors as the numbers they hold."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, Tensor) else value
