"""What keeps hundreds of small trainings fast."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread has nothing to do for such small models, and on a busy machine waits long to do it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def short_collections() -> None:
    """Several checks call ``gc.collect()``; it need not look at what was there before."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="package")
def thaw() -> Iterator[None]:
    yield
    gc.unfreeze()
