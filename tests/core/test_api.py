"""The protocol of rules is API 1.0: what plugins may rely on is written down here, and may only grow (docs/adr/0012)."""

from __future__ import annotations

import dataclasses
import inspect

from hbcore import api
from hbcore.rules.transform import Context, Slot, Transform
from hbcore.rules.views import Block
from hbcore.state.codec import StateCodec

NAMES = {
    "API_VERSION", "Alias", "Block", "CodecSpec", "Composite", "Context", "CoupleDecay", "Domain", "Extension",
    "HyperparameterError", "Momentum", "OptimizerSpec", "OptionError", "Optimizer", "Options", "Parallel", "Route", "Scalar", 
    "ScaleByAdam", "Slot", "State", "Transform", "compute_dtype", "debiased", "ema", "graft", "hookimpl",
    "hyper", "is_matrix", "matrix_view", "zeros",
}  # fmt: skip
CONTEXT = (
    "param", "grad", "step", "divide", "sum", "amax", "numel", "refresh", "probe", "noise", "apply", "products",
)  # fmt: skip
METHODS = {
    "slots": ["self", "param"],
    "scalars": ["self"],
    "rate": ["self", "k"],
    "blocks": ["self", "shape"],
    "working_dtype": ["self", "param"],
    "prime": ["self", "u", "s", "c"],
    "update": ["self", "u", "s", "c"],
    "refresh": ["self", "stacks"],
    "swap": ["self", "param", "s", "training"],
    "hypers": ["self"],
}
ATTRIBUTES = {"name", "version", "domain", "stage", "owns_apply", "primes", "needs", "draws"}


def test_no_name_is_gone():
    assert api.API_VERSION[0] == 1
    assert set(api.__all__) >= NAMES
    assert all(getattr(api, name) is not None for name in api.__all__)


def test_rules_are_called_as_they_were_written():
    assert Context._fields[: len(CONTEXT)] == CONTEXT
    for name, parameters in METHODS.items():
        assert list(inspect.signature(getattr(Transform, name)).parameters)[: len(parameters)] == parameters
    assert all(hasattr(Transform, name) for name in ATTRIBUTES)


def test_slots_blocks_and_codecs_keep_their_shape():
    assert [f.name for f in dataclasses.fields(Slot)][:4] == ["shape", "fill", "basis", "exact"]
    assert Block._fields[:3] == ("start", "batch", "shape")
    assert list(inspect.signature(StateCodec.parts).parameters) == ["self", "slot", "dtype"]
    assert list(inspect.signature(StateCodec.read).parameters) == ["self", "stored", "slot", "dtype"]
    assert list(inspect.signature(StateCodec.write).parameters) == ["self", "stored", "slot", "value", "noise"]
