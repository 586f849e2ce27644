"""``benchmarks/lightbench``: its problems begin unsolved and can be solved, and a study repeats nothing and draws alike."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "lightbench"


def load(name):
    """A script of the folder, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"lightbench_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


problems = load("problems")
table = load("table")
EVERY = [(name, level) for name, problem in problems.PROBLEMS.items() for level in problem.levels]
SOLUTIONS = {"rosenbrock": 1.0, "saddle_point": -2.0, "powers": 1.0, "beale": 0.0, "rastrigin": 0.0, "plateau_navigation": 0.0}
AT_ZERO = ("discontinuous_gradient", "quadratic_varying_scale", "sparse_gradient", "scale_invariant", "adversarial_gradient")


@pytest.fixture
def run(monkeypatch):
    """The script ``run.py``, with hbcore alone."""
    monkeypatch.setitem(sys.modules, "problems", problems)
    monkeypatch.setitem(sys.modules, "table", table)
    module = load("run")
    monkeypatch.setattr(module, "LIBRARIES", {"hbcore": module.ours})
    return module


def instance(name, level, seed=0):
    generator = torch.Generator().manual_seed(seed)
    problem = problems.PROBLEMS[name]
    return problem.make(problem.levels[level], generator), generator


@pytest.mark.parametrize(("name", "level"), EVERY)
def test_a_problem_begins_unsolved_with_finite_gradients(name, level):
    for seed in range(8):
        made, generator = instance(name, level, seed)
        error = made.error(0).item()
        assert torch.tensor(error).isfinite() and error > problems.PROBLEMS[name].threshold
        for t in range(2):
            loss = made.loss(t, generator)
            assert loss.isfinite() and loss.shape == ()
            grads = torch.autograd.grad(loss, made.params)
            assert all(g.isfinite().all() for g in grads) and any(g.any() for g in grads)


@pytest.mark.parametrize(("name", "level"), [(n, v) for n, v in EVERY if n in SOLUTIONS or n in AT_ZERO])
def test_a_problem_is_solved_at_its_solution(name, level):
    made, _ = instance(name, level)
    with torch.no_grad():
        made.params[0].fill_(SOLUTIONS.get(name, 0.0))
        if name == "beale":
            assert made.error(0).item() == pytest.approx(0.0, abs=1e-12)
        assert made.error(0).item() <= problems.PROBLEMS[name].threshold


def test_a_network_is_solved_by_none_of_its_symmetries():
    made, _ = instance("xor_digit_rnn", "easy")
    with torch.no_grad():
        for p in made.params:
            p.zero_()
    assert made.error(0).item() == pytest.approx(0.6931, abs=1e-3), "a network of zeros knows nothing: log 2"


def test_adamw_solves_an_easy_problem_and_the_same_way_each_time(run):
    problem = problems.PROBLEMS["plateau_navigation"]
    found = [run.attempt(run.ours, "AdamW", problem, "easy", lr, seed=3) for lr in (0.02, 0.02, 1e-6)]
    assert found[0] == found[1] and found[0][0] <= problem.threshold and found[0][1] < problem.steps
    assert found[2][0] > problem.threshold and found[2][1] == problem.steps


