"""On-disk cache of generated kernels: readable, one file per program, imported only if unmodified.

Triton needs its kernels in a file. The folder is private (mode 0700), files are written atomically, and a file's name is the
hash of its content, which is checked before it is executed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from types import ModuleType

from hbcore.engine.backends.source_cache import directory, private, write
from hbcore.errors import CompileError

__all__ = ["directory", "load"]


def load(source: str) -> ModuleType:
    """Write ``source`` unless it is cached already, and import it.

    Raises:
        CompileError: the folder cannot be used, or the file's content does not match its name.
    """
    digest = hashlib.sha256(source.encode()).hexdigest()
    name = f"hbcore_kernel_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    path = private(directory()) / f"{name}.py"
    if not path.exists():
        write(path, source)
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
