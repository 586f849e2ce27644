"""``c.apply(inner, u, s)``: an inner rule that is compiled gives what it gives as it is written, and leaves nothing behind."""

from __future__ import annotations

import gc
import warnings
from dataclasses import replace

import pytest
import torch
from core.inner_rules import Around, applied, kept, train, trainer, written
from core.kit import combined, distance, same
from core.rules import rule
from torch.multiprocessing.reductions import StorageWeakRef

from hbcore.api import Domain, Slot
from hbcore.engine.backends.cpp.backend import CppBackend
from hbcore.engine.backends.eager import EagerExecutable
from hbcore.engine.backends.inductor import InductorBackend, InductorExecutable
from hbcore.engine.backends.triton.backend import TritonBackend
from hbcore.engine.stacks.inner_segment import InnerSegment
from hbcore.errors import CompileError, FallbackWarning, RuleError


@pytest.fixture
def runs(monkeypatch):
    """The names of the inner rules that ran compiled."""
    seen = []
    run = InnerSegment.run
    monkeypatch.setattr(InnerSegment, "run", lambda self, *a: (seen.append(self.program.label), run(self, *a))[1])
    return seen


# how far apart the two may be: the parameters, and the slots where another last bit is not another stored value
OPTIONS = {
    "usual": ({}, 1e-6, 1e-6),
    "float64": ({"dtype": torch.float64}, 1e-12, 1e-12),
    "packed": ({"ecc": "bf16+8"}, 1e-4, None),
    "palm": ({"palm": True}, 1e-6, 1e-6),
    "ascent": ({"maximize": True}, 1e-6, 1e-6),
    "narrow": ({"storage_dtype": "bfloat16"}, 1e-3, None),
    "another division": ({"division_backend": "atan2"}, 1e-6, 1e-6),
    "skipping": ({"skip_nonfinite": True}, 1e-6, 1e-6),
    "one by one": ({"multi_tensor": False}, 1e-6, 1e-6),
}


@pytest.mark.parametrize(
    ("backend", "name"),
    combined(["eager", "cpp", "inductor", "triton"], OPTIONS, compiled=[("inductor", "usual"), ("inductor", "packed")]),
)
def test_it_gives_the_numbers_of_the_rule_as_it_is_written(runs, backend, name):
    options, near, near_slots = OPTIONS[name]
    ours = train(*trainer(compile=backend, **options))
    assert len(runs) >= 6 and ours[0].report.backend == backend and not ours[0].report.reasons
    runs.clear()
    theirs = train(*trainer(written, compile=backend, **options))
    assert not runs
    assert distance(ours[1], theirs[1]) < near
    assert near_slots is None or distance(kept(*ours), kept(*theirs)) < near_slots


@pytest.mark.parametrize("backend", ["eager", "triton", "cpp", "inductor"])
def test_numbers_that_change_and_rows_that_come_and_go_compile_nothing(runs, backend):
    optimizer, params = train(*trainer(compile=backend))
    report = optimizer.report
    before = report.programs, report.compiles
    assert report.programs == 3  # the segments before and after the rule, and the one in it
    train(optimizer, params, steps=8)
    assert (report.programs, report.compiles) == before
    assert len(set(runs)) == 1


def tensor_sum(self, u, s, c):
    return u / (1 + c.norm(u)), {"m": s["m"] + u}


def branching(self, u, s, c):
    return (u * 2 if float(u.sum()) > -1e9 else u), {"m": s["m"] + u}


def plain(self, u, s, c):
    return u + s["m"], {"m": s["m"] * self.beta + u}


