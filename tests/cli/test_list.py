"""``hbcore list`` and the command line around it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hbcore.cli.main import COMMANDS, main
from hbcore.errors import PluginWarning, RegistryError

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = """
from hbcore.api import Alias, OptimizerSpec, hookimpl
API = (1, 0)
@hookimpl
def hb_optimizers(api):
    return [OptimizerSpec("TestOne", "hb_listed.rules:TestOne", "the first", "arXiv:1234.56789", frozenset({"capturable"})),
            OptimizerSpec("TestTwo", "hb_listed.rules:TestTwo", "the second")]
@hookimpl
def hb_aliases(api):
    return [Alias("OldOne", "TestOne", {"palm": True}), Alias("OldTwo", "TestTwo")]
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A fresh interpreter's environment with one plugin, whose optimizers would fail to import."""
    package = tmp_path / "hb_listed"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "plugin.py").write_text(MANIFEST)
    (package / "rules.py").write_text("1 / 0")
    info = tmp_path / "hb_listed-2.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hb-listed\nVersion: 2.5\n")
    (info / "entry_points.txt").write_text("[hbcore.plugins]\nhb_listed = hb_listed.plugin\n")
    return os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "HBCORE_PLUGINS": "hb_listed"}


def hbcore(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hbcore", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_names_plugins_and_summaries_line_up(environment: dict[str, str]) -> None:
    done = hbcore(environment, "list")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "TestOne  hb_listed  the first\nTestTwo  hb_listed  the second\n"
    assert hbcore(environment, "list", "*two").stdout == "TestTwo  hb_listed  the second\n"


def test_aliases_are_listed_on_demand(environment: dict[str, str]) -> None:
    done = hbcore(environment, "list", "--aliases", "Old*")
    assert done.stdout == "OldOne  hb_listed  = TestOne(palm=True)\nOldTwo  hb_listed  = TestTwo\n"


def test_json_holds_the_whole_spec(environment: dict[str, str]) -> None:
    first, _, alias, _ = sorted(
        json.loads(hbcore(environment, "list", "--aliases", "--json").stdout), key=lambda r: r["name"] < "P"
    )
    assert first == {
        "name": "TestOne",
        "plugin": "hb_listed",
        "distribution": "hb-listed",
        "version": "2.5",
        "summary": "the first",
        "paper": "arXiv:1234.56789",
        "capabilities": ["capturable"],
        "target": "hb_listed.rules:TestOne",
        "aliases": ["OldOne"],
    }
    assert (alias["name"], alias["alias_of"], alias["preset"]) == ("OldOne", "TestOne", {"palm": True})


def test_nothing_to_list_is_said_and_no_error(environment: dict[str, str]) -> None:
    done = hbcore(environment, "list", "Zzz*")
    assert (done.returncode, done.stdout) == (0, "") and "no optimizer matches 'Zzz*'" in done.stderr
    done = hbcore(environment | {"HBCORE_PLUGINS": "other"}, "list")
    assert done.returncode == 0
    assert f"no plugins found; pip install -e {ROOT / 'plugins' / 'hb_adam'} (or hb_muon, hb_soap, hb_psgd)" in done.stderr
    assert hbcore(environment, "list", "Zzz*", "--json").stdout == "[]\n"


def test_a_broken_plugin_is_one_line_on_stderr(environment: dict[str, str]) -> None:
    folder = Path(environment["PYTHONPATH"].split(os.pathsep)[0])
    (folder / "hb_listed" / "plugin.py").write_text("1 / 0")
    done = hbcore(environment, "list")
    assert done.returncode == 0 and done.stderr.startswith("hbcore: warning: plugin 'hb_listed'")
    done = hbcore(environment | {"HBCORE_STRICT": "1"}, "list")
    assert done.returncode == 2 and "ZeroDivisionError" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_it_imports_no_torch_and_no_other_command(environment: dict[str, str]) -> None:
    code = """
import sys
from hbcore.cli.main import main
assert main(["list"]) == 0
print(sorted(name for name in sys.modules if name.partition(".")[0] == "torch" or name.startswith("hbcore.cli.")))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "['hbcore.cli.list', 'hbcore.cli.main', 'hbcore.cli.text']"


def test_it_answers_at_once(environment: dict[str, str]) -> None:
    times = []
    for _ in range(3):
        start = processor_seconds()
        assert hbcore(environment, "list").returncode == 0
        times.append(processor_seconds() - start)
    assert min(times) < 0.4, times  # about 0.1 s here; `import torch` alone takes over a second


def processor_seconds() -> float:
    """What ended child processes took: not what they waited for, on a busy machine."""
    spent = os.times()
    return spent.children_user + spent.children_system


def test_no_arguments_print_the_help_with_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"{command.name} " in shown and command.help in shown for command in COMMANDS)


@pytest.mark.parametrize(("words", "status"), [(["--version"], 0), (["--help"], 0), (["nonsense"], 2), (["--x"], 2)])
def test_the_top_level_follows_argparse(words: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == status
    out = capsys.readouterr()
    assert ("hbcore 0.1.0" in out.out) == (words == ["--version"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_help(command: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command.name, "--help"])  # type: ignore[attr-defined]
    assert caught.value.code == 0
    assert f"usage: hbcore {command.name}" in capsys.readouterr().out  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (RegistryError("two\nlines"), 2, "hbcore: two lines\n"),
        (ModuleNotFoundError("x", name="rich"), 2, "hbcore: the command 'list' needs the module 'rich'"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_one_line(
    error: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: object) -> int:
        raise error

    monkeypatch.setattr("hbcore.cli.list.run", run)
    assert main(["list"]) == status
    assert capsys.readouterr().err.startswith(said)


def test_a_fault_in_hbcore_itself_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("hbcore.cli.list.run", run)
    with pytest.raises(ZeroDivisionError):
        main(["list"])


def test_a_reader_that_stops_early_is_no_error(environment: dict[str, str]) -> None:
    code = "from hbcore.cli.main import main; import sys; sys.exit(main(['list', '--json']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 1


def test_warnings_go_back_to_normal_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    before = warnings.showwarning
    monkeypatch.setattr("hbcore.cli.list.run", lambda args: warnings.warn("x", PluginWarning, stacklevel=1) or 0)
    main(["list"])
    assert warnings.showwarning is before
