"""The factors of preconditioners, SOAP's, PSGD's and LATHER's, as slots of a view."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbcore.errors import CheckpointError
from hbcore.migrate.heavyball.reading import matrix
from hbcore.migrate.heavyball.slots import Made, Reading


def add(r: Reading, made: Made) -> None:
    """Add a view's factors to its other slots."""
    for slot in ("Q", "GG"):
        if slot in r.view.slots and not isinstance(r.view.slots[slot].value, (list, tuple)):
            raise CheckpointError(
                f"{r.where}[{slot!r}] is {type(r.view.slots[slot].value).__name__}; expected a list of factors."
            )
    if "GG" in r.view.slots:
        _soap(r, made)
    elif "Q" in r.view.slots:
        _psgd(r, made)
    if "U" in r.view.slots:  # hbcore's bounds on the curvature, and the number of the vector that a parameter is part of
        made.slots |= {"bounds": torch.zeros(3), "psgd_lra.vector": torch.ones(())}


def _soap(r: Reading, made: Made) -> None:
    """SOAP's bases ``Q``, and its factors ``GG``, averages of all gradients, the first one too."""
    made.idle |= {"Q", "GG"}  # of a vector they are lists of None
    bases: list[Tensor | None] = []
    for i, q in enumerate(r.view.slots["Q"].value if "Q" in r.view.slots else ()):
        bases.append(q if isinstance(q, Tensor) else None)
        if isinstance(q, Tensor) and f"Q_{i}" not in r.wanted:
            raise CheckpointError(f"{r.where}: its moments are in a basis of dimension {i}, for which this optimizer has none.")
        if isinstance(q, Tensor):
            made.put(f"Q_{i}", q, "Q")
    factor = 1.0 - r.averages.shampoo_beta ** max(r.averages.steps, 1)
    for i, gram in enumerate(r.view.slots["GG"].value):
        if isinstance(gram, Tensor):
            made.put(f"GG_{i}", gram.double() * factor, "GG", f", times 1 - beta^t = {factor:.6g}")
    for name, shape in r.wanted.items():  # HeavyBall takes the narrow last piece of a cut matrix for a vector
        if name.startswith("Q_") and name not in made.slots:
            made.slots |= {name: torch.eye(*shape), f"GG_{name[2:]}": torch.zeros(shape)}
    if made.slots.keys() >= {"exp_avg"} and r.view.slots["exp_avg"].rule.endswith("shampoo"):
        made.put("exp_avg", _projected(r.where, made.slots["exp_avg"], bases), "exp_avg", ", in the bases")


def _projected(where: str, value: Tensor, bases: list[Tensor | None]) -> Tensor:
    """KLShampoo's average, which HeavyBall keeps as it is, in the bases of its factors."""
    for i, q in enumerate(bases):
        if q is not None:
            if i >= value.ndim or q.ndim != 2 or q.shape[0] != value.shape[i]:
                raise CheckpointError(f"{where}['Q'][{i}] has the shape {tuple(q.shape)}, for a block of {tuple(value.shape)}.")
            value = torch.tensordot(value, q.double(), dims=([i], [0])).movedim(-1, i)
    return value


def _psgd(r: Reading, made: Made) -> None:
    """PSGD's factors with their bounds, and LATHER's bases."""
    factors = [matrix(one) for one in r.view.slots["Q"].value]
    count = sum(name.startswith("Q_") for name in r.wanted)
    made.idle |= {"running_lower_bound"} | (set() if count else {"Q", "Q_basis"})  # LATHER's vectors are Adam's here
    kept = [i for i, q in enumerate(factors) if q is not None and (len(factors) == count or q.numel() > 1)]
    for k, i in enumerate(kept):
        q = factors[i]
        assert q is not None
        rooted = q.ndim == 2 and r.entries.get("precond_rule") == "quad" and not torch.equal(q, q.mT)
        made.put(f"Q_{k}", symmetric_root(q) if rooted else q, "Q", ", as the symmetric root of Q^T Q" if rooted else "")
        bound = _of(r, "running_lower_bound", i)
        made.slots[f"L_{k}"] = bound if bound is not None and bound.numel() == 1 else torch.zeros(())
        if (basis := _of(r, "Q_basis", i)) is not None:
            made.put(f"B_{k}", basis, "Q_basis")
    made.slots["init_scale"] = torch.ones(())  # it has started; the value is not read again
    made.slots |= {name: torch.zeros(shape) for name, shape in r.wanted.items() if name in ("grad_mean", "grad_count")}


def _of(r: Reading, slot: str, i: int) -> Tensor | None:
    """What a list of one entry for each factor has for one."""
    values: Any = r.view.slots[slot].value if slot in r.view.slots else ()
    return values[i] if isinstance(values, (list, tuple)) and i < len(values) and isinstance(values[i], Tensor) else None


def symmetric_root(q: Tensor) -> Tensor:
    """The symmetric positive definite S with S S = Q^T Q: another factor of the same preconditioner."""
    _, values, basis = torch.linalg.svd(q.double())
    root: Tensor = basis.mT @ (values[:, None] * basis)
    return root
