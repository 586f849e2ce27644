"""Say whether the committed result of ``make test-full`` belongs to this checkout's code. It never fails."""

from __future__ import annotations

import json

from code_hash import RESULT, ROOT, code_hash


def notice() -> str:
    """One line on ``tests/full/result.json``."""
    name = RESULT.relative_to(ROOT)
    if not RESULT.exists():
        return f"NOTICE: there is no {name}; `make test-full` writes it"
    result = json.loads(RESULT.read_text())
    told = f"{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped, on {result['date']}"
    told += f" ({result['gpu'] or 'no GPU'})"
    if result["code"] != code_hash():
        return f"NOTICE: {name} is old: the sources changed since `make test-full` ran ({told})"
    if result["status"] != 0:
        return f"NOTICE: {name} belongs to this code and reports a failure ({told})"
    return f"{name} belongs to this code ({told})"


if __name__ == "__main__":
    print(notice())
