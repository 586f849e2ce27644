"""The private folder of generated sources and what is built from them: created with mode 0700, files written atomically."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hbcore.errors import CompileError


def directory() -> Path:
    """The folder of generated kernels: ``$HBCORE_CACHE_DIR``, or ``hbcore`` in the user's cache folder."""
    root = os.environ.get("HBCORE_CACHE_DIR")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hbcore"


def private(folder: Path) -> Path:
    """Return ``folder``, created if missing.

    Raises:
        CompileError: it cannot be used, or others can write to it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if os.name == "posix" and (status.st_uid != os.getuid() or status.st_mode & 0o022):
            raise CompileError(f"others can write to {folder}; run chmod 700 on it, or set HBCORE_CACHE_DIR")
        return folder
    except OSError as error:
        raise CompileError(f"the kernel cache {folder} cannot be used ({error}); set HBCORE_CACHE_DIR") from error


def write(path: Path, source: str) -> None:
    """Write a file that other processes see whole or not at all.

    Raises:
        CompileError: the folder cannot be written to.
    """
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
        raise unwritable(path.parent, error) from error


def unwritable(folder: Path, error: OSError) -> CompileError:
    """The error of a folder that cannot be written to."""
    return CompileError(f"the kernel cache {folder} cannot be written ({error}); set HBCORE_CACHE_DIR")
