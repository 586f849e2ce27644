"""On-disk cache of generated kernels: readable, one file per program, imported only if unmodified.

Triton needs its kernels in a file. The folder is private (mode 0700), files are written atomically, and a file's name is the
hash of its content, which is checked before it is executed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from hbcore.errors import CompileError


def directory() -> Path:
    """The folder of generated kernels: ``$HBCORE_CACHE_DIR``, or ``hbcore`` in the user's cache folder."""
    root = os.environ.get("HBCORE_CACHE_DIR")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hbcore"


def load(source: str) -> ModuleType:
    """Write ``source`` unless it is cached already, and import it.

    Raises:
        CompileError: the folder cannot be used, or the file's content does not match its name.
    """
    digest = hashlib.sha256(source.encode()).hexdigest()
    name = f"hbcore_kernel_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    path = _private(directory()) / f"{name}.py"
    if not path.exists():
        _write(path, source)
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise CompileError(f"{path} was changed after it was generated; delete it")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _private(folder: Path) -> Path:
    """Return ``folder``, created if missing; raise if others can write to it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if os.name == "posix" and (status.st_uid != os.getuid() or status.st_mode & 0o022):
            raise CompileError(f"others can write to {folder}; run chmod 700 on it, or set HBCORE_CACHE_DIR")
        return folder
    except OSError as error:
        raise CompileError(f"the kernel cache {folder} cannot be used ({error}); set HBCORE_CACHE_DIR") from error


def _write(path: Path, source: str) -> None:
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(source)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise CompileError(f"the kernel cache {path.parent} cannot be written ({error}); set HBCORE_CACHE_DIR") from error
