r"""One view's slots under hbcore's names.

HeavyBall stores most averages divided by the sum of their weights, :math:`\hat m_t = m_t / (1 - \beta^n)`, where n is t, or
t - 1 where the first gradient only prepares the state (:data:`PRIMES`). hbcore stores :math:`m_t`, as torch does, and divides
on use. :data:`PLAIN` has the exceptions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hbcore.errors import CheckpointError
from hbcore.migrate.heavyball.naming import MOMENTA
from hbcore.migrate.heavyball.reading import Group, Held, View, matrix
from hbcore.migrate.heavyball.settings import is_pair

PLAIN = {
    "exp_avg": re.compile(r".*nadam|.*shampoo|adopt"),
    "exp_avg_fast": None,
    "exp_avg_slow": re.compile(r".*"),
    "exp_avg_sq": re.compile(r"adopt"),
}
"""Averages -> the rules in which HeavyBall does not divide them, or hbcore divides neither."""

PRIMES = re.compile(r".*soap\w*|.*shampoo|suds")
"""The rules whose first gradient is in no average, and no step of hbcore's. LATHER's is in none either, but divides by the
group's count all the same: it goes on alike with that as its own."""

RECOMPUTED = frozenset({"mu_product", "scion_state", "init_norm", "step", "Q_cache", "exprs", "velocity"})
"""Slots that hbcore does without, or computes from others."""


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

    def divided_by(self, slot: str, held: Held) -> float:
        """What HeavyBall has divided a slot by, and hbcore has not."""
        plain = PLAIN[slot]
        if (plain is not None and plain.fullmatch(held.rule)) or (slot == "exp_avg_sq" and self.palm):
            return 1.0
        beta = self.betas[1 if slot == "exp_avg_sq" else 0]
        return 1.0 - beta ** max(self.steps - bool(PRIMES.fullmatch(held.rule)), 0)


@dataclass
class Made:
    """A view's slots.

    Attributes:
        slots: hbcore's name -> the value.
        origins: hbcore's name -> HeavyBall's, for those that have one.
        told: HeavyBall's name -> what becomes of it, for the report.
        idle: HeavyBall's names of what is computed from others, or is not needed.
        steps: the parameter's own count.
    """

    slots: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)
    idle: set[str] = field(default_factory=set)
    steps: int = 0

    def put(self, name: str, value: Any, source: str, how: str = "") -> None:
        """Add a slot that comes from ``source``."""
        self.slots[name] = value
        self.origins[name] = source
        self.told[source] = f"{name}{how}"


def state_of(where: str, view: View, averages: Averages, wanted: Mapping[str, torch.Size], entries: Mapping[str, Any]) -> Made:
    """A view's slots under hbcore's names, without ``@k``.

    Args:
        where: the parameter, for messages.
        view: its state.
        averages: of its group.
        wanted: the parameter's slots in hbcore, without ``@k``.
        entries: hbcore's group, for the form in which slots are wanted.
    """
    made = Made(steps=averages.steps)
    if any(PRIMES.fullmatch(held.rule) for held in view.slots.values()):
        made.steps = max(averages.steps - 1, 0)
    for slot, held in view.slots.items():
        if isinstance(held.value, (list, tuple)) and all(one is None for one in held.value):
            made.idle.add(slot)  # SOAP's of a vector
        if slot in PLAIN:
            _average(where, slot, held, view, averages, wanted, entries, made)
        elif slot == "momentum":
            _momentum(held, wanted, entries, averages, made)
        elif slot in OTHERS:
            OTHERS[slot](where, held, view, averages, wanted, entries, made)
        elif slot in RECOMPUTED:
            made.idle.add(slot)
    return made


def _average(
    where: str, slot: str, held: Held, view: View, averages: Averages, wanted: Mapping[str, Any], entries: Mapping[str, Any],
    made: Made,
) -> None:  # fmt: skip
    """A moment."""
    if not isinstance(held.value, Tensor) or not held.value.is_floating_point():
        raise CheckpointError(f"{where}[{slot!r}] is no tensor of floats.")
    factor = averages.divided_by(slot, held)
    value = held.value.double() * factor
    how = "" if factor == 1 else f", times 1 - beta^t = {factor:.6g}"
    if slot == "exp_avg_sq":
        made.put("square_avg" if "square_avg" in wanted else slot, value, slot, how)
        if held.rule == "exp_avg_sq" and wanted.keys() == PAIR:
            made.slots["exp_avg"] = torch.zeros_like(value)  # HyperBallAdamW's first moment
    elif "momentum_buffer" in wanted and slot == "exp_avg":
        made.put("momentum_buffer", value / _weight(wanted, entries, averages), slot, how)
    elif not (
        wanted.keys() >= PAIR and (held.rule == "exp_avg" or held.rule.endswith("shampoo"))
    ):  # momentum, where Adam is wanted
        made.put(slot, value, slot, how)
    if slot == "exp_avg" and "perturbation" in wanted:
        rho = float(entries.get("sam_step_size", 0.1))
        made.slots["perturbation"] = rho * held.value.double() / held.value.double().norm().clamp(min=1e-8)


PAIR = {"exp_avg", "exp_avg_sq"}


