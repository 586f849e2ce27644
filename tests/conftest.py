"""Prepares a run before the first test, and skips what needs a GPU where there is none."""

from __future__ import annotations

import pytest
import surroundings  # noqa: F401  sets environment variables, which torch reads when it is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip ``gpu`` tests, with the reason in the summary, where torch finds no CUDA device."""
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
