"""Matrix rules in the engine: inputs and results do not depend on the other members of the stack."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from core.kit import combined, distance, run
from torch import Tensor, nn

from hb_muon import Muon
from hb_muon.rules import Orthogonalize
from hb_psgd import PSGDKron
from hb_soap import SOAP
from hbcore.api import Block, Context, Domain, Optimizer, Route, Slot, State, Transform, hyper, is_matrix, matrix_view, zeros
from hbcore.engine.backends.triton.launch_tables import Tables
from hbcore.engine.stacks import stack as stack_module
from hbcore.engine.stacks.rule_call import Arguments
from hbcore.errors import OptionError, RuleError

SHAPES = ((6, 6), (6, 6), (5, 6), (6, 6), (11, 3, 2, 2), (7,), (), (1, 2), (5, 6))
"""Every gradient determines all but at most one of SOAP's eigenvectors; two undetermined ones would be arbitrary."""
FAMILIES = {
    "muon": (Muon, {}),
    "muon-clipped": (Muon, {"update_clipping": "global_l2norm_clip", "gradient_clipping": "l2_clip_", "mars": True}),
    "soap": (SOAP, {"precondition_frequency": 3}),
    "soap-caution": (SOAP, {"caution": True, "merge_dims": False, "weight_decay": 0.1}),
    "psgd": (PSGDKron, {}),
    "psgd-all-diag": (PSGDKron, {"memory_save_mode": "all_diag", "exp_avg_input": False}),
}


@dataclass(frozen=True)
class Averaged(Transform):
    """Adds the mean of its rows to each matrix and stores the sum of its inputs, which every second step doubles."""

    share: float = hyper(1.0)
    split: tuple[int, ...] = ()
    name = "averaged"
    domain = Domain.MATRIX

    def blocks(self, shape: torch.Size) -> tuple[Block, ...]:
        return matrix_view(shape, split=self.split)

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"seen": zeros(param), "count": Slot(torch.Size(), fill=5.0, exact=True)}

    def rate(self, k: int) -> float:
        return 0.5

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        out = u + self.share * u.mean(-2, keepdim=True)
        return out * (2 if c.refresh else 1), {"seen": s["seen"] + u, "count": s["count"] + c.step}


class Averaging(Optimizer):
    def __init__(self, params: Any, lr: float = 0.1, share: float = 1.0, split: tuple[int, ...] = (), **options: Any) -> None:
        super().__init__(params, {"lr": lr, "share": share, "split": split}, options)

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (Route(is_matrix, (Averaged(h.share, h.split),)),)


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def gradients(steps, shapes=SHAPES, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes] for _ in range(steps)]


def test_a_matrix_rule_sees_matrices_and_its_state_is_the_parameters():
    params, grads = parameters(((4, 3), (4, 3), (5,))), gradients(4, ((4, 3), (4, 3), (5,)))
    optimizer = Averaging(params, lr=0.5, compile="eager")
    expected = [p.detach().clone() for p in params]
    for k, step in enumerate(grads, start=1):
        run(optimizer, params, [step])
        for i, g in enumerate(step):
            u = g if g.ndim == 1 else (g + g.mean(0)) * (2 if k % 2 == 0 else 1)
            expected[i] -= 0.5 * u
    assert distance(params, expected) < 1e-6
    for i in range(2):
        state = optimizer.state[params[i]]
        assert torch.allclose(state["seen"], sum(step[i] for step in grads), atol=1e-6)
        assert state["count"] == 5 + 1 + 2 + 3 + 4
        assert state["step"] == 4
        assert set(state) == {"seen", "count", "step"}
    assert set(optimizer.state[params[2]]) == {"step"}


@pytest.mark.parametrize(
    ("family", "backend"),
    combined(FAMILIES, ["eager", "cpp", "inductor", "triton"], compiled=[("soap-caution", "inductor")]),
)
def test_backends_agree(family, backend, monkeypatch):
    cls, options = FAMILIES[family]
    exact = trained(cls, options, "eager", torch.float64)
    if cls is Muon:  # whose iteration in bfloat16 is no match for float64
        exact, options = trained(cls, options, "eager"), options
    ours = trained(cls, options, backend)
    tolerance = {"muon": 1e-3, "muon-clipped": 1e-3}.get(family, 2e-5)
    assert distance(ours, exact) < tolerance


