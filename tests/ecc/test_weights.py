"""``param_ecc``: the weights that a bfloat16 parameter and its correction are together, whatever happens to either of them."""

from __future__ import annotations

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from core.kit import KINDS, gradients, one_of_each, parameters, run, same
from torch import nn

import hbcore
from hb_adam import SGD, AdamW, SAMWrapper
from hbcore import SplitOpt
from hbcore.errors import OptionError, ParameterError, StateWarning
from hbcore.testing import Subject

pytestmark = pytest.mark.filterwarnings("ignore:.*(param_ecc|max_lr|no names):UserWarning", "ignore:.*param_ecc turned")


def some(*quick):
    """Every optimizer, those that are not ``quick`` where all are checked."""
    return [pytest.param(n, marks=() if n in quick else pytest.mark.broad) for n in hbcore.list_optimizers()]


SHAPES = ((6, 5), (7,), (2, 3, 4))
BITS = {"bf16+8": 8, "bf16+16": 16}
EXACT = {"bf16+8": 2.0**-16, "bf16+16": 0.0}
"""How far, relatively, what a codec stores is from a float32."""


class Model(nn.Module):
    """Parameters of some shapes, one of them under two names, and a buffer."""

    def __init__(self, seed=1):
        super().__init__()
        for i, p in enumerate(parameters(SHAPES) if seed == 1 else [nn.Parameter(torch.randn(s)) for s in SHAPES]):
            self.register_parameter(f"p{i}", p)
        self.tied = self.p0
        self.register_buffer("table", torch.arange(3.0))


def quiet(cls, params, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(params, compile="eager", **options)


def trained(name, steps=3, seed=1, **options):
    model = Model(seed)
    subject = Subject(hbcore.get(name), hbcore.info(name).spec.capabilities, {})
    optimizer = quiet(subject.cls, list(model.parameters()), **options)
    for grads in gradients(steps, SHAPES):
        advance(model, optimizer, grads)
    return model, optimizer


def give(model, grads):
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g.to(p.dtype)


def advance(model, optimizer, grads):
    """One step, of whichever kind of gradient and closure the optimizer takes."""

    def closure():
        give(model, grads)
        for p in model.parameters() if getattr(optimizer, "sparse_gradients", False) else ():
            p.grad = p.grad.to_sparse(1)
        return 0.0

    if getattr(optimizer, "requires_closure", False):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def joined(p, correction):
    """Float32 of the bits of a bfloat16 and its correction, by NumPy's integers."""
    bits = p.detach().view(torch.int16).numpy().astype(np.int64)
    shift = {torch.int8: 8, torch.int16: 0}[correction.dtype]
    whole = (bits << 16) + (correction.numpy().astype(np.int64) << shift)
    return torch.from_numpy((whole & 0xFFFFFFFF).astype(np.uint32).view(np.float32).copy()).view(p.shape)


def full(model, optimizer):
    return {name: t.clone() for name, t in hbcore.full_state(model, optimizer).items()}


def close(ours, theirs, relative):
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        assert t.dtype == theirs[name].dtype, name
        torch.testing.assert_close(t, theirs[name], rtol=relative, atol=0.0, msg=name)


@pytest.mark.parametrize("codec", BITS)
@pytest.mark.parametrize("name", one_of_each(hbcore.list_optimizers()))
def test_the_full_state_has_every_bit_that_model_and_optimizer_hold(name, codec):
    subject = Subject(hbcore.get(name), hbcore.info(name).spec.capabilities, {"compile": "eager"})
    trial = subject.loose(*SHAPES, param_ecc=codec)
    trial.train(3)
    params = [p for group in trial.optimizer.param_groups for p in group["params"]]
    model = nn.ParameterList(params)
    found = hbcore.full_state(model, trial.optimizer)
    assert all(p.dtype == torch.bfloat16 for p in params) and any(
        trial.optimizer.state[p]["param#ecc"].any() for p in params if p.numel() > 1
    )
    assert same(found.values(), [joined(p, trial.optimizer.state[p]["param#ecc"]) for p in params])


def test_a_step_does_not_take_its_own_writes_for_the_users():
    for name in KINDS:
        _, optimizer = trained(name, 4, param_ecc="bf16+8")
        assert not any("written to" in note for note in optimizer.report.notes), name


@pytest.mark.parametrize("backend", ["eager", "inductor", "triton"])
def test_no_backends_writes_are_taken_for_the_users(backend):
    params = parameters(SHAPES)
    optimizer = AdamW(params, param_ecc="bf16+8", compile=backend)
    run(optimizer, params, gradients(4, SHAPES, torch.bfloat16))
    assert optimizer.report.backend == backend
    assert not any("written to" in note for note in optimizer.report.notes)


def perturbs(params):
    return SAMWrapper(params, AdamW, param_ecc="bf16+8", compile="eager")


def takes_differences(params):
    return hbcore.get("PSGDKron")(
        params, param_ecc="bf16+8", compile="eager", hessian_approx=True, hvp_interval=1, finite_differences=True
    )


def releases(params):
    optimizer = AdamW(params, param_ecc="bf16+8", compile="eager", lr=1e-5)
    hbcore.hook_into_backward(params, optimizer)
    return optimizer


@pytest.mark.parametrize("make", [perturbs, takes_differences, releases], ids=lambda f: f.__name__)
def test_what_moves_parameters_and_puts_them_back_keeps_their_corrections(make):
    params = parameters(SHAPES)
    optimizer = make(params)

    def closure():
        optimizer.zero_grad()
        loss = sum(p.float().square().sum() for p in params)
        loss.backward()
        return loss

    for _ in range(3):
        if make is releases:
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)
    assert not any("written to" in note for note in optimizer.report.notes)
    assert any(optimizer.state[p]["param#ecc"].any() for p in params)


