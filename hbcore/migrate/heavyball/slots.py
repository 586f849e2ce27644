r"""One view's slots under hbcore's names.

HeavyBall stores most averages divided by the sum of their weights, :math:`\hat m_t = m_t / (1 - \beta^n)`, where n is t, or
t - 1 where the first gradient only prepares the state (:data:`PRIMES`). hbcore stores :math:`m_t`, as torch does, and divides
on use. :data:`PLAIN` has the exceptions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbcore.errors import CheckpointError
from hbcore.migrate.heavyball.naming import MOMENTA
from hbcore.migrate.heavyball.reading import Group, Held, View
from hbcore.migrate.heavyball.settings import is_pair

PLAIN = {
    "exp_avg": re.compile(r".*nadam|.*shampoo|adopt"),
    "exp_avg_fast": re.compile(r".*nadam"),
    "exp_avg_slow": re.compile(r".*"),
    "exp_avg_sq": re.compile(r"adopt"),
}
"""Averages -> the rules in which HeavyBall does not divide them, or hbcore, like ADOPT's paper, divides them nowhere."""

PRIMES = re.compile(r".*soap\w*|.*shampoo|suds")
"""The rules whose first gradient is in no average, and no step of hbcore's. LATHER's is in none either, but divides by the
group's count all the same: it goes on alike with that as its own."""

RECOMPUTED = frozenset({"mu_product", "scion_state", "init_norm", "step", "Q_cache", "exprs", "velocity"})
"""Slots that hbcore does without, or computes from others."""

ALIKE = {"fisher_approx": "fisher_approx", "mars_old_grad": "mars_prev_grad", "U": "U", "V": "V", "d": "d"}
"""Slots that hbcore stores likewise, and its name for them."""

PAIR = {"exp_avg", "exp_avg_sq"}


@dataclass(frozen=True)
class Averages:
    """What turns HeavyBall's averages into plain ones.

    Attributes:
        steps: the group's count.
        betas: the decay rates of the two moments; more for AdEMAMix.
        shampoo_beta: of SOAP's factors.
        palm: whether hbcore's second moment is one that it does not divide.
    """

    steps: int
    betas: tuple[float, ...]
    shampoo_beta: float
    palm: bool

    @staticmethod
    def of(group: Group, palm: bool) -> Averages:
        """Those of a group; raises CheckpointError if its decay rates are none."""
        entries = group.entries
        first = entries["beta"] if entries.get("beta") is not None else None
        betas = tuple(entries["betas"]) if is_pair(entries.get("betas")) else (0.9, 0.99)
        betas = betas if first is None else (first, *betas[1:])
        shampoo = entries.get("shampoo_beta", 0.95)
        if not all(isinstance(b, (int, float)) and 0 <= b <= 1 for b in (*betas, shampoo)):
            raise CheckpointError(f"a group has the decay rates {betas!r:.60}; expected numbers in [0, 1].")
        return Averages(group.steps, betas, shampoo, palm)

    def divided_by(self, slot: str, rule: str) -> float:
        """What HeavyBall has divided a slot by, and hbcore has not."""
        if PLAIN[slot].fullmatch(rule) or (slot == "exp_avg_sq" and self.palm):
            return 1.0
        beta = self.betas[1 if slot == "exp_avg_sq" else 0]
        return 1.0 - beta ** max(self.steps - bool(PRIMES.fullmatch(rule)), 0)


class Reading(NamedTuple):
    """What a view's slots are read with.

    Attributes:
        where: the parameter, for messages.
        view: its state.
        averages: of its group.
        wanted: the slots that hbcore has for the view, without ``@k``, and their shapes.
        entries: hbcore's group, for the form in which slots are wanted.
    """

    where: str
    view: View
    averages: Averages
    wanted: Mapping[str, torch.Size]
    entries: Mapping[str, Any]


@dataclass
class Made:
    """A view's slots.

    Attributes:
        steps: the parameter's own count.
        slots: hbcore's name -> the value.
        origins: hbcore's name -> HeavyBall's, for those that have one.
        told: HeavyBall's name -> what becomes of it, for the report.
        idle: HeavyBall's names of what is computed from others, or is not needed.
    """

    steps: int = 0
    slots: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)
    idle: set[str] = field(default_factory=set)

    def put(self, name: str, value: Any, source: str, how: str = "") -> None:
        """Add a slot that comes from ``source``."""
        self.slots[name] = value
        self.origins[name] = source
        self.told[source] = f"{name}{how}"


def elementwise(r: Reading) -> Made:
    """A view's slots under hbcore's names, but for those of preconditioners' factors and second sets of weights."""
    primed = any(PRIMES.fullmatch(held.rule) for held in r.view.slots.values())
    made = Made(max(r.averages.steps - primed, 0))
    for slot, held in r.view.slots.items():
        if slot in PLAIN:
            _average(r, slot, held, made)
        elif slot == "momentum":
            _momentum(r, held, made)
        elif slot in ALIKE:
            made.put(ALIKE[slot], held.value, slot)
        elif slot in RECOMPUTED:
            made.idle.add(slot)
    return made


def _average(r: Reading, slot: str, held: Held, made: Made) -> None:
    """A moment."""
    if not isinstance(held.value, Tensor) or not held.value.is_floating_point():
        raise CheckpointError(f"{r.where}[{slot!r}] is no tensor of floats.")
    factor = r.averages.divided_by(slot, held.rule)
    value = held.value.double() * factor
    how = "" if factor == 1 else f", times 1 - beta^t = {factor:.6g}"
    if slot == "exp_avg_sq":
        made.put("square_avg" if "square_avg" in r.wanted else slot, value, slot, how)
        if "exp_avg" in r.wanted and "exp_avg" not in r.view.slots:
            made.slots["exp_avg"] = torch.zeros_like(value)  # HyperBallAdamW has no first moment there
    elif slot == "exp_avg" and "momentum_buffer" in r.wanted:
        made.put("momentum_buffer", value / (1 - r.averages.betas[0]) if _sums(r) else value, slot, how)
    elif not (r.wanted.keys() >= PAIR and (held.rule == "exp_avg" or held.rule.endswith("shampoo"))):
        made.put(slot, value, slot, how)  # where Adam is wanted, a momentum is no moment of its
    if slot == "exp_avg" and "perturbation" in r.wanted:
        rho = float(r.entries.get("sam_step_size", 0.1))
        made.slots["perturbation"] = rho * held.value.double() / held.value.double().norm().clamp(min=1e-8)


def _sums(r: Reading) -> bool:
    """Whether hbcore's momentum is a sum of gradients here, as SGD's, or their average."""
    return bool(r.entries.get("heavyball_momentum", "dampening" in r.entries))


def _momentum(r: Reading, held: Held, made: Made) -> None:
    """Muon's and SGD's momentum: an average, or a sum, which is 1 / (1 - beta) times as large."""
    if held.rule not in MOMENTA or not isinstance(held.value, Tensor):
        return
    theirs, ours, rest = held.rule != "nesterov_ema", _sums(r), 1 - r.averages.betas[0]
    factor = 1.0 if theirs == ours else rest if theirs else 1 / rest
    made.put("momentum_buffer", held.value.double() * factor, "momentum", "" if factor == 1 else f", times {factor:.6g}")
