"""Checks of what trainers, schedulers and torch itself expect from an optimizer."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from hbcore.errors import HyperparameterError
from hbcore.testing import expect
from hbcore.testing.subject import NOT_BY_HAND, Check, Subject, Trial, loss_of, through_file
from hbcore.wrappers.composite import Composite


def it_is_a_torch_optimizer(subject: Subject) -> None:
    """If this fails, trainers, schedulers and configuration files do not accept the optimizer."""
    parameters = inspect.signature(subject.cls).parameters
    assert next(iter(parameters), "") == "params", f"expected 'params' as the first argument, found {list(parameters)[:3]}"
    if not issubclass(subject.cls, Composite):  # a composite forwards the arguments of its optimizers
        assert "lr" in parameters, f"expected an argument 'lr', found {list(parameters)}"
        vague = [n for n, p in parameters.items() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        assert not vague, f"expected a signature that names every argument, found {vague}"
    optimizer = subject.mlp().optimizer
    assert isinstance(optimizer, torch.optim.Optimizer), f"expected a torch.optim.Optimizer, found {type(optimizer).__mro__}"
    assert "lr" in optimizer.defaults and all("lr" in g for g in optimizer.param_groups), "expected 'lr' in every param group"
    assert subject.cls.__name__ in repr(optimizer), f"expected the class's name in its repr, found {optimizer!r:.60}"


def bad_numbers_are_refused(subject: Subject) -> None:
    """If this fails, a typo in a configuration can go unnoticed for days of training."""
    for lr in (-1.0, float("nan")):
        for build in (lambda lr=lr: subject.loose((3,), lr=lr), lambda lr=lr: _group_with(subject, lr=lr)):
            try:
                build()
            except HyperparameterError as error:
                assert "lr" in str(error), f"expected the error for lr={lr} to name lr, found: {error}"
            else:
                raise AssertionError(f"expected a HyperparameterError for lr={lr}; it was accepted")
    try:
        subject.loose((3,), no_such_option=1)
    except TypeError as error:
        assert "no_such_option" in str(error), f"expected the error to name the option 'no_such_option', found: {error}"
    else:
        raise AssertionError("expected a TypeError for the option 'no_such_option'; it was accepted")


def _group_with(subject: Subject, **numbers: Any) -> None:
    subject.optimizer([{"params": [nn.Parameter(torch.ones(3))], **numbers}])


def a_closure_is_called_and_its_loss_returned(subject: Subject) -> None:
    """If this fails, trainers that pass a closure, such as Lightning, do not train, or log no loss."""
    trial, plain = subject.mlp(), subject.mlp()
    losses: list[Tensor] = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled(), "expected gradients to be enabled while the closure runs"
        losses.append(trial.backward())
        return losses[-1]

    with torch.no_grad():
        returned = trial.optimizer.step(closure)
    assert losses, "expected step(closure) to call the closure"
    assert returned is losses[0], f"expected step(closure) to return the closure's loss, found {returned!r}"
    if "closure" not in subject.capabilities:
        assert len(losses) == 1, f"expected one call of the closure, found {len(losses)}"
    plain.step()
    trial.optimizer.zero_grad()
    expect.same(trial.values(), plain.values(), "one step with a closure")


def copies_train_on(subject: Subject) -> None:
    """If this fails, sweeps, SWA and workers that copy or pickle an optimizer break, or lose its state."""
    ways: dict[str, Callable[[Any], Any]] = {
        "copy.deepcopy": copy.deepcopy,
        "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    }
    for way, copied in ways.items():
        for before in (0, 3):
            trial = subject.mlp()
            trial.train(before)
            what = f"three steps after {way} after {before} steps"
            with expect.working(what):
                model, optimizer = copied((trial.model, trial.optimizer))
                twin = Trial(subject, model, optimizer, trial.taken)
                assert type(twin.optimizer) is type(trial.optimizer), f"{way} made a {type(twin.optimizer).__name__}"
                start = trial.values()
                twin.train(3)
            expect.same(trial.values(), start, f"the original after its {way} took three steps")
            trial.train(3)
            expect.same_trial(twin, trial, what)


def every_hook_runs_once(subject: Subject) -> None:
    """If this fails, features that use optimizer hooks (accumulation, logging, sharding) run twice or never."""
    subject.mlp()  # torch wraps step() when the first optimizer of a class is built
    trial = subject.mlp()
    calls: list[str] = []
    for name in ("step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
        register = getattr(trial.optimizer, f"register_{name}_hook")
        register(lambda *_, name=name: calls.append(name))
    trial.step()
    saved = trial.optimizer.state_dict()
    with expect.working("loading its own state dict"):
        trial.optimizer.load_state_dict(saved)
    expected = ["step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"]
    assert calls == expected, f"expected the hooks {expected}, each once; found {calls}"


def schedules_apply_and_compile_nothing(subject: Subject) -> None:
    """If this fails, a learning rate schedule is ignored, or causes a compilation in every step."""
    trial = subject.loose((6, 4), (5,), compile="inductor")
    cycles = "betas" in trial.optimizer.defaults or "momentum" in trial.optimizer.defaults
    schedules: dict[str, Callable[[Any], Any]] = {
        "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
        "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20, cycle_momentum=cycles),
        "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    }
    trial.train(2)
    report = trial.optimizer.report
    warm = report.compiles, report.programs
    for name, schedule in schedules.items():
        scheduler = schedule(trial.optimizer)
        before = trial.values()
        for step in range(15):
            trial.step()
            scheduler.step(*[1.0] * (name == "ReduceLROnPlateau"))
            found = report.compiles, report.programs
            assert found == warm, f"{name}, step {step}: expected {warm} compiles and programs, as after warm-up, found {found}"
        expect.moved(before, trial.values(), f"15 steps with {name}")
    _expect_obeyed(subject)


def _expect_obeyed(subject: Subject) -> None:
    """Expect a step to use the scheduler's learning rate."""
    still, fast = subject.mlp(), subject.mlp()
    before = still.values()
    for trial, factor in ((still, 0.0), (fast, 2.0)):
        lr_scheduler.LambdaLR(trial.optimizer, lambda t, factor=factor: factor)  # type: ignore[misc]
        trial.train(2)
    expect.moved(still.values(), fast.values(), "a scheduler that doubles the lr, compared with one that sets it to 0")
    if "modes" not in subject.capabilities:
        expect.same(still.values(), before, "two steps at lr 0, set by a scheduler")
        return
    moved = []
    for trial in (still, fast):  # training weights may be perturbed at any lr, evaluation weights follow it
        trial.optimizer.eval()
        moved.append(max(float((value - before[name]).abs().max()) for name, value in trial.values().items()))
    assert moved[0] <= 1e-3 * moved[1], (
        f"expected two steps at lr 0 not to change the evaluation weights, found a change of {moved[0]:g}"
    )


