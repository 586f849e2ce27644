"""The hoisted scalar arithmetic in plain Python is the tensors' arithmetic, bit for bit, or the tensors do it."""

from __future__ import annotations

import importlib.util
import math
import os
import random
import struct
from dataclasses import dataclass

import pytest
import torch
from core.kit import distance, optimizer_of, parameters, run, values
from torch import fx, nn

from hb_adam import SGD, AdamW
from hbcore.api import Transform, hyper
from hbcore.engine.graph import host_scalars as host
from hbcore.engine.graph.host_scalars import as_python

aten = torch.ops.aten
interpreted = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
needs_the_interpreter = pytest.mark.skipif(not interpreted, reason="needs Triton's interpreter")

OPTIONS = {
    "plain": {},
    "decay": {"weight_decay": 0.1, "cautious_weight_decay": True, "maximize": True},
    "mars": {"mars": True},
    "reductions": {"caution": True, "gradient_clipping": "global_rmsnorm_clip", "update_clipping": "l2_clip_"},
    "adaptive": {"update_clipping": "adaptive_gradient_clipping_", "ecc": "bf16+8"},
    "capturable": {"capturable": True, "mars": True, "caution": True},
}
CHAINS = {f"adamw-{name}": (AdamW, options) for name, options in OPTIONS.items()}
CHAINS |= {f"adamw-{d}": (AdamW, {"division_backend": d}) for d in ("eps_add", "atan2", "nan_to_0")}
CHAINS |= {f"sgd-{name}": (SGD, options) for name, options in OPTIONS.items()}
CHAINS |= {
    "sgd-nesterov": (SGD, {"nesterov": True}),
    "sgd-coupled": (SGD, {"weight_decay": 0.1, "decoupled_weight_decay": False}),
}

EDGES = {
    "lr": (0.0, 1.0, 1e-300, 1e300),
    "betas": (0.0, 5e-324, 0.5, 0.9, 1 - 2**-53),
    "momentum": (0.0, 0.9, 1.0, 2.0),
    "dampening": (0.0, 1.0, -3.0),
    "eps": (0.0, 5e-324, 1e-8, 1.0),
    "weight_decay": (0.0, 0.1, 1e300),
    "warmup_steps": (0.0, 1.0, 7.0, 1e6),
    "mars_gamma": (0.0, 0.025, 1e300),
    "beta2_scale": (0.1, 0.8, 1.0),
    "ema_decay": (0.0, 0.001, 1.0),
    "step": (1.0, 2.0, 7.0, 8.0, 2.0**24, 1e9),
    "grad_scale": (1.0, 65536.0, 2.0**-20),
    "found_inf": (0.0, 1.0, 3.0),
    "model_numel": (1.0, 124e6),
}


def program_of(cls, options):
    p = nn.Parameter(torch.zeros(4))
    optimizer = cls([p], **options, compile="eager")
    p.grad = torch.zeros(4)
    optimizer.step()
    [segment] = optimizer.core.plan.segments.values()
    return segment.program


def drawn(name, draw):
    """A likely value of one hyperparameter, or one from the edge of what is allowed."""
    name = name.split(".")[0]
    if draw.random() < 0.3:
        return draw.choice(EDGES[name])
    if name in ("step", "warmup_steps"):
        return float(draw.randint(1, 100_000))
    if name in ("betas", "momentum"):
        return 1 - 10 ** draw.uniform(-6, 0)
    return 10 ** draw.uniform(-10, 3)


def bits(numbers):
    """Numbers as integers: NaN equals NaN, and 0.0 is not -0.0."""
    return ["nan" if math.isnan(n) else struct.pack("d", n).hex() for n in map(float, numbers)]


@pytest.mark.parametrize("chain", CHAINS)
def test_python_computes_the_bits_that_tensors_compute(chain):
    program = program_of(*CHAINS[chain])
    python = as_python(program.host)
    assert python is not None, "every chain here is within Python's reach"
    draw, ran = random.Random(0), 0
    for _ in range(300):
        values = [drawn(name, draw) for name in program.scalar_names]
        tensors = [float(s) for s in program.scalars(values)]
        assert bits(program.numbers(values)) == bits(tensors), dict(zip(program.scalar_names, values, strict=True))
        try:
            assert bits(python(values)) == bits(tensors)
            ran += 1
        except (ArithmeticError, ValueError):
            assert not all(map(math.isfinite, tensors))  # Python raises where tensors have inf or nan, and only there
    assert ran > 200


@pytest.mark.parametrize(
    ("beta", "step"),
    [(0.0, 1.0), (0.9, 1.0), (5e-324, 1.0), (1 - 2**-53, 1.0), (1 - 2**-53, 2.0**40), (0.999, 1e9), (0.0, 2.0**24)],
)
def test_bias_correction_at_its_edges(beta, step):
    program = program_of(AdamW, {})
    values = {"lr": 0.1, "betas.0": beta, "betas.1": beta, "eps": 0.0, "weight_decay": 0.0, "warmup_steps": 0.0}
    values |= {"step": step, "model_numel": 4.0}
    row = [values.get(name, 0.0) for name in program.scalar_names]
    assert bits(program.numbers(row)) == bits(program.scalars(row))
    assert any(n == 1 / (1 - beta**step) for n in program.numbers(row))


