"""``hbcore doctor``: the report, and that it survives what it reports on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hbcore.cli import doctor

ROOT = Path(__file__).resolve().parents[2]
HEAD = "from hbcore.api import Alias, OptimizerSpec, hookimpl\nAPI = (1, 0)\n"
CLAIM = "@hookimpl\ndef hb_optimizers(api): return [OptimizerSpec('Same', f'{api.plugin}.rules:Same', '')]\n"
HEALTHY_TORCH = "__version__ = '9.9'\nclass cuda:\n    is_available = staticmethod(lambda: False)\n"


class Place:
    """A folder of plugins and stand-ins that a fresh ``hbcore doctor`` sees first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []

    def plugin(self, name: str, manifest: str) -> None:
        self.names.append(name)
        (self.path / name).mkdir()
        (self.path / name / "__init__.py").write_text(manifest)
        info = self.path / f"{name}-3.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 3.1\n")
        (info / "entry_points.txt").write_text(f"[hbcore.plugins]\n{name} = {name}\n")

    def doctor(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "PYTHONPATH": f"{self.path}{os.pathsep}{ROOT}",
            "HBCORE_PLUGINS": ",".join(self.names) or "none",
        }
        command = [sys.executable, "-m", "hbcore", "doctor", *words]
        return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=300)

    def report(self, **variables: str) -> dict[str, Any]:
        done = self.doctor("--json", **variables)
        assert (done.returncode, done.stderr) == (0, "")
        report: dict[str, Any] = json.loads(done.stdout)
        return report


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """With a torch that imports at once and finds no GPU."""
    (tmp_path / "torch.py").write_text(HEALTHY_TORCH)
    return Place(tmp_path)


def test_a_healthy_machine_without_a_gpu_passes_strict(place: Place) -> None:
    place.plugin("hb_a", HEAD + CLAIM + "@hookimpl\ndef hb_doctor(report): report.note('all is well')\n")
    done = place.doctor("--strict")
    assert done.returncode == 0, done.stdout
    assert "nothing is broken" in done.stdout and "note: all is well" in done.stdout
    report = place.report()
    assert report["versions"] | {"torch": "9.9", "python": sys.version.split()[0], "hbcore": "0.1.0"} == report["versions"]
    assert set(report["versions"]) == {"python", "hbcore", "torch", "triton", "pluggy"}
    assert report["machine"]["gpu"] == "none" and report["machine"]["triton"].startswith("not usable: ")
    (plugin,) = report["plugins"]
    assert (plugin["name"], plugin["status"], plugin["version"], plugin["optimizers"]) == ("hb_a", "ok", "3.1", 1)
    assert plugin["location"] == str(place.path / "hb_a" / "__init__.py")


def test_broken_conflicting_and_blocked_plugins_are_all_reported(place: Place) -> None:
    place.plugin("hb_a", HEAD + CLAIM)
    place.plugin("hb_b", HEAD + CLAIM + "@hookimpl\ndef hb_doctor(report): report.problem('no disk')\n")
    place.plugin("hb_bad", "import no_such_module")
    place.plugin("hb_out", "raise SystemExit")
    report = place.report(HBCORE_DISABLE_PLUGINS="hb_out")
    by_name = {plugin["name"]: plugin for plugin in report["plugins"]}
    assert {name: plugin["status"] for name, plugin in by_name.items()} == {
        "hb_a": "ok",
        "hb_b": "problem",
        "hb_bad": "disabled",
    }
    bad = by_name["hb_bad"]
    assert (bad["distribution"], bad["version"], bad["phase"]) == ("hb_bad", "3.1", "import")
    assert "import no_such_module" in bad["traceback"] and str(place.path) in bad["location"]
    ours = [b for b in report["blocked"] if b["name"] in place.names]  # plugins of this environment are blocked too
    assert ours == [{"name": "hb_out", "distribution": "hb_out", "reason": "HBCORE_DISABLE_PLUGINS"}]
    assert len(report["conflicts"]) == 1 and "hb_a:Same" in report["conflicts"][0]
    assert len(report["broken"]) == 3
    done = place.doctor("--strict", HBCORE_DISABLE_PLUGINS="hb_out", HBCORE_STRICT="1")
    assert done.returncode == 1 and done.stderr == ""
    for said in ("Traceback", "problem: no disk", "conflicts:", "  hb_out (hb_out), by HBCORE_DIS", "broken:"):
        assert said in done.stdout


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise OSError('libcudart.so.99 is missing')", "OSError: libcudart.so.99 is missing"),
        ("import os; os._exit(7)", "exited with status 7"),
        ("import sys; sys.exit('bye')", "SystemExit: bye"),
        ("import os; os.abort()", "exited with status -6"),
        ("raise ModuleNotFoundError('No module named torch')", "No module named torch"),
    ],
)
def test_a_torch_that_does_not_work_is_reported_and_survived(place: Place, code: str, said: str) -> None:
    (place.path / "torch.py").write_text(code)
    place.plugin("hb_a", HEAD + CLAIM)
    done = place.doctor("--strict")
    assert done.returncode == 1 and "hb_a: ok" in done.stdout and "torch does not work: " in done.stdout
    assert said in done.stdout


def test_without_pluggy_the_rest_is_still_reported(place: Place) -> None:
    (place.path / "pluggy.py").write_text("raise ImportError('damaged')")
    report = place.report()
    assert report["broken"] == ["cannot import hbcore's registry: ImportError: damaged"]
    assert report["versions"]["torch"] == "9.9" and "damaged" in report["registry_error"]


def test_a_torch_that_hangs_is_given_up(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.path / "torch.py").write_text("import time; time.sleep(60)")
    monkeypatch.syspath_prepend(place.path)
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 1)
    assert "more than 1 s" in doctor._probe()["torch_error"]


def test_no_second_process_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert "cannot start a second process" in doctor._probe()["torch_error"]


def test_the_compiler_is_cxx_first_then_the_usual_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert doctor._compiler() == "none on PATH"
    for name in ("clang++", "mine"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert doctor._compiler() == str(tmp_path / "clang++")
    monkeypatch.setenv("CXX", "mine")
    assert doctor._compiler() == str(tmp_path / "mine")


def test_the_real_torch_is_examined(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    report = Place(tmp_path).report()
    assert report["versions"]["torch"] == str(torch.__version__)
    usable = report["machine"]["triton"] == "usable"
    assert usable or report["machine"]["triton"].startswith("not usable: ")
    assert (report["machine"]["gpu"] == "none") == (not torch.cuda.is_available())


@pytest.mark.gpu
def test_triton_is_usable_on_a_gpu(tmp_path: Path) -> None:
    assert Place(tmp_path).report()["machine"]["triton"] == "usable"
