"""Exact Hessian-vector products, made while a closure runs: each of its backward passes is differentiated once more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self


class DoubleBackward:
    r"""Stands in for ``torch.autograd.backward``, which ``Tensor.backward`` calls too, while a closure runs.

    .. math:: H v = \nabla \langle \nabla L, v \rangle \qquad \text{Pearlmutter 1994, Fast Exact Multiplication by the Hessian}

    A backward pass itself is left as it is: it computes the same gradients, runs the same hooks and frees its graph, and no
    gradient has a graph afterwards. The products come before it, from gradients of their own: that is one more pass, but the
    closure sees none of it, and a closure that accumulates gradients over several passes needs memory for one of them. Other
    threads' backward passes are their own.

    Args:
        vectors: parameter -> v, asked for once a loss is there: lazy modules have no shapes before.

    Attributes:
        products: parameter -> its part of :math:`H v`, summed over the passes; none for parameters that no gradient depends on.
        failure: why there are no products; empty if there are.
    """

    def __init__(self, vectors: Callable[[], Mapping[Tensor, Tensor]]) -> None:
        self.products: dict[Tensor, Tensor] = {}
        self.failure = "the closure calls no backward()"
        self._vectors, self._original = vectors, torch.autograd.backward
        self._thread, self._passes, self._over = threading.get_ident(), 0, False

    def __enter__(self) -> Self:
        torch.autograd.backward = self
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        present: Any = torch.autograd.backward
        while isinstance(present, DoubleBackward) and present._over:  # two threads may leave in the order in which they came
            present = torch.autograd.backward = present._original

    def __call__(self, tensors: Any, grad_tensors: Any = None, *args: Any, **options: Any) -> None:
        ours = threading.get_ident() == self._thread and not self._over
        if not ours or (self._passes and self.failure):
            self._original(tensors, grad_tensors, *args, **options)
            return
        self._passes += 1
        self.failure = ""
        unreached = self._differentiate(tensors, grad_tensors, options.get("inputs"))
        before = [(p, p.grad, None if p.grad is None else p.grad._version) for p in unreached]
        self._original(tensors, grad_tensors, *args, **options)
        if any(p.grad is not g or (g is not None and g._version != version) for p, g, version in before):
            self._fail("a parameter's gradient is not of the loss's graph, as with checkpoint(..., use_reentrant=True)")

    def _fail(self, why: str) -> None:
        self.products, self.failure = {}, why

    def _differentiate(self, losses: Any, weights: Any, inputs: Any) -> list[Tensor]:
        """Add a pass's part of the products, or note why there is none; return the parameters that its graph leaves out."""
        try:
            return self._products_of(losses, weights, inputs)
        except RuntimeError as error:
            self._fail(str(error).strip().partition("\n")[0])
            return []

    def _products_of(self, losses: Any, weights: Any, inputs: Any) -> list[Tensor]:
        vectors = {p: v for p, v in self._vectors().items() if p.requires_grad}
        params = computed = list(vectors)
        if inputs is not None:  # the pass computes these gradients alone: other passes contribute what the others do
            listed = inputs.values() if isinstance(inputs, dict) else (inputs,) if isinstance(inputs, Tensor) else inputs
            among = set(map(id, listed))
            computed = [p for p in params if id(p) in among]
        if not computed:
            return []
        firsts: Sequence[Tensor | None] = torch.autograd.grad(losses, computed, weights, create_graph=True, allow_unused=True)
        unreached = [p for g, p in zip(firsts, computed, strict=True) if g is None]
        curved = [(g, vectors[p]) for g, p in zip(firsts, computed, strict=True) if g is not None and g.requires_grad]
        if not curved:  # the loss is linear
            return unreached
        gradients, along = [g for g, _ in curved], [v for _, v in curved]
        if once_differentiable(gradients):
            raise RuntimeError("a function of the loss is marked with @once_differentiable")
        made: Sequence[Tensor | None] = torch.autograd.grad(gradients, params, along, retain_graph=True, allow_unused=True)
        for p, product in zip(params, made, strict=True):
            if product is not None:
                self.products[p] = self.products[p] + product if p in self.products else product
        return unreached


def once_differentiable(gradients: Iterable[Tensor]) -> bool:
    """Whether some gradient comes from a function that forbids to differentiate it again.

    Its node would raise, if it ran. But it leads to no parameter, so autograd leaves it out, along with the terms that it
    stands for.
    """
    ahead, seen = [g.grad_fn for g in gradients], set[Any]()
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            if node.name() == "torch::autograd::Error":
                return True
            seen.add(node)
            ahead += [following for following, _ in node.next_functions]
    return False
