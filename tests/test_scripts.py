"""The scripts that judge the tests and record what came of them."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.broad  # what runs in CI and `make test-full` is tested there

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
        """Two functions in two files, and a test of one; it wants nothing hidden, built or installed beside it."""
        files = {
            "toy/engine/deep/sums.py": "def total(a, b):\n    return a + b\n",
            "toy/engine/differences.py": "def difference(a, b):\n    return a - b\n",
            "plugins/hb_x/src/toy_plugin.py": "value = 3\n",
            "tests/test_sums.py": "import toy_plugin\nfrom pathlib import Path\nfrom toy.engine.deep.sums import total\n\n\n"
            "def test_sums():\n    assert total(2, toy_plugin.value) == 5\n"
            "    assert sorted(p.name for p in Path().iterdir()) == ['plugins', 'tests', 'tests.log', 'toy']\n",
            "environment/pyvenv.cfg": "",
            ".hidden/file": "",
            "build/file": "",
        }
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    @pytest.mark.parametrize("jobs", [1, 2])
    def test_survivors_and_killed_ones_are_told_apart(self, mutants, project, capfd, jobs):
        before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
        found = mutants.survey(9, 1, jobs, root=project, folder="toy/engine", arguments=["tests"])
        killed, survivor = "toy/engine/deep/sums.py:2: a + b -> (a - b)", "toy/engine/differences.py:2: a - b -> (a + b)"
        assert found == {"possible": 2, "seed": 1, "count": 2, "killed": 1, "rate": 0.5, "survivors": [survivor]}
        # one after the other in this order: the second is tried without the first
        said = [f"killed   {killed}", f"SURVIVED {survivor}"]
        heard = capfd.readouterr().err.splitlines()
        assert heard == said if jobs == 1 else sorted(heard) == sorted(said)
        assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before

    def test_a_sample_is_drawn_by_its_seed_and_each_mutant_has_a_minute_at_the_least(self, mutants, project, monkeypatch):
        limits = []
        monkeypatch.setattr(mutants, "tests_pass", lambda tree, arguments, limit: limits.append(limit) or True)
        seeds = (0, 1, 2, 3, 0, 1, 2, 3)
        drawn = [mutants.survey(1, seed, root=project, folder="toy/engine", arguments=[])["survivors"] for seed in seeds]
        assert drawn[:4] == drawn[4:]
        assert len({str(survivors) for survivors in drawn}) == 2
        assert all(len(survivors) == 1 for survivors in drawn)
        assert min(limits) >= 60

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

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such bound")
    def test_tests_that_want_memory_without_end_do_not_get_it(self, mutants, project):
        (project / "tests" / "test_sums.py").write_text("def test_it():\n    assert len(bytearray(2**33)) > 0\n")
        assert not mutants.tests_pass(project, ["tests"], 60)
        assert "MemoryError" in (project / "tests.log").read_text()

    def test_the_tests_that_it_runs_are_there(self, mutants):
        files = [name for name in mutants.TESTS if name.endswith(".py")]
        assert len(files) > 20
        assert [name for name in files if not (ROOT / name).exists()] == []


class TestFullRuns:
    """scripts/test_full.py, and the notice that reads what it writes."""

    @pytest.fixture
    def full(self, scripts, monkeypatch, tmp_path):
        """The script in a checkout of its own, with a pytest that finds one test passed in 3 seconds, and a long one in 7.5."""
        module = scripts("test_full")

        def passes(arguments, plugins):
            for nodeid, durations in {"quick": (1, 2, 0), "slow": (0.5, 6, 1)}.items():
                for when, duration in zip(("setup", "call", "teardown"), durations, strict=True):
                    report = SimpleNamespace(
                        nodeid=nodeid, when=when, duration=duration, failed=False, skipped=False, outcome="passed"
                    )
                    if (nodeid == "slow") == ("--dist=load" in arguments):
                        plugins[0].pytest_runtest_logreport(report)
            return 0

        monkeypatch.setattr(module.pytest, "main", passes)
        monkeypatch.setattr(module, "RESULT", tmp_path / "full" / "result.json")
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, "KEPT", tmp_path / "build" / "full")
        monkeypatch.setattr(module, "CASES", None)
        monkeypatch.setattr(module, "code_hash", lambda: "this code")
        monkeypatch.setattr(module, "capabilities", lambda: ("default", "avx2"))
        monkeypatch.setattr(
            module, "numeric_run", lambda capability, threads, arguments: {"passed": 9, "failed": 0, "status": 0}
        )
        monkeypatch.setattr(
            module, "survey", lambda count, seed, jobs: {"count": count, "killed": 30, "survivors": ["a.py:1: b -> c"]}
        )
        monkeypatch.chdir(tmp_path)
        return module

    def test_the_result_has_all_three_parts_and_the_notice_reads_it(self, full, scripts, monkeypatch):
        assert full.main([]) == 0
        result = json.loads(full.RESULT.read_text())
        assert (result["code"], result["status"], result["passed"], result["failed"]) == ("this code", 0, 2, 0)
        assert list(result["slowest"].items()) == [("slow", 7.5), ("quick", 3)]
        assert (result["seconds"], result["failures"]) == (0, [])
        assert {name: run.get("passed") for name, run in result["numeric"].items()} == {
            "default, 1 thread": 9, "default, 2 threads": 9, "avx2, 1 thread": 9, "avx2, 2 threads": 9,
            "avx512, 1 thread": None, "avx512, 2 threads": None,
        }  # fmt: skip
        assert result["numeric"]["avx512, 1 thread"] == {"skipped": "this processor has no avx512"}
        assert result["mutants"] == {"count": full.MUTANTS, "killed": 30, "survivors": ["a.py:1: b -> c"]}
        notices = scripts("full_result_notice")
        for name in ("RESULT", "ROOT", "code_hash"):
            monkeypatch.setattr(notices, name, getattr(full, name))
        assert notices.notice().startswith("full/result.json belongs to this code (2 passed, 0 failed, 0 skipped, on ")

    def test_a_narrowed_run_ends_after_pytest_and_writes_nothing(self, full, monkeypatch, capsys):
        monkeypatch.setattr(full, "numeric_run", lambda *_: pytest.fail("nothing that would be recorded"))
        assert full.main(["-k", "quick"]) == 0
        assert not full.KEPT.exists()
        assert not full.RESULT.exists()
        assert "not written, because arguments may narrow a run: -k quick" in capsys.readouterr().out

    def test_a_run_whose_sources_changed_writes_nothing(self, full, monkeypatch, capsys):
        hashes = itertools.count()
        monkeypatch.setattr(full, "code_hash", lambda: next(hashes))
        assert full.main([]) == 1
        assert not full.RESULT.exists()

    def test_parts_that_ran_apart_make_one_result(self, full, monkeypatch):
        for part in ("mutants", "numeric", "cases", "long"):
            monkeypatch.setattr(full, "where", lambda part=part: {"python": part, "torch": "2", "system": "s", "gpu": None})
            assert full.main(["--part", part]) == 0
            assert not full.RESULT.exists()
        monkeypatch.setattr(full, "where", lambda: {"python": "3", "torch": "2", "system": "s", "gpu": None})
        assert full.main(["--part", "tests"]) == 0
        result = json.loads(full.RESULT.read_text())
        assert (result["passed"], result["python"], result["mutants"]["killed"]) == (2, "3", 30)
        assert {part: ran["python"] for part, ran in result["ran"].items()} == {
            p: p for p in ("long", "numeric", "mutants", "cases")
        }

    def test_tests_that_were_at_fault_run_again(self, full, monkeypatch, capsys):
        passes = full.pytest.main

        def fails(arguments, plugins):
            passes(arguments, plugins)
            report = SimpleNamespace(nodeid="red", when="call", duration=1, failed=True, skipped=False, outcome="failed")
            if "--dist=load" in arguments:
                plugins[0].pytest_runtest_logreport(SimpleNamespace(**vars(report), longreprtext="assert 1 == 2"))
            return int("--dist=load" in arguments)

        def mended(arguments, plugins):
            assert "--last-failed" in arguments
            report = SimpleNamespace(nodeid="red", when="call", duration=1, failed=False, skipped=False, outcome="passed")
            plugins[0].pytest_runtest_logreport(report)
            return 0

        monkeypatch.setattr(full.pytest, "main", fails)
        assert full.main([]) == 1
        assert json.loads(full.RESULT.read_text())["failures"] == ["red"]
        assert "FAILED red\nassert 1 == 2" in capsys.readouterr().out
        monkeypatch.setattr(full.pytest, "main", mended)
        assert full.main(["--part", "again"]) == 0
        result = json.loads(full.RESULT.read_text())
        assert (result["status"], result["passed"], result["failed"], result["again"]) == (0, 3, 0, 1)

    def test_parts_of_other_code_make_none(self, full, monkeypatch, capsys):
        assert full.main(["--part", "numeric"]) == 0
        monkeypatch.setattr(full, "code_hash", lambda: "other code")
        assert full.main(["--part", "tests"]) == 0
        assert not full.RESULT.exists()
        assert "there is no result yet of: long, numeric, mutants, cases" in capsys.readouterr().out

    @pytest.mark.parametrize("part", ["numeric", "mutants"])
    def test_what_goes_wrong_behind_the_tests_is_a_failure_too(self, full, monkeypatch, part):
        def fails(count, seed, jobs):
            raise RuntimeError("the tests fail without a mutant")

        if part == "numeric":
            monkeypatch.setattr(full, "numeric_run", lambda *_: {"passed": 8, "failed": 1, "status": 1})
        else:
            monkeypatch.setattr(full, "survey", fails)
        assert full.main([]) == 1
        assert json.loads(full.RESULT.read_text())["status"] == 1

    def test_numeric_runs_have_the_width_and_the_threads_that_they_name(self, scripts, tmp_path):
        tests = tmp_path / "test_it.py"
        tests.write_text(
            "import os, pytest, torch\n"
            "def test_width():\n    assert torch.backends.cpu.get_cpu_capability() == 'DEFAULT'\n"
            "def test_threads():\n    assert torch.get_num_threads() == 2\n"
            "def test_red():\n    assert os.environ['CUDA_VISIBLE_DEVICES']\n"
            "def test_skipped():\n    pytest.skip('says nothing')\n"
            "@pytest.fixture\ndef broken():\n    assert False\n"
            "def test_error(broken):\n    pass\n"
        )
        full = scripts("test_full")
        assert full.numeric_run("default", 2, [str(tests)]) == {"passed": 2, "failed": 2, "status": 1}
        assert full.numeric_run("default", 2, [str(tmp_path / "missing.py")])["status"] != 0

    def test_the_widths_of_a_processor_are_all_up_to_its_widest(self, scripts, monkeypatch):
        import torch

        full, best = scripts("test_full"), torch.backends.cpu.get_cpu_capability().lower()
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")  # which does not make a processor a lesser one
        found = full.capabilities()
        assert found[0] == "default"
        assert best not in full.CAPABILITIES or best in found

    def test_the_numeric_tests_are_there(self, scripts):
        full = scripts("test_full")
        paths = [name for name in (*full.NUMERIC, *full.LONG) if name.startswith("tests/")]
        assert len(paths) > 9
        assert [name for name in paths if not (ROOT / name).exists()] == []

    def test_the_cases_of_a_folder_are_part_of_the_result(self, full, monkeypatch, tmp_path):
        assert full.main([]) == 0
        assert json.loads(full.RESULT.read_text())["cases"] == {}
        folder = tmp_path / "cases"
        folder.mkdir()
        (folder / "fine.py").write_text("")
        monkeypatch.setattr(full, "CASES", folder)
        assert full.main([]) == 0
        (folder / "red.py").write_text("raise SystemExit(3)")
        assert full.main([]) == 1
        result = json.loads(full.RESULT.read_text())
        assert {name: case["status"] for name, case in result["cases"].items()} == {"fine.py": 0, "red.py": 3}
        assert result["status"] == 1 and str(tmp_path) not in full.RESULT.read_text()


CASES = {
    "a_fine.py": "import hbcore, sys\nfrom helper import word\nprint(word)\nassert sys.argv[1:] == []",
    "b_red.py": "print('first')\nprint('the reason')\nraise SystemExit(3)",
    "c/raises.py": "1 / 0",
    "d_slow.py": "import subprocess, sys\n"
    "subprocess.run([sys.executable, '-c', 'import time; print(\"begun\", flush=True); time.sleep(60)'])",
    "e_where.py": "import os, hb_muon\nassert os.path.exists('scripts/run_cases.py')\n"
    "assert os.path.samefile(os.path.dirname(hb_muon.__file__), 'plugins/hb_muon/src/hb_muon')",
    "helper.py": "word = 'hello'",
}
"""Script -> its source."""


class TestRunCases:
    """scripts/run_cases.py."""

    @pytest.fixture
    def folder(self, tmp_path):
        for name, source in CASES.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(source)
        return tmp_path

    def test_each_script_runs_in_the_root_for_as_long_as_it_may(self, scripts, folder, capsys, monkeypatch):
        monkeypatch.chdir(folder)
        cases = scripts("run_cases")
        found = {case.name: case for case in cases.run_all(Path(), limit=15)}
        assert {name: case.status for name, case in found.items()} == {
            "a_fine.py": 0, "b_red.py": 3, "c/raises.py": 1, "d_slow.py": None, "e_where.py": 0, "helper.py": 0,
        }  # fmt: skip
        assert 15 <= found["d_slow.py"].seconds < 50 and found["b_red.py"].seconds < 15
        said = capsys.readouterr().out
        assert "    | the reason" in said and "ZeroDivisionError" in said and "    | begun" in said and "hello" not in said
        assert "too long" in said and said.endswith("6 cases, 3 failed\n")

    def test_its_exit_status_says_whether_all_passed(self, scripts, folder, tmp_path):
        cases = scripts("run_cases")
        for name in ("b_red.py", "d_slow.py"):
            (folder / name).unlink()
        assert cases.main([str(folder)]) == 1
        (folder / "c/raises.py").unlink()
        assert cases.main([str(folder), "--seconds", "60"]) == 0
        with pytest.raises(SystemExit):
            cases.main([str(folder / "c")])
