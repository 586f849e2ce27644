"""Results, expected failures, levels and the decorator, on checks and optimizers that cost nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from testing.broken import BROKEN

from hb_adam import SGD
from hbcore.testing import (
    CHECKS,
    CODEC_CHECKS,
    RANK_CHECKS,
    Result,
    assert_codec_conforms,
    assert_conforms,
    conformance,
    levels,
    run_checks,
    run_codec_checks,
)

LOSS = "a_closure_is_called_and_its_loss_returned"
SAVED = "saving_early_leaves_no_trace"
FORGETS = BROKEN[LOSS]
EVERY = [*(c.name for c in (*CHECKS, *RANK_CHECKS)), *(f.__name__ for f in CODEC_CHECKS)]


def statuses(results: list[Result]) -> dict[tuple[str, str], str]:
    return {(r.subject, r.check): r.status for r in results}


def test_a_result_has_a_status_a_message_and_a_time_and_is_told_as_it_comes():
    told = []
    results = run_checks(FORGETS, only=[LOSS, SAVED], ecc=[], on_result=told.append)
    assert told == results
    assert statuses(results) == {("Broken()", LOSS): "failed", ("Broken()", SAVED): "passed"}
    assert "found None" in results[0].message and results[1].message == "" and all(r.seconds > 0 for r in results)
    assert str(results[1]) == f"Broken() passes {SAVED}"


def test_what_cannot_be_checked_here_is_skipped(monkeypatch):
    from unittest import SkipTest

    def skips(subject):
        raise SkipTest("no GPU")

    monkeypatch.setattr("hbcore.testing.codec_runner.CODEC_CHECKS", (skips,))
    monkeypatch.setitem(levels.ADDED, "api-1", ("skips",))
    [result] = run_codec_checks("bf16+8")
    assert (result.status, result.message, result.red) == ("skipped", "no GPU", False)
    [result] = run_codec_checks("bf16+8", expected_failures={"zeros_are_zero": "another"})
    assert result.status == "skipped"


def test_a_listed_failure_is_expected_and_a_listed_pass_is_red():
    results = run_checks(FORGETS, only=[LOSS, SAVED], ecc=[], expected_failures={LOSS: "until 2.0", SAVED: "as well"})
    assert [(r.status, r.red) for r in results] == [("expected", False), ("unexpected pass", True)]
    assert results[0].message.startswith("until 2.0: ") and "found None" in results[0].message
    assert str(results[1]).endswith("was expected to fail (as well); remove it from expected_failures.")


def test_one_variant_may_be_listed():
    only = {"Broken(ecc='bf16+8')-" + LOSS: "compressed alone"}
    found = statuses(run_checks(FORGETS, only=[LOSS], expected_failures=only))
    assert found == {("Broken()", LOSS): "failed", ("Broken(ecc='bf16+8')", LOSS): "expected"}


@pytest.mark.parametrize(
    ("listed", "told"),
    [
        ({"saving_early_leaves_trace": "x"}, f"no check is named 'saving_early_leaves_trace'; choose from {SAVED}"),
        ({"zeros_are_zero": "x"}, "no check is named 'zeros_are_zero'"),
        ({f"Lion()-{SAVED}": "x"}, r"has 'Lion\(\)-saving_early_leaves_no_trace', but what is checked is SGD\(\)"),
        ({SAVED: " "}, f"needs a reason for '{SAVED}'"),
        ({SAVED: None}, f"needs a reason for '{SAVED}'"),
    ],
)
def test_a_wrong_list_is_an_error(listed, told):
    with pytest.raises(ValueError, match=told):
        run_checks("SGD", only=[SAVED], expected_failures=listed)
    with pytest.raises(ValueError, match=told):
        conformance("SGD", expected_failures=listed)


def test_asserting_conformance_obeys_levels_and_expected_failures(monkeypatch):
    monkeypatch.setattr("hbcore.testing.runner.CHECKS", tuple(c for c in CHECKS if c.name in (LOSS, SAVED)))
    with pytest.raises(AssertionError, match=rf"1 checks failed:\nBroken\(\) fails {LOSS}"):
        assert_conforms(FORGETS, ecc=[])
    assert_conforms(FORGETS, ecc=[], expected_failures={LOSS: "until 2.0"})
    with pytest.raises(AssertionError, match=f"passes {SAVED}, which was expected to fail"):
        assert_conforms(FORGETS, ecc=[], expected_failures={LOSS: "until 2.0", SAVED: "as well"})
    monkeypatch.setitem(levels.ADDED, "api-1", tuple(n for n in levels.ADDED["api-1"] if n != LOSS))
    assert_conforms(FORGETS, ecc=[], level="api-1")
    with pytest.raises(ValueError, match="there is no level 'api-0'"):
        assert_conforms(FORGETS, level="api-0")
    with pytest.raises(AssertionError, match="passes zeros_are_zero, which was expected to fail"):
        assert_codec_conforms("bf16+8", expected_failures={"zeros_are_zero": "never"})


# --- levels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("api-*.txt")), ids=lambda path: path.stem)
def test_a_released_level_never_changes(path):
    """A check in it cannot be added, removed or renamed: authors who pinned the level would see red."""
    assert sorted(levels.names_of(path.stem)) == path.read_text().split()


def test_every_check_enters_one_level_and_there_are_no_others():
    entered = [name for names in levels.ADDED.values() for name in names]
    assert sorted(entered) == sorted(EVERY)
    assert levels.names_of(None) == set(EVERY) == levels.names_of(levels.NEWEST)


# --- the decorator ----------------------------------------------------------------------------------------------------


def params(decorator):
    name, cases = decorator.mark.args
    assert decorator.mark.name == "parametrize" and name == "check"
    return {case.id: case for case in cases}


def test_the_decorator_makes_a_test_of_each_case():
    found = params(conformance(SGD, "AdamW", level="api-1"))
    assert "SGD()-every_hook_runs_once" in found and "AdamW(ecc='bf16+8')-resuming_changes_no_bit" in found
    assert "SGD(ecc='bf16+8')-every_hook_runs_once" not in found and not any("shards" in name for name in found)
    [check] = found[f"SGD()-{SAVED}"].values
    check()
    assert f"SGD()-{RANK_CHECKS[0].name}" in params(conformance("SGD", ranks=2))
    assert set(params(conformance(codec="bf16+8"))) == {f"BF16Plus8()-{f.__name__}" for f in CODEC_CHECKS}


def test_the_decorator_marks_what_is_expected_to_fail_and_what_the_author_wants_marked():
    slow = pytest.mark.broad
    expected = {LOSS: "until 2.0"}
    found = params(
        conformance(FORGETS, ecc=[], expected_failures=expected, marks=lambda case: slow if case.check.stored else ())
    )
    [xfail] = found[f"Broken()-{LOSS}"].marks
    assert (xfail.name, xfail.kwargs) == ("xfail", {"reason": "until 2.0", "strict": True})
    assert [m.name for m in found["Broken()-resuming_changes_no_bit"].marks] == ["broad"]


@pytest.mark.parametrize("arguments", [{}, {"codec": "bf16+8", "optimizer": "SGD"}, {"optimizer": lambda check: None}])
def test_the_decorator_without_a_subject_or_with_two_is_an_error(arguments):
    optimizer = arguments.pop("optimizer", None)
    with pytest.raises(TypeError, match="conformance takes optimizers, names or classes, or a codec"):
        conformance(*([] if optimizer is None else [optimizer]), **arguments)


def test_the_kit_needs_torch_only_when_used_and_pytest_only_for_the_decorator():
    light = (
        "import sys; from hbcore.testing import conformance; import hbcore.testing.levels; assert 'torch' not in sys.modules"
    )
    alone = (
        "import sys; sys.modules['pytest'] = sys.modules['_pytest'] = None\n"
        "from hbcore.testing import run_checks, check, assert_conforms, assert_codec_conforms\n"
        f"assert [r.status for r in run_checks('SGD', only=[{SAVED!r}], ecc=[])] == ['passed']"
    )
    for script in (light, alone):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