def test_tied_weights_buffers_and_wrappers_come_along():
    model = Model()
    compiled = torch.compile(model, backend="eager")
    optimizer = quiet(
        SplitOpt,
        model.named_parameters(),
        specs=[{"optimizer": "Muon", "when": lambda p: p.ndim > 1, "param_ecc": "bf16+16"}, {"optimizer": "AdamW"}],
    )
    advance(model, optimizer, next(gradients(1, SHAPES)))
    state = hbcore.full_state(compiled, optimizer)
    assert list(state) == list(compiled.state_dict()) and state._metadata == compiled.state_dict()._metadata
    assert state["_orig_mod.tied"] is state["_orig_mod.p0"] and state["_orig_mod.p0"].dtype == torch.float32
    assert same([state["_orig_mod.p1"], state["_orig_mod.table"]], [model.p1, model.table])
    assert not any(t.requires_grad for t in state.values())
    for other in (torch.optim.SGD(model.parameters(), lr=0.1), AdamW(Model().parameters())):
        assert same(hbcore.full_state(model, other).values(), model.state_dict().values())
    with pytest.raises(ParameterError, match="has none of the parameters of AdamW"):
        hbcore.full_state(Model(), quiet(AdamW, Model().parameters(), param_ecc="bf16+8"))


@pytest.mark.parametrize("codec", BITS)
def test_a_full_state_loads_with_all_its_bits(codec):
    model, optimizer = trained("AdamW", param_ecc=codec)
    saved = full(model, optimizer)
    wide = Model(seed=2)
    wide.load_state_dict(saved)
    close(wide.state_dict(), saved, 0.0)
    narrow = Model(seed=3)
    other = quiet(AdamW, narrow.parameters(), param_ecc=codec)
    hbcore.load_full_state(narrow, other, saved)
    close(full(narrow, other), saved, 0.0)
    other.load_state_dict(optimizer.state_dict())
    close(full(narrow, other), saved, 0.0)
    run(other, [], [])
    advance(narrow, other, next(gradients(1, SHAPES)))
    assert not any("written to" in note for note in other.report.notes)


