"""Without a compiler, or with one that fails, training goes on in plain torch; one warning says why."""

from __future__ import annotations

import warnings

import pytest
import torch
from core.kit import backward, copy_gradients, gradients, mlp, parameters, run, same

from hb_adam import SGD, AdamW
from hbcore.engine.backends import select as fallback
from hbcore.errors import CompileError, FallbackWarning


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    torch._dynamo.reset()


@pytest.mark.parametrize("choice", ["inductor", "auto"])
def test_without_a_compiler_plain_torch_runs_and_one_warning_says_why(choice, no_compiler, monkeypatch):
    monkeypatch.setattr(fallback, "WORTH_COMPILING", 1)  # every model is a large one
    model, plain = mlp(), mlp()
    plain_optimizer = AdamW(plain.parameters(), caution=True, compile="eager")
    half = [torch.nn.Parameter(torch.ones(4, dtype=torch.float64))]  # a second segment, which must not warn again
    optimizer = AdamW([*model.parameters(), *half], caution=True, compile=choice)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            backward(plain, step)
            copy_gradients(plain.parameters(), model.parameters())
            half[0].grad = torch.ones_like(half[0])
            optimizer.step()
            plain_optimizer.step()
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
        optimizer.step()
    told = [w for w in caught if issubclass(w.category, FallbackWarning)]
    assert len(told) == 1
    for word in ("inductor", r"C++ compiler", "PATH", "eager", "same results"):
        assert word in str(told[0].message)
    assert same(model.parameters(), plain.parameters())
    assert optimizer.report.backend == "eager"
    assert optimizer.report.compiles == 0
    assert len(optimizer.report.reasons) == 1
    assert "C++ compiler" in str(optimizer.report)
    assert "C++ compiler" in repr(optimizer)


def test_a_small_model_on_a_cpu_does_not_compile_by_itself():
    params = parameters()
    optimizer = AdamW(params)
    run(optimizer, params, gradients(1))
    assert (optimizer.report.backend, optimizer.report.compiles, optimizer.report.reasons) == ("eager", 0, [])


def test_more_optimizers_than_dynamos_limit_all_compile():
    """torch.compile keeps eight graphs for one code object, and gives up on the ninth."""
    torch._dynamo.reset()
    for momentum in range(torch._dynamo.config.recompile_limit + 2):
        params = parameters([(4,)])
        optimizer = SGD(params, momentum=momentum / 10, compile="inductor")
        run(optimizer, params, [[torch.ones(4)]])
        assert (optimizer.report.backend, optimizer.report.reasons) == ("inductor", [])


def test_a_size_that_first_gets_a_gradient_later_is_compiled_then_and_counted():
    shapes = [(4,), (200, 200)]
    small, large = parameters(shapes)
    plain = parameters(shapes)
    optimizer = SGD([small, large], compile="inductor")
    reference = SGD(plain, compile="eager")
    counts = []
    for step in range(3):
        small.grad, plain[0].grad = torch.ones(4), torch.ones(4)
        if step:
            large.grad, plain[1].grad = torch.ones(200, 200), torch.ones(200, 200)
        optimizer.step()
        reference.step()
        counts.append(optimizer.report.compiles)
    assert counts == [1, 2, 2]
    assert all(torch.allclose(p, q, rtol=1e-6) for p, q in zip((small, large), plain, strict=True))


def test_a_compilation_that_fails_later_leaves_no_step_half_done(monkeypatch):
    """A size compiles when it first gets a gradient. If that fails, earlier segments must not have been stepped yet."""
    shapes = [(4,), (200, 200)]
    params, plain = parameters(shapes), parameters(shapes)
    double, plain_double = [parameters([(3,)], torch.float64)[0] for _ in range(2)]
    optimizer = SGD([double, *params], compile="inductor")
    reference = SGD([plain_double, *plain], compile="eager")

    def step(members, optimizer):
        for p in members:
            p.grad = torch.ones_like(p)
        optimizer.step()

    step([double, params[0]], optimizer)
    step([plain_double, plain[0]], reference)

    def broken(*args, **kwargs):
        raise RuntimeError("no room for temporary files")

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", broken)
    with pytest.warns(FallbackWarning, match="no room for temporary files"):
        step([double, *params], optimizer)
    step([plain_double, *plain], reference)
    for p, q in zip([double, *params], [plain_double, *plain], strict=True):
        assert torch.allclose(p, q, rtol=1e-6)
        assert optimizer.state[p]["step"] == reference.state[q]["step"]


def test_with_no_backend_left_the_reason_is_raised_and_nothing_moves(monkeypatch):
    class Broken:
        name = "cpp"

        def compile(self, *args):
            raise CompileError("it is broken")

    monkeypatch.setattr(fallback, "BACKENDS", (Broken,))
    monkeypatch.setattr(fallback, "WORTH_GENERATING", 1)
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = AdamW(params)
    with pytest.raises(CompileError, match="it is broken"):
        run(optimizer, params, gradients(1))
    assert same(params, before)
    assert all(not s or s["step"] == 0 for s in optimizer.state.values())