COUNT = Slot(torch.Size(), exact=True)
UNFIT = {
    "reads the parameter": (
        rule(lambda self, u, s, c: (u + c.param, {"m": s["m"] + u})), applied, {"needs": frozenset({"param"})},
    ),
    "draws": (rule(lambda self, u, s, c: (u + c.noise(u), {"m": s["m"] + u}), draws=1), applied, {}),
    "sees a tensor": (rule(tensor_sum, domain=Domain.TENSOR), applied, {}),
    "reduces": (rule(tensor_sum), applied, {}),
    "branches": (rule(branching), applied, {}),
    "carries a number": (
        rule(lambda self, u, s, c: (u * s["total"], {"m": u, "total": s["total"] + 1}), scalars=lambda self: {"total": 1.0}),
        applied, {},
    ),
    "a slot of another shape": (
        rule(lambda self, u, s, c: (u + s["n"][:, None, None], {"n": s["n"] + 1}), lambda self, param: {"n": COUNT}),
        applied, {},
    ),
    "made on the way": (rule(plain), lambda self, x, s, c: c.apply(replace(self.inner), x, s), {}),
    "other state": (rule(plain), lambda self, x, s, c: c.apply(self.inner, x, dict(s)), {}),
    "not contiguous": (rule(plain), lambda self, x, s, c: c.apply(self.inner, x.mT.contiguous().mT, s), {}),
    "half precision": (rule(plain), applied, {"dtype": torch.bfloat16}),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_a_rule_that_cannot_be_compiled_runs_as_it_is_written(runs, name):
    inner, how, around = UNFIT[name]
    ours, theirs = (train(*trainer(h, inner, around=around, compile="eager"), partial=False) for h in (how, written))
    assert not runs
    assert same(kept(*ours), kept(*theirs))


def test_neither_does_one_whose_slots_are_rounded_stochastically(runs):
    options = {"ecc": "bf16+8", "stochastic_rounding": True, "compile": "eager"}
    assert same(kept(*train(*trainer(**options))), kept(*train(*trainer(written, **options))))
    assert not runs


PLACES = {
    "in a tuple": lambda self, x, s, c: c.apply(self.inner.others[1], x, s),
    "in a rule within": lambda self, x, s, c: c.apply(self.inner.inner, x, s),
}


@pytest.mark.parametrize("where", PLACES)
def test_it_is_found_wherever_the_rule_has_it(runs, where):
    part = rule(plain)
    ours = train(*trainer(PLACES[where], lambda: Around(inner=part(), others=(part(0.1), part())), compile="eager"))
    assert len(runs) >= 6
    assert same(kept(*ours), kept(*train(*trainer(written, part, compile="eager"))))


@pytest.mark.parametrize("backend", ["eager", "triton", "cpp", "inductor"])
def test_nothing_of_a_step_is_kept_and_slots_stay_where_they_are(backend):
    alive = []

    def watched(self, x, s, c):
        direction, new = c.apply(self.inner, x, s)
        assert not new  # they are written
        assert torch.equal(new["exp_avg"], s["exp_avg"])
        alive.extend(StorageWeakRef(t.untyped_storage()) for t in (x, direction))
        return direction, new

    optimizer, params = train(*trainer(watched, compile=backend), steps=1)
    places = [t.data_ptr() for t in kept(optimizer, params)]
    before = [t.clone() for t in kept(optimizer, params)]
    for k in range(4):
        assert alive and all(each.expired() for each in alive)
        alive.clear()
        train(optimizer, params, steps=1, without=(0,) if k == 1 else ())
    assert [t.data_ptr() for t in kept(optimizer, params)] == places
    assert not any(map(torch.equal, kept(optimizer, params), before))


def test_nothing_is_kept_of_a_step_that_fails_either(monkeypatch):
    alive = []

    def watched(self, x, s, c):
        alive.append(StorageWeakRef(x.untyped_storage()))
        return c.apply(self.inner, x, s)

    optimizer, params = train(*trainer(watched, compile="eager"))
    run = EagerExecutable.run
    monkeypatch.setattr(EagerExecutable, "run", lambda self, phase, batch: (
        1 / 0 if "in a matrix rule" in self.program.label else run(self, phase, batch)
    ))  # fmt: skip
    with pytest.raises(ZeroDivisionError) as caught:
        train(optimizer, params, steps=1)
    del caught
    gc.collect()  # the frames that the error went through
    assert all(each.expired() for each in alive)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_step_that_is_skipped_changes_no_slot_of_it(backend):
    optimizer, params = train(*trainer(compile=backend, skip_nonfinite=True), steps=3)
    before = [t.clone() for t in kept(optimizer, params)]
    for p in params:
        p.grad = torch.ones_like(p)
    params[1].grad[0, 0] = torch.nan
    optimizer.step()
    assert optimizer.report.skipped == 1 and same(kept(optimizer, params), before)


@pytest.mark.parametrize("how", [applied, lambda self, x, s, c: c.apply(replace(self.inner), x, s)], ids=["field", "made"])
@pytest.mark.parametrize("what", ["m", "update"])
def test_one_that_writes_to_what_it_is_given_is_named(what, how):
    def writing(self, u, s, c):
        (u if what == "update" else s["m"]).mul_(2)
        return u, {"m": s["m"]}

    optimizer, params = trainer(how, rule(writing, name="inner"), compile="eager")
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuleError, match=rf"{__file__}:\d+: rule 'inner' .ToyRule.* writes to a tensor that it was given"):
        train(optimizer, params, steps=1)
    assert same(params, before)


def failing(when):
    """Raises where a program of an inner rule, and perhaps no other, is compiled."""

    def compile_(self, program, batch):
        if when == "all" or "in a matrix rule" in program.label:
            raise CompileError("it is broken")
        return EagerExecutable(program, True)

    return compile_


@pytest.mark.parametrize("when", ["all", "inner"])
@pytest.mark.parametrize("backend", [TritonBackend, CppBackend, InductorBackend], ids=lambda b: b.name)
def test_where_it_does_not_compile_the_next_backend_runs_and_one_warning_says_so(monkeypatch, backend, when):
    for each in (TritonBackend, CppBackend, InductorBackend):
        monkeypatch.setattr(each, "compile", failing(when))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = train(*trainer(compile=backend.name))
    texts = [str(w.message) for w in said if w.category is FallbackWarning]
    pairs = [("triton", "cpp"), ("cpp", "inductor"), ("inductor", "eager")]
    pairs = pairs[[failed for failed, _ in pairs].index(backend.name) :]
    assert len(texts) == len(pairs)
    for text, (failed, following) in zip(texts, pairs, strict=True):
        assert text.startswith(f"{failed} does not run here: it is broken. {following} runs instead")
    assert same(kept(*ours), kept(*train(*trainer(compile="eager"))))


def test_where_a_later_size_does_not_compile_the_next_backend_takes_over(monkeypatch):
    monkeypatch.setattr(InductorBackend, "compile", lambda self, program, batch: InductorExecutable(program))
    monkeypatch.setattr(InductorExecutable, "run", lambda self, phase, batch: 0)

    def prepare(self, batch):
        if "in a matrix rule" in self.program.label:
            raise CompileError("too large")

    monkeypatch.setattr(InductorExecutable, "prepare", prepare)
    with pytest.warns(FallbackWarning, match="inductor does not run here: too large. eager runs instead") as said:
        optimizer, _ = train(*trainer(compile="inductor"))
    assert len([w for w in said if w.category is FallbackWarning]) == 1
    assert len(optimizer.report.reasons) == 1
