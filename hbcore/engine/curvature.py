r"""What a step evaluates before it begins: the loss and the gradients and, for rules that need them, Hessian-vector products.

Whether a rule needs one is known before the closure runs: a group's scalars say whether its refresh is due. Two ways lead to
a product. Exactly, each backward pass of the closure is differentiated once more (:mod:`hbcore.engine.double_backward`).
By finite differences the closure runs twice:

.. math:: H v \approx \frac{\nabla L(p + \delta v) - \nabla L(p)}{\delta} \qquad
    \delta = \sqrt{\epsilon}\; \mathrm{rms}(p)

with the rounding unit :math:`\epsilon` of the coarsest dtype among the parameters, and the root mean square of all of them (1
if they are all 0). The relative error of a smooth loss's product is then about :math:`\sqrt{\epsilon}`: 3e-4 in float32, 9% in
bfloat16. The vector that goes with the difference is what the parameters really moved by, over :math:`\delta`: rounding
:math:`p + \delta v` makes no error. A model that computes in a coarser dtype than its parameters', as under autocast, does not
see so small a difference: such models need exact products.

Either way the parameters are the same bits afterwards, gradients and loss are those of one ordinary call of the closure, and
torch's random number generators are where one call leaves them. Both calls draw the same random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hbcore.distributed.exchange import all_reduce
from hbcore.distributed.placement import Shards, local, shards_of
from hbcore.engine.core import OptimizerCore
from hbcore.engine.double_backward import DoubleBackward
from hbcore.engine.group_scalars import advanced
from hbcore.engine.param_codec import restoring
from hbcore.errors import FallbackWarning, OptionError
from hbcore.rules import route
from hbcore.rules.curvature import Curvature
from hbcore.rules.noise import stream_key
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.row_noise import normal
from hbcore.warn import warn_at_caller

Closure = Callable[[], Any]


class Wanted(NamedTuple):
    """A parameter that some rule needs a product for.

    Attributes:
        key: what its vectors are drawn by: the optimizer's seed, and its name.
        step: its group's.
        curvature: how the rule has products made.
    """

    core: OptimizerCore
    param: Tensor
    key: int
    step: int
    curvature: Curvature


def evaluate(cores: Sequence[OptimizerCore], closure: Closure) -> Any:
    """Run the closure of optimizers that step together, and make the products that their rules need; return its loss.

    The products are left in each core's ``pairs``. The closure computes the whole gradient, in as many backward passes as it
    likes.

    Raises:
        OptionError: differentiating twice failed and a rule allows no finite differences; or the closure computes no gradients.
    """
    wanted = [w for core in cores for w in wanted_in(core)]
    if not wanted:
        with torch.enable_grad():
            return closure()
    return Evaluation(cores, wanted, closure).run()


def needed(core: OptimizerCore) -> str:
    """The name of a rule that needs products; empty if there is none."""
    return next((t.name for group in core.groups for t in core.chain.every(group) if "hvp" in t.needs), "")


def wanted_in(core: OptimizerCore) -> Iterator[Wanted]:
    """The parameters whose rules need a product in the coming step."""
    core.pairs.made = {}
    for g, group in enumerate(core.groups):
        forked = core.chain.forked(group)
        curved = {t.name: t.curvature for t in route.every(forked) if "hvp" in t.needs}
        if not curved:
            continue
        core.skipping.settle()
        coming, due = advanced(dict(core.carried(g)), route.every(forked))
        asking = {name: how for name, how in curved.items() if due[name].asks(how.interval)}
        for i, p in enumerate(group["params"]) if asking else ():
            rules = route.resolve(forked, route.branches(forked, p))
            how = next((asking[t.name] for t in rules if t.name in asking), None)
            if how is None:
                continue
            yield Wanted(core, p, stream_key(core.seed_key_at(g, i), "hvp"), int(coming["step"]), how)


class Evaluation:
    """One step's loss, gradients and products.

    Args:
        cores: the optimizers that step together.
        wanted: the parameters that products are needed for.
        closure: the user's.
    """

    def __init__(self, cores: Sequence[OptimizerCore], wanted: Sequence[Wanted], closure: Closure) -> None:
        self._cores, self._wanted, self._closure = cores, wanted, closure
        self._everyone = [p for core in cores for group in core.groups for p in group["params"]]
        self._vectors: dict[Tensor, Tensor] = {}

    def run(self) -> Any:
        """Run the closure, and leave the products in the cores; return the loss."""
        asked = any(w.curvature.finite_differences for w in self._wanted)
        failure = (
            ""
            if asked
            else next((core.pairs.differences for core in self._cores if core.pairs.differences), "") or self._apart()
        )
        self._check(failure)
        before = Before(self._everyone)
        exact = None if asked or failure else DoubleBackward(self._drawn)
        with torch.enable_grad(), nullcontext() if exact is None else exact:
            loss = self._closure()
        stepping = [p for w in self._wanted if (p := w.param).grad is not None]
        if exact is not None and not exact.failure:
            pairs = {p: (self._vectors[p], _or_zeros(exact.products.get(p), p)) for p in stepping}
        else:
            failure = failure if exact is None else exact.failure
            self._check(failure)
            pairs = self._differences(before, stepping) if stepping else {}
            if failure:
                self._fall_back(failure)
        for w in self._wanted:
            if w.param in pairs:
                w.core.pairs.made[w.param] = pairs[w.param]
        return loss

    def _apart(self) -> str:
        """Why differentiating twice would give each rank something else; empty for one process and whole parameters."""
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if ranks > 1:
            return f"each of {ranks} ranks would differentiate its own batch twice, and nothing averages that"
        return "parameters are sharded" if any(shards_of(w.param) is not None for w in self._wanted) else ""

    def _drawn(self) -> dict[Tensor, Tensor]:
        """The vectors, in the parameters' dtypes: standard normal numbers, the same on every rank."""
        if not self._vectors:
            for _, p, key, step, _ in self._wanted:
                keys = torch.tensor([key], dtype=torch.int64, device=p.device)
                drawn = own_part(normal(keys, p.numel(), step).view(p.shape).to(p.dtype), shards_of(p))
                self._vectors[p] = drawn if p.requires_grad else torch.zeros_like(drawn)  # frozen, with a gradient left over
        return self._vectors

    def _differences(self, before: Before, stepping: Sequence[Tensor]) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """Parameter -> what it moved by, over delta, and what its gradient changed by, over delta."""
        if before.untouched():
            raise OptionError(
                f"{self._cores[0].name}: the closure computed no gradients; a closure clears the gradients, computes the loss, "
                "calls backward() and returns the loss."
            )
        vectors, first, after = self._drawn(), [p.grad for p in self._everyone], RandomState(self._everyone)
        parts, pairs = [local(p.detach()) for p in stepping], dict[Tensor, tuple[Tensor, Tensor]]()
        own, delta = [part.clone() for part in parts], step_size(stepping)
        with restoring(self._cores):
            try:
                for p, part in zip(stepping, parts, strict=True):
                    part.add_((vectors[p] * delta.to(part.device)).to(part.dtype))
                before.restore()
                with torch.enable_grad():
                    self._closure()
                gradients = dict(zip(self._everyone, first, strict=True))
                for p, part, start in zip(stepping, parts, own, strict=True):
                    size, change = delta.to(part.device), None if p.grad is None else _difference(p.grad, gradients[p])
                    pairs[p] = _difference(part, start) / size, _or_zeros(change, part) / size
            finally:
                for part, start in zip(parts, own, strict=True):
                    part.copy_(start)
                for p, gradient in zip(self._everyone, first, strict=True):
                    p.grad = gradient
                after.restore()
        return pairs

    def _check(self, failure: str) -> None:
        """Raise :class:`OptionError` if exact products failed and a rule takes no others."""
        if failure and not all(w.curvature.fallback for w in self._wanted):
            raise OptionError(
                f"{self._cores[0].name}: there is no exact Hessian-vector product ({failure}); pass finite_differences=True, "
                "or let the optimizer fall back to finite differences."
            )

    def _fall_back(self, failure: str) -> None:
        """Use finite differences from now on; say so once."""
        core = self._wanted[0].core
        if not core.pairs.differences:
            warn_at_caller(
                f"{core.name}: there is no exact Hessian-vector product ({failure}); steps that need one take finite "
                "differences from now on, and call the closure twice. finite_differences=True asks for them from the start.",
                FallbackWarning,
            )
        for w in self._wanted:
            w.core.pairs.differences = failure
            w.core.report.note(f"Hessian-vector products are finite differences: {failure}")


