"""The scripts that judge the tests and record what came of them."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def script(name):
    """A module of scripts/, whose modules import each other by their names."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    before = dict(sys.modules)
    yield script
    for name in set(sys.modules) - set(before):
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == ROOT / "scripts":
            del sys.modules[name]


@pytest.fixture
def mutants(scripts):
    return scripts("mutants")


MADE = {
    "x = a < b": ["x = (a <= b)"],
    "x = a >= b": ["x = (a > b)"],
    "x = a == b": ["x = (a != b)"],
    "x = a is not b": ["x = (a is b)"],
    "x = a in b": ["x = (a not in b)"],
    "x = a < b < c": ["x = (a <= b < c)", "x = (a < b <= c)"],
    "x = a and b": ["x = (a or b)"],
    "x = a or b or c": ["x = (a and b and c)"],
    "x = not a": ["x = (a)"],
    "x = f(1, -2)": ["x = f((2), -2)", "x = f(1, -(3))"],
    "x = a + b * c": ["x = (a - b * c)", "x = a + (b / c)"],
    "x = a // b - c % d": ["x = (a // b + c % d)", "x = (a * b) - c % d", "x = a // b - (c // d)"],
    "x = a**b": ["x = (a * b)"],
    "x = a if b else c": ["x = a if (not b) else c"],
    "x = [a for a in b if c]": ["x = [a for a in b if (not c)]"],
    "if a:\n    b = c": ["if (not a):\n    b = c"],
    "while a < b:\n    b = c": ["while (a <= b):\n    b = c", "while (not a < b):\n    b = c"],
    "if a != b:\n    b = c": ["if (a == b):\n    b = c"],
    "f(a)": ["pass"],
    "a.b += c": ["pass"],
    "f(\n    a,\n)  # why\nx = a": ["pass  # why\nx = a"],
    "é = 'é'; x = a == b": ["é = 'é'; x = (a != b)"],
}
"""A line -> what it may become."""


class TestMutants:
    """scripts/mutants.py."""

    @pytest.mark.parametrize("source", MADE)
    def test_each_change_is_made_where_it_can_be(self, mutants, source):
        assert sorted(m.apply(source) for m in mutants.mutants(source)) == sorted(MADE[source])

    @pytest.mark.parametrize(
        "source",
        [
            '"""1 + 1."""',
            "x: Array[1 + 1] = a",
            "def f(a: Array[1] = b) -> Array[2]:\n    return a",
            "raise ValueError(f'{a + 1} is too large' if a else 'none', 3)",
            "x = f'{a + 1}'",
            "if TYPE_CHECKING:\n    f(1)",
            "if typing.TYPE_CHECKING:\n    f(1)",
            "assert a, 1 + 1",
            "x = 'a' + b + c",
            "x = [a] * b",
            "x = True",
            "x = 1.5",
        ],
    )
    def test_nothing_is_changed_that_does_not_run_or_is_only_told(self, mutants, source):
        assert mutants.mutants(source) == []

    def test_a_mutant_says_where_it_is_and_what_it_does(self, mutants):
        [mutant] = mutants.mutants("a = b\nc = (d <\n     e)\n", "some/file.py")
        assert str(mutant) == "some/file.py:2: d < e -> (d <= e)"
        assert mutant.apply("a = b\nc = (d <\n     e)\n") == "a = b\nc = ((d <= e))\n"

    def test_every_mutant_of_the_engine_is_a_program(self, mutants):
        files = sorted((ROOT / mutants.ENGINE).rglob("*.py"))
        for path in files[::6]:
            source = path.read_text()
            for mutant in mutants.mutants(source):
                assert mutant.apply(source) != source
                compile(mutant.apply(source), str(path), "exec")
        assert len(files) > 10

    @pytest.fixture
    def project(self, tmp_path):
        """A package with two functions, and a test of one of them."""
        files = {
            "toy/engine/deep/sums.py": "def total(a, b):\n    return a + b\n\n\ndef difference(a, b):\n    return a - b\n",
            "plugins/hb_x/src/toy_plugin.py": "value = 3\n",
            "tests/test_sums.py": "import toy_plugin\nfrom toy.engine.deep.sums import total\n\n\n"
            "def test_sums():\n    assert total(2, toy_plugin.value) == 5\n",
            "environment/pyvenv.cfg": "",
            ".hidden/file": "",
        }
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    def test_survivors_and_killed_ones_are_told_apart(self, mutants, project, capfd):
        before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
        found = mutants.survey(9, 0, root=project, folder="toy/engine", arguments=["tests"])
        survivor = "toy/engine/deep/sums.py:6: a - b -> (a + b)"
        assert found == {"possible": 2, "seed": 0, "count": 2, "killed": 1, "rate": 0.5, "survivors": [survivor]}
        told = capfd.readouterr().err.splitlines()
        assert sorted(told) == [f"SURVIVED {survivor}", "killed   toy/engine/deep/sums.py:2: a + b -> (a - b)"]
        assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before

    def test_a_sample_is_drawn_by_its_seed(self, mutants, project, monkeypatch):
        monkeypatch.setattr(mutants, "tests_pass", lambda tree, arguments, limit: True)
        drawn = [
            mutants.survey(1, seed, root=project, folder="toy/engine", arguments=[])["survivors"]
            for seed in (0, 1, 2, 3, 0, 1, 2, 3)
        ]
        assert drawn[:4] == drawn[4:]
        assert len({str(survivors) for survivors in drawn}) == 2
        assert all(len(survivors) == 1 for survivors in drawn)

    def test_tests_that_fail_anyway_judge_nothing(self, mutants, project):
        (project / "tests" / "test_sums.py").write_text("def test_sums():\n    assert 2 + 2 == 5\n")
        with pytest.raises(RuntimeError, match=r"(?s)fail without a mutant.*2 \+ 2"):
            mutants.survey(1, 0, root=project, folder="toy/engine", arguments=["tests"])

    def test_tests_that_take_too_long_do_not_pass_and_do_not_go_on(self, mutants, project):
        endless = "import os, time\nopen('started', 'w').write(str(os.getpid()))\n\ndef test_it():\n    time.sleep(600)\n"
        (project / "tests" / "test_sums.py").write_text(endless)
        assert not mutants.tests_pass(project, ["tests"], 5)
        with pytest.raises(ProcessLookupError):
            os.kill(int((project / "started").read_text()), 0)

    def test_the_tests_that_it_runs_are_there(self, mutants):
        files = [name for name in mutants.TESTS if name.endswith(".py")]
        assert len(files) > 20
        assert [name for name in files if not (ROOT / name).exists()] == []
