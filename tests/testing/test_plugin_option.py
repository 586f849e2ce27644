"""``pytest --hbcore-plugin NAME`` checks everything that a plugin declares, in any folder, and tells mistakes in one line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MANIFEST = """
from hbcore.api import CodecSpec, OptimizerSpec, hookimpl

API = (1, 0)
{more}

@hookimpl
def hb_optimizers(api):
    return [OptimizerSpec("Mine", "hb_adam.sgd:SGD", ""), OptimizerSpec("Missing", "hb_nowhere:Missing", "")]

@hookimpl
def hb_codecs(api):
    return [CodecSpec("mine8", "hb_ecc.codec:BF16Plus8", ""), CodecSpec("bad", "hb_ecc.codec:absent", "")]
"""
EMPTY = "API = (1, 0)\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with three plugins: one that works but for two names, a broken and an empty one."""
    path = tmp_path_factory.mktemp("site")
    for name, text in {"hb_mine": MANIFEST.format(more=""), "hb_torn": MANIFEST.format(more="1 / 0"), "hb_void": EMPTY}.items():
        (path / f"{name}.py").write_text(text)
        info = path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[hbcore.plugins]\n{name} = {name}\n")
    return path


@pytest.fixture
def pytest_run(site, tmp_path):
    def run(*arguments, **variables):
        # The plugin by its module: its entry point may be installed or not, and twice is an error.
        paths = os.pathsep.join([str(site), *(p for p in sys.path if p)])
        settings = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **variables}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "hbcore.testing.plugin", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300
        )

    return run


def test_a_plugin_is_checked_in_a_folder_without_tests_and_what_does_not_load_fails_alone(pytest_run):
    done = pytest_run("--hbcore-plugin", "hb-Mine", "-p", "xdist", "-n", "2", "-k", "hook or zeros_are or hb_mine", "-vv")
    told = done.stdout + done.stderr
    assert done.returncode == 1, told
    assert "2 failed, 2 passed" in told
    assert "[hb_mine:Missing-loads]" in told and "No module named 'hb_nowhere'" in told
    assert "[hb_mine:bad-loads]" in told and "has no attribute 'absent'" in told
    assert "[SGD()-every_hook_runs_once]" in told and "[BF16Plus8()-zeros_are_zero]" in told


@pytest.mark.broad  # pytest in a process
def test_a_folders_own_tests_run_only_if_they_are_named(pytest_run, tmp_path):
    (tmp_path / "test_apart.py").write_text("def test_beside():\n    pass\n")
    command = ("--hbcore-plugin", "hb_ecc", "--hbcore-level", "api-1", "--co", "-k", "beside or zeros_are")
    alone, both = pytest_run(*command).stdout, pytest_run(*command, ".", "--pyargs", "hbcore.testing.suite").stdout
    assert "test_beside" not in alone and alone.count("zeros_are_zero") == 7
    assert "test_beside" in both and both.count("zeros_are_zero") == 7


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--hbcore-plugin", "hb_mime"], "no plugin is named 'hb_mime'. Did you mean hb_mine?"),
        (["--hbcore-plugin", "unlike"], "no plugin is named 'unlike'. Installed are "),
        (["--hbcore-plugin", ""], "no plugin is named ''. Installed are "),
        (["--hbcore-plugin", "hb_torn"], "plugin hb_torn (hb_torn 1.0) is broken: ZeroDivisionError: division by zero"),
        (["--hbcore-plugin", "hb_void"], "plugin hb_void (hb_void 1.0) declares neither optimizers nor codecs"),
        (["--hbcore-optimizer", "Adamm"], "Did you mean Adam"),
        (["--hbcore-plugin", "hb_mine", "--hbcore-level", "api-0"], "there is no level 'api-0' of checks; choose from api-1"),
        (["--hbcore-ranks", "0"], "--hbcore-ranks 0 is no number of processes"),
        (["--hbcore-ranks", "two"], "invalid int value: 'two'"),
    ],
)
def test_a_mistake_is_told_without_a_traceback(pytest_run, arguments, told):
    done = pytest_run(*arguments)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert told in done.stderr and "Traceback" not in done.stderr + done.stdout


def test_a_blocked_plugin_is_told_to_be_blocked(pytest_run):
    done = pytest_run("--hbcore-plugin", "hb_mine", HBCORE_DISABLE_PLUGINS="hb_mine")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "plugin hb_mine (hb_mine 1.0) is" in done.stderr and "HBCORE_DISABLE_PLUGINS" in done.stderr
