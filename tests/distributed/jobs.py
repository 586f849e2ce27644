"""What the ranks do: train a model with given gradients, save, load. Module-level functions, so that they can be sent."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from core.dog import DoG, LDoG
from torch import Tensor, nn

import hbcore
from hbcore.api import Domain, Momentum, Route, Slot, Transform, ema, hyper, is_matrix, matrix_view, zeros

SHAPES = {
    "wide": (18, 64), "row": (1, 64), "bias": (18,), "tall": (64, 5), "square": (16, 16), "odd": (3, 7), "wide_too": (18, 64),
}  # fmt: skip
"""Shards that are uneven, and empty on the second rank."""


class Model(nn.Module):
    """Parameters of the shapes above, and nothing to compute."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))


def gradient(step: int, name: str) -> Tensor:
    seed = 1000 * step + sorted(SHAPES).index(name)
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Average(Transform):
    """A matrix rule with state of its own: it subtracts the average over one dimension, averaged over steps."""

    dim: int = 0
    name = "average"
    domain = Domain.MATRIX

    def blocks(self, shape: torch.Size) -> Any:
        return matrix_view(shape)

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {self.name: Slot(param.mean(self.dim - 2, keepdim=True).shape)}

    def update(self, u: Tensor, s: Any, c: Any) -> tuple[Tensor, dict[str, Tensor]]:
        mean = ema(s[self.name], u.mean(self.dim - 2, keepdim=True), 0.5)
        return u - mean, {self.name: mean}


@dataclass(frozen=True)
class OtherAverage(Average):
    """A second one, with another name."""

    name = "other_average"


class TwoMatrixRules(hbcore.Optimizer):
    """Two matrix rules in one chain; vectors have none."""

    lr: float = 0.01

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (Route(is_matrix, (Average(0), OtherAverage(1)), ()),)


@dataclass(frozen=True)
class NormaliseRows(Transform):
    """A second moment for each row of a matrix, as in NorMuon (arXiv:2510.05491)."""

    beta2: float = hyper(0.5, ge=0, lt=1)
    name = "normalise_rows"
    domain = Domain.MATRIX

    def blocks(self, shape: torch.Size) -> Any:
        return matrix_view(shape)

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"row_sq": Slot(param.shape[:1], exact=True)}

    def update(self, u: Tensor, s: Any, c: Any) -> tuple[Tensor, dict[str, Tensor]]:
        row_sq = ema(s["row_sq"], u.square().mean(-1), self.beta2)
        return u / row_sq.sqrt().clamp(min=1e-8)[..., None], {"row_sq": row_sq}


class NormalisedRows(hbcore.Optimizer):
    """Momentum whose rows are normalised; vectors take the momentum as it is."""

    lr: float = 0.01
    beta2: float = 0.5

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (Momentum(0.9), Route(is_matrix, (NormaliseRows(h.beta2),)))


@dataclass(frozen=True)
class Fit(Transform):
    """Multiplies by the square of a factor, which is kept in bfloat16, and whose square is derived from it."""

    name = "fit"
    domain = Domain.MATRIX

    def blocks(self, shape: torch.Size) -> Any:
        return matrix_view(shape)

    def slots(self, param: Tensor) -> dict[str, Slot]:
        square = torch.Size(param.shape[:1] * 2)
        return {"factor": Slot(square, 0.1, dtype=torch.bfloat16), "squared": Slot(square, derived=True)}

    def derive(self, s: Any, c: Any) -> dict[str, Tensor]:
        return {"squared": s["factor"].mT @ s["factor"]}

    def update(self, u: Tensor, s: Any, c: Any) -> tuple[Tensor, dict[str, Tensor]]:
        factor = ema(s["factor"], u @ u.mT / u.shape[-1], 0.5)
        return s["squared"] @ u, {"factor": factor, "squared": factor.mT @ factor}


class Fitted(hbcore.Optimizer):
    """Momentum through the rule above; vectors take the momentum as it is."""

    lr: float = 0.01

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (Momentum(0.9), Route(is_matrix, (Fit(),)))


