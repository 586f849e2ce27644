"""Checks of accuracy, memory, and independence of the compiler."""

from __future__ import annotations

import gc
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import SkipTest

import torch
from torch import Tensor, nn

from hbcore.errors import FallbackWarning
from hbcore.introspect import describe
from hbcore.testing import expect
from hbcore.testing.subject import Check, Subject


def without_a_compiler_the_result_is_the_same(subject: Subject) -> None:
    """If this fails, machines without a C++ compiler cannot train, or get different results."""
    eager = subject.mlp(compile="eager")
    eager.train(3)
    with _no_compiler(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trial = subject.mlp(compile="inductor")
        with expect.working("three steps with compile='inductor' and no C++ compiler"):
            trial.train(3)
    found = [str(w.message) for w in caught if issubclass(w.category, FallbackWarning)]
    assert len(found) == 1, f"expected one FallbackWarning without a C++ compiler, found {len(found)}: {found}"
    expect.same_trial(trial, eager, "three steps without a C++ compiler, against compile='eager'")


def every_rule_is_fused(subject: Subject) -> None:
    """If this fails, parameters are stepped one by one, far slower, and sharding them is an error."""
    trial = subject.loose((6, 4), (5,), (2, 3, 2), compile="eager")
    with expect.working("two steps"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        trial.train(2)
    found = [reason for reason in trial.optimizer.report.reasons if "cannot be fused" in reason]
    assert not found, f"expected every rule to be one graph, found that {'; '.join(found)}"


def generated_kernels_agree(subject: Subject) -> None:
    """If this fails, training on a GPU takes other steps than on a CPU. Runs where ``TRITON_INTERPRET=1`` is set."""
    try:
        from hbcore.engine.backends.triton.device_lib import INTERPRETED
    except ImportError:
        raise SkipTest("Triton is not installed") from None
    if not INTERPRETED:
        raise SkipTest("set TRITON_INTERPRET=1 to run kernels on the CPU")
    eager, triton = (subject.loose((6, 4), (5,), dtype=torch.float64, compile=backend) for backend in ("eager", "triton"))
    for trial in (eager, triton):
        trial.train(3)
    assert "eager" not in triton.optimizer.report.backend, (
        f"expected kernels for every part of the step, found {triton.optimizer.report.reasons}"
    )
    expect.close(triton.values(), eager.values(), 1e-10, "three steps with compile='triton', against compile='eager'")


@contextmanager
def _no_compiler() -> Iterator[None]:
    """Hide all compilers from the enclosed code."""
    saved = {name: os.environ.pop(name) for name in ("PATH", "CXX") if name in os.environ}
    with tempfile.TemporaryDirectory() as empty:
        os.environ["PATH"] = empty
        try:
            yield
        finally:
            del os.environ["PATH"]
            os.environ.update(saved)


def bfloat16_weights_follow_small_updates(subject: Subject) -> None:
    """If this fails, bfloat16 weights stop learning when updates are smaller than half of their last bit."""
    means = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, ones = nn.Module(), torch.ones(512, dtype=dtype)
        model.register_parameter("weight", nn.Parameter(torch.cat([ones, -ones])))  # orthogonal to the gradient, for OrthoGrad
        trial = subject.trial(model, lr=1e-4, stochastic_rounding=True)
        for _ in range(300):
            trial.step(lambda p=trial.params["weight"]: p.float().sum())  # type: ignore[misc]
        means[dtype] = -float(trial.params["weight"].detach().double().mean())
    exact, found = means[torch.float32], means[torch.bfloat16]
    # Elements move by whole last bits, and the fewer do, the farther off chance takes the mean: steps of unit norm are small.
    chance = math.sqrt(abs(exact) * 2.0**-7 / 1024)
    assert abs(found - exact) <= max(0.05 * abs(exact), 4 * chance), (
        f"expected the mean of bfloat16 weights to move by {exact:g} in 300 small steps with stochastic_rounding=True, like "
        f"that of float32 weights; found {found:g}"
    )


def memory_is_as_described(subject: Subject) -> None:
    """If this fails, a run that should fit into memory, by the published bytes per parameter, runs out of memory."""
    trial = subject.loose((32, 32), (32, 32))
    trial.train(3)
    measured, live = _state_bytes(trial.optimizer), _live_bytes()
    wanted = _described(subject) * sum(p.numel() for p in trial.params.values())
    assert abs(measured - wanted) <= 0.1 * wanted, f"expected {wanted:g} bytes of state, as documented; found {measured}"
    trial.train(12)
    later, grown = _state_bytes(trial.optimizer), _live_bytes() - live
    assert later == measured, f"expected the state to stay at {measured} bytes, found {later} twelve steps later"
    assert grown < 10_000, f"expected no growth of tensors in memory after step 3, found {grown} bytes more twelve steps later"


def _described(subject: Subject) -> float:
    """The documented bytes of state per parameter, with the subject's options; without slots that are derived from others."""
    slots = describe(subject.cls, **subject.options)["slots"]
    return float(sum(slot["bytes_per_parameter"] for slot in slots if not slot["derived"]))


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state, without step counters."""
    slots = [v for s in optimizer.state.values() for k, v in s.items() if isinstance(v, Tensor) and k != "step"]
    return sum(t.numel() * t.element_size() for t in slots)


def _live_bytes() -> int:
    """Bytes of all tensors that the garbage collector tracks."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]  # isinstance() would trigger lazy modules
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}.values())


def capturable_steps_are_the_same(subject: Subject) -> None:
    """If this fails, capturing the training step in a CUDA graph changes the result."""
    plain, captured = subject.mlp(), subject.mlp(capturable=True)
    for t in (plain, captured):
        t.train(5)
    expect.close(captured.values(), plain.values(), 1e-6, "five steps with capturable=True")


CHECKS = (
    Check(every_rule_is_fused, stored=True),
    Check(generated_kernels_agree, stored=True),
    Check(without_a_compiler_the_result_is_the_same),
    Check(bfloat16_weights_follow_small_updates, excludes=frozenset({"matrix"}), stored=True),
    Check(memory_is_as_described, stored=True),
    Check(capturable_steps_are_the_same, needs=frozenset({"capturable"}), stored=True),
)