def a_tensor_is_as_good_a_rate_as_a_number(subject: Subject) -> None:
    """If this fails, a tensor lr, which prevents recompilation by torch.compile, is rejected or rounded."""
    number, tensor = subject.mlp(lr=2.0**-10), subject.mlp(lr=torch.tensor(2.0**-10))
    for t in (number, tensor):
        with expect.working("three steps with a tensor lr"):
            t.train(3)
    expect.same(tensor.values(), number.values(), "three steps with a tensor lr")


def a_grad_scaler_skips_infinite_steps(subject: Subject) -> None:
    """If this fails, the first steps of a mixed-precision run, while the scale is too large, turn the model into NaN."""
    trial, plain = subject.mlp(), subject.mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    before = trial.values()
    for step in range(4):
        loss = loss_of(trial.model, max(step - 1, 0))
        scaler.scale(loss * (1.0 if step else float("inf"))).backward()  # type: ignore[no-untyped-call]
        scaler.step(trial.optimizer)
        scaler.update()
        trial.optimizer.zero_grad()
        if step == 0:
            expect.same(trial.values(), before, "a step with infinite gradients, which the GradScaler skips")
    plain.train(3)
    expect.same(trial.values(), plain.values(), "a skipped step and three steps with a GradScaler, compared with three without")


