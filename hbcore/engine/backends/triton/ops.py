"""Translation of ATen operations to Triton, with torch's dtype promotion, rounding and NaN handling made explicit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hbcore.engine.graph.host_scalars import literal_of
from hbcore.errors import CompileError
from hbcore.state.blocks import AMAX, ROOT, SPREAD

aten = torch.ops.aten

TYPES = {
    torch.float32: "tl.float32", torch.float64: "tl.float64", torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16",
    torch.int8: "tl.int8", torch.int16: "tl.int16", torch.int32: "tl.int32", torch.int64: "tl.int64",
    torch.uint8: "tl.uint8", torch.bool: "tl.int1",
}  # fmt: skip


VECTORS = ("element", "block")
"""The kinds of values that are tensors in a kernel: an entry for each element of a block of the program, or of 32 of them."""


SMALL_INTEGERS = (torch.int8, torch.uint8, torch.int16)
"""Those that a float32's own digits hold: adding to its bits converts them four times as fast as the conversion does."""


def cast(expression: str, have: torch.dtype, want: torch.dtype) -> str:
    """``expression`` converted between dtypes like torch does."""
    if have == want:
        return expression
    if want == torch.bfloat16:
        return f"to_bf16({cast(expression, have, torch.float32)})"
    if want == torch.bool:
        return f"({expression} != 0)"
    if have in SMALL_INTEGERS and want == torch.float32:
        return f"small_float({expression})"
    if have == torch.bfloat16 and want != torch.float32:
        return f"{expression}.to(tl.float32).to({TYPES[want]})"
    return f"({expression}).to({TYPES[want]})"


@dataclass(frozen=True)
class Call:
    """One graph node, as passed to the operation table."""

    node: fx.Node
    names: Mapping[fx.Node, str]
    compute: torch.dtype
    size: str = "BLOCK"
    branchless: bool = False

    @property
    def is_vector(self) -> bool:
        """Whether the result is a tensor."""
        return self.node.meta["kind"] in VECTORS

    @property
    def dtype(self) -> torch.dtype:
        """The result's dtype."""
        result: torch.dtype = self.node.meta["dtype"]
        return result

    def arg(self, i: int, dtype: torch.dtype | None = None, default: Any = None) -> str:
        """Argument ``i`` as an expression of ``dtype`` (default: the result's)."""
        value = self.node.args[i] if i < len(self.node.args) else default
        want = dtype or self.dtype
        if isinstance(value, fx.Node):
            return cast(self.names[value], value.meta["dtype"], want)
        return literal(value, want)

    def raw(self, i: int) -> tuple[str, torch.dtype]:
        """Argument ``i`` without conversion, and its dtype."""
        value = self.node.args[i]
        assert isinstance(value, fx.Node)
        return self.names[value], value.meta["dtype"]

    def common(self) -> torch.dtype:
        """The common dtype of a comparison's operands."""
        operands = [a for a in self.node.args if isinstance(a, fx.Node)]
        elements = [a for a in operands if a.meta["kind"] in VECTORS] or operands
        dtypes: list[torch.dtype] = [a.meta["dtype"] for a in elements]
        result = dtypes[0]
        for d in dtypes[1:]:
            result = torch.promote_types(result, d)
        if not result.is_floating_point and any(isinstance(a, float) or _is_float(a) for a in self.node.args):
            return self.compute
        return result


def _is_float(a: Any) -> bool:
    return isinstance(a, fx.Node) and bool(a.meta["dtype"].is_floating_point)