def trained(cls, options, backend, dtype=torch.float32, steps=6, chosen=SHAPES):
    params = parameters(chosen, dtype)
    optimizer = cls(params, lr=0.01, compile=backend, **options)
    run(optimizer, params, gradients(steps, chosen, dtype))
    return params


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_in_one_slab_do_not_know_of_each_other(family):
    """multi_tensor=False gives each parameter its own segment; a parameter trained alone must give the same result too."""
    cls, options = FAMILIES[family]
    together = trained(cls, options, "eager")
    apart = trained(cls, {**options, "multi_tensor": False}, "eager")
    assert distance(together, apart) < 1e-6
    if "clip" in family:
        return  # a global clip is about all of them
    for i in (0, 4, 5):
        params = parameters()
        optimizer = cls(
            [{"params": params[:i]}, {"params": [params[i]]}] if i else [params[0]], lr=0.01, compile="eager", **options
        )
        for step in gradients(6):
            params[i].grad = step[i].clone()
            optimizer.step()
        if cls is not PSGDKron:  # whose probes are drawn by the parameter's place
            assert distance([params[i]], [together[i]]) < (1e-3 if cls is Muon else 1e-5)


@pytest.mark.parametrize("family", ["muon", "soap", "psgd"])
def test_rows_without_a_gradient_stay_as_they_are(family):
    cls, options = FAMILIES[family]
    params, steps = parameters(), gradients(8)
    optimizer = cls(params, lr=0.01, compile="eager", **options)
    run(optimizer, params, steps[:3])
    quiet = {0, 4}
    for step in steps[3:]:
        before = {i: (params[i].detach().clone(), copy.deepcopy(dict(optimizer.state[params[i]]))) for i in quiet}
        for i, (p, g) in enumerate(zip(params, step, strict=True)):
            p.grad = None if i in quiet else g.clone()
        optimizer.step()
        for i, (value, state) in before.items():
            assert torch.equal(params[i], value)
            assert all(torch.equal(state[k], optimizer.state[params[i]][k]) for k in state)
    assert any("sat a step out" in note for note in optimizer.report.notes)
    if cls is not PSGDKron:
        alone = parameters()
        reference = cls([alone[1]], lr=0.01, compile="eager", **options)
        run(reference, [alone[1]], [[step[1]] for step in steps])
        assert distance([params[1]], [alone[1]]) < (1e-3 if cls is Muon else 1e-5)


@pytest.mark.parametrize("family", ["muon", "soap", "psgd"])
def test_a_late_parameter_opens_a_slab_and_moves_nobodys_state(family):
    cls, options = FAMILIES[family]
    params, steps = parameters(), gradients(6)
    optimizer = cls(params[:3], lr=0.01, compile="eager", **options)
    run(optimizer, params[:3], [s[:3] for s in steps[:3]])
    held = {i: dict(optimizer.state[params[i]]) for i in range(3)}
    params[3].grad = None
    optimizer.param_groups[0]["params"].append(params[3])
    run(optimizer, params[:4], [s[:4] for s in steps[3:]])
    for i, state in held.items():
        assert all(optimizer.state[params[i]][name] is tensor for name, tensor in state.items() if name != "step")
        assert optimizer.state[params[i]]["step"] == (5 if cls is SOAP else 6)
    assert optimizer.state[params[3]]["step"] == (2 if cls is SOAP else 3)


@dataclass(frozen=True)
class AveragedTogether(Averaged):
    """The same, recording the shapes of each ``update_stacks`` call in ``heard``."""

    heard: Any = None
    lazy: bool = False

    def update_stacks(self, stacks):
        self.heard.append([tuple(u.shape) for u, _, _ in stacks])
        results = (self.update(*stack) for stack in stacks)
        return results if self.lazy else list(results)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_rule_is_handed_all_stacks_that_take_the_same_step(monkeypatch, lazy):
    heard: list[Any] = []
    chain = lambda h: (Route(is_matrix, (AveragedTogether(h.share, h.split, heard, lazy),)),)  # noqa: E731
    params, steps = parameters(), gradients(4)
    plain = parameters()
    steps[2][0] = steps[2][8] = None
    run(Averaging(plain, compile="eager"), plain, steps)
    monkeypatch.setattr(Averaging, "chain", staticmethod(chain))
    run(Averaging(params, compile="eager"), params, steps)
    assert distance(params, plain) == 0
    whole = [(3, 6, 6), (2, 5, 6), (1, 11, 12)]
    assert heard[:2] == [whole] * 2
    assert sorted(heard[2]) == [(1, 5, 6), (1, 11, 12), (2, 6, 6)]
    late = [(1, 5, 6), (1, 6, 6)]  # those that missed a step
    assert sorted(map(sorted, heard[3:])) == [late, [(1, 5, 6), (1, 11, 12), (2, 6, 6)]]


