"""Split one elementwise graph into host scalar arithmetic and as many passes as its reductions require.

A reduction's result is known only after a pass over the whole tensor, so everything that depends on it belongs to a later
pass. A later pass can recompute an intermediate from its inputs, or read it back if an earlier pass stored it. New slot values
must be stored anyway, so storing them early is free scratch space; :func:`split` counts the bytes of both plans and picks the
smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import fx

from hbcore.engine.graph.program import CARRIED, NOISE, REDUCERS, REPORT, Bits, Phase, Program, Reduction, module_of
from hbcore.errors import TraceError
from hbcore.rules.transform import Domain
from hbcore.state.blocks import BLOCK


def split(
    graph: fx.Graph,
    results: Mapping[str, fx.Node],
    dtypes: Mapping[str, torch.dtype],
    scalar_names: Sequence[str],
    numbers: Sequence[str],
    label: str,
    per_block: frozenset[str] = frozenset(),
    bits: Mapping[str, Bits] | None = None,
) -> Program:
    """Cut ``graph`` into a :class:`Program`.

    Args:
        graph: the recorded graph, with each node's kind in ``meta["kind"]``.
        results: stored tensor -> the node of its new value.
        dtypes: stored tensor -> its dtype.
        scalar_names: the 0-d inputs, in order.
        numbers: the stored tensors that are one number for each parameter.
        label: a readable name of the chain, for generated sources and reports.
        per_block: the stored tensors that have one entry for each block.
        bits: random input -> where it lies in a word.

    Raises:
        TraceError: a new value is of another kind than its tensor.
    """
    finals = _finals(results, numbers)
    carries = {name: node for name, node in results.items() if name.startswith(CARRIED) and name not in finals}
    results = {name: node for name, node in results.items() if not name.startswith((CARRIED, REPORT)) and name not in numbers}
    _check_kinds(graph, results, finals, per_block)
    stores = {name: node for name, node in results.items() if node.meta.get("input") != name}
    live = _live(graph, (*stores.values(), *finals.values()))
    hoisted = [n for n in _varying(live) if n in finals.values() or any(u.meta["kind"] != "host" for u in n.users if u in live)]
    level = _levels(live)
    one_pass = not any(level[n] for n in live)
    candidates = (_plan(live, stores, hoisted, level, early) for early in ((False,) if one_pass else (False, True)))
    phases = min(candidates, key=lambda plan: traffic(plan, dtypes, per_block))
    summed = {n: str(n.meta["reduction"]) for n in live if _is_reduction(n)}
    return Program(
        label,
        dict(dtypes),
        tuple(scalar_names),
        _host(graph, live, hoisted, scalar_names),
        tuple(n.meta["dtype"] for n in hoisted),
        phases,
        tuple(name.removeprefix(CARRIED) for name in carries),
        _host(graph, _live(graph, carries.values()), list(carries.values()), scalar_names) if carries else None,
        _phase(live, finals, {}, summed, hoisted, {})[0] if finals else None,
        per_block,
        dict(bits or {}),
    )


def _finals(results: Mapping[str, fx.Node], numbers: Sequence[str]) -> dict[str, fx.Node]:
    """What is computed once all phases ran: scalar slots that change, carried numbers that no host can tell, and reports."""
    found = {name: node for name, node in results.items() if name in numbers and node.meta.get("input") != name}
    late = {name: node for name, node in results.items() if name.startswith(CARRIED) and node.meta["kind"] != "host"}
    return {**found, **late, **{name: node for name, node in results.items() if name.startswith(REPORT)}}


def _check_kinds(
    graph: fx.Graph, results: Mapping[str, fx.Node], finals: Mapping[str, fx.Node], per_block: frozenset[str]
) -> None:
    for name, node in results.items():
        kind, wanted = node.meta["kind"], "block" if name in per_block else "element"
        if kind in ("host", "scalar"):
            raise TraceError(f"{node.meta['where']}: the new value of {name!r} is a scalar; it must be a full tensor.")
        if kind != wanted:
            raise TraceError(f"{node.meta['where']}: the new value of {name!r} has one entry for each {kind}, not {wanted}.")
    for name, node in finals.items():
        if not name.startswith(CARRIED):
            continue
        for n in _live(graph, [node]):
            own = n.target in REDUCERS.values() and n.args[1] != Domain.MODEL
            if own or n.meta.get("input") == "numel":
                raise TraceError(
                    f"{node.meta['where']}: {name.removeprefix(CARRIED)!r} is carried by the group and must not depend on one "
                    "tensor; make the rule one of Domain.MODEL, or the number a slot: scalar()."
                )


def _live(graph: fx.Graph, roots: Iterable[fx.Node]) -> dict[fx.Node, None]:
    wanted, stack = set(), list(roots)
    while stack:
        node = stack.pop()
        if node not in wanted:
            wanted.add(node)
            stack.extend(node.all_input_nodes)
    return {n: None for n in graph.nodes if n in wanted}


def _varying(live: Iterable[fx.Node]) -> list[fx.Node]:
    """Host values computed from hyperparameters or the step; constants stay where they are used."""
    varying: dict[fx.Node, None] = {}
    for n in live:
        if n.meta["kind"] == "host" and (n.op == "placeholder" or any(i in varying for i in n.all_input_nodes)):
            varying[n] = None
    return list(varying)


def _is_given(node: fx.Node) -> bool:
    """Whether a program is given this 0-d value, which is none of its own reductions."""
    return node.op == "placeholder" and node.meta["kind"] == "scalar" and node.meta["input"] != "numel"


def _is_reduction(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in REDUCERS.values()


def _levels(live: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """The first pass in which each node can be computed."""
    level: dict[fx.Node, int] = {}
    for n in live:
        level[n] = max((level[i] + _is_reduction(i) for i in n.all_input_nodes), default=0)
    return level


def _host(graph: fx.Graph, live: Iterable[fx.Node], hoisted: Sequence[fx.Node], names: Sequence[str]) -> fx.GraphModule:
    host, copies = fx.Graph(), {}
    inputs = {n.meta.get("input"): n for n in graph.nodes if n.op == "placeholder"}
    for name in names:  # including unused ones: the backends pass a full row
        copies[inputs[name]] = host.placeholder(inputs[name].name)
    for n in live:
        if n.meta["kind"] == "host" and n.op == "call_function":
            copies[n] = host.node_copy(n, lambda i: copies[i])
            if n.target is torch.ops.aten.scalar_tensor.default:  # a fill, which can be captured
                copies[n].target, copies[n].args = torch.ops.aten.full.default, ([], n.args[0])
            copies[n].kwargs = {k: v for k, v in n.kwargs.items() if k != "device"}  # Program.scalars sets it
    host.output(tuple(copies[n] for n in hoisted))
    return module_of(host)


def _plan(
    live: Mapping[fx.Node, None],
    stores: Mapping[str, fx.Node],
    hoisted: Sequence[fx.Node],
    level: Mapping[fx.Node, int],
    early: bool,
) -> tuple[Phase, ...]:
    """Lay out the passes; with ``early``, each slot is stored by the first pass that can compute it, where that is safe."""
    last = max([level[n] for n in stores.values()] + [level[n] for n in live if _is_reduction(n)])
    when = {name: level[node] if early and name != "param" else last for name, node in stores.items()}
    while True:
        phases, clash = [], None
        for k in range(last + 1):
            known = {stores[n]: n for n, w in when.items() if w < k and stores[n].op != "placeholder"}
            targets = {name: node for name, node in stores.items() if when[name] == k}
            reduces = {n: str(n.meta["reduction"]) for n in live if _is_reduction(n)}
            phase, read = _phase(live, targets, {n: r for n, r in reduces.items() if level[n] == k},
                                 {n: r for n, r in reduces.items() if level[n] < k}, hoisted, known)  # fmt: skip
            gone = {name for name, w in when.items() if w < k}
            clash = next((n for n in read if n in gone), clash)
            phases.append(phase)
        if clash is None:
            return tuple(phases)
        when[clash] = last  # a later pass reads the old value, so it must not be overwritten earlier


def _phase(
    live: Mapping[fx.Node, None],
    targets: Mapping[str, fx.Node],
    reduces: Mapping[fx.Node, str],
    summed: Mapping[fx.Node, str],
    hoisted: Sequence[fx.Node],
    known: Mapping[fx.Node, str],
) -> tuple[Phase, set[str]]:
    """Build one pass; also return the tensors whose old value it reads."""
    scalars = {n: i for i, n in enumerate(hoisted)}
    wanted, stack = set(), [*targets.values(), *reduces]
    while stack:
        n = stack.pop()
        if n not in wanted:
            wanted.add(n)
            if n not in scalars and n not in summed and n not in known:
                stack.extend(n.all_input_nodes)
    given = [n for n in live if n in wanted]
    summed = {**summed, **{n: str(n.meta["input"]) for n in given if _is_given(n)}}
    fresh = {n: str(n.meta["input"]) for n in given if n.op == "placeholder" and n.meta["kind"] in ("element", "block")}
    tensors = {**fresh, **{n: s for n, s in known.items() if n in wanted}}
    inputs = [*tensors, *(n for n in given if n in scalars), *(n for n in given if n in summed)]
    inputs += [n for n in given if n.op == "placeholder" and n not in inputs]  # numel
    graph, copies = fx.Graph(), {}
    for n in inputs:
        copies[n] = graph.placeholder(n.name)
        copies[n].meta.update(n.meta)
    for n in given:
        if n not in copies:
            copies[n] = graph.node_copy(n, lambda i: copies[i])
    outputs = [copies[n] for n in [*targets.values(), *reduces]]
    for i, (name, n) in enumerate(targets.items()):
        if n in tensors and tensors[n] != name and tensors[n] in targets:  # otherwise another write would overwrite it first
            outputs[i] = graph.call_function(torch.ops.aten.clone.default, (copies[n],))
            outputs[i].meta.update({key: n.meta[key] for key in ("kind", "dtype", "where")})
    graph.output(tuple(outputs))
    phase = Phase(
        graph=graph,
        tensors=tuple(tensors.values()),
        scalars=tuple(scalars[n] for n in given if n in scalars),
        sums=tuple(summed[n] for n in given if n in summed),
        needs_numel=any(n.meta.get("input") == "numel" for n in inputs),
        writes=tuple(targets),
        reduces=tuple(_reduction(n, name) for n, name in reduces.items()),
    )
    return phase, set(fresh.values())


def _reduction(node: fx.Node, name: str) -> Reduction:
    how = next(how for how, function in REDUCERS.items() if function is node.target)
    return Reduction(name, how, Domain(cast("int", node.args[1])), node.meta["dtype"])


def traffic(phases: Iterable[Phase], dtypes: Mapping[str, torch.dtype], per_block: frozenset[str]) -> float:
    """Bytes per element that all passes move in total."""
    names = (name for p in phases for name in (*p.tensors, *p.writes) if not name.startswith(NOISE))
    return sum(dtypes[name].itemsize / (BLOCK if name in per_block else 1) for name in names)