@pytest.mark.parametrize("steps", [1.0, 4.0, 5.0, 6.0])
def test_warmup_reaches_the_whole_rate_and_stays(steps):
    program = program_of(SGD, {})
    names = program.scalar_names
    values = {"lr": 0.5, "warmup_steps": 4.0, "step": steps}
    row = [values.get(name, 0.0) for name in names]
    assert 0.5 * min(1.0, steps / 5) in program.numbers(row)
    assert bits(program.numbers(row)) == bits(program.scalars(row))


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"betas.0": 1.0, "step": 3.0}, math.inf),  # 1 / 0
        ({"betas.0": 1e300, "step": 3.0}, 0.0),  # an overflow
        ({"betas.0": -0.5, "step": 0.5}, math.nan),  # a root of what is below zero
    ],
)
def test_where_python_raises_the_tensors_answer(values, wanted):
    program = program_of(AdamW, {})
    row = [{"betas.1": 0.9, "eps": 1.0, "lr": 1.0, **values}.get(name, 0.0) for name in program.scalar_names]
    with pytest.raises((ArithmeticError, ValueError)):
        as_python(program.host)(row)
    numbers = program.numbers(row)
    assert bits([wanted])[0] in bits(map(abs, numbers))
    assert bits(numbers) == bits(program.scalars(row))


# --- each form by itself ------------------------------------------------------------------------------------------------


def graph_of(target, args, inputs, **kwargs):
    """A host graph of one call; ``[i]`` among ``args`` is input number i."""
    graph = fx.Graph()
    places = [graph.placeholder(f"x{i}") for i in range(inputs)]
    call = graph.call_function(target, tuple(places[a[0]] if isinstance(a, list) and a else a for a in args), kwargs)
    graph.output((call,))
    return fx.GraphModule(torch.nn.Module(), graph)


NUMBERS = (0.0, 1.0, -1.0, 0.5, 2.0, 3.7, -2.5, 1e-8, 1e8, 1e-300, 0.1, math.pi)
NEAREST = {aten.sqrt.default, aten.exp.default, aten.expm1.default, aten.log.default}
NEAREST |= {aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor}
"""torch's own may come from a vector library that errs in the last bit. Chains hoist ``beta ** step``, and NAdam the others."""

FORMS = {str(f): f for f in host.FORMS if f not in (aten.full.default, aten.where.self, aten.pow.Scalar)}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_its_operation(form):
    target, seen = FORMS[form], 0
    arguments = [a for a in target._schema.arguments if not a.has_default_value()]
    for a in NUMBERS:
        for b in NUMBERS if len(arguments) == 2 else (0.0,):
            args = [[0], [1] if "Tensor" in str(arguments[-1].type) else b][: len(arguments)]
            graph = graph_of(target, args, 2)
            [wanted] = graph(*(torch.tensor(x, dtype=torch.float64) for x in (a, b)))
            try:
                [number] = as_python(graph)([a, b])
            except (ArithmeticError, ValueError):
                continue
            seen += 1
            if target in NEAREST and math.isfinite(number):
                assert abs(number - float(wanted)) <= math.ulp(number), (a, b)
            else:
                assert bits([number]) == bits([wanted]), (a, b)
    assert seen >= len(NUMBERS) / 2


def test_the_forms_of_several_or_swapped_arguments():
    x = torch.tensor(0.3, dtype=torch.float64)
    for target, args, kwargs in [
        (aten.pow.Scalar, (2.0, [0]), {}),
        (aten.clamp.default, ([0], None, 0.2), {}),
        (aten.clamp.default, ([0], 0.5), {}),
        (aten.clamp.default, ([0],), {"max": 0.2}),
        (aten.clamp.default, ([0],), {"min": 0.5, "max": 0.7}),
        (aten.clamp.Tensor, ([0], [0], [0]), {}),
        (aten.full.default, ([], 0.5), {"dtype": torch.float64}),
        (aten.full.default, ([], 0.5), {"dtype": torch.float64, "device": torch.device("cpu")}),
    ]:
        graph = graph_of(target, args, 1, **kwargs)
        assert bits(as_python(graph)([0.3])) == bits(graph(x)), (target, args, kwargs)
    graph = graph_of(aten.where.self, ([0], [1], [2]), 3)
    assert [as_python(graph)([c, 2.0, 3.0]) for c in (True, False)] == [(2.0,), (3.0,)]


@pytest.mark.parametrize(
    ("target", "kwargs"),
    [
        (aten.hypot.default, {}),
        (aten.add.Tensor, {"alpha": 2}),
        (aten.sub.Tensor, {"alpha": 2}),
        (aten.div.Tensor_mode, {"rounding_mode": "floor"}),
    ],
)
def test_what_has_no_plain_form_is_left_to_the_tensors(target, kwargs):
    assert as_python(graph_of(target, ([0], [1]), 2, **kwargs)) is None


@dataclass(frozen=True)
class Heated(Transform):
    heat: float = hyper(0.3)
    name = "heated"

    def update(self, u, s, c):
        return u * torch.erf(self.heat), {}


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=needs_the_interpreter)])
def test_a_program_without_a_plain_form_runs_on_tensors(backend):
    params = parameters([(5,)])
    [start] = values(params)
    optimizer = optimizer_of(Heated)(params, lr=1.0, compile=backend)
    run(optimizer, params, [[torch.ones(5)]])
    [segment] = optimizer.core.plan.segments.values()
    assert as_python(segment.program.host) is None and optimizer.report.backend == backend
    assert distance(params, [start - math.erf(0.3)]) <= 1e-6