ORDERS = ("before", "model", "optimizer")
"""Whether the model's weights are loaded before the optimizer is made, or which of the two is loaded first."""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("after", [None, *BITS])
@pytest.mark.parametrize("before", [None, *BITS])
@pytest.mark.parametrize("name", some("AdamW", "MSAMLaProp"))
def test_a_run_is_resumed_with_its_weights_whichever_of_the_two_has_param_ecc(name, before, after, order):
    model, optimizer = trained(name, param_ecc=before)
    weights = full(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = Model(seed=2)
    if order == "before":
        other.load_state_dict(saved[0])
    second = quiet(hbcore.get(name), list(other.parameters()), param_ecc=after)
    if order == "optimizer":
        second.load_state_dict(saved[1])
        other.load_state_dict(saved[0])
    else:
        if order == "model":
            other.load_state_dict(saved[0])
        second.load_state_dict(saved[1])
    rounds = EXACT.get(after, 0.0)
    if before is None and after and order != "before":
        rounds = 2.0**-8  # torch's own load rounded them: hbcore.load_full_state does not
    close(full(other, second), weights, rounds)
    for m, o in ((model, optimizer), (other, second)):
        advance(m, o, list(gradients(4, SHAPES))[-1])
    assert not any("go on without it" in note for note in second.report.notes)
    if before == after:
        close(full(other, second), full(model, optimizer), 0.0)


@pytest.mark.parametrize(("before", "after"), [("bf16+8", "bf16+8"), ("bf16+16", "bf16+8"), ("bf16+8", None)])
@pytest.mark.parametrize("order", ORDERS[1:])
def test_corrections_act_on_no_other_weights(before, after, order):
    _, optimizer = trained("AdamW", param_ecc=before)
    others = Model(seed=5).to(torch.bfloat16)
    model = Model(seed=2)
    second = quiet(AdamW, model.parameters(), param_ecc=after)
    for step in ("model", "optimizer") if order == "model" else ("optimizer", "model"):
        if step == "model":
            model.load_state_dict(others.state_dict())
        else:
            second.load_state_dict(optimizer.state_dict())
    give(model, [torch.zeros(s) for s in SHAPES])
    second.param_groups[0]["lr"] = 0.0
    with pytest.warns(StateWarning, match="hold other weights than those"):
        second.step()
    found = full(model, second)
    assert same([found[f"p{i}"] for i in range(3)], [t.float() for t in list(others.state_dict().values())[:3]])


def test_a_checkpoint_from_before_fingerprints_loads():
    model, optimizer = trained("AdamW", param_ecc="bf16+8")
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        del entry["param#sum"]
    for group in saved["param_groups"]:
        group["hbcore"] = group["hbcore"].replace('"param_codec": "bf16+8", ', "")
        assert "param_codec" not in group["hbcore"]
    for after in (None, "bf16+8", "bf16+16"):
        other = Model(seed=2)
        second = quiet(AdamW, other.parameters(), param_ecc=after)
        other.load_state_dict(model.state_dict())
        second.load_state_dict(saved)
        close(full(other, second), full(model, optimizer), 0.0)


def test_a_saved_state_is_plain_data_and_a_second_load_starts_over():
    model, optimizer = trained("AdamW", param_ecc="bf16+8")
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    weights = full(model, optimizer)
    for grads in gradients(2, SHAPES):
        advance(model, optimizer, grads)
    optimizer.load_state_dict(loaded["optimizer"])
    model.load_state_dict(loaded["model"])
    close(full(model, optimizer), weights, 0.0)


WRITES = {
    "fill": lambda p: p.fill_(1.0),
    "inf": lambda p: p.fill_(torch.inf),
    "clamp": lambda p: p.clamp_(-0.5, 0.5),
    "copy": lambda p: p.copy_(torch.full_like(p, 1.006)),
    "scale": lambda p: p.mul_(0.75),
    "init": nn.init.zeros_,
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("codec", BITS)
def test_a_parameter_goes_on_from_what_the_user_wrote(codec, write):
    model, optimizer = trained("SGD", param_ecc=codec)
    with torch.no_grad():
        for p in (model.p0, model.p1):
            WRITES[write](p)
    written = [model.p0.float(), model.p1.float(), full(model, optimizer)["p2"]]
    assert same([full(model, optimizer)[f"p{i}"] for i in range(3)], written)
    if write == "inf":  # times a decay of 0 it is NaN
        return
    optimizer.param_groups[0]["lr"] = 0.0
    advance(model, optimizer, [torch.zeros(s) for s in SHAPES])
    assert same([full(model, optimizer)[f"p{i}"] for i in range(3)], written)
    assert any("written to" in note for note in optimizer.report.notes)


def test_writes_after_every_step_are_warned_of_once():
    model, optimizer = trained("SGD", param_ecc="bf16+8")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for grads in gradients(5, SHAPES):
            with torch.no_grad():
                model.p1.clamp_(-0.5, 0.5)
            advance(model, optimizer, grads)
    assert [str(w.message).partition(".")[0] for w in caught if w.category is StateWarning] == [
        "SGD: 1 parameters were written to after each of the last steps"
    ]


@pytest.mark.parametrize("name", some("AdamW", "SFAdamW", "SOAP"))
@pytest.mark.parametrize("cast", ["float", "half", "double"])
def test_a_model_cast_to_another_dtype_gets_its_corrections_once(name, cast):
    model, optimizer = trained(name, param_ecc="bf16+16")
    weights = full(model, optimizer)
    getattr(model, cast)()
    wanted = [weights[f"p{i}"].to(model.p0.dtype) for i in range(3)]
    saved = optimizer.state_dict()
    assert not any("param#ecc" in entry for entry in saved["state"].values())
    assert same(model.parameters(), wanted)
    optimizer.load_state_dict(saved)
    assert same(model.parameters(), wanted)
    advance(model, optimizer, next(gradients(1, SHAPES)))
    assert not any("param#ecc" in optimizer.state[p] for p in model.parameters())


def test_a_cast_there_and_back_changes_nothing():
    model, optimizer = trained("AdamW", param_ecc="bf16+16")
    weights = full(model, optimizer)
    model.float().bfloat16()
    close(full(model, optimizer) | {"table": weights["table"]}, weights, 0.0)


def test_a_cast_that_was_written_to_keeps_what_was_written():
    model, optimizer = trained("AdamW", param_ecc="bf16+8")
    other = Model(seed=2)
    model.float().load_state_dict(other.state_dict())
    optimizer.state_dict()
    assert same(model.parameters(), other.parameters())


def test_what_is_kept_beside_averages_and_evaluation_weights_is_theirs():
    for name in ("SFAdamW", "MSAMLaProp", "AdamW"):
        model, optimizer = trained(name, param_ecc="bf16+16", use_ema=True)
        weights = full(model, optimizer)
        optimizer.eval()
        other = full(model, optimizer)
        optimizer.train()
        close(full(model, optimizer), weights, 0.0)
        with optimizer.ema_weights():
            [average] = [optimizer.core.chain.bound(g, g["params"][0])[-1] for g in optimizer.param_groups]
            held = full(model, optimizer)["p0"]
            torch.testing.assert_close(
                held, average.average({"param_ema": optimizer.state[model.p0]["param_ema"]}, torch.tensor(3.0))
            )
        close(full(model, optimizer), weights, 0.0)
        assert (name == "AdamW") == same(other.values(), weights.values())


@pytest.mark.parametrize("name", some("AdamW", "Muon"))
@pytest.mark.parametrize("options", [{}, {"ecc": "bf16+8"}, {"storage_dtype": "bfloat16"}, {"param_ecc": "bf16+8"}], ids=str)
def test_the_average_of_weights_that_stand_still_is_those_weights(name, options):
    params = [nn.Parameter(torch.full((4, 4), 1.006))]
    subject = Subject(hbcore.get(name), hbcore.info(name).spec.capabilities, {})
    still = {"lr": 0.0, "use_ema": True, "weight_decay": 0.0}
    if getattr(subject.cls, "sparse_gradients", False):
        pytest.skip("it refuses use_ema=True")
    if name == "MSAMLaProp":
        still["sam_step_size"] = 0.0
    trial = quiet(subject.cls, params, **still, **options)
    gradient = torch.ones(4, 4, dtype=params[0].dtype)
    for _ in range(60):
        advance(nn.ParameterList(params), trial, [gradient])
    with trial.ema_weights():
        [average] = full(nn.ParameterList(params), trial).values()
        assert float((average.double() - 1.006).abs().max()) < 2e-5


@pytest.mark.parametrize(
    ("dtype", "left"), [(torch.float16, True), (torch.float64, True), (torch.complex64, True), (torch.bfloat16, False)], ids=str
)
def test_parameters_that_param_ecc_cannot_store_are_named(dtype, left):
    params = [nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = AdamW([{"params": params[:1]}, {"params": params[1:]}], param_ecc="bf16+8")
    said = [str(w.message) for w in caught if w.category is StateWarning]
    assert said == ([f"AdamW: param_ecc='bf16+8' leaves 2 parameters as they are, of {dtype}: it stores only float32 and "
                     "torch.bfloat16 parameters."] if left else [])  # fmt: skip
    assert bool(optimizer.report.notes) == left


def test_a_gradient_accumulator_that_somebody_holds_is_not_lost_silently():
    p = nn.Parameter(torch.ones(3))
    loss = (2 * p).sum()
    with pytest.raises(OptionError, match="Make the optimizer first, then wrap the model"):
        SGD([p], param_ecc="bf16+8")
    assert p.dtype == torch.float32
    del loss
    quiet(SGD, [p], param_ecc="bf16+8")
    assert p.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "make",
    [
        lambda params: SplitOpt(params, [{"optimizer": "AdamW", "param_ecc": "bf16+16"}]),
        lambda params: SAMWrapper(params, AdamW, param_ecc="bf16+16"),
        lambda params: SAMWrapper(wrapped_optimizer=AdamW(params, param_ecc="bf16+16")),
        lambda params: AdamW(params, param_ecc="bf16+16"),
    ],
    ids=["split", "sam", "wrapped", "plain"],
)
def test_a_fresh_optimizer_holds_the_weights_that_it_was_given(make):
    model = Model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    close(full(model, quiet(lambda params, compile: make(params), model.parameters())), before, 0.0)


def test_a_composite_keeps_the_state_that_its_children_have():
    params = parameters(SHAPES)
    inner = AdamW(params, compile="eager")
    run(inner, params, gradients(3, SHAPES))
    wrapped = SAMWrapper(wrapped_optimizer=inner)
    assert [float(wrapped.state[p]["step"]) for p in params] == [3.0] * 3


@pytest.mark.parametrize("after", [None, *BITS])
@pytest.mark.parametrize("name", ["SFAdamW", "MSAMLaProp"])
def test_evaluation_weights_are_resumed_whoever_has_param_ecc(name, after):
    model, optimizer = trained(name, param_ecc="bf16+16")
    training = full(model, optimizer)
    optimizer.eval()
    other = Model(seed=2)
    second = quiet(hbcore.get(name), other.parameters(), param_ecc=after)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(model.state_dict())
    close(full(other, second), full(model, optimizer), EXACT.get(after, 0.0))
    second.train()
    for key, value in full(other, second).items():
        torch.testing.assert_close(value, training[key], rtol=2.0**-15, atol=1e-6)
    advance(other, second, list(gradients(4, SHAPES))[-1])


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda x: torch.load(saved_whole(x), weights_only=False)], ids=["copy", "pickle"]
)
def test_copies_keep_corrections(how):
    model, optimizer = trained("AdamW", param_ecc="bf16+8")
    other, second = how((model, optimizer))
    close(full(other, second), full(model, optimizer), 0.0)
    for m, o in ((model, optimizer), (other, second)):
        advance(m, o, list(gradients(4, SHAPES))[-1])
    close(full(other, second), full(model, optimizer), 0.0)


