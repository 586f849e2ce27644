"""``offload="cpu"``: state in host memory, on its way to the device and back within a step. Here the device is the CPU, too:
everything but streams and pinning is as on a GPU, for which there is ``tests/gpu/test_offload.py``."""

from __future__ import annotations

import copy
import gc
import math
import pickle

import pytest
import torch
from core.kit import SHAPES, backward, convnet, gradients, loss_of, mlp, one_of_each, parameters, run, train
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import hbcore
from hb_adam import SparseAdam
from hbcore import SplitOpt
from hbcore.engine import offload
from hbcore.errors import OptionError
from hbcore.testing import Subject

EVERY = sorted({*hbcore.list_optimizers()} - {"SparseAdam"})


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """State of parameters on a CPU is offloaded too, in shares of a few elements."""
    monkeypatch.setattr(offload, "APPLIES", ("cuda", "cpu"))
    monkeypatch.setattr(offload, "SHARE", 256)
    monkeypatch.setattr(offload, "RESIDENT", 4 * 256)


@pytest.fixture
def opened(monkeypatch):
    """The twins that have memory, and the most bytes that they had at once."""
    found, most = {}, [0]
    take, give = offload.Twin.open, offload.Twin.close

    def taking(twin):
        take(twin)
        found[twin] = twin.size
        most[0] = max(most[0], sum(found.values()))

    def giving(twin):
        give(twin)
        found.pop(twin, None)

    monkeypatch.setattr(offload.Twin, "open", taking)
    monkeypatch.setattr(offload.Twin, "close", giving)
    return found, most


def tensors(optimizer):
    """Every tensor in an optimizer's state, in order."""
    cores = [child.core for child in getattr(optimizer, "children", [optimizer])]
    groups = [group for core in cores for group in core.groups]
    found = [(core.state.get(p, {}), p) for core in cores for group in core.groups for p in group["params"]]
    assert groups
    return [
        t for slots, p in found for t in [p.detach(), *(slots[name] for name in slots if isinstance(slots[name], torch.Tensor))]
    ]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=7), b.nan_to_num(nan=7)) for a, b in zip(ours, theirs, strict=True)
    )


def twins_of(optimizer):
    plan = optimizer.core.plan
    stacks = [stack for m in plan.members.values() for view in m.views for _, stack, _ in view.runs]
    members = [m for whole in plan.members.values() for m in (whole, *whole.pieces)]
    return [t for m in members for t in m.twins.values()] + [t for s in stacks for t in s.twins.values()]


def trained(name, backend, **options):
    subject = Subject(hbcore.get(name), hbcore.info(name).spec.capabilities, {"compile": backend})
    trial = subject.mlp(**options)
    trial.train(6)
    return trial.optimizer


BACKENDS = [*(("eager", name) for name in EVERY), *((b, n) for b in ("triton", "cpp") for n in ("AdamW", "SFAdamW", "SOAP"))]
MARKED = {p.values[0]: p.marks for p in one_of_each(EVERY)}


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:.*max_lr")
@pytest.mark.parametrize(
    ("backend", "name"), [pytest.param(b, n, marks=MARKED[n] if b == "eager" else ()) for b, n in BACKENDS]
)
def test_a_run_is_the_same_bit_for_bit(name, backend, opened):
    if backend == "triton" and not pytest.importorskip("hbcore.engine.backends.triton.device_lib").INTERPRETED:
        pytest.skip("runs under Triton's interpreter")
    plain, away = trained(name, backend), trained(name, backend, offload="cpu")
    assert same(tensors(plain), tensors(away))
    ours, theirs = away.report, plain.report
    assert (ours.backend, ours.notes, ours.reasons, ours.programs) == (
        theirs.backend, theirs.notes, theirs.reasons, theirs.programs,
    )  # fmt: skip
    assert not opened[0]
    for child in getattr(away, "children", [away]):
        assert all(t.tensor.untyped_storage().nbytes() == 0 for t in twins_of(child))


