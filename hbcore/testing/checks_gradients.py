"""Checks of absent, zero and accumulated gradients, of random numbers, and of what a step does to gradients."""

from __future__ import annotations

import gc
import random
import weakref

import torch
from torch import Tensor, nn

from hbcore.testing import expect
from hbcore.testing.subject import NOT_BY_HAND, Check, Subject, Trial, drawn, pull


def no_gradient_means_untouched(subject: Subject) -> None:
    """If this fails, frozen layers, and layers that a batch does not use, decay anyway."""
    trial = subject.loose((4, 3), (4, 3), (5,), weight_decay=0.5)
    trial.params["p2"].requires_grad_(False)
    before = trial.values()
    for step in range(3):
        trial.step(lambda step=step: pull({"p0": trial.params["p0"]}, step))  # type: ignore[misc]
    after = trial.values()
    for name, reason in (("p1", "has no gradient"), ("p2", "is frozen")):
        expect.same({name: after[name]}, {name: before[name]}, f"{name}, which {reason}, after three steps with weight decay")
    expect.moved({"p0": before["p0"]}, after, "p0, which has gradients")


def zero_gradients_stay_finite(subject: Subject) -> None:
    """If this fails, a layer whose first gradients are zero becomes NaN, and then the whole model."""
    trial = subject.loose((4, 3), (4, 3), (5,))
    for step in range(4):
        with expect.working(f"step {step + 1}, with zero gradients in the first two"):
            trial.step(lambda step=step: _partly_zero(trial, step))  # type: ignore[misc]
        expect.finite(trial.values(), f"step {step + 1}, with zero gradients in the first two")


def _partly_zero(trial: Trial, step: int) -> Tensor:
    """p0 has zero gradients in the first two steps; p1 and p2 never do."""
    return pull(trial.params, step) if step > 1 else pull({**trial.params, "p0": trial.params["p0"] * 0}, step)


def accumulated_gradients_are_one_gradient(subject: Subject) -> None:
    """If this fails, accumulating micro-batches trains a different model than one large batch."""
    whole, parts = subject.loose((6, 4), (5,)), subject.loose((6, 4), (5,))
    for step in range(3):
        whole.step(lambda step=step: _mean_loss(whole, step, range(8)))  # type: ignore[misc]
        parts.optimizer.zero_grad()
        for k in range(0, 8, 2):
            (_mean_loss(parts, step, range(k, k + 2)) / 4).backward()  # type: ignore[no-untyped-call]
        parts.optimizer.step()
    expect.close(parts.values(), whole.values(), 1e-5, "three steps on 4 micro-batches of 2, against batches of 8")
    expect.same(_counters(parts), _counters(whole), "three steps on 4 micro-batches of 2, against batches of 8")


def _mean_loss(trial: Trial, step: int, samples: range) -> Tensor:
    """A mean over samples with small integers, so that sums of its gradients are exact in any order."""
    losses = [(p * drawn(f"{n} {step} {i}", p.shape).mul(8).round()).sum() for n, p in trial.params.items() for i in samples]
    return torch.stack(losses).sum() / len(samples)


def _counters(trial: Trial) -> dict[str, Tensor]:
    return {name: value for name, value in trial.state().items() if name.startswith("step ")}


def gradients_are_left_alone(subject: Subject) -> None:
    """If this fails, code that logs or reuses gradients after a step, with consume_grad=False, reads wrong values."""
    trial = subject.mlp(consume_grad=False)
    for step in range(3):
        trial.backward()
        held = {name: p.grad for name, p in trial.params.items()}
        before = {name: g.clone() for name, g in held.items() if g is not None}
        trial.optimizer.step()
        for name, p in trial.params.items():
            assert p.grad is held[name], f"step {step + 1} with consume_grad=False replaced or dropped the gradient of {name}"
        expect.same({n: g for n, g in held.items() if g is not None}, before, f"gradients after step {step + 1}")


def global_random_state_is_untouched(subject: Subject) -> None:
    """If this fails, the choice of optimizer changes dropout and the order of the data."""
    with torch.random.fork_rng(devices=[]):
        trial = subject.mlp()
        before, python = torch.random.get_rng_state(), random.getstate()
        trial = subject.trial(trial.model)
        trial.train(3)
        trial.optimizer.state_dict()
        assert torch.equal(torch.random.get_rng_state(), before), "three steps changed torch's global random state"
        assert random.getstate() == python, "three steps changed Python's global random state"


def results_do_not_depend_on_the_global_seed(subject: Subject) -> None:
    """If this fails, data-parallel ranks with different seeds diverge."""
    trials = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            trials.append(subject.mlp())
            trials[-1].train(4)
    expect.same_trial(trials[1], trials[0], "four steps with a different torch.manual_seed")


def the_seed_option_is_used(subject: Subject) -> None:
    """If this fails, runs with different seeds use the same random numbers."""
    one, other = subject.loose((6, 4), seed=1), subject.loose((6, 4), seed=2)
    for t in (one, other):
        t.train(4)
    ours, theirs = one.values() | one.state(), other.values() | other.state()
    alike = all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert not alike, "expected different results with seed=1 and seed=2, found the same parameters and state after 4 steps"


def used_gradients_are_let_go(subject: Subject) -> None:
    """If this fails, every gradient stays in memory until the next step replaces it."""
    p = nn.Parameter(drawn("kept", (8, 8)))
    optimizer = subject.optimizer([("kept", p)])
    for step in range(3):
        p.grad = torch.ones_like(p)
        watched = weakref.ref(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        if watched() is not None:
            gc.collect()
        assert watched() is None, f"the gradient of step {step + 1} is still alive after zero_grad()"


CHECKS = (
    Check(no_gradient_means_untouched, stored=True),
    Check(zero_gradients_stay_finite, stored=True),
    Check(accumulated_gradients_are_one_gradient, excludes=NOT_BY_HAND),
    Check(gradients_are_left_alone, excludes=NOT_BY_HAND),
    Check(used_gradients_are_let_go, excludes=NOT_BY_HAND),
    Check(global_random_state_is_untouched, stored=True),
    Check(results_do_not_depend_on_the_global_seed, stored=True),
    Check(the_seed_option_is_used, needs=frozenset({"random"})),
)