@dataclass(frozen=True)
class Shake(Transform):
    """An elementwise rule that draws: uniform noise on the update, and normal noise that it remembers."""

    name = "shake"
    draws = 2

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"shaken": zeros(param)}

    def update(self, u: Tensor, s: Any, c: Any) -> tuple[Tensor, dict[str, Tensor]]:
        shaken = ema(s["shaken"], c.probe(u), 0.5)
        return u + c.noise(u) + shaken, {"shaken": shaken}


class Shaken(hbcore.Optimizer):
    """Gradient descent with noise."""

    lr: float = 0.01

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (Shake(),)


def class_of(name: str | type[Any]) -> Any:
    """An optimizer's class; one that is not registered is sent as it is."""
    if isinstance(name, type):
        return name
    own = {
        "TwoMatrixRules": TwoMatrixRules, "Shaken": Shaken, "NormalisedRows": NormalisedRows, "LDoG": LDoG, "DoG": DoG,
        "Fitted": Fitted,
    }  # fmt: skip
    return own.get(name) or hbcore.get(name)


def build(
    name: str | type[Any],
    options: dict[str, Any],
    how: str,
    device: str = "cpu",
    layerwise: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Model, torch.optim.Optimizer]:
    """With ``layerwise``, each parameter is a group with a learning rate of its own."""
    model = Model(dtype).to(device)
    if how == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh(device, (dist.get_world_size(),)))
    params: Any = model.named_parameters()
    if layerwise:
        params = [{"params": [named], "lr": 0.02 * 0.7**i} for i, named in enumerate(params)]
    return model, class_of(name)(params, lr=0.01, **options)


def train(model: Model, optimizer: torch.optim.Optimizer, steps: range, skip: str = "") -> None:
    for step in steps:
        for name, p in model.named_parameters():
            p.grad = None if name == skip else spread(gradient(step, name), p)
        optimizer.step()


def skip_nonfinite(rank: int, name: str, options: dict[str, Any], bad: tuple[int, ...]) -> tuple[dict[str, Tensor], int]:
    """Train four steps, with others between them in which one element, on one rank, is NaN; the parameters and the count."""
    model, optimizer = build(name, {**options, "skip_nonfinite": True}, "fsdp")
    for t in range(4 + len(bad)):
        step = 50 if t in bad else t - sum(b < t for b in bad)
        for i, (which, p) in enumerate(model.named_parameters()):
            grad = gradient(step, which)
            if t in bad and i == t % 3:
                grad.view(-1)[-1] = torch.nan  # the last rank's
            p.grad = spread(grad, p)
        optimizer.step()
    report: Any = optimizer
    return whole(model), report.report.skipped


def spread(whole: Tensor, p: Tensor) -> Tensor:
    whole = whole.to(p.device, p.dtype, copy=True)
    if not hasattr(p, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, p.device_mesh, p.placements)


def whole(model: Model) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().cpu().clone()
        for name, p in model.named_parameters()
    }


def follow(
    rank: int, name: str | type[Any], options: dict[str, Any], how: str, device: str = "cpu", layerwise: bool = False
) -> dict[str, Tensor]:
    """Train, and return the whole parameters."""
    model, optimizer = build(name, options, how, device, layerwise)
    train(model, optimizer, range(6))
    return whole(model)


def rounded(rank: int, how: str, compile: str, names: tuple[str, ...]) -> tuple[dict[str, Tensor], set[str]]:
    """Train bfloat16 weights with stochastic rounding; return the whole parameters, and the backends that ran."""
    model, made = build("SGD", {}, how, dtype=torch.bfloat16)
    options: dict[str, Any] = {"ecc": "bf16+8", "stochastic_rounding": True, "compile": compile, "lr": 0.01, "seed": 3}
    del made
    optimizer: Any = hbcore.get("AdamW")([(n, p) for n, p in model.named_parameters() if n in names], **options)
    train(model, optimizer, range(3))
    return whole(model), {segment.backend for segment in optimizer.core.plan.segments.values()}