@pytest.mark.parametrize("name", ["AdamW", "SFAdamW", "Muon"])
@pytest.mark.parametrize("clip", [None, ("l2_clip_", 0.1)])
def test_the_memory_of_elementwise_state_is_that_of_a_few_shares(name, clip, opened):
    shapes = ((10, 8),) * 20
    params = parameters(shapes)
    optimizer = hbcore.get(name)(params, lr=0.01, offload="cpu", compile="eager", gradient_clipping=clip)
    run(optimizer, params, gradients(3, shapes))
    twins = twins_of(optimizer)
    assert sum(t.size for t in twins) >= 20 * 80 * 4 > opened[1][0] > 0
    assert opened[1][0] <= (offload.RESIDENT if clip is None else 2 * 640), "sums over the model need whole tensors"
    assert all(t.tensor.untyped_storage().nbytes() == 0 for t in twins)


def test_state_that_is_too_much_for_one_share_comes_in_pieces(opened):
    params = parameters(((40, 32), (5,)))
    optimizer = hbcore.get("AdamW")(params, lr=0.01, offload="cpu", compile="eager", ecc="int8")
    run(optimizer, params, gradients(3, ((40, 32), (5,))))
    large, small = optimizer.core.plan.members.values()
    assert len(large.pieces) > 3 and not small.pieces and not large.twins
    assert opened[1][0] <= offload.RESIDENT
    clipped = hbcore.get("AdamW")(params, lr=0.01, offload="cpu", compile="eager", update_clipping="l2_clip_")
    run(clipped, params, gradients(1, ((40, 32), (5,))))
    assert not any(m.pieces for m in clipped.core.plan.members.values()), "a sum over a tensor needs all of it"


def test_state_travels_once_for_passes_that_need_not_wait_for_others(opened, monkeypatch):
    """Caution and clipping take several passes over each tensor, and its state one journey."""
    journeys = []
    monkeypatch.setattr(offload.Lane, "_travel", lambda lane, way, copies: journeys.append((way, len(copies))))
    shapes = ((10, 8),) * 4
    for options in (
        {"caution": True},
        {"caution": True, "gradient_clipping": "global_l2norm_clip", "update_clipping": "l2_clip_"},
    ):
        params = parameters(shapes)
        optimizer = hbcore.get("AdamW")(params, offload="cpu", compile="eager", **options)
        journeys.clear()
        run(optimizer, params, gradients(1, shapes))
        assert sum(n for way, n in journeys if way == 0) == sum(n for way, n in journeys if way == 1) == 4 * 2


def simple(build):
    params = parameters()
    optimizer = build(params)
    run(optimizer, params, gradients(6))
    return optimizer


def several_groups(build):
    params = parameters()
    optimizer = build([{"params": params[:2], "lr": 0.1}, {"params": params[2:], "weight_decay": 0.1}])
    run(optimizer, params, gradients(6))
    return optimizer


def late_parameters_and_missing_gradients(build):
    params = parameters()
    optimizer = build(params)
    for t, grads in enumerate(gradients(8)):
        run(optimizer, params, [[g if t > i or t % (i + 1) else None for i, g in enumerate(grads)]])
    return optimizer


def a_group_is_added(build):
    params = parameters()
    optimizer = build(params[:3])
    run(optimizer, params[:3], [g[:3] for g in gradients(2)])
    optimizer.add_param_group({"params": params[3:], "lr": 0.3})
    run(optimizer, params, gradients(4))
    return optimizer


def loaded(into_stepped):
    def scenario(build):
        params, others = parameters(), parameters()
        first, second = build(params), build(others)
        run(first, params, gradients(3))
        if into_stepped:
            run(second, others, gradients(1))
        with torch.no_grad():
            for p, q in zip(params, others, strict=True):
                q.copy_(p)
        second.load_state_dict(first.state_dict())
        run(second, others, gradients(3))
        return second

    scenario.__name__ = f"loaded_{'in_place' if into_stepped else 'into_a_fresh_one'}"
    return scenario