def test_each_result_is_written_before_the_next_is_computed(monkeypatch):
    """Otherwise a rule that processes its stacks one by one would hold the results of all of them."""
    order: list[str] = []
    update, keep = Averaged.update, Arguments.keep

    def told(name, function):
        def wrapped(*args, **kwargs):
            order.append(name)
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(Averaged, "update", told("update", update))
    monkeypatch.setattr(Arguments, "keep", told("keep", keep))
    params, steps = parameters(), gradients(1)
    run(Averaging(params, compile="eager"), params, steps)
    assert order == ["update", "keep"] * 3


def test_rows_are_split_and_several_slabs_serve_one_parameter():
    fused, parts = parameters(((10, 4), (4, 4), (3, 4), (3, 4)))[:1], parameters(((4, 4), (3, 4), (3, 4)))
    with torch.no_grad():
        for part, rows in zip(parts, fused[0].split([4, 3, 3]), strict=True):
            part.copy_(rows)
    one = Averaging(fused, split=(4, 3, 3), compile="eager")
    three = Averaging(parts, compile="eager")
    for [g] in gradients(4, ((10, 4),)):
        run(one, fused, [[g]])
        run(three, parts, [[*g.split([4, 3, 3])]])
    assert distance(fused, [torch.cat(list(parts))]) < 1e-6
    names = set(one.state[fused[0]])
    assert names == {"seen@0", "seen@1", "count@0", "count@1", "step"}
    assert one.state[fused[0]]["seen@1"].shape == (2, 3, 4)


def test_channels_last_convolutions_are_seen_in_logical_order():
    shape = (5, 3, 2, 2)
    plain, lasting = (
        parameters((shape,)),
        [nn.Parameter(parameters((shape,))[0].detach().to(memory_format=torch.channels_last))],
    )
    steps = gradients(5, (shape,))
    run(SOAP(plain, compile="eager"), plain, steps)
    optimizer = SOAP(lasting, compile="eager")
    run(optimizer, lasting, steps)
    assert distance(plain, lasting) < 1e-6
    assert lasting[0].is_contiguous(memory_format=torch.channels_last)


def test_steady_steps_allocate_nothing_that_stays_and_stack_nothing(monkeypatch):
    shapes = ((256, 256),) * 4
    params, steps = parameters(shapes), gradients(6, shapes)
    optimizer = Averaging(params, compile="eager", consume_grad=False)
    run(optimizer, params, steps[:3])
    storages = {t.untyped_storage().data_ptr() for s in optimizer.state.values() for t in s.values()}
    for name in ("stack", "cat", "clone"):
        monkeypatch.setattr(torch, name, lambda *a, **k: pytest.fail("a step stacks"))
    run(optimizer, params, steps[3:])
    assert {t.untyped_storage().data_ptr() for s in optimizer.state.values() for t in s.values()} == storages


def test_state_is_small_when_one_parameter_is_pickled():
    import pickle

    shapes = ((32, 32),) * 8
    params = parameters(shapes)
    optimizer = Averaging(params, compile="eager")
    run(optimizer, params, gradients(2, shapes))
    assert len(pickle.dumps(optimizer)) < 8 * 32 * 32 * 4 * 2 * 1.2 + 8000


@pytest.mark.parametrize("family", ["soap", "psgd"])
@pytest.mark.parametrize("codec", ["bf16+8", "bf16+16"])
def test_codecs_store_what_is_as_large_as_the_parameter_and_leave_factors_exact(family, codec):
    cls, options = FAMILIES[family]
    params = parameters()
    optimizer = cls(params, lr=0.01, compile="eager", ecc=codec, **options)
    run(optimizer, params, gradients(5))
    state = optimizer.state[params[0]]
    assert state["exp_avg"].dtype == torch.bfloat16
    assert state["exp_avg#ecc"].dtype in (torch.int8, torch.int16)
    assert state["Q_0"].dtype == torch.float32
    assert distance(params, trained(cls, options, "eager", steps=5)) < (1e-3 if codec == "bf16+8" else 1e-5)


