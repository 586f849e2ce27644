"""Trace a segment into one elementwise graph, hoist its scalar arithmetic and split it into phases at reductions.

The segment runs on meta tensors, and on numbers that are on the host, under a dispatch mode that records every ATen call.
(Torch computes with a number a hundred times faster than it finds the shape of nothing.) It runs twice, with different lengths:
any difference between the graphs is a length that leaked into the rule, which is an error. Each value has one of three kinds:

* ``host``: 0-d, computed from hyperparameters and the step only. Hoisted: computed once per (group, step), in float64.
* ``scalar``: 0-d, but depends on a tensor: a reduction, ``c.numel``, and values computed from them. One per tensor.
* ``element``: as long as the parameter.
* ``block``: one for each block of 32 elements: what a codec reduces within blocks (:mod:`hbcore.state.blocks`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode

from hbcore.engine.graph.phases import split
from hbcore.engine.graph.program import REDUCERS, Bits, Program, identifier
from hbcore.engine.graph.purity import impure, written
from hbcore.engine.graph.segment_spec import SegmentSpec
from hbcore.engine.graph.where import where
from hbcore.errors import RuleError, TraceError
from hbcore.rules.contract import named, tensors_in
from hbcore.rules.transform import Domain, Transform
from hbcore.state.blocks import AMAX, BLOCK, ROOT, SPREAD

Kind = Literal["host", "scalar", "element", "block"]
LENGTHS = (7 * BLOCK, 156_257 * BLOCK)
"""Two lengths unlikely to appear as constants in a formula, of whole blocks; both graphs must agree."""

REDUCTIONS = {
    torch.ops.aten.sum.default, torch.ops.aten.sum.dim_IntList, torch.ops.aten.mean.default, torch.ops.aten.mean.dim,
    torch.ops.aten.max.default, torch.ops.aten.min.default, torch.ops.aten.amax.default, torch.ops.aten.amin.default,
    torch.ops.aten.linalg_vector_norm.default, torch.ops.aten.norm.Scalar, torch.ops.aten.dot.default,
    torch.ops.aten.any.default, torch.ops.aten.all.default, torch.ops.aten.prod.default, torch.ops.aten.std.correction,
    torch.ops.aten.var.correction, torch.ops.aten.argmax.default, torch.ops.aten.count_nonzero.default,
}  # fmt: skip


HARMLESS = {
    torch.ops.aten._to_copy.default, torch.ops.aten.expand.default, torch.ops.aten.zeros_like.default,
    torch.ops.aten.ones_like.default, torch.ops.aten.full_like.default, torch.ops.aten.full.default,
    torch.ops.aten.scalar_tensor.default, torch.ops.aten.zeros.default, torch.ops.aten.ones.default,
    torch.ops.aten.view.dtype, torch.ops.aten.clone.default, ROOT,
}  # fmt: skip
"""Elementwise operations that torch does not tag as pointwise."""

BLOCKWISE = {AMAX, SPREAD}
"""The operations that lead from elements to blocks and back, of codecs alone."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records each ATen call in an fx graph; rejects calls that are not elementwise, naming the line that made them.

    Args:
        length: of the elementwise tensors.
        blockwise: whether a codec stores something for each block.
        before: a recording with another length. What depends on no tensor is the same there, and is not recorded again.
    """

    def __init__(self, length: int, blockwise: bool, before: Recorder | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = length
        self._shapes: dict[tuple[int, ...], Kind] = {(): "host", (length,): "element"}
        if blockwise:
            self._shapes[length // BLOCK,] = "block"
        self.graph = fx.Graph()
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []  # ids are only unique while the tensor lives
        self._known: dict[Any, Tensor] = {}
        self._given: set[int] = set()
        self._title = "the chain"
        self.scalars: dict[str, Tensor] = {}
        if before is not None:
            self._known = {key: value for key, value in before._known.items() if before._kind(value) == "host"}
            self._nodes = {key: node for key, node in before._nodes.items() if node.meta["kind"] == "host"}
            self._alive, self.scalars = list(before._alive), before.scalars

    def placeholder(self, name: str, value: Tensor, kind: Kind) -> Tensor:
        """Declare a graph input; its original name is stored in ``node.meta["input"]``."""
        node = self.graph.placeholder(name.replace(".", "_").replace("#", "_"))
        node.meta.update(input=name)
        self._given.add(id(value))
        return self._remember(value, node, kind)

    def give(self, t: Transform, tensors: Iterable[Any]) -> None:
        """From here on ``t`` runs, which is given ``tensors`` and must not write to them."""
        self._title = named(t)
        self._given.update(id(x) for x in (*tensors_in(t), *tensors))

    def reduce(self, x: Tensor, how: str, domain: Domain, rule: str) -> Tensor:
        """Record a reduction requested through the context."""
        if domain < Domain.TENSOR:
            raise self._error(
                f"calls c.{how} (or c.mean, c.norm), and its domain is ELEMENTWISE; declare `domain = Domain.TENSOR`, or "
                "Domain.MODEL to reduce over the whole model."
            )
        key = (how, id(x), domain)
        if key not in self._known:
            node = self.graph.call_function(REDUCERS[how], (self._nodes[id(x)], int(domain)))
            stem = identifier(f"{rule}_{how}")  # numbered within the rule: segments with other rules must agree on the name
            node.meta["reduction"] = f"{stem}{sum(n.meta.get('reduction', '').startswith(stem) for n in self.graph.nodes)}"
            self._known[key] = self._remember(torch.empty((), dtype=x.dtype, device="cpu"), node, "scalar")
        return self._known[key]

    def node(self, value: Tensor) -> fx.Node:
        """The node that produced ``value``."""
        return self._nodes[id(value)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and "device" in kwargs:  # torch.as_tensor adds the user's default device
            kwargs = {k: v for k, v in kwargs.items() if k != "device"}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.lift_fresh.default):
            return args[0]
        if func is torch.ops.aten.empty.memory_format:  # only the reductions above create these; each is a distinct value
            return func(*args, **kwargs)
        key = (func, *self._key(args), *self._key(tuple(sorted(kwargs.items()))))
        if key in self._known:  # the same call twice is the same value: rules are pure
            return self._known[key]
        operands = list(tensors_among((*args, *kwargs.values())))
        self._refuse(func, args, kwargs, operands)
        value = func(*args, **kwargs)
        if not isinstance(value, Tensor) or tuple(value.shape) not in self._shapes:
            raise self._error(f"calls {func}, which is not elementwise; a rule must treat each element independently.")
        kind = self._shapes[tuple(value.shape)]
        if kind == "host" and any(self._kind(a) != "host" for a in operands):
            kind = "scalar"
        kept = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "layout")}  # specific to the trace
        if not value.ndim and "device" in kwargs and func in HARMLESS and func is not torch.ops.aten._to_copy.default:
            kept["device"] = torch.device("cpu")  # combines with any tensor, unlike other devices
        target = self.graph.call_function(func)  # its arguments later, or torch looks through them with pytree
        target.args, target.kwargs = map_aggregate((args, kept), self._argument)
        self._known[key] = self._remember(value, target, kind)
        return value

    def _remember(self, value: Tensor, node: fx.Node, kind: Kind) -> Tensor:
        node.meta.update(kind=kind, dtype=value.dtype, where=where())
        self._nodes[id(value)] = node
        self._alive.append(value)
        return value

    def _kind(self, value: Tensor) -> Kind:
        node = self._nodes.get(id(value))
        return node.meta["kind"] if node else "host"

    def _argument(self, a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        if id(a) in self._nodes:
            return self._nodes[id(a)]
        if a.ndim == 0 and a.device.type != "meta":
            return a.item()  # a constant such as torch.tensor(0.5)
        raise self._error("reads a tensor from outside the rule; rules may only read their arguments.")

    def _key(self, a: Any) -> tuple[Any, ...]:
        self._alive.extend(x for x in a if isinstance(x, Tensor))
        return tuple(id(x) if isinstance(x, Tensor) else (type(x), repr(x)) for x in a)

    def _refuse(self, func: Any, args: Any, kwargs: Any, operands: Sequence[Tensor]) -> None:
        if func in REDUCTIONS and any(a.ndim > 0 for a in operands):
            raise self._error(
                f"calls {func}, which reduces a tensor without the engine and is wrong on shards; use c.sum, c.mean, c.norm or "
                "c.amax."
            )
        if func is torch.ops.aten._local_scalar_dense.default:
            node = self._nodes.get(id(args[0]))
            what = repr(node.meta["input"]) if node is not None and "input" in node.meta else "a tensor"
            raise self._error(
                f"turns {what} into a Python number (an `if`, float(), max() or math function); hyperparameters are tensors "
                "inside a rule: use torch.where, torch.maximum or tensor methods."
            )
        if func._schema.is_mutable:
            if any(id(t) in self._given for t in written(func, args, kwargs)):
                raise RuleError(impure(func, self._title))
            raise self._error(f"calls {func}, which writes to a tensor; use the out-of-place form.")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise self._error(
                f"calls {func}, which draws from torch's global generator; declare `draws = 1` and use c.noise or c.probe."
            )
        if func in BLOCKWISE and len(self._shapes) == 3:
            return
        if torch.Tag.pointwise not in func.tags and func not in HARMLESS:
            raise self._error(f"calls {func}, which is not elementwise; a rule must treat each element independently.")
        if any(a.ndim > 0 and a.device.type != "meta" for a in operands):
            raise self._error("reads a tensor from outside the rule; rules may only read their arguments.")

    def _error(self, what: str) -> TraceError:
        return TraceError(f"{where()}: {self._title} {what}")


def tensors_among(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors that an ATen call is given. Its arguments nest no deeper than in lists, so torch's pytree, which takes a
    third of the time of tracing, is not needed."""
    for a in arguments:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from (x for x in a if isinstance(x, Tensor))