def _weight(wanted: Mapping[str, Any], entries: Mapping[str, Any], averages: Averages) -> float:
    """What an average is divided by, to be the momentum that hbcore has here: a sum of gradients, or their average."""
    return 1 - averages.betas[0] if _sums(entries) else 1.0


def _sums(entries: Mapping[str, Any]) -> bool:
    return bool(entries.get("heavyball_momentum", "dampening" in entries))


def _momentum(held: Held, wanted: Mapping[str, Any], entries: Mapping[str, Any], averages: Averages, made: Made) -> None:
    """Muon's and SGD's momentum: an average, or a sum, which is 1 / (1 - beta) times as large."""
    if held.rule not in MOMENTA or "momentum_buffer" not in wanted or not isinstance(held.value, Tensor):
        return
    theirs, ours = held.rule != "nesterov_ema", _sums(entries)
    factor = 1.0 if theirs == ours else (1 - averages.betas[0]) if theirs else 1 / (1 - averages.betas[0])
    how = "" if factor == 1 else f", times {factor:.6g}"
    made.put("momentum_buffer", held.value.double() * factor, "momentum", how)


def _same(name: str) -> Callable[..., None]:
    """A slot that hbcore stores likewise, under its own name."""

    def put(where: str, held: Held, view: View, averages: Averages, wanted: Any, entries: Any, made: Made) -> None:
        [source] = [s for s, other in view.slots.items() if other is held]
        made.put(name, held.value, source)

    return put


def _factors(where: str, held: Held, view: View, averages: Averages, wanted: Any, entries: Any, made: Made) -> None:
    """``Q``: SOAP's bases, or PSGD's factors."""
    if not isinstance(held.value, (list, tuple)):
        raise CheckpointError(f"{where}['Q'] is {type(held.value).__name__}; expected a list of factors.")
    factors = [matrix(one) for one in held.value]
    if "GG" in view.slots:
        if any(q is not None for q in factors) and not any(name.startswith("Q_") for name in wanted):
            raise CheckpointError(
                f"{where}: its moments are in the basis of a preconditioner, which this optimizer has not here."
            )
        for i, q in enumerate(factors):
            if q is not None:
                made.put(f"Q_{i}", q, "Q")
        return
    count = sum(name.startswith("Q_") for name in wanted)
    kept = [i for i, q in enumerate(factors) if q is not None and (len(factors) == count or q.numel() > 1)]
    bounds = view.slots["running_lower_bound"].value if "running_lower_bound" in view.slots else [None] * len(factors)
    bases = view.slots["Q_basis"].value if "Q_basis" in view.slots else [None] * len(factors)
    for k, i in enumerate(kept):
        q = factors[i]
        assert q is not None
        rooted = q.ndim == 2 and entries.get("precond_rule") == "quad" and not torch.equal(q, q.mT)
        made.put(f"Q_{k}", symmetric_root(q) if rooted else q, "Q", ", as the symmetric root of Q^T Q" if rooted else "")
        bound = bounds[i] if isinstance(bounds, (list, tuple)) and i < len(bounds) else None
        made.slots[f"L_{k}"] = bound.reshape(()) if isinstance(bound, Tensor) and bound.numel() == 1 else torch.zeros(())
        basis = bases[i] if isinstance(bases, (list, tuple)) and i < len(bases) else None
        if isinstance(basis, Tensor):
            made.put(f"B_{k}", basis, "Q_basis")
    made.slots["init_scale"] = torch.ones(())  # it has started; the value is not read again
    made.slots |= {name: torch.zeros(shape) for name, shape in wanted.items() if name in ("grad_mean", "grad_count")}
    made.idle |= {"running_lower_bound"} | ({"Q", "Q_basis"} if not count else set())


def symmetric_root(q: Tensor) -> Tensor:
    """The symmetric positive definite S with S S = Q^T Q: another factor of the same preconditioner."""
    _, values, basis = torch.linalg.svd(q.double())
    root: Tensor = basis.mT @ (values[:, None] * basis)
    return root


def _grams(where: str, held: Held, view: View, averages: Averages, wanted: Any, entries: Any, made: Made) -> None:
    """``GG``: SOAP's factors, averages of all gradients, the first one too."""
    if not isinstance(held.value, (list, tuple)):
        raise CheckpointError(f"{where}['GG'] is {type(held.value).__name__}; expected a list of factors.")
    factor = 1.0 - averages.shampoo_beta ** max(averages.steps, 1)
    for i, gram in enumerate(held.value):
        if isinstance(gram, Tensor):
            made.put(f"GG_{i}", gram.double() * factor, "GG", f", times 1 - beta^t = {factor:.6g}")


def _low_rank(where: str, held: Held, view: View, averages: Averages, wanted: Any, entries: Any, made: Made) -> None:
    """``U``, ``V`` and ``d``, and what hbcore has beside them."""
    for name in ("U", "V", "d"):
        if name in view.slots:
            made.put(name, view.slots[name].value, name)
    made.slots["bounds"] = torch.zeros(3)
    made.slots["psgd_lra.vector"] = torch.ones(())


OTHERS: Mapping[str, Callable[..., None]] = {
    "fisher_approx": _same("fisher_approx"),
    "mars_old_grad": _same("mars_prev_grad"),
    "Q": _factors,
    "GG": _grams,
    "d": _low_rank,
}
"""Slots that are no moments -> what puts them into the result. ``z`` needs the weights, and is converted with them."""
