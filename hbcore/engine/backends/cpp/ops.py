"""Translation of ATen operations to C++, with torch's dtype promotion, rounding and NaN handling made explicit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hbcore.errors import CompileError
from hbcore.state.blocks import ROOT, SPREAD

aten = torch.ops.aten

TYPES = {
    torch.float32: "float", torch.float64: "double", torch.float16: "half", torch.bfloat16: "bf16",
    torch.int8: "int8_t", torch.int16: "int16_t", torch.int32: "int32_t", torch.int64: "int64_t",
    torch.uint8: "uint8_t", torch.bool: "bool",
}  # fmt: skip

BITS = {torch.bfloat16: "bf16", torch.float16: "half"}
"""Types that are held as their bits, and the name of their conversions."""


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an operation on ``dtype`` is computed in: float32 for bfloat16 and float16, rounded once afterwards."""
    return torch.float32 if dtype in BITS else dtype


def cast(expression: str, have: torch.dtype, want: torch.dtype) -> str:
    """``expression`` converted between dtypes like torch does."""
    if have == want:
        return expression
    if have in BITS:
        return cast(f"from_{BITS[have]}({expression})", torch.float32, want)
    if want in BITS:
        return f"to_{BITS[want]}({cast(expression, have, torch.float32)})"
    if have == torch.bool:  # a choice stays a vector's mask; a conversion passes through bytes and is ten times slower
        return f"({expression} ? {TYPES[want]}(1) : {TYPES[want]}(0))"
    return f"({expression} != 0)" if want == torch.bool else f"{TYPES[want]}({expression})"


