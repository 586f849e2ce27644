"""The SOAP family in one table: what the oracle must be told for each name, at which settings, and trainings of both."""

from __future__ import annotations

import pytest
import torch
from core.kit import normal
from reference.soap_family import Weights, schedule_free_soap, soap_family

import hbcore

PLAIN = {
    "SOAP": {"inner": "adam"},
    "SOAPNAdam": {"inner": "nadam"},
    "SOAPAdEMAMix": {"inner": "ademamix"},
    "SOLP": {"inner": "laprop"},
    "KLSOAP": {"inner": "adam", "covariance": "kl"},
    "KLShampoo": {"inner": "shampoo", "covariance": "kl"},
}
FAMILY = (
    PLAIN | {f"Heavy{name}": {**told, "transport": "square"} for name, told in PLAIN.items()} | {"SFSOAP": {"inner": "rms"}}
)
"""Name -> what the oracle is told besides hyperparameters."""

REPEATING = ("SOAPNAdam", "SOLP", "HeavySOAPNAdam", "HeavySOAPAdEMAMix", "HeavySOLP", "HeavyKLShampoo")
"""Names whose rules are put together from what the others' tests have tried."""

BASIC = {"lr": 0.05, "betas": (0.9, 0.95), "shampoo_beta": 0.9, "eps": 1e-8, "weight_decay": 0.0, "merge_dims": False}
OWN = {
    "SOAPAdEMAMix": {"betas": (0.9, 0.95, 0.99)},
    "KLSOAP": {"eps": 1e-3},
    "KLShampoo": {"dampening": 0.0},
    "SFSOAP": {"gradient_clipping": None, "update_clipping": None, "warmup_steps": 0},
}
"""Settings that differ from the basic ones, in the Heavy form too.

The first gradient leaves a side longer than the product of the others without one direction, whose eigenvalue is ``eps`` to
KLSOAP: at 1e-8, the next factor of the other side has a condition number near 1e9, too much for 1e-9 in float64.
"""


def row(name, *more, always=False):
    """Arguments of a test that is ``broad`` for the repeating names, unless ``always``."""
    marks = pytest.mark.broad if name in REPEATING and not always else ()
    return pytest.param(name, *more, marks=marks, id="-".join([name, *(part for part in more if isinstance(part, str))]))


def stream(shape, steps=21, dtype=torch.float64, *, seed=2, largest=1.8):
    """Gradients whose sizes vary, and whose dominant direction changes half-way, so that columns have to be sorted anew.

    Along each dimension they are weighted by up to ``largest``, which may be 2, and as much below 1.
    """
    grads = normal(steps, *shape, seed=seed) * 2.0 ** (torch.arange(steps) % 5 - 2).reshape(-1, *[1] * len(shape))
    for i, n in enumerate(shape):
        weights = torch.linspace(2 - largest, largest, n, dtype=torch.float64).reshape(
            [-1 if d == i else 1 for d in range(len(shape))]
        )
        grads = torch.cat([grads[: steps // 2] * weights, grads[steps // 2 :] * weights.flip(i)])
    return list(grads.to(dtype))


def settings_of(name, changed=None):
    """The settings at which a name is compared."""
    return {**BASIC, **OWN.get(name.removeprefix("Heavy"), {}), **(changed or {})}


def trained(name, start, grads, changed=None):
    """A parameter after these gradients, in its own dtype, and its optimizer."""
    param = torch.nn.Parameter(start.clone())
    optimizer = hbcore.get(name)([param], compile="eager", **settings_of(name, changed))
    for g in grads:
        param.grad = g.to(start.dtype).clone()
        optimizer.step()
    return param.detach().clone(), optimizer


def told(name, changed=None):
    """The same settings as the oracle takes them."""
    h = {**FAMILY[name], **settings_of(name, changed)}
    for ours in ("dampening", "gradient_clipping", "update_clipping"):
        h.pop(ours, None)
    if FAMILY[name].get("inner") == "nadam":
        h["coupled"] = not h.pop("decoupled_weight_decay", True)
    scheduler, scheduled = h.pop("precond_scheduler", (1 / 3, 9)), h.pop("use_precond_schedule", False)
    return {**h, "schedule": scheduler if scheduled else None}


def averaged(start, grads, changed=None) -> Weights:
    """The oracle's three sequences of SFSOAP."""
    wanted = schedule_free_soap(start.double().numpy(), [g.double().numpy() for g in grads], **told("SFSOAP", changed))
    return Weights(*map(torch.tensor, wanted))


def wanted(name, start, grads, changed=None):
    """What the oracle makes of them; of the schedule-free one, what it trains with."""
    if name == "SFSOAP":
        return averaged(start, grads, changed).y
    return torch.tensor(soap_family(start.double().numpy(), [g.double().numpy() for g in grads], **told(name, changed)))