def carried_by(how):
    def scenario(build):
        model = mlp()
        optimizer = build(list(model.parameters()))
        train(model, optimizer, range(3))
        model, optimizer = how((model, optimizer))
        train(model, optimizer, range(3, 6))
        return optimizer

    scenario.__name__ = f"carried_by_{how.__name__}"
    return scenario


def pickled(both):
    return pickle.loads(pickle.dumps(both))


def gradients_are_released(build):
    model = mlp()
    optimizer = build(list(model.parameters()))
    with hbcore.hook_into_backward(model, optimizer):
        train(model, optimizer, range(4))
    train(model, optimizer, range(4, 6))
    return optimizer


def a_scaler_skips(build):
    model = mlp()
    optimizer, scaler = build(list(model.parameters())), torch.amp.GradScaler("cpu", init_scale=4.0)
    for t in range(5):
        model.zero_grad()
        scaler.scale(loss_of(model, t)).backward()
        if t == 2:
            next(model.parameters()).grad.view(-1)[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    return optimizer


def under(mode):
    def scenario(build):
        model = mlp()
        optimizer = build(list(model.parameters()))
        for t in range(4):
            backward(model, t)
            with mode() if t % 2 else torch.enable_grad():
                optimizer.step()
        return optimizer

    scenario.__name__ = f"under_{mode.__name__}"
    return scenario


def state_is_replaced_moved_and_written_to(build):
    params = parameters()
    optimizer = build(params)
    for t, grads in enumerate(gradients(6)):
        run(optimizer, params, [grads])
        for slots in optimizer.state.values():
            for key in [key for key in slots if key != "step" and slots[key].ndim]:
                if t == 1:
                    slots[key] = slots[key].clone()
                elif t == 2:
                    slots[key].data = slots[key].data.clone()
                elif t == 3:
                    slots[key].mul_(0.5)
    return optimizer


def weights_are_switched(build):
    model = mlp()
    optimizer = build(list(model.parameters()))
    for t in range(5):
        train(model, optimizer, [t])
        optimizer.eval()
        backward(model, 9)
        optimizer.train()
    return optimizer


def averages_are_looked_at(build):
    model, seen = mlp(), []
    optimizer = build(list(model.parameters()), use_ema=True)
    for t in range(4):
        train(model, optimizer, [t])
        with optimizer.ema_weights():
            seen += [p.detach().clone() for p in model.parameters()]
    optimizer.seen = seen
    return optimizer


def channels_last(build):
    model = convnet().to(memory_format=torch.channels_last)
    optimizer = build(list(model.parameters()))
    train(model, optimizer, range(4))
    return optimizer


def complex_parameters(build):
    p = nn.Parameter(torch.randn(5, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)))
    optimizer = build([p])
    for t in range(4):
        p.grad = torch.randn(5, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(t))
        optimizer.step()
    return optimizer


def in_bfloat16(build):
    params = parameters(dtype=torch.bfloat16)
    optimizer = build(params, stochastic_rounding=True)
    run(optimizer, params, gradients(5, dtype=torch.bfloat16))
    return optimizer


def a_step_is_skipped(build):
    params = parameters()
    optimizer = build(params, skip_nonfinite=True)
    for t, grads in enumerate(gradients(5)):
        run(optimizer, params, [[g * math.nan if t == 2 else g for g in grads]])
    return optimizer


def with_options(**options):
    def scenario(build):
        params = parameters(((10, 32), (64,), (7,), ()))
        optimizer = build(params, **options)
        run(optimizer, params, gradients(5, ((10, 32), (64,), (7,), ())))
        return optimizer

    scenario.__name__ = "with_" + "_".join(f"{key}={value}" for key, value in options.items())
    return scenario