class RandomState:
    """The state of torch's global generators, of the CPU and of the parameters' devices."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        devices = {p.device for p in params if p.device.type not in ("cpu", "meta")}
        generators = [(torch.get_device_module(d), () if d.type == "mps" else (d,)) for d in devices]
        self._cpu = torch.get_rng_state()
        self._others = [(module, where, module.get_rng_state(*where)) for module, where in generators]

    def restore(self) -> None:
        """Put it back."""
        torch.set_rng_state(self._cpu)
        for module, where, state in self._others:
            module.set_rng_state(state, *where)


class Before:
    """What a closure finds: gradients and random numbers, so that a second call finds the same."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params, self._random = params, RandomState(params)
        self._held = [(g, None if g is None else g._version) for g in (p.grad for p in params)]
        self._copies = [None if g is None else g.clone() for g, _ in self._held]

    def untouched(self) -> bool:
        """Whether the closure computed no gradient."""
        now = [p.grad for p in self._params]
        return all(g is held and (g is None or g._version == v) for g, (held, v) in zip(now, self._held, strict=True))

    def restore(self) -> None:
        """Put it back, for the second call."""
        for p, gradient in zip(self._params, self._copies, strict=True):
            p.grad = gradient
        self._random.restore()


def step_size(params: Sequence[Tensor]) -> Tensor:
    """How far finite differences move parameters along a standard normal vector, 0-d. Collective if some are sharded."""
    squares: dict[Any, tuple[Shards | None, list[Tensor]]] = {}
    for p in params:
        part, shards = local(p.detach()), shards_of(p)
        norm = torch.linalg.vector_norm(part, dtype=compute_dtype(part.dtype))
        squares.setdefault((None if shards is None else shards.mesh, norm.device), (shards, []))[1].append(
            norm.float().square()
        )
    sums: list[Tensor] = []
    for shards, some in squares.values():
        total = torch.stack(some).sum()
        if shards is not None:
            all_reduce(total, "sum", shards)
        sums.append(total.to(sums[0].device) if sums else total)
    rms = (torch.stack(sums).sum() / max(sum(p.numel() for p in params), 1)).sqrt()
    size: Tensor = torch.where(rms > 0, rms, 1.0) * max(torch.finfo(p.dtype).eps for p in params) ** 0.5
    return size


def _difference(a: Tensor, b: Tensor | None) -> Tensor:
    """``a - b``, rounded to the compute dtype only."""
    dtype = compute_dtype(a.dtype)
    return local(a.detach()).to(dtype) if b is None else local(a.detach()).to(dtype) - local(b.detach()).to(dtype)


def _or_zeros(product: Tensor | None, p: Tensor) -> Tensor:
    """A product, which no gradient depending on ``p`` makes 0."""
    return torch.zeros_like(p, requires_grad=False) if product is None else product.detach()


def own_part(whole: Tensor, shards: Shards | None) -> Tensor:
    """This rank's rows of a tensor that every rank has; all of it if it is not sharded."""
    if shards is None:
        return whole
    sizes = shards.sizes()
    start = sum(sizes[: shards.rank])
    return whole.reshape(-1)[start : start + sizes[shards.rank]].view(-1, *whole.shape[1:])
