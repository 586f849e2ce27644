"""Compile generated C++ to a shared library, once: it stays in hbcore's private cache folder.

A library's name has two hashes. One is of everything that it was made from: the source, the flags, the compiler, and the
processor, because code for one machine's instructions must not run on another that shares the folder. The other is of its own
content, and is checked before it is loaded. A library is moved to its name when it is complete, so processes that compile the
same source at once do not meet.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hbcore.engine.backends.compiler import compiler_on_path
from hbcore.engine.backends.source_cache import directory, private, unwritable, write
from hbcore.errors import CompileError

FLAGS = (
    "-std=c++17", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fwrapv", "-ffp-contract=off",
    "-fvisibility-inlines-hidden",
)  # fmt: skip
"""No flag changes a result: no fused multiply-add, no reordering, NaN and infinities as they are."""

NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"


def load(source: str) -> ctypes.CDLL:
    """The library of ``source``, compiled unless it is cached.

    Raises:
        CompileError: there is no compiler or it fails, the cache folder cannot be used, or a library in it was changed.
    """
    compiler = cpp_compiler()
    if compiler is None:
        raise CompileError("there is no C++ compiler on PATH (g++ or clang++); install one to compile")
    folder = private(directory())
    variants = [(NATIVE, *openmp()), (NATIVE, "-fopenmp-simd")]  # Apple's clang has no OpenMP library of its own
    stems = [f"hbcore_cpp_{_digest(source, compiler, flags)}" for flags in variants]
    for stem in stems:
        for path in sorted(folder.glob(f"{stem}_*.so")):
            return _loaded(path)
    for i, (stem, flags) in enumerate(zip(stems, variants, strict=True)):
        try:
            return _loaded(_compiled(source, compiler, flags, folder, stem))
        except _Failed:
            if i == len(stems) - 1:
                raise
    raise CompileError("no flags are left to try")


def cpp_compiler() -> str | None:
    """The path of the compiler, None if there is none that takes GCC's flags."""
    return compiler_on_path(("g++", "clang++")) if os.name == "posix" else None


def openmp() -> tuple[str, ...]:
    """Flags for OpenMP. torch's own library is linked where it is loaded: a second one would have threads of its own."""
    try:
        with open("/proc/self/maps") as maps:
            loaded = {line.split(maxsplit=5)[-1].strip() for line in maps if "libgomp" in line}
    except OSError:
        loaded = set()
    return ("-fopenmp", "-Wl,--as-needed", *sorted(loaded)[:1]) if loaded else ("-fopenmp",)


class _Failed(CompileError):
    """The compiler did not compile."""


def _digest(source: str, compiler: str, flags: Sequence[str]) -> str:
    """The hash of what a library is made from, as it is on this machine."""
    status = os.stat(compiler)
    version = (os.path.realpath(compiler), str(status.st_size), str(status.st_mtime_ns))
    made_from = (source, *version, *FLAGS, *flags, *_processor())
    return hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:16]


def _processor() -> list[str]:
    """What decides which instructions ``native`` means."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = {line for line in file if line.startswith(("flags", "Features", "model name", "CPU part"))}
        return [platform.machine(), *sorted(lines)]
    except OSError:
        return [platform.machine(), platform.processor(), platform.node()]


def _compiled(source: str, compiler: str, flags: Sequence[str], folder: Path, stem: str) -> Path:
    """Compile in a folder of its own, and move the result to its name."""
    try:
        write(folder / f"{stem}.cpp", source)
        with tempfile.TemporaryDirectory(dir=folder, suffix=".tmp") as work:
            made = Path(work) / "library.so"
            (Path(work) / "source.cpp").write_text(source)
            command = [compiler, *FLAGS, "-o", "library.so", "source.cpp", *flags]
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
            if done.returncode:
                raise _Failed(f"{compiler} failed: {_first_error(done.stderr)}")
            made.chmod(0o700)
            path = folder / f"{stem}_{hashlib.sha256(made.read_bytes()).hexdigest()[:32]}.so"
            os.replace(made, path)
            return path
    except OSError as error:
        raise unwritable(folder, error) from error


def _first_error(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), next(iter(lines), "no message"))[:300]


def _loaded(path: Path) -> ctypes.CDLL:
    """Load a library whose content is what its name says, and which nobody else can have written."""
    try:
        status = path.lstat()
        foreign = status.st_uid != os.getuid() or status.st_mode & 0o022 or not path.is_file() or path.is_symlink()
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CompileError(f"{path} cannot be read ({error}); delete it") from error
    if foreign or not path.stem.endswith(f"_{content[:32]}"):
        raise CompileError(f"{path} was changed after it was generated; delete it")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CompileError(f"{path} cannot be loaded ({error})") from error
