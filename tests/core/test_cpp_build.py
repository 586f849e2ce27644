"""What the C++ backend keeps on disk: private, whole, made for this machine, and loaded only if nobody changed it."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hbcore.engine.backends.cpp import build
from hbcore.errors import CompileError

pytestmark = pytest.mark.skipif(build.cpp_compiler() is None, reason="needs a C++ compiler")
SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache's folder, not made yet."""
    monkeypatch.setenv("HBCORE_CACHE_DIR", str(tmp_path / "deep" / "kernels"))
    return tmp_path / "deep" / "kernels"


def libraries(folder):
    return sorted(folder.glob("*.so"))


def test_a_library_is_compiled_once_and_private(folder, monkeypatch):
    assert build.load(SOURCE).answer() == 42
    [library] = libraries(folder)
    assert [f.suffix for f in sorted(folder.iterdir())] == [".cpp", ".so"]  # nothing temporary
    assert next(folder.glob("*.cpp")).read_text() == SOURCE
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(f.stat().st_mode) & 0o077 == 0 for f in folder.iterdir())
    before = library.stat()
    monkeypatch.setattr(subprocess, "run", None)
    assert build.load(SOURCE).answer() == 42
    assert (library.stat().st_mtime_ns, library.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


@pytest.mark.parametrize("change", ["content", "mode", "link"])
def test_a_library_that_was_changed_is_refused(folder, change, tmp_path):
    build.load(SOURCE)
    [library] = libraries(folder)
    if change == "content":
        other = tmp_path / "other.so"
        other.write_bytes(library.read_bytes() + b" ")
        os.replace(other, library)  # the loaded one stays as it is
        library.chmod(0o700)
    elif change == "mode":
        library.chmod(0o722)
    else:
        library.rename(tmp_path / "moved.so")
        library.symlink_to(tmp_path / "moved.so")
    with pytest.raises(CompileError, match="was changed after it was generated; delete it"):
        build.load(SOURCE)
    library.unlink()
    assert build.load(SOURCE).answer() == 42


def test_a_folder_that_others_can_write_to_is_refused(folder):
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(CompileError, match=r"others can write to .*chmod 700"):
        build.load(SOURCE)
    assert not list(folder.iterdir())


def test_a_failure_gives_the_compilers_first_error_and_leaves_no_library(folder):
    with pytest.raises(CompileError, match=r"failed: source.cpp:1:\d+: error: .*nothing"):
        build.load("int x = nothing;\n")
    assert not libraries(folder) and not list(folder.glob("*.tmp"))


def test_a_full_disk_says_so(folder, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CompileError, match=r"cannot be written .*No space left"):
        build.load(SOURCE)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("what", ["processor", "compiler", "flags", "source"])
def test_another_machine_or_compiler_has_a_library_of_its_own(folder, what, monkeypatch, tmp_path):
    build.load(SOURCE)
    if what == "processor":
        monkeypatch.setattr(build, "_processor", lambda: ["another"])
    elif what == "flags":
        monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DANOTHER"))
    elif what == "compiler":
        script = tmp_path / "c++"
        script.write_text(f'#!/bin/sh\nexec {build.cpp_compiler()} "$@"\n')
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
    assert build.load(SOURCE + (" " if what == "source" else "")).answer() == 42
    assert len(list(folder.glob("*.cpp"))) == 2


def test_a_compiler_without_openmp_makes_a_library_for_one_thread(folder, monkeypatch, tmp_path):
    script = tmp_path / "c++"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *-fopenmp\\ *) echo "error: no -fopenmp" >&2; exit 1;; esac\n'
        f'exec {build.cpp_compiler()} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(build, "openmp", lambda: ("-fopenmp", "-lm"))
    assert build.load(SOURCE).answer() == 42
    assert len(libraries(folder)) == 1
    monkeypatch.setattr(subprocess, "run", None)
    assert build.load(SOURCE).answer() == 42  # nor does the next process try with OpenMP again


def test_processes_that_compile_the_same_source_at_once_do_not_meet(folder):
    script = f"from hbcore.engine.backends.cpp.build import load; assert load({SOURCE!r}).answer() == 42"
    running = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert len(libraries(folder)) == 1  # compilers are deterministic
    assert build.load(SOURCE).answer() == 42


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_there_is_one_openmp_in_the_process(folder):
    build.load(SOURCE)
    library = build.load(
        'extern "C" int threads() { int n = 0;\n#pragma omp parallel num_threads(2)\n#pragma omp atomic\n n += 1; return n; }\n'
    )
    assert isinstance(library, ctypes.CDLL) and library.threads() == 2
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert len(loaded) <= 1