def literal(value: Any, dtype: torch.dtype) -> str:
    """A Python number as Triton source; float64 constants are written so that they are not rounded to float32."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, (int, float)):
        text = repr(float(value)) if dtype.is_floating_point else repr(int(value))
        if text in ("inf", "-inf", "nan"):
            return f'float("{text}")'
        return f"tl.full([], {text}, tl.float64)" if dtype == torch.float64 else text
    raise CompileError(f"the Triton generator does not support the constant {value!r}")


def _alpha(c: Call, sign: str) -> str:
    alpha = c.node.kwargs.get("alpha", c.node.args[2] if len(c.node.args) > 2 else 1)
    other = c.arg(1) if alpha == 1 else f"{c.arg(1)} * {literal(alpha, c.dtype)}"
    return f"{c.arg(0)} {sign} {other}"


def _divide(c: Call) -> str:
    return _quotient(c, c.arg(0), c.arg(1))


def _sqrt(c: Call) -> str:
    if c.dtype != torch.float32:
        return f"tl.sqrt({c.arg(0)})"
    if not (c.branchless and c.is_vector):
        return f"tl.sqrt_rn({c.arg(0)})"
    floors = [_floor(user) for user in c.node.users]
    if len(floors) == 1 and floors[0] is not None:
        return f"root_above({c.arg(0)}, {c.names[floors[0]]}.to(tl.float32))"
    return f"root({c.arg(0)})"


def _floor(node: fx.Node) -> fx.Node | None:
    """The number that a root is at least, if ``node`` is the larger of a root and a number."""
    if node.target is not aten.maximum.default:
        return None
    numbers = [a for a in node.args if isinstance(a, fx.Node) and a.meta["kind"] not in VECTORS]
    roots = [a for a in node.args if isinstance(a, fx.Node) and a.target is aten.sqrt.default and a.meta["kind"] in VECTORS]
    return numbers[0] if numbers and roots else None


def _compare(op: str) -> Callable[[Call], str]:
    return lambda c: f"{c.arg(0, c.common())} {op} {c.arg(1, c.common())}"


def _binary(op: str) -> Callable[[Call], str]:
    return lambda c: f"{c.arg(0)} {op} {c.arg(1)}"


def _function(name: str, arity: int = 1) -> Callable[[Call], str]:
    return lambda c: f"{name}({', '.join(c.arg(i) for i in range(arity))})"


def _clamp(c: Call) -> str:
    low, high = (c.node.args[i] if i < len(c.node.args) else c.node.kwargs.get(k) for i, k in ((1, "min"), (2, "max")))
    expression = c.arg(0)
    if low is not None:
        expression = f"maximum({expression}, {c.arg(1) if len(c.node.args) > 1 else literal(low, c.dtype)})"
    if high is not None:
        expression = f"minimum({expression}, {c.arg(2) if len(c.node.args) > 2 else literal(high, c.dtype)})"
    return expression


def _power(c: Call) -> str:
    exponent = c.node.args[1]
    if isinstance(exponent, (int, float)) and float(exponent).is_integer() and 0 < exponent <= 4:
        return " * ".join([c.arg(0)] * int(exponent))
    if exponent == 0.5:
        return _sqrt(c)
    return f"tl.exp2({c.arg(1)} * tl.log2({c.arg(0)}))"


def _quotient(c: Call, x: str, y: str) -> str:
    if c.dtype != torch.float32 or not c.is_vector:
        return f"({x}) / ({y})"
    if not c.branchless:
        return f"tl.div_rn({x}, {y})"
    divisor = c.node.args[1] if len(c.node.args) > 1 else None
    floor = _floor(divisor) if isinstance(divisor, fx.Node) else None
    return f"quotient({x}, {y})" if floor is None else f"quotient_by_root({x}, {y}, {c.names[floor]}.to(tl.float32))"


def _log1p(c: Call) -> str:
    """``log(1 + x)`` without libdevice: Kahan's correction for the rounding of ``1 + x`` near zero."""
    x = c.arg(0)
    corrected = f"tl.log(1.0 + {x}) * {_quotient(c, x, f'(1.0 + {x}) - 1.0')}"
    return f"tl.where(1.0 + {x} == 1.0, {x}, tl.where(tl.abs({x}) < 0.5, {corrected}, tl.log(1.0 + {x})))"


def _tanh(c: Call) -> str:
    """Lambert's continued fraction, truncated after seven terms, near zero, where the ``exp`` formula cancels."""
    x, z = c.arg(0), f"{c.arg(0)} * {c.arg(0)}"
    above = f"{x} * (135135.0 + {z} * (17325.0 + {z} * (378.0 + {z})))"
    below = f"135135.0 + {z} * (62370.0 + {z} * (3150.0 + {z} * 28.0))"
    far = f"1.0 - {_quotient(c, '2.0', f'tl.exp(2.0 * {x}) + 1.0')}"
    return f"tl.where(tl.abs({x}) < 0.5, {_quotient(c, above, below)}, {far})"


def _where(c: Call) -> str:
    return f"tl.where({c.arg(0, torch.bool)}, {c.arg(1)}, {c.arg(2)})"


def _lerp(c: Call) -> str:
    return f"{c.arg(0)} + {c.arg(2)} * ({c.arg(1)} - {c.arg(0)})"


def _fill(c: Call, value: Any) -> str:
    size = f"{c.size} // 32" if c.node.meta["kind"] == "block" else c.size
    return f"tl.full([{size}], {literal(value, torch.float32)}, {TYPES[c.dtype]})"


def _block_amax(c: Call) -> str:
    largest = "block_amax" if c.dtype.is_floating_point else "block_max"
    return f"{largest}({c.arg(0)}, {c.size} // 32)"


def _spread(c: Call) -> str:
    name, dtype = c.raw(0)
    return cast(f"spread({name}, {c.size} // 32)", dtype, c.dtype)


def _view(c: Call) -> str:
    name, _ = c.raw(0)
    return f"{name}.to({TYPES[c.dtype]}, bitcast=True)"


def _to_copy(c: Call) -> str:
    name, dtype = c.raw(0)
    if not c.dtype.is_floating_point and dtype.is_floating_point:
        return f"{name}.to({TYPES[c.dtype]})"
    return cast(name, dtype, c.dtype)