def resume(rank: int, name: str | type[Any], options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Train 3 + 3 steps with a state dict in between, loaded into a new optimizer on the same ranks, and 6 straight."""
    straight, optimizer = build(name, options, "fsdp")
    train(straight, optimizer, range(6))
    first, before = build(name, options, "fsdp")
    train(first, before, range(3))
    after = class_of(name)(first.named_parameters(), lr=0.5, **options)
    after.load_state_dict(before.state_dict())
    train(first, after, range(3, 6))
    keys = sum(len(entry) for entry in after.state_dict()["state"].values())
    return whole(straight), whole(first), keys


def save(rank: int, folder: str, name: str | type[Any], options: dict[str, Any], skip: str) -> dict[str, Tensor]:
    """Train three steps, ``skip`` without gradients, save with DCP, train on, and return the whole parameters."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = build(name, options, "fsdp")
    train(model, optimizer, range(3), skip)
    m, o = get_state_dict(model, optimizer)
    dcp.save({"m": m, "o": o}, checkpoint_id=folder)
    train(model, optimizer, range(3, 6))
    return whole(model)


def load(rank: int, folder: str, name: str | type[Any], options: dict[str, Any], how: str) -> dict[str, Tensor]:
    """Load what :func:`save` saved into new objects, train on, and return the whole parameters."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = build(name, options, how)
    m, o = get_state_dict(model, optimizer)
    state = {"m": m, "o": o}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["m"], optim_state_dict=state["o"])
    train(model, optimizer, range(3, 6))
    return whole(model)


def param_ecc_under_ddp(rank: int, first: str) -> tuple[str, list[Tensor]]:
    """Two models alike, of which ``param_ecc`` narrows one: what refused it, if its wrapper came first; or its gradients.

    Each rank's gradients are of its own batch, and the average is the same on both.
    """
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer: Any = None
    if first == "optimizer":
        optimizer = hbcore.get("SGD")(model.parameters(), lr=0.5, param_ecc="bf16+8", compile="eager")
    wrapped = nn.parallel.DistributedDataParallel(model)
    if first == "wrapper":
        try:
            hbcore.get("SGD")(model.parameters(), lr=0.5, param_ecc="bf16+8")
        except hbcore.OptionError as error:
            return str(error), [p.detach() for p in model.parameters()]
        return "", []
    wrapped(torch.full((1, 4), 8.0 * (rank + 1), dtype=torch.bfloat16)).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    return "", [*gradients, *hbcore.full_state(model, optimizer).values()]


def ddp(rank: int, name: str | type[Any], options: dict[str, Any]) -> bytes:
    """Train a DDP model, each rank on data of its own; return the parameters' bits."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)))
    optimizer = class_of(name)(model.parameters(), lr=0.01, **options)
    torch.manual_seed(rank)  # whatever draws from the global generator now differs between the ranks
    for _ in range(5):
        x = torch.randn(8, 6)
        optimizer.zero_grad()
        (model(x) - x[:, :3]).square().mean().backward()
        optimizer.step()
    out = io.BytesIO()
    torch.save([p.detach() for p in model.parameters()], out)
    return out.getvalue()


def norms(rank: int, name: str | type[Any], options: dict[str, Any], how: str) -> dict[Any, tuple[float, float]]:
    """What the optimizer says of a third step."""
    model, optimizer = build(name, {**options, "report_norms": True}, how)
    train(model, optimizer, range(3))
    reported: dict[Any, tuple[float, float]] = optimizer.norms()
    return reported


def offloaded(rank: int) -> str:
    """What refuses to offload the state of sharded parameters."""
    model, optimizer = build("AdamW", {"offload": "cpu"}, "fsdp")
    try:
        train(model, optimizer, range(1))
    except hbcore.OptionError as error:
        return str(error)
    return ""
