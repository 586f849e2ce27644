"""``hbcore doctor``: the report, and that it survives what it reports on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hbcore.cli import doctor, second_process

ROOT = Path(__file__).resolve().parents[2]
HEAD = "from hbcore.api import Alias, CodecSpec, OptimizerSpec, hookimpl\nAPI = (1, 0)\n"
RULES = "class Same: pass\n"
REAL = "import torch\nclass Same(torch.optim.Optimizer): pass\n"
CLAIM = "@hookimpl\ndef hb_optimizers(api): return [OptimizerSpec('Same', f'{api.plugin}.rules:Same', '')]\n"
HEALTHY_TORCH = "__version__ = '9.9'\nclass cuda:\n    is_available = staticmethod(lambda: False)\n"


class Place:
    """A folder of plugins and stand-ins that a fresh ``hbcore doctor`` sees first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []

    def plugin(self, name: str, manifest: str, rules: str = RULES) -> None:
        self.names.append(name)
        (self.path / name).mkdir()
        (self.path / name / "rules.py").write_text(rules)
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


def hook(name: str, returns: str) -> str:
    return f"@hookimpl\ndef {name}(api): return {returns}\n"


CODEC = "class Q:\n    name = rounds = parts = read = write = 'q'\n"
FAULTS: dict[str, tuple[str, str, str]] = {
    "a target's module is missing": (
        HEAD + hook("hb_optimizers", "[OptimizerSpec('A', 'hb_x.gone:A', '')]"),
        RULES,
        "optimizer 'A' of plugin hb_x (hb_x 3.1) does not load from 'hb_x.gone:A': ModuleNotFoundError: No module named",
    ),
    "a target's attribute is missing": (HEAD + CLAIM, "", "AttributeError: module 'hb_x.rules' has no attribute 'Same'"),
    "a target's module raises": (HEAD + CLAIM, "1 / 0", "does not load from 'hb_x.rules:Same': ZeroDivisionError"),
    "a target's module ends the process": (
        HEAD + CLAIM,
        "import os; os.abort()",
        "optimizer hb_x:Same: the process that imported it exited with status -6",
    ),
    "a target is no class": (HEAD + CLAIM, "Same = 3", "the target 'hb_x.rules:Same' must be a class; it is 3"),
    "a target is no optimizer": (
        HEAD + CLAIM,
        "import torch\nclass Same: pass",
        "hb_x:Same: hb_x.rules.Same is not a subclass of torch.optim.Optimizer",
    ),
    "an alias' target is missing": (
        HEAD + CLAIM + hook("hb_aliases", "[Alias('Old', 'Smae')]"),
        RULES,
        "its alias 'Old' leads nowhere: no installed plugin provides 'Smae'",
    ),
    "an alias' target is an alias": (
        HEAD + CLAIM + hook("hb_aliases", "[Alias('Old', 'Same'), Alias('Older', 'Old')]"),
        RULES,
        "its alias 'Older' leads nowhere: 'Old' is itself an alias",
    ),
    "a class does not take its alias' preset": (
        HEAD + CLAIM + hook("hb_aliases", "[Alias('Old', 'Same', {'nope': 1})]"),
        "class Same:\n    def __init__(self, params): pass",
        "alias 'Old' of plugin hb_x (hb_x 3.1): its preset sets 'nope', which Same does not take",
    ),
    "a codec's target is missing": (
        HEAD + hook("hb_codecs", "[CodecSpec('q', 'hb_x.rules:Q', '')]"),
        RULES,
        "codec 'q' of plugin hb_x (hb_x 3.1) does not load from 'hb_x.rules:Q': AttributeError",
    ),
    "a codec lacks a method": (
        HEAD + hook("hb_codecs", "[CodecSpec('q', 'hb_x.rules:Q', '')]"),
        CODEC.replace(" = write", ""),
        "codec hb_x:q: Q lacks write",
    ),
    "a codec has another name": (
        HEAD + hook("hb_codecs", "[CodecSpec('q4', 'hb_x.rules:Q', '')]"),
        CODEC,
        "codec hb_x:q4: Q.name is 'q'; checkpoints would not find it",
    ),
    "two plugins have a codec of one name": (
        HEAD + hook("hb_codecs", "[CodecSpec('p', 'hb_x.rules:Q', '')]"),
        CODEC.replace("'q'", "'p'"),
        "the codec name 'p' is claimed by hb_other (hb_other 3.1) as 'hb_other:p' and hb_x (hb_x 3.1) as 'hb_x:p'",
    ),
    "a hook returns None": (
        HEAD + hook("hb_optimizers", "None"),
        RULES,
        "hb_optimizers must return a list of OptimizerSpec; it returned None. Is a 'return' missing?",
    ),
    "a hook for checkpoints returns None": (
        HEAD + CLAIM + hook("hb_migrations", "None"),
        RULES,
        "hb_migrations must return a list of migrations; it returned None",
    ),
    "a hook for checkpoints raises": (
        HEAD + CLAIM + hook("hb_migrations", "1 / 0"),
        RULES,
        "migrations hb_x: ZeroDivisionError",
    ),
    "the manifest imports torch": (
        "import torch\n" + HEAD + CLAIM,
        REAL,
        "hb_x/__init__.py, line 1), which makes 'hbcore list'",
    ),
    "a hook of the manifest imports torch": (
        HEAD + hook("hb_optimizers", "[OptimizerSpec('Same', 'hb_x.rules:Same', str(__import__('torch')))]"),
        REAL,
        "its manifest imports torch (",
    ),
    "the manifest ends the process": (
        "import os; os.abort()",
        RULES,
        "manifest hb_x: the process that imported it exited with status -6",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_plugins_fault_is_found_and_strict_fails(place: Place, fault: str) -> None:
    manifest, rules, said = FAULTS[fault]
    (place.path / "torch.py").write_text(HEALTHY_TORCH + "class optim:\n    class Optimizer: pass\n")
    place.plugin("hb_x", manifest, rules)
    other = hook("hb_codecs", "[CodecSpec('p', 'hb_other.rules:Q', '')]")
    place.plugin("hb_other", HEAD + other, CODEC.replace("'q'", "'p'"))
    report = place.report()
    assert len(report["broken"]) == 1 and said in report["broken"][0], report["broken"]
    assert report["plugins"][0]["name"] == "hb_other" and report["plugins"][0]["status"] == "ok"


def test_an_alias_for_a_family_that_is_not_installed_is_only_noted(place: Place) -> None:
    place.plugin("hb_x", HEAD + CLAIM + hook("hb_aliases", "[Alias('OldSoap', 'hb_soap:SOAP')]"))
    report = place.report()
    assert report["broken"] == []
    assert report["plugins"][0]["notes"] == ["its alias 'OldSoap' leads nowhere: no installed plugin provides 'hb_soap:SOAP'"]


def test_a_name_that_loses_to_a_family_is_reported_and_not_broken(place: Place) -> None:
    place.plugin("hb_adam", HEAD + CLAIM)
    place.plugin("hb_x", HEAD + CLAIM)
    done = place.doctor("--strict")
    assert done.returncode == 0, done.stdout
    assert "names that lost to others:\n  the name 'Same' means 'hb_adam:Same'" in done.stdout


def test_targets_are_not_imported_where_torch_does_not_work(place: Place) -> None:
    (place.path / "torch.py").write_text("raise OSError('no libcudart')")
    place.plugin("hb_a", HEAD + CLAIM, "import torch")
    assert [text.partition(":")[0] for text in place.report()["broken"]] == ["torch does not work"]


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
    monkeypatch.setattr(second_process, "SECONDS", 1)
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