OPERATIONS: dict[Any, Callable[[Call], str]] = {
    aten.add.Tensor: lambda c: _alpha(c, "+"), aten.add.Scalar: lambda c: _alpha(c, "+"),
    aten.sub.Tensor: lambda c: _alpha(c, "-"), aten.sub.Scalar: lambda c: _alpha(c, "-"),
    aten.rsub.Scalar: lambda c: f"{c.arg(1)} - {c.arg(0)}", aten.rsub.Tensor: lambda c: f"{c.arg(1)} - {c.arg(0)}",
    aten.mul.Tensor: _binary("*"), aten.mul.Scalar: _binary("*"),
    aten.div.Tensor: _divide, aten.div.Scalar: _divide, aten.true_divide.Tensor: _divide,
    aten.reciprocal.default: lambda c: _quotient(c, "1.0", c.arg(0)),
    aten.neg.default: lambda c: f"-{c.arg(0)}", aten.abs.default: _function("tl.abs"), aten.sqrt.default: _sqrt,
    aten.rsqrt.default: lambda c: _quotient(c, "1.0", _sqrt(c)),
    aten.square.default: lambda c: f"{c.arg(0)} * {c.arg(0)}", aten.pow.Tensor_Scalar: _power, aten.pow.Tensor_Tensor: _power,
    aten.exp.default: _function("tl.exp"), aten.log.default: _function("tl.log"), aten.log2.default: _function("tl.log2"),
    aten.exp2.default: _function("tl.exp2"), aten.log1p.default: _log1p, aten.tanh.default: _tanh,
    aten.sign.default: _function("sign"), aten.round.default: _function("rint"),
    aten.floor.default: _function("tl.floor"), aten.ceil.default: _function("tl.ceil"),
    aten.sigmoid.default: _function("tl.sigmoid"), aten.atan2.default: _function("atan2", 2),
    aten.maximum.default: _function("maximum", 2), aten.minimum.default: _function("minimum", 2),
    aten.clamp.default: _clamp, aten.clamp.Tensor: _clamp, aten.clamp_min.default: _function("maximum", 2),
    aten.clamp_min.Tensor: _function("maximum", 2), aten.clamp_max.default: _function("minimum", 2),
    aten.logical_and.default: lambda c: f"{c.arg(0, torch.bool)} & {c.arg(1, torch.bool)}",
    aten.logical_or.default: lambda c: f"{c.arg(0, torch.bool)} | {c.arg(1, torch.bool)}",
    aten.logical_not.default: lambda c: f"{c.arg(0, torch.bool)} == 0",
    aten.bitwise_and.Tensor: _binary("&"), aten.bitwise_and.Scalar: _binary("&"),
    aten.bitwise_or.Tensor: _binary("|"), aten.bitwise_or.Scalar: _binary("|"),
    aten.bitwise_xor.Tensor: _binary("^"), aten.bitwise_xor.Scalar: _binary("^"),
    aten.bitwise_not.default: lambda c: f"{c.arg(0)} == 0" if c.dtype == torch.bool else f"~{c.arg(0)}",
    aten.bitwise_left_shift.Tensor_Scalar: _binary("<<"), aten.bitwise_right_shift.Tensor_Scalar: _binary(">>"),
    aten.__lshift__.Scalar: _binary("<<"), aten.__rshift__.Scalar: _binary(">>"),
    aten.isnan.default: lambda c: "{0} != {0}".format(c.raw(0)[0]),
    aten.isfinite.default: lambda c: f'tl.abs({c.raw(0)[0]}) < float("inf")',
    aten.isinf.default: lambda c: f'tl.abs({c.raw(0)[0]}) == float("inf")',
    aten.where.self: _where, aten.lerp.Scalar: _lerp, aten.lerp.Tensor: _lerp, aten._to_copy.default: _to_copy,
    AMAX: _block_amax, SPREAD: _spread, ROOT: lambda c: f"root_code({c.arg(0, torch.float32)}, {c.node.args[1]})",
    aten.view.dtype: _view, aten.clone.default: lambda c: c.arg(0),
    aten.zeros_like.default: lambda c: _fill(c, 0), aten.ones_like.default: lambda c: _fill(c, 1),
    aten.full_like.default: lambda c: _fill(c, c.node.args[1]),
    aten.scalar_tensor.default: lambda c: f"tl.full([], {literal_of(c.node.args[0])}, {TYPES[c.dtype]})",
}  # fmt: skip
OPERATIONS.update(
    {
        getattr(getattr(aten, name), overload): _compare(sign)
        for name, sign in {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}.items()
        for overload in ("Tensor", "Scalar")
    }
)
"""Supported operations: ATen operation -> Triton expression, with torch's dtype promotion and rounding."""