def late_and_empty_groups_work(subject: Subject) -> None:
    """If this fails, layers that are unfrozen late never train, or their run cannot be resumed."""
    trials = [_grouped(subject) for _ in range(2)]
    trial, other = trials
    before = trial.values()
    with expect.working("three steps with an empty and a late group"):
        trial.train(3)
    expect.finite(trial.values(), "three steps with a late group")
    expect.moved(before, trial.values(), "three steps with a late group")
    with expect.working("saving and loading with an empty and a late group"):
        other.model.load_state_dict(trial.model.state_dict())
        other.optimizer.load_state_dict(through_file(trial.optimizer.state_dict()))
    other.taken = trial.taken
    missing = trial.optimizer.param_groups[0].keys() - other.optimizer.param_groups[1].keys()
    assert not missing, f"expected the empty group to keep its hyperparameters; it lost {sorted(missing)}"
    for t in trials:
        t.train(2)
    expect.same_trial(other, trial, "resumed with an empty and a late group")


def _grouped(subject: Subject) -> Trial:
    """A group, an empty group, and after two steps a third. Without names: torch treats an empty group as unnamed."""
    trial = subject.loose((4, 3), (5,), (4, 3))
    params = list(trial.params.values())
    trial.optimizer = subject.optimizer([{"params": params[:2]}, {"params": [], "lr": 0.5}])
    trial.train(2)
    trial.optimizer.add_param_group({"params": params[2:]})
    return trial


def nothing_outlives_the_optimizer(subject: Subject) -> None:
    """If this fails, every model of a sweep stays in memory."""
    trial = subject.mlp()
    trial.train(2)
    watched = {f"parameter {name}": weakref.ref(p) for name, p in trial.params.items()}
    watched["the optimizer"] = weakref.ref(trial.optimizer)
    del trial
    gc.collect()
    alive = [name for name, w in watched.items() if w() is not None]
    assert not alive, f"expected everything to be freed after del; still alive: {alive}"


def eval_and_train_return_to_where_they_were(subject: Subject) -> None:
    """If this fails, evaluation between steps changes training, or uses the wrong weights."""
    trial = subject.loose((6, 4), (5,))
    trial.train(5)
    training = trial.values()
    trial.optimizer.eval()
    evaluating = trial.values()
    expect.moved(training, evaluating, "eval() after five steps")
    trial.optimizer.eval()
    expect.same(trial.values(), evaluating, "a second eval()")
    trial.optimizer.train()
    expect.close(trial.values(), training, 1e-5, "train() after eval()")
    back = trial.values()
    trial.optimizer.train()
    expect.same(trial.values(), back, "a second train()")


def the_loss_goes_down(subject: Subject) -> None:
    """If this fails, the optimizer does not optimize."""
    for trial in (subject.mlp(), subject.convnet()):
        start = float(loss_of(trial.model, 0).detach())
        for _ in range(20):
            trial.step(lambda model=trial.model: loss_of(model, 0))  # type: ignore[misc]
        end = float(loss_of(trial.model, 0).detach())
        assert end < start, f"expected 20 steps on one batch to lower its loss from {start:g}; it became {end:g}"


def the_first_gradient_moves_everything(subject: Subject) -> None:
    """If this fails, the optimizer silently wastes its first step: declare the capability ``"primes"``."""
    trial = subject.loose((6, 4), (5,))
    before = trial.values()
    trial.step()
    expect.moved(before, trial.values(), "the first step")


def the_first_gradient_of_a_matrix_only_primes(subject: Subject) -> None:
    """If this fails, the optimizer declares the capability ``"primes"`` but does not prime."""
    trial = subject.loose((6, 4))
    before = trial.values()
    trial.step()
    expect.same(trial.values(), before, "the first gradient, which only primes")
    trial.step()
    expect.moved(before, trial.values(), "the second gradient")


PRIMES = frozenset({"primes"})

CHECKS = (
    Check(it_is_a_torch_optimizer),
    Check(bad_numbers_are_refused),
    Check(a_closure_is_called_and_its_loss_returned),
    Check(copies_train_on, stored=True),
    Check(every_hook_runs_once),
    Check(schedules_apply_and_compile_nothing, compiles=True),
    Check(a_tensor_is_as_good_a_rate_as_a_number),
    Check(a_grad_scaler_skips_infinite_steps, excludes=NOT_BY_HAND, stored=True),
    Check(late_and_empty_groups_work),
    Check(nothing_outlives_the_optimizer),
    Check(eval_and_train_return_to_where_they_were, needs=frozenset({"modes"}), stored=True),
    Check(the_loss_goes_down, stored=True),
    Check(the_first_gradient_moves_everything, excludes=PRIMES, stored=True),
    Check(the_first_gradient_of_a_matrix_only_primes, needs=PRIMES, stored=True),
)
