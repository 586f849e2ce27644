"""Each operation of the C++ generator against torch's own, on numbers of every kind: special values, ties, halves, extremes."""

from __future__ import annotations

import math

import pytest
import torch
from core.kit import normal
from rounding import unit
from torch import fx

from hbcore.engine.backends.base import Batch
from hbcore.engine.backends.cpp.backend import CppBackend
from hbcore.engine.backends.cpp.ops import OPERATIONS
from hbcore.engine.backends.eager import EagerBackend
from hbcore.engine.graph.phases import split
from hbcore.engine.graph.program import Phase, Program, module_of, shared_words
from hbcore.engine.graph.trace import Recorder
from hbcore.errors import CompileError
from hbcore.rules.transform import Domain

aten = torch.ops.aten
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, math.inf, -math.inf, math.nan, 1e-45, 6e-8, 1e-5, 3e-39, 65504.0, 65519.0,
           65520.0, 1e30, 3.4e38, 3.3961775e38, 1.00390625, 1.01171875, 2.0**-24, 2.0**-25, 2.0**-14, 100.0, -77.7,
           3.0]  # fmt: skip


def executed(function, columns, backend, scalars=()):
    """The tensors that ``function`` returns for ``columns``, computed by a backend in one program."""
    dtypes = {f"in{i}": x.dtype for i, x in enumerate(columns)}
    recorder = Recorder(7, blockwise=False)
    given = [recorder.placeholder(n, torch.empty(7, dtype=d, device="meta"), "element") for n, d in dtypes.items()]
    numbers = {f"s{i}": torch.ones((), dtype=torch.float64) for i in range(len(scalars))}
    hosts = [recorder.placeholder(n, x, "host") for n, x in numbers.items()]
    with recorder:
        results = function(*given, *hosts)
    nodes = {f"out{i}": recorder.node(x) for i, x in enumerate(results)}
    dtypes |= {name: node.meta["dtype"] for name, node in nodes.items()}
    dtypes["param"] = torch.float64 if torch.float64 in dtypes.values() else torch.float32
    program = split(recorder.graph, nodes, dtypes, tuple(numbers), (), "operations")
    tensors = {name: [x] for name, x in zip(dtypes, columns, strict=False)}
    tensors |= {name: [torch.empty(columns[0].shape, dtype=node.meta["dtype"])] for name, node in nodes.items()}
    tensors |= {"param": [torch.zeros(columns[0].shape, dtype=dtypes["param"])], "grad": [torch.zeros(columns[0].shape)]}
    batch = Batch(tensors, [0], [[*scalars, 0.0]] if scalars else [[0.0]])
    executable = backend().compile(program, batch)
    executable.prepare(batch)
    for k in range(len(program.phases)):
        executable.run(k, batch)
    return [batch.tensors[name][0] for name in nodes]


def numbers_of(dtype, seed=0):
    """Two columns of numbers, every special one beside every other and some ordinary ones."""
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    x, y = special.repeat_interleave(len(SPECIAL)), special.repeat(len(SPECIAL))
    ordinary = normal(2, 500, seed=seed)
    return [torch.cat(pair).to(dtype) for pair in zip((x, y), ordinary * 3, strict=True)]


