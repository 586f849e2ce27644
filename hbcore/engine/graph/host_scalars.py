"""Hoisted scalar arithmetic as plain Python on floats, for backends that upload a row of numbers to a device.

A step's bias corrections are about ten operations; as 0-d tensors they would take longer than launching the kernel. Python
floats are IEEE float64 like the tensors, so both give the same numbers. Where Python raises (a division by zero) or an
operation is not supported here, callers fall back to tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx

aten = torch.ops.aten
Numbers = Callable[[Sequence[float]], tuple[float, ...]]

FORMS: dict[Any, str] = {
    aten.add.Tensor: "{0} + {1}", aten.sub.Tensor: "{0} - {1}", aten.add.Scalar: "{0} + {1}", aten.sub.Scalar: "{0} - {1}",
    aten.rsub.Scalar: "{1} - {0}", aten.rsub.Tensor: "{1} - {0}", aten.mul.Tensor: "{0} * {1}", aten.mul.Scalar: "{0} * {1}",
    aten.div.Tensor: "{0} / {1}", aten.div.Scalar: "{0} / {1}", aten.reciprocal.default: "1.0 / {0}",
    aten.pow.Tensor_Tensor: "math.pow({0}, {1})", aten.pow.Tensor_Scalar: "math.pow({0}, {1})",
    aten.pow.Scalar: "math.pow({0}, {1})", aten.sqrt.default: "math.sqrt({0})", aten.neg.default: "-{0}",
    aten.exp.default: "math.exp({0})", aten.expm1.default: "math.expm1({0})",
    aten.log.default: "math.log({0})", aten.abs.default: "abs({0})",
    aten.where.self: "({1} if {0} else {2})", aten.eq.Scalar: "{0} == {1}", aten.gt.Scalar: "{0} > {1}",
    aten.lt.Scalar: "{0} < {1}", aten.ge.Scalar: "{0} >= {1}", aten.le.Scalar: "{0} <= {1}",
    aten.minimum.default: "min({0}, {1})", aten.maximum.default: "max({0}, {1})",
    aten.full.default: "{1}",
}  # fmt: skip
"""ATen operation -> Python expression of its arguments."""


def as_python(host: fx.GraphModule) -> Numbers | None:
    """The host graph as one Python function of floats; None if an operation is not supported."""
    names: dict[fx.Node, str] = {}
    lines: list[str] = []
    result = ""
    for node in host.graph.nodes:
        if node.op == "placeholder":
            names[node] = f"v[{len(names)}]"
        elif node.op == "output":
            result = "".join(f"{names[n]}, " for n in cast("tuple[fx.Node, ...]", node.args[0]))
        else:
            form = _form(node)
            if form is None:
                return None
            names[node] = f"x{len(lines)}"
            operands = [names[a] if isinstance(a, fx.Node) else literal_of(a) for a in node.args]
            lines.append(f"    {names[node]} = {form.format(*operands)}")
    source = "\n".join(["def numbers(v):", *lines, f"    return ({result})"])
    scope: dict[str, Any] = {"math": math}
    exec(source, scope)  # the source contains only the table above and the graph's constants
    return cast("Numbers", scope["numbers"])


def literal_of(value: Any) -> str:
    """A constant of the graph in generated source; ``repr`` writes ``inf`` and ``nan``, which are not names."""
    return f"float('{value}')" if isinstance(value, float) and not math.isfinite(value) else repr(value)


def _form(node: fx.Node) -> str | None:
    if node.target is aten.addcdiv.default:
        return f"{{0}} + {literal_of(node.kwargs.get('value', 1))} * ({{1}} / {{2}})"
    if node.target in (aten.clamp.default, aten.clamp.Tensor):
        bounds = {"max": (1, node.kwargs.get("min")), "min": (2, node.kwargs.get("max"))}
        form = "{0}"
        for function, (index, keyword) in bounds.items():
            if len(node.args) > index and node.args[index] is not None:
                form = f"{function}({form}, {{{index}}})"
            elif keyword is not None:
                form = f"{function}({form}, {literal_of(keyword)})" if not isinstance(keyword, fx.Node) else ""
        return form or None
    plain = not {k for k in node.kwargs if k not in ("dtype", "device")}
    return FORMS.get(node.target) if plain else None