COMMON = [
    simple, several_groups, late_parameters_and_missing_gradients, a_group_is_added, loaded(False), loaded(True),
    carried_by(copy.deepcopy), carried_by(pickled), under(torch.no_grad), state_is_replaced_moved_and_written_to,
    averages_are_looked_at, channels_last, a_step_is_skipped, a_scaler_skips,
    with_options(multi_tensor=False), with_options(ecc="bf16+8"),
]  # fmt: skip
ALONE = [
    gradients_are_released, under(torch.inference_mode), complex_parameters, in_bfloat16, weights_are_switched,
    with_options(ecc="int8"), with_options(ecc="bf16+8", stochastic_rounding=True), with_options(storage_dtype="bfloat16"),
    with_options(caution=True), with_options(skip_nonfinite=True), with_options(mars=True),
    with_options(gradient_clipping=("l2_clip_", 0.1)), with_options(gradient_clipping=("global_l2norm_clip", 0.1)),
    with_options(update_clipping="adaptive_gradient_clipping_"),
]  # fmt: skip
CASES = [("AdamW", "eager", s) for s in (*COMMON, *ALONE)]
CASES += [("SOAP", "eager", s) for s in COMMON]
CASES += [
    pytest.param(name, "eager", s, marks=pytest.mark.broad)
    for name in ("SFAdamW", "PSGDLRA")
    for s in COMMON
    if (name, s) != ("PSGDLRA", channels_last)
]
CASES += [("PSGDLRA", "eager", s) for s in (late_parameters_and_missing_gradients, loaded(False), loaded(True))]
CASES += [("SFAdamW", "eager", weights_are_switched), ("Muon", "eager", late_parameters_and_missing_gradients)]
CASES += [("AdamW", "cpp", s) for s in (simple, late_parameters_and_missing_gradients, state_is_replaced_moved_and_written_to)]


@pytest.mark.parametrize(("name", "backend", "scenario"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_whatever_users_do_gives_the_same_bits(name, backend, scenario, opened):
    def result(**away):
        def build(params, **options):
            return hbcore.get(name)(params, **{"lr": 0.01, "compile": backend, **options, **away})

        optimizer = scenario(build)
        return [*tensors(optimizer), *getattr(optimizer, "seen", [])]

    plain, away = result(), result(offload="cpu")
    assert same(plain, away)
    assert not opened[0] and opened[1][0] > 0


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_tables_that_are_made_while_twins_have_no_memory_are_filled_in_later():
    """As gradients need that lie otherwise in memory; and the twins may get their memory where they had it before."""
    if not pytest.importorskip("hbcore.engine.backends.triton.device_lib").INTERPRETED:
        pytest.skip("runs under Triton's interpreter")
    [p] = parameters(((4, 4),))
    optimizer = hbcore.get("AdamW")([p], compile="triton", consume_grad=False, offload="cpu")
    run(optimizer, [p], gradients(2, ((4, 4),)))
    layout = optimizer.core.plan.layout
    [batch] = layout.batches
    assert layout.collect()
    executable, moves = batch.segment.executable, batch.moves
    executable.tables = None
    executable.prepare(batch)
    [launch] = executable.tables.launches
    assert 0 in launch.table[0]
    for twin in twins_of(optimizer):
        twin.open()
    executable.tables.follow()
    columns = executable.layout.columns
    assert launch.table[0, : len(columns)].tolist() == [batch.tensors[name][0].data_ptr() for name in columns]
    assert batch.moves == moves
    layout.release()
    for twin in twins_of(optimizer):
        twin.close()


@pytest.mark.parametrize("kind", ["split", "sam"])
def test_optimizers_made_of_optimizers(kind, opened):
    def result(**away):
        model = mlp()
        if kind == "sam":
            optimizer = hbcore.get("SAMWrapper")(model.parameters(), hbcore.get("AdamW"), lr=0.01, **away)
        else:
            specs = [{"optimizer": "Muon", "when": lambda p: p.ndim > 1, **away}, {"optimizer": "SFAdamW", **away}]
            optimizer = SplitOpt(model.named_parameters(), specs, lr=0.01)
        for t in range(4):
            optimizer.step(lambda t=t: backward(model, t))
        return [p.detach() for p in model.parameters()]

    assert same(result(), result(offload="cpu")) and opened[1][0]


def test_a_step_that_fails_leaves_all_state_at_home(opened, monkeypatch):
    params = parameters()
    optimizer = hbcore.get("AdamW")(params, lr=0.01, offload="cpu", compile="eager")
    run(optimizer, params, gradients(2))
    before = [t.clone() for t in tensors(optimizer)]
    layout = optimizer.core.plan.layout
    executable = layout.batches[0].segment.executable
    monkeypatch.setattr(executable, "run", lambda *_: 1 / 0)
    layout.operations = offload.Operations()  # made again, of the broken one
    with pytest.raises(ZeroDivisionError):
        run(optimizer, params, gradients(1))
    assert not opened[0] and same(before, tensors(optimizer))


def test_state_lives_on_the_host_after_a_load():
    params = parameters()
    optimizer = hbcore.get("AdamW")(params, offload="cpu")
    run(optimizer, params, gradients(1))
    other = hbcore.get("AdamW")(parameters(), offload="cpu")
    other.load_state_dict(optimizer.state_dict())
    for slots in other.state.values():
        assert all(offload.homed(t, torch.device("cpu")) is t for t in slots.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"offload": "disk"}, "offload='disk' is not one of cpu, or None"),
        ({"offload": True}, "offload=True is not one of cpu"),
        ({"offload": "cpu", "capturable": True}, "pass capturable=False or offload=None"),
        ({"offload": "cpu", "param_ecc": "bf16+8"}, "does not support param_ecc"),
    ],
)
def test_what_is_refused_says_so(options, words):
    with pytest.raises(OptionError, match=words):
        hbcore.get("AdamW")(parameters(), **options)