EXACT = {
    "arithmetic": lambda x, y: [x + y, x - y, x * y, x / y, -x, 2 - x, x.reciprocal(), x + 0.5, x * 0.1],
    "choices": lambda x, y: [torch.maximum(x, y), torch.minimum(x, y), x.clamp(-1, 1), x.clamp(min=0.5), x.clamp(max=y),
                             x.clamp_min(0.1), x.clamp_max(0.1), torch.where(x > y, x, y), x.relu(), torch.where(x != x, 0, x)],
    "shapes": lambda x, y: [x.abs(), x.sign(), x.round(), x.floor(), x.ceil(), x.trunc(), x.square(), x**2,
                            torch.zeros_like(x), torch.ones_like(x), torch.full_like(x, 0.1), torch.copysign(x, y), x.clone()],
    "comparisons": lambda x, y: [x > y, x >= y, x < y, x <= y, x == y, x != y, x > 0.1, x == math.inf, x.isnan(), x.isinf(),
                                 x.isfinite(), (x > 0) & (y > 0), (x > 0) | (y > 0), ~(x > 0), (x > 0) ^ (y > 0),
                                 torch.logical_and(x, y), torch.logical_or(x, y), torch.logical_not(x)],
    "conversions": lambda x, y: [x.to(d) for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool)],
}  # fmt: skip
ROUNDED = {  # torch fuses some products with a sum
    "products": lambda x, y: [torch.add(x, y, alpha=2), torch.addcmul(x, x, x), torch.addcdiv(x, x, x.sign() + 2),
                              torch.addcmul(x, x, x.abs(), value=0.5), x.lerp(x * 2, 0.25), x.lerp(x * 2, 0.75), x**3, x**4],
    "powers": lambda x, y: [x.sqrt(), x.rsqrt(), x**0.5, x**-0.5, x**-1, x.abs() ** 1.25, x.abs() ** y],
    "functions": lambda x, y: [x.exp(), x.exp2(), x.expm1(), x.abs().log(), x.abs().log2(), x.abs().log1p(), x.abs().log10(),
                               x.tanh(), x.erf(), x.sigmoid(), torch.atan2(x, y), x.atan()],
    "waves": lambda x, y: [(x.sign() + 0.1).sin(), (x.sign() + 0.1).cos()],
}  # fmt: skip


def equal(ours, theirs):
    """Bit for bit, but for the payload of a NaN."""
    return ours.dtype == theirs.dtype and torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(
        torch.nan_to_num(ours, nan=0.0), torch.nan_to_num(theirs, nan=0.0)
    ) and torch.equal(ours.signbit() & ~ours.isnan(), theirs.signbit() & ~theirs.isnan())  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_exact_operations_give_torchs_bits(name, dtype):
    columns = numbers_of(dtype)
    for k, (ours, theirs) in enumerate(zip(executed(EXACT[name], columns, CppBackend), EXACT[name](*columns), strict=True)):
        assert equal(ours, theirs), (name, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ROUNDED)
def test_functions_are_as_exact_as_torchs(name, dtype):
    columns = [x[-500:] if name == "products" else x for x in numbers_of(dtype)]
    exact = ROUNDED[name](*(x.double() for x in columns))
    ours = executed(ROUNDED[name], columns, CppBackend)
    for k, (a, b) in enumerate(zip(ours, exact, strict=True)):
        assert torch.allclose(
            a, b.to(dtype), rtol=8 * unit(dtype), atol=4 * unit(dtype) if name == "products" else 1e-44, equal_nan=True
        ), (name, k)


def test_functions_of_float32_are_rounded_once():
    """A series is off by less than a thousandth of what rounding is, over all magnitudes."""
    size = torch.logspace(-44, 38.5, 60_000, dtype=torch.float64).clamp(max=3.4e38).float()
    x = torch.cat([size, -size, torch.linspace(-30, 30, 60_001)])
    functions = lambda x: [x.exp(), x.abs().log(), x.abs().log1p(), x.clamp(-1, 1).log1p(), x.tanh()]  # noqa: E731
    for k, (ours, exact) in enumerate(zip(executed(functions, [x], CppBackend), functions(x.double()), strict=True)):
        finite = exact.abs() < 3.4e38
        near = (ours.double() - exact).abs() <= 1.002 * unit(torch.float32) * exact.abs() + 1e-45
        assert bool(near[finite].all()) and torch.equal(ours[~finite], exact[~finite].float()), k


INTEGERS = {
    torch.int8: [-128, -127, -1, 0, 1, 2, 63, 127], torch.int16: [-(2**15), -1, 0, 1, 255, 256, 2**15 - 1],
    torch.int32: [-(2**31), -1, 0, 1, 65535, 65536, 2**31 - 1], torch.int64: [-(2**63), -1, 0, 1, 2**32, 2**63 - 1],
    torch.uint8: [0, 1, 127, 128, 255],
}  # fmt: skip


