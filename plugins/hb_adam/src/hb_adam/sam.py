"""SAM, Foret et al. 2021, and ASAM, Kwon et al. 2021, around any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

import hbcore
from hb_adam.adamw import AdamW
from hbcore.api import Composite, HyperparameterError, Optimizer, OptionError, compute_dtype


class SAMWrapper(Composite):
    r"""Another optimizer's step, with the gradient at the worst point nearby; twice the work, flatter minima.

    .. math::
        \epsilon = \rho\, \frac{p^2 g}{\lVert p\, g \rVert_2} \;\text{ adaptive, or }\; \rho\, \frac{g}{\lVert g \rVert_2}
        \qquad p \leftarrow \text{the optimizer's step from } p \text{ with } \nabla L(p + \epsilon)

    with norms over the whole model: Kwon et al. 2021, ASAM (arXiv:2102.11600), equation 9 with :math:`T_w = |w|`, and
    Foret et al. 2021, SAM (arXiv:2010.01412), equation 2. Parameters without a gradient are not changed.

    Args:
        params: parameters, named parameters or groups of them; omitted if ``wrapped_optimizer`` is an instance.
        wrapped_optimizer: an hbcore optimizer class, its name, or an instance.
        ball: :math:`\rho`, at least 0; a param group may have its own, as the entry ``ball``.
        adaptive: ASAM, whose neighbourhood does not change if a layer's weights are scaled; otherwise SAM.
        **options: the wrapped optimizer's arguments.

    State: the wrapped optimizer's.

    Raises:
        HyperparameterError: ``ball`` is negative or not a number.
        OptionError: ``wrapped_optimizer`` is not an hbcore optimizer, or an instance with further arguments; ``step`` got no
            closure, or one that computes no gradients. The wrapped optimizer raises its own errors.
    """

    requires_closure = True

    def __init__(
        self,
        params: ParamsT | None = None,
        wrapped_optimizer: str | type[Optimizer] | Optimizer = AdamW,
        ball: float = 0.1,
        adaptive: bool = True,
        **options: Any,
    ) -> None:
        self.adaptive = adaptive
        super().__init__([_built(params, wrapped_optimizer, options)])
        for group in self.param_groups:
            group.setdefault("ball", ball)
            _check(group["ball"])
        self.defaults["ball"] = ball

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if "ball" in self.defaults:
            self.param_groups[-1].setdefault("ball", self.defaults["ball"])
            _check(self.param_groups[-1]["ball"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step with the gradient at the perturbed parameters.

        Args:
            closure: clears the gradients, computes the loss anew and its gradients, and returns the loss; called twice.

        Returns:
            The loss at the parameters, before the step.
        """
        [inner] = self.children
        if closure is None:
            if self._allocating():
                return inner.step()
            raise OptionError("SAMWrapper.step needs a closure that clears the gradients, computes the loss and its gradients.")
        with torch.enable_grad():
            loss = closure()
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        with self.restoring(), self._perturbed(), torch.enable_grad():
            closure()
        if moved and all(p.grad is None for p in moved):
            raise OptionError(
                "SAMWrapper: the closure computed no gradients, and those from before are of no use at other parameters; a "
                "closure clears the gradients, computes the loss, calls backward() and returns the loss."
            )
        super().step()
        return loss

    @contextmanager
    def _perturbed(self) -> Iterator[None]:
        """Moves the parameters to the worst point nearby and clears their gradients; restores them bit for bit at exit."""
        uphill = [(-group["ball"] if group["maximize"] else group["ball"], group["params"]) for group in self.param_groups]
        active = [(ball, p) for ball, params in uphill for p in params if p.grad is not None]
        grads = [_real(p.grad) for _, p in active if p.grad is not None]
        params = [_real(p.detach()) for _, p in active]
        before = [p.detach().clone() for p in params]
        scaled = [p.abs() * g for p, g in zip(params, grads, strict=True)] if self.adaptive else grads
        if scaled:
            norm = _norm(scaled)
            for (ball, _), p, s in zip(active, params, scaled, strict=True):
                p.add_((p.abs() if self.adaptive else 1) * s * (ball / norm).to(p.device, p.dtype))
        for _, p in active:
            p.grad = None
        try:
            yield
        finally:
            for p, own in zip(params, before, strict=True):
                p.copy_(own)

    def _allocating(self) -> bool:
        """Whether this is torch.distributed.checkpoint's dry step, which creates state and moves nothing."""
        return not self.state and all(float(group["lr"]) == 0 for group in self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "adaptive": self.adaptive}

    def __repr__(self) -> str:
        kind = "ASAM" if self.adaptive else "SAM"
        return f"SAMWrapper ({kind}, ball {self.defaults['ball']:g}) around\n{self.children[0]!r}"


def _built(params: Any, wrapped: str | type[Optimizer] | Optimizer, options: dict[str, Any]) -> Optimizer:
    if isinstance(wrapped, Optimizer):
        own = {p for group in wrapped.param_groups for p in group["params"]}
        given = None if params is None else {p for group in _groups(params) for p in group["params"]}
        if options or (given is not None and given != own):
            raise OptionError(
                "SAMWrapper: an optimizer instance has its own options and parameters; pass it alone, or with those parameters."
            )
        return wrapped
    cls: Any = hbcore.get(wrapped) if isinstance(wrapped, str) else wrapped
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise OptionError(f"SAMWrapper: {wrapped!r} is not an hbcore optimizer; pass a class, a name or an instance.")
    optimizer: Optimizer = cls(params, **options)
    return optimizer


def _groups(params: Any) -> list[dict[str, Any]]:
    """Any valid ``params`` argument as groups of bare tensors."""
    members = list(params)
    groups = members if members and isinstance(members[0], dict) else [{"params": members}]
    return [{"params": [p[1] if isinstance(p, tuple) else p for p in group["params"]]} for group in groups]


def _real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm over all tensors, at least the smallest normal number, so that zeros perturb nothing."""
    norms = [_whole(torch.linalg.vector_norm(t, dtype=compute_dtype(t.dtype))).double() for t in tensors]
    total: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    return total.clamp(min=torch.finfo(torch.float32).tiny)


def _whole(norm: Tensor) -> Tensor:
    """A norm over all ranks, for a sharded tensor."""
    sharded: Any = norm
    whole: Tensor = sharded.full_tensor() if hasattr(sharded, "full_tensor") else norm
    return whole


def _check(ball: Any) -> None:
    if isinstance(ball, bool) or not isinstance(ball, (int, float)) or not ball >= 0:
        raise HyperparameterError(f"SAMWrapper: ball={ball!r} must be a number, at least 0.")