def test_sparse_gradients_are_refused():
    with pytest.raises(OptionError, match="would move whole tables"):
        SparseAdam(parameters(), offload="cpu")


def test_parameters_on_a_cpu_have_nothing_to_offload(monkeypatch):
    monkeypatch.setattr(offload, "APPLIES", ("cuda",))
    optimizer = simple(lambda params: hbcore.get("SOAP")(params, offload="cpu", compile="eager"))
    assert any("offload='cpu' does nothing: state of parameters in host memory" in note for note in optimizer.report.notes)
    assert not twins_of(optimizer)


@pytest.mark.parametrize("name", one_of_each(EVERY))
def test_memory_tells_where_state_is(name):
    def foretold(**options):
        return hbcore.memory([nn.Parameter(torch.empty(s, device="meta")) for s in SHAPES[:3]], name, **options)

    plain, away = foretold(), foretold(offload="cpu")
    assert away.state + away.host == plain.state and plain.host == 0
    assert away.total == plain.total - away.host and away.state < 100
    assert ("in host memory" in str(away)) is (away.host > 0)


@pytest.mark.parametrize("name", ["AdamW", "SFAdamW", "Muon", "SOAP", "PSGDLRA"])
def test_homes_that_users_replace_are_let_go_of_at_once(name):
    params = parameters(((10, 8), (6, 4), (6, 4), (5,)))
    optimizer = hbcore.get(name)(params, lr=0.01, offload="cpu", compile="eager")
    run(optimizer, params, gradients(3, ((10, 8), (6, 4), (6, 4), (5,))))
    slots = [(some, key) for some in optimizer.state.values() for key in some if key != "step"]
    held = [StorageWeakRef(some[key].untyped_storage()) for some, key in slots]
    gc.disable()
    try:
        for some, key in slots:
            some[key] = some[key].new_empty(0)
        assert held and all(storage.expired() for storage in held)
    finally:
        gc.enable()