def of_integers(x, y):
    return [x + y, x - y, x * y, -x, x & y, x | y, x ^ y, ~x, x << 3, x >> 3, x & 15, x | 15, torch.maximum(x, y),
            torch.minimum(x, y), x > y, x == 1, x.abs(), x.clamp(0, 5), x.sign(), x.to(torch.float32), x.to(torch.int32),
            x.to(torch.int8), x.to(torch.int64), x * 0.5, x / 3, torch.where(x > 0, x, 7), x > 0.5]  # fmt: skip


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_wrap_around_as_torchs_do(dtype):
    base = torch.tensor(INTEGERS[dtype], dtype=dtype)
    columns = [base.repeat_interleave(len(base)), base.repeat(len(base))]
    for k, (a, b) in enumerate(zip(executed(of_integers, columns, CppBackend), of_integers(*columns), strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), k


def test_bits_are_reinterpreted():
    def function(x):
        raw = x.view(torch.int32)
        high = (raw >> 16).to(torch.int16)
        return [raw, high, high.view(torch.bfloat16), high.view(torch.float16).to(torch.float32), (raw ^ 1).view(torch.float32)]

    columns = numbers_of(torch.float32)[:1]
    for a, b in zip(executed(function, columns, CppBackend), function(*columns), strict=True):
        assert torch.equal(*(t.view({2: torch.int16, 4: torch.int32}[t.dtype.itemsize]) for t in (a, b)))


def test_every_half_and_bfloat16_converts_and_rounds_as_torchs_do():
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    between = torch.arange(2**16).to(torch.int32).repeat(3) << 16
    between[2**16 :] += torch.tensor([0x7FFF, 0x8001]).repeat_interleave(2**16).to(torch.int32)

    def widened(x):
        return [x.view(torch.bfloat16).to(torch.float32), x.view(torch.float16).to(torch.float32)]

    def rounded(x):
        y = x.view(torch.float32)
        return [y.to(torch.bfloat16), y.to(torch.float16), (y * 2.0**-110).to(torch.float16)]

    for function, column in ((widened, every), (rounded, between)):
        for a, b in zip(executed(function, [column], CppBackend), function(column), strict=True):
            assert equal(a, b)


def test_numbers_that_schedules_change_are_rounded_as_torch_rounds_them():
    def function(x, s):
        return [x * s, x + s, x > s, torch.where(x > 0, s, x).to(torch.float32), torch.maximum(x, s), x.lerp(x * 2, s)]

    columns = numbers_of(torch.float32)[:1]
    ours, theirs = (executed(function, columns, backend, [0.1]) for backend in (CppBackend, EagerBackend))
    assert all(equal(a, b) for a, b in zip(ours[:-1], theirs[:-1], strict=True))
    assert torch.allclose(
        ours[-1], theirs[-1], rtol=4 * unit(torch.float32), equal_nan=True
    )  # torch's fuses a product and a sum


def test_what_it_does_not_know_is_named_with_the_line():
    with pytest.raises(
        CompileError, match=r"C\+\+ generator does not support aten.digamma.default, used at .*test_cpp_operations"
    ):
        executed(lambda x: [x.digamma()], numbers_of(torch.float32)[:1], CppBackend)
    assert aten.digamma.default not in OPERATIONS


def scaled():
    """A program that stores each block's largest magnitude, and each element as a share of it and of the block's last one."""
    graph, element, block = fx.Graph(), torch.float32, torch.bfloat16

    def node(target, arguments, kind, dtype):
        made = graph.placeholder(target) if arguments is None else graph.call_function(target, arguments)
        made.meta.update(kind=kind, dtype=dtype, where="here")
        return made

    x, old = node("x", None, "element", element), node("old", None, "block", block)
    magnitude = node(aten.abs.default, (x,), "element", element)
    largest = node(torch.ops.hbcore.block_amax.default, (magnitude,), "block", element)
    stored = node(aten._to_copy.default, (largest,), "block", block)
    both = node(aten.add.Tensor, (largest, node(aten._to_copy.default, (old,), "block", element)), "block", element)
    share = node(aten.div.Tensor, (x, node(torch.ops.hbcore.spread.default, (both, x), "element", element)), "element", element)
    graph.output((share, stored))
    phase = Phase(graph, ("param", "scale"), (), (), False, ("param", "scale"), ())
    dtypes = {"param": element, "grad": element, "scale": block}
    return Program("blocks", dtypes, (), module_of(nothing()), (), (phase,), per_block=frozenset({"scale"}))


def nothing():
    graph = fx.Graph()
    graph.output(())
    return graph


@pytest.mark.parametrize("poison", [None, math.nan, math.inf])
def test_blocks_have_their_largest_value_and_spread_it(poison):
    sizes = (32, 96, 16384, 16384 + 64, 50016)
    columns = [normal(n, seed=n).float() for n in sizes]
    if poison is not None:
        columns[3][16384 + 40] = poison
    old = [normal(n // 32, seed=n).abs().to(torch.bfloat16) for n in sizes]
    tensors = {"param": [x.clone() for x in columns], "grad": columns, "scale": [s.clone() for s in old]}
    batch = Batch(tensors, [0] * len(sizes), [[0.0]])
    executable = CppBackend().compile(scaled(), batch)
    executable.run(0, batch)
    for x, before, share, scale in zip(columns, old, tensors["param"], tensors["scale"], strict=True):
        largest = x.abs().view(-1, 32).amax(1)
        assert equal(scale, largest.to(torch.bfloat16))
        assert equal(share, (x.view(-1, 32) / (largest + before.float())[:, None]).view(-1))


def test_a_part_of_a_sharded_tensor_knows_the_wholes_size_and_draws_its_bits():
    drawn, rounding, second = "noise.#rule.0", "noise.slot", "noise.other"
    recorder = Recorder(7, blockwise=False)
    x = recorder.placeholder("param", torch.empty(7, device="meta"), "element")
    bits = recorder.placeholder(drawn, torch.empty(7, dtype=torch.int64, device="meta"), "element")
    low = recorder.placeholder(rounding, torch.empty(7, dtype=torch.int32, device="meta"), "element")
    high = recorder.placeholder(second, torch.empty(7, dtype=torch.int32, device="meta"), "element")
    numel = recorder.placeholder("numel", torch.ones((), dtype=torch.float64), "scalar")
    with recorder:
        total = recorder.reduce(x, "sum", Domain.TENSOR, "rule")
        results = {"bits": bits + 0, "low": low + 0, "high": high + 0, "param": x * numel + total}
    results = {name: recorder.node(value) for name, value in results.items()}
    dtypes = {"param": torch.float32, "grad": torch.float32, drawn: torch.int64, rounding: torch.int32}
    dtypes |= {second: torch.int32, "bits": torch.int64, "low": torch.int32, "high": torch.int32}
    bits = shared_words({rounding: 11, second: 9})
    program = split(recorder.graph, results, dtypes, (), (), "parts", frozenset(), bits)
    sizes, starts = (300, 5, 40000), [0, 2**32 - 2, 123]
    made = []
    for backend in (CppBackend, EagerBackend):
        columns = {"param": [normal(n, seed=n).float() for n in sizes], "grad": [torch.zeros(n) for n in sizes]}
        columns |= {name: [torch.zeros(n, dtype=dtypes[name]) for n in sizes] for name in ("bits", "low", "high")}
        batch = Batch(columns, [0] * 3, [[0.0]], keys={drawn: [1, 2**62 + 5, 3], rounding: [4, 5, 6]}, bits=bits)
        batch.numels, batch.starts = [1000.0, 2.0**33, 5e4], starts
        executable = backend().compile(program, batch)
        executable.prepare(batch)
        for k in range(len(program.phases)):
            executable.run(k, batch)
            for r in program.phases[k].reduces:  # as if another rank had contributed
                batch.sums[r.name] = [2 * s for s in batch.sums[r.name]]
        made.append(batch.tensors)
    ours, theirs = made
    assert all(torch.equal(a, b) for name in ("bits", "low", "high") for a, b in zip(ours[name], theirs[name], strict=True))
    assert all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))
        for a, b in zip(ours["param"], theirs["param"], strict=True)
    )