def test_capturable_steps_are_refused_by_name():
    with pytest.raises(OptionError, match=r"capturable=True.*soap"):
        SOAP(parameters(((4, 4),)), capturable=True)


def test_a_rule_that_reads_what_it_did_not_ask_for_is_told_so():
    @dataclass(frozen=True)
    class Nosy(Averaged):
        def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
            return u * c.grad.mean(), {}

    class Curious(Averaging):
        @staticmethod
        def chain(h: Any) -> tuple[Transform, ...]:
            return (Nosy(h.share, h.split),)

    params = parameters(((4, 3),))
    with pytest.raises(RuleError, match="needs = frozenset"):
        run(Curious(params, compile="eager"), params, gradients(1, ((4, 3),)))


def test_probes_leave_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    trained(PSGDKron, {}, "eager", steps=2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_promote_hands_updates_over_in_the_compute_dtype(monkeypatch, dtype):
    heard: list[torch.dtype] = []
    update = Orthogonalize.update_stacks

    def told(self, stacks):
        heard.extend(u.dtype for u, _, _ in stacks)
        return update(self, stacks)

    monkeypatch.setattr(Orthogonalize, "update_stacks", told)
    for promote in (False, True):
        params, steps = parameters(((4, 6),), dtype), gradients(1, ((4, 6),), dtype)
        run(Muon(params, promote=promote), params, steps)
    asked = torch.float64 if dtype == torch.float64 else torch.bfloat16
    assert heard == [asked, torch.float64 if dtype == torch.float64 else torch.float32]


def test_products_are_exact_whatever_the_model_asked_torch_for():
    seen = []

    @dataclass(frozen=True)
    class Watching(Averaged):
        def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
            seen.append(torch.get_float32_matmul_precision())
            return u, {}

    class Watcher(Averaging):
        @staticmethod
        def chain(h: Any) -> tuple[Transform, ...]:
            return (Watching(h.share, h.split),)

    params = parameters(((4, 3),))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        run(Watcher(params, compile="eager"), params, gradients(1, ((4, 3),)))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"]


@pytest.mark.parametrize(
    ("family", "backend"),
    combined(["muon", "soap-caution", "psgd"], ["eager", "triton", "cpp", "inductor"]),
)
def test_stacks_give_their_memory_back_between_steps(monkeypatch, family, backend):
    """As on a GPU: steps do not depend on the memory's content in between, nor on its address afterwards."""
    cls, options = FAMILIES[family]
    results, held = [], []
    for lent in ((), ("cpu",)):
        monkeypatch.setattr(stack_module, "LENT", lent)
        params, steps = parameters(), gradients(6)
        steps[3][1] = steps[4][8] = None
        optimizer = cls(params, lr=0.01, compile=backend, **options)
        for grads in steps:
            run(optimizer, params, [grads])
            inputs = [t for level in optimizer.core.plan.layout.levels for stack in level.stacks for t in stack.inputs.values()]
            assert inputs
            assert all((t.untyped_storage().size() == 0) == bool(lent) for t in inputs)
            # other tensors take the memory and write to it
            held.append([torch.full(t.shape, torch.nan, dtype=t.dtype) for t in inputs])
        results.append([p.detach().clone() for p in params])
    assert all(map(torch.equal, *results))


def test_tables_follow_tensors_that_moved(monkeypatch):
    monkeypatch.setattr(stack_module, "LENT", ("cpu",))
    followed: list[int] = []
    follow = Tables.follow
    monkeypatch.setattr(Tables, "follow", lambda self: (followed.append(self.batch.moves - self.moves), follow(self)))
    params, steps, held = parameters(), gradients(6), []
    optimizer = Muon(params, compile="triton")
    for grads in steps:
        run(optimizer, params, [grads])
        inputs = [t for level in optimizer.core.plan.layout.levels for stack in level.stacks for t in stack.inputs.values()]
        held.append([torch.empty_like(t) for t in inputs])  # these take the freed memory, so the stacks must move
    assert optimizer.report.backend == "triton"
    assert any(followed)