def record(
    spec: SegmentSpec,
    dtypes: Mapping[str, torch.dtype],
    per_block: frozenset[str],
    length: int,
    before: Recorder | None = None,
) -> tuple[Recorder, dict[str, fx.Node]]:
    """Run ``spec`` once on meta tensors of ``length`` elements; return the recording and the node of each stored result."""
    recorder = Recorder(length, bool(per_block), before)
    meta = torch.device("meta")
    with torch.no_grad():
        tensors: dict[str, Tensor] = {}
        for n in (n for n in dtypes if n not in spec.numbers):
            kind: Kind = "block" if n in per_block else "element"
            empty = torch.empty(length // BLOCK if n in per_block else length, dtype=dtypes[n], device=meta)
            tensors[n] = recorder.placeholder(n, empty, kind)
        for n in spec.scalar_names if before is None else ():
            one = torch.ones((), dtype=torch.float64, device="cpu")
            recorder.scalars[n] = recorder.placeholder(n, one, "host")
        numel = recorder.placeholder("numel", torch.ones((), dtype=torch.float64, device="cpu"), "scalar")
        for name, dtype in spec.given(dtypes["param"]).items():
            tensors[name] = recorder.placeholder(name, torch.ones((), dtype=dtype, device="cpu"), "scalar")
        with recorder:
            results = spec.update(tensors, recorder.scalars, numel, recorder.reduce, recorder.give)
    return recorder, {name: recorder.node(value) for name, value in results.items()}


def trace(
    spec: SegmentSpec,
    dtypes: Mapping[str, torch.dtype],
    label: str = "",
    per_block: frozenset[str] = frozenset(),
    bits: Mapping[str, Bits] | None = None,
) -> Program:
    """Trace ``spec`` for parameters whose tensors have ``dtypes``, those of ``per_block`` with an entry for each block.

    Args:
        spec, dtypes, per_block: of the segment.
        label: a readable name of the chain.
        bits: random input -> where it lies in a word.

    Raises:
        TraceError: the rule violates the tracing contract; the message names the line.
    """
    recorder, results = record(spec, dtypes, per_block, LENGTHS[0])
    other, _ = record(spec, dtypes, per_block, LENGTHS[1], recorder)
    for (node, one), (twin, two) in zip_longest(_described(recorder.graph), _described(other.graph), fillvalue=(None, None)):
        if one != two:
            differs = node or twin
            assert differs is not None
            raise TraceError(f"{differs.meta['where']}: the tensor's length became part of the rule; use c.numel.")
    return split(recorder.graph, results, dtypes, spec.scalar_names, spec.numbers, label, per_block, bits)


def _described(graph: fx.Graph) -> Iterator[tuple[fx.Node, Any]]:
    """The nodes that depend on tensors, and what each computes: from others by their place, and from the host's own nodes."""
    places: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.meta["kind"] != "host":
            places[node] = len(places)
            arguments = map_aggregate(
                (node.args, node.kwargs), lambda a: places.get(a, a) if isinstance(a, fx.Node) else repr(a)
            )
            yield node, (node.op, node.target, arguments)