def test_noise_follows_from_the_seed(run):
    problem = problems.PROBLEMS["wide_linear"]
    short = problems.Problem(problem.make, problem.threshold, steps=10, levels=problem.levels)
    found = [run.attempt(run.ours, "PSGDKron", short, "easy", 0.02, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_a_run_that_diverges_ends(run):
    problem = problems.PROBLEMS["rosenbrock"]
    best, steps = run.attempt(run.ours, "SGD", problem, "easy", 10.0, seed=0)
    assert best > problem.threshold and steps < problem.steps


def test_a_study_repeats_nothing_and_stops_at_the_level_that_fails(run, monkeypatch, tmp_path):
    runs, calls = tmp_path / "runs", []

    def search(make, name, problem, level, seed):
        calls.append(level)
        return {"passed": level == "easy", "best": 1.0, "seconds": 0.0}

    monkeypatch.setattr(run, "search", search)
    run.study([("AdamW", "powers"), ("AdamW", "beale")], 0, runs)
    assert calls == ["easy", "medium", "easy"]
    text = runs.read_text()
    runs.write_text(text[:-9])  # as an interruption leaves it
    run.study([("AdamW", "powers"), ("AdamW", "beale")], 0, runs)
    assert calls == ["easy", "medium", "easy", "easy"]
    assert run.held(runs) == [json.loads(line) for line in text.splitlines()]


def test_what_only_one_library_passed_is_repeated_on_other_seeds(run, monkeypatch, tmp_path):
    def search(make, name, problem, level, seed):
        only_ours = problem is problems.PROBLEMS["beale"] and make == "theirs"
        return {"passed": level == "easy" and not only_ours, "best": 1.0, "seconds": 0.5}

    out = tmp_path / "result.json"
    monkeypatch.setattr(run, "search", search)
    monkeypatch.setattr(run, "LIBRARIES", {"hbcore": "ours", "heavyball": "theirs"})
    monkeypatch.setattr(run, "version", lambda package: "1.0")
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(out), "--only", "AdamW", "--problems", "beale", "powers"])
    run.main()
    result = json.loads(out.read_text())
    assert [(r["problem"], r["seed"]) for r in result["runs"]] == [
        *[("beale", 0)] * 2,
        *[("powers", 0)] * 4,
        *[("beale", 1)] * 2,
        *[("beale", 2)] * 2,
    ]
    assert result["seconds"] == 5.0 and "--only AdamW" in result["command"]
    assert "| AdamW | beale | easy | 1e-06 | 1 | 1 | 1/0, 1/0, 1/0 |" in table.disagreements(result)


def test_an_optimizer_that_fails_is_recorded(run):
    def broken(name, params, lr, seed):
        raise ValueError("no such rule")

    found = run.search(broken, "AdamW", problems.PROBLEMS["beale"], "easy", 0)
    assert not found["passed"] and "no such rule" in found["exception"] and found["best"] is None


def test_both_libraries_take_the_same_steps(run, monkeypatch):
    heavyball = pytest.importorskip("heavyball", reason="heavyball does not import here", exc_type=ImportError)
    for name in ("compile_mode", "scion_auto_init_param_"):
        monkeypatch.setattr(heavyball.utils, name, getattr(heavyball.utils, name))  # given back afterwards
    problem = problems.PROBLEMS["wide_linear"]
    ours, theirs = (run.attempt(make, "AdamW", problem, "easy", 0.025, seed=0) for make in (run.ours, run.theirs))
    assert ours[1] == theirs[1] and ours[0] == pytest.approx(theirs[0], rel=1e-2)


def test_the_table_counts_levels_and_marks_what_differs():
    def searched(problem, library, level, passed, seed=0):
        who = {"optimizer": "AdamW", "problem": problem, "library": library, "level": level, "seed": seed}
        return {**who, "passed": passed, "best": 0.5}

    about = {
        "beale": {"threshold": 0.1, "levels": {"easy": 0}},
        "powers": {"threshold": 0.1, "levels": dict.fromkeys("emh", 0)},
    }
    result = {
        "problems": about,
        "runs": [
            *(searched("beale", library, "easy", True) for library in ("hbcore", "heavyball")),
            *(searched("powers", "hbcore", level, True) for level in "emh"),
            *(searched("powers", "heavyball", level, level == "e") for level in "em"),
            *(searched("powers", library, "e", True, seed=1) for library in ("hbcore", "heavyball")),
        ],
    }
    assert "| `AdamW` | ✓/✓ | **h/e** | 4/2 |" in table.markdown(result)
    assert table.markdown(result).splitlines()[-1] == "| total | 1/1 | 3/1 | 4/2 |"
    assert table.disagreements(result).splitlines()[2:] == ["| AdamW | powers | m | 0.1 | 0.5 | 0.5 | 3/1, 1/1 |"]