@dataclass(frozen=True)
class Call:
    """One graph node, as passed to the operation table."""

    node: fx.Node
    names: Mapping[fx.Node, str]
    compute: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the operation is computed in."""
        return arithmetic(self.node.meta["dtype"])

    def arg(self, i: int, dtype: torch.dtype | None = None) -> str:
        """Argument ``i`` as an expression of ``dtype`` (default: the result's)."""
        value, want = self.node.args[i], dtype or self.dtype
        if isinstance(value, fx.Node):
            return cast(self.names[value], value.meta["dtype"], want)
        return literal(value, want)

    def raw(self, i: int = 0) -> tuple[str, torch.dtype]:
        """Argument ``i`` without conversion, and its dtype."""
        value = self.node.args[i]
        assert isinstance(value, fx.Node)
        return self.names[value], value.meta["dtype"]

    def number(self) -> str:
        """Argument 0 in the dtype that it is computed in."""
        return self.arg(0, arithmetic(self.raw()[1]))

    def common(self) -> torch.dtype:
        """The common dtype of a comparison's operands."""
        operands = [a for a in self.node.args if isinstance(a, fx.Node)]
        wide = [a for a in operands if a.meta["kind"] in ("element", "block")] or operands
        result: torch.dtype = wide[0].meta["dtype"]
        for a in wide[1:]:
            result = torch.promote_types(result, a.meta["dtype"])
        if not result.is_floating_point and any(isinstance(a, float) or _is_float(a) for a in self.node.args):
            return self.compute
        return arithmetic(result)


def _is_float(a: Any) -> bool:
    return isinstance(a, fx.Node) and bool(a.meta["dtype"].is_floating_point)


def literal(value: Any, dtype: torch.dtype) -> str:
    """A Python number as C++ source, rounded to ``dtype``."""
    if not isinstance(value, (bool, int, float)):
        raise CompileError(f"the C++ generator does not support the constant {value!r}")
    if dtype == torch.bool:
        return str(bool(value)).lower()
    if dtype.is_floating_point:
        number = float(value)
        text = repr(number) if math.isfinite(number) else f"{'-' if number < 0 else ''}{'NAN' if number != number else 'INF'}"
        return cast(text, torch.float64, dtype)
    return f"{TYPES[dtype]}({int(value)}LL)" if int(value) > -(2**63) else f"{TYPES[dtype]}(-9223372036854775807LL - 1)"


def _alpha(c: Call, sign: str) -> str:
    alpha = c.node.kwargs.get("alpha", c.node.args[2] if len(c.node.args) > 2 else 1)
    other = c.arg(1) if alpha == 1 else f"{c.arg(1)} * {literal(alpha, c.dtype)}"
    return f"{c.arg(0)} {sign} {other}"


def _product(c: Call, sign: str) -> str:
    value = c.node.kwargs.get("value", 1)
    factor = c.arg(1) if value == 1 else f"{literal(value, c.dtype)} * {c.arg(1)}"
    return f"{c.arg(0)} + {factor} {sign} {c.arg(2)}"


def _compare(op: str) -> Callable[[Call], str]:
    return lambda c: f"{c.arg(0, c.common())} {op} {c.arg(1, c.common())}"


def _binary(op: str) -> Callable[[Call], str]:
    return lambda c: f"{c.arg(0)} {op} {c.arg(1)}"


def _own(name: str, arity: int = 1) -> Callable[[Call], str]:
    """A function of the prelude, a template over its arguments' type."""
    return lambda c: f"{name}({', '.join(c.arg(i) for i in range(arity))})"


def library(name: str, c: Call, *arguments: str) -> str:
    """A call of the C library's function, or of the instruction that the compiler has for it."""
    return f"__builtin_{name}{'f' if c.dtype == torch.float32 else ''}({', '.join(arguments)})"


def _function(name: str, arity: int = 1) -> Callable[[Call], str]:
    return lambda c: library(name, c, *(c.arg(i) for i in range(arity)))


def _rounding(name: str) -> Callable[[Call], str]:
    return lambda c: library(name, c, c.arg(0)) if c.dtype.is_floating_point else c.arg(0)


def _clamp(c: Call) -> str:
    expression = c.arg(0)
    for i, keyword, function in ((1, "min", "maximum"), (2, "max", "minimum")):
        bound = c.node.args[i] if i < len(c.node.args) else c.node.kwargs.get(keyword)
        if isinstance(bound, fx.Node):
            expression = f"{function}({expression}, {cast(c.names[bound], bound.meta['dtype'], c.dtype)})"
        elif bound is not None:
            expression = f"{function}({expression}, {literal(bound, c.dtype)})"
    return expression


def short_power(exponent: Any) -> bool:
    """Whether a power needs no call: a few products, or a root."""
    return isinstance(exponent, (int, float)) and (exponent in (0.5, -0.5, -1) or exponent in (1, 2, 3, 4))


def _power(c: Call) -> str:
    exponent = c.node.args[1]
    if not isinstance(exponent, (int, float)) or not short_power(exponent):
        return library("pow", c, c.arg(0), c.arg(1))
    if exponent == 0.5:
        return library("sqrt", c, c.arg(0))
    if exponent < 0:
        return f"1 / {library('sqrt', c, c.arg(0)) if exponent == -0.5 else c.arg(0)}"
    return " * ".join([c.arg(0)] * int(exponent))


def _where(c: Call) -> str:
    return f"{c.arg(0, torch.bool)} ? {c.arg(1)} : {c.arg(2)}"


def _view(c: Call) -> str:
    name, dtype = c.raw()
    want: torch.dtype = c.node.meta["dtype"]
    if want.itemsize != dtype.itemsize:
        raise CompileError(f"the C++ generator does not support {c.node.target} from {dtype} to {want}")
    return f"bits<{TYPES[want]}>({name})"


def _to_copy(c: Call) -> str:
    return cast(*c.raw(), c.dtype)


CALLS = {
    aten.exp.default: _own("exp"), aten.exp2.default: _function("exp2"), aten.expm1.default: _function("expm1"),
    aten.log.default: _own("log"), aten.log2.default: _function("log2"), aten.log1p.default: _own("log1p"),
    aten.log10.default: _function("log10"), aten.tanh.default: _own("tanh"), aten.erf.default: _function("erf"),
    aten.sin.default: _function("sin"), aten.cos.default: _function("cos"), aten.atan.default: _function("atan"),
    aten.atan2.default: _own("atan2", 2), aten.pow.Tensor_Scalar: _power, aten.pow.Tensor_Tensor: _power,
    aten.sigmoid.default: lambda c: f"1 / (1 + exp(-{c.arg(0)}))",
}  # fmt: skip
"""Operations that call the C library, or in float32 a series. A loop with a call is not vectorised, and does nothing else."""

OPERATIONS: dict[Any, Callable[[Call], str]] = {
    **CALLS,
    aten.add.Tensor: lambda c: _alpha(c, "+"), aten.add.Scalar: lambda c: _alpha(c, "+"),
    aten.sub.Tensor: lambda c: _alpha(c, "-"), aten.sub.Scalar: lambda c: _alpha(c, "-"),
    aten.rsub.Scalar: lambda c: f"{c.arg(1)} - {c.arg(0)}", aten.rsub.Tensor: lambda c: f"{c.arg(1)} - {c.arg(0)}",
    aten.mul.Tensor: _binary("*"), aten.mul.Scalar: _binary("*"),
    aten.addcmul.default: lambda c: _product(c, "*"), aten.addcdiv.default: lambda c: _product(c, "/"),
    aten.div.Tensor: _binary("/"), aten.div.Scalar: _binary("/"), aten.true_divide.Tensor: _binary("/"),
    aten.reciprocal.default: lambda c: f"1 / {c.arg(0)}", aten.neg.default: lambda c: f"-{c.arg(0)}",
    aten.abs.default: _own("absolute"), aten.sqrt.default: _function("sqrt"),
    aten.rsqrt.default: lambda c: f"1 / {library('sqrt', c, c.arg(0))}",
    aten.square.default: lambda c: f"{c.arg(0)} * {c.arg(0)}", aten.sign.default: _own("sign"),
    aten.sgn.default: _own("sign"), aten.round.default: _rounding("rint"), aten.floor.default: _rounding("floor"),
    aten.ceil.default: _rounding("ceil"), aten.trunc.default: _rounding("trunc"),
    aten.copysign.Tensor: _function("copysign", 2),
    aten.relu.default: lambda c: f"{c.arg(0)} < 0 ? {literal(0, c.dtype)} : {c.arg(0)}",
    aten.maximum.default: _own("maximum", 2), aten.minimum.default: _own("minimum", 2),
    aten.clamp.default: _clamp, aten.clamp.Tensor: _clamp, aten.clamp_min.default: _own("maximum", 2),
    aten.clamp_min.Tensor: _own("maximum", 2), aten.clamp_max.default: _own("minimum", 2),
    aten.clamp_max.Tensor: _own("minimum", 2),
    aten.logical_and.default: lambda c: f"{c.arg(0, torch.bool)} & {c.arg(1, torch.bool)}",
    aten.logical_or.default: lambda c: f"{c.arg(0, torch.bool)} | {c.arg(1, torch.bool)}",
    aten.logical_xor.default: lambda c: f"{c.arg(0, torch.bool)} != {c.arg(1, torch.bool)}",
    aten.logical_not.default: lambda c: f"!{c.arg(0, torch.bool)}",
    aten.bitwise_and.Tensor: _binary("&"), aten.bitwise_and.Scalar: _binary("&"),
    aten.bitwise_or.Tensor: _binary("|"), aten.bitwise_or.Scalar: _binary("|"),
    aten.bitwise_xor.Tensor: _binary("^"), aten.bitwise_xor.Scalar: _binary("^"),
    aten.bitwise_not.default: lambda c: f"{'!' if c.dtype == torch.bool else '~'}{c.arg(0)}",
    aten.bitwise_left_shift.Tensor_Scalar: _binary("<<"), aten.bitwise_right_shift.Tensor_Scalar: _binary(">>"),
    aten.__lshift__.Scalar: _binary("<<"), aten.__rshift__.Scalar: _binary(">>"),
    aten.isnan.default: lambda c: f"{c.number()} != {c.number()}",
    aten.isfinite.default: lambda c: f"absolute({c.number()}) < INF",
    aten.isinf.default: lambda c: f"absolute({c.number()}) == INF",
    aten.where.self: _where, aten.lerp.Scalar: _own("lerp", 3), aten.lerp.Tensor: _own("lerp", 3),
    aten._to_copy.default: _to_copy, aten.view.dtype: _view, aten.clone.default: lambda c: c.arg(0),
    aten.zeros_like.default: lambda c: literal(0, c.dtype), aten.ones_like.default: lambda c: literal(1, c.dtype),
    aten.full_like.default: lambda c: c.arg(1), aten.scalar_tensor.default: lambda c: c.arg(0),
    SPREAD: lambda c: c.arg(0),
    ROOT: lambda c: f"root_code({c.arg(0, torch.float32)}, {c.node.args[1]}.0f)",
}  # fmt: skip
OPERATIONS.update(
    {
        getattr(getattr(aten, name), overload): _compare(sign)
        for name, sign in {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}.items()
        for overload in ("Tensor", "Scalar")
    }
)
"""Supported operations: ATen operation -> C++ expression, with torch's dtype promotion and rounding."""


def expression(node: fx.Node, names: Mapping[fx.Node, str], compute: torch.dtype) -> str:
    """The C++ expression of one node, in the node's dtype.

    Raises:
        CompileError: the operation is not supported; the message names it.
    """
    if node.target not in OPERATIONS:
        raise CompileError(f"the C++ generator does not support {node.target}, used at {node.meta['where']}")
    call, dtype = Call(node, names, compute), node.meta["dtype"]
    if dtype not in TYPES:
        raise CompileError(f"the C++ generator does not support {dtype}, used at {node.meta['where']}")
    made = OPERATIONS[node.target](call)
    if node.target is aten.view.dtype:
        return made
    return cast(f"({made})" if dtype in BITS else made, call.dtype, dtype)


def calls(node: fx.Node) -> bool:
    """Whether a node calls the C library."""
    if node.target in (aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor):
        return not short_power(node.args[1])
    return node.target in CALLS and not (node.target is aten.atan2.default and node.meta["dtype"] != torch.float64)