def saved_whole(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@pytest.mark.parametrize(("name", "slot"), [("AdamW", "param_ema"), ("MSAMLaProp", "perturbation")])
@pytest.mark.parametrize("options", [{"ecc": "bf16+8"}, {"ecc": "bf16+16"}, {"storage_dtype": "bfloat16"}], ids=str)
def test_what_an_older_checkpoint_has_encoded_is_decoded_where_it_is_exact_now(name, slot, options):
    model, optimizer = trained(name, use_ema=True, **options)
    saved = copy.deepcopy(optimizer.state_dict())
    wanted = []
    for entry in saved["state"].values():
        value = entry[slot]
        assert value.dtype == torch.float32
        blank = {
            part: torch.zeros_like(value, dtype=d) for part, d in optimizer.settings.codec.parts(slot, torch.float32).items()
        }
        entry.update(optimizer.settings.codec.write(blank, slot, value))
        wanted.append(optimizer.settings.codec.read(entry, slot, torch.float32))
    second = quiet(hbcore.get(name), model.parameters(), use_ema=True, **options)
    with pytest.warns(StateWarning, match=f"state '{slot}' was saved as"):
        second.load_state_dict(saved)
    assert same([second.state[p][slot] for p in model.parameters()], wanted)
    assert not any(f"{slot}#ecc" in second.state[p] for p in model.parameters())
