"""Print one hash of hbcore's and the plugins' Python sources.

``make test-full`` stores it beside its result, and CI compares it with the checkout's, so that a result that belongs to
other code is noticed. The hash covers paths and contents of ``hbcore/**/*.py`` and ``plugins/*/src/**/*.py``. It reads
the working tree and not git's index: a result speaks of the code that ran, and a copy without ``.git`` has the same
hash.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "tests" / "full" / "result.json"


def sources(root: Path = ROOT) -> list[Path]:
    """The files that count, in one order on every machine."""
    found = [*(root / "hbcore").rglob("*.py")]
    for plugin in (root / "plugins").glob("*/src"):
        found += plugin.rglob("*.py")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def code_hash(root: Path = ROOT) -> str:
    """SHA-256, in hexadecimal, over each file's relative path and contents."""
    digest = hashlib.sha256()
    for path in sources(root):
        contents = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(root).as_posix()} {contents}\n".encode())
    return digest.hexdigest()


if __name__ == "__main__":
    print(code_hash())
