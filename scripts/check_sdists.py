"""Check that each sdist of a folder makes the wheel beside it: the same files, byte for byte.

    python scripts/check_sdists.py dist      needs setuptools and wheel

A wheel is built from the checkout, where nothing is missing; who installs the sdist has only what it contains.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def contents(wheel: Path) -> dict[str, int]:
    """Name -> checksum of a wheel's files, without the list of them."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.CRC for info in archive.infolist() if not info.filename.endswith("/RECORD")}


def differing(sdist: Path, wheel: Path, folder: Path) -> list[str]:
    """The files in which the wheel that an sdist makes differs from ``wheel``."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*command, str(folder), str(sdist.resolve())], check=True)
    ours, theirs = contents(folder / wheel.name), contents(wheel)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def main(dist: Path) -> int:
    """Check all sdists; 1 if one is missing or makes another wheel."""
    wheels, failed = sorted(dist.glob("*.whl")), 0
    for wheel in wheels:
        sdist = dist / f"{'-'.join(wheel.name.split('-')[:2])}.tar.gz"
        with tempfile.TemporaryDirectory() as folder:
            wrong = differing(sdist, wheel, Path(folder)) if sdist.exists() else ["everything: it is missing"]
        if wrong:
            failed += 1
            print(f"check_sdists: {sdist.name} differs from {wheel.name} in {', '.join(wrong[:10])}", file=sys.stderr)
    print(f"check_sdists: {len(wheels) - failed} of {len(wheels)} sdists make their wheels")
    return 1 if failed or not wheels else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
