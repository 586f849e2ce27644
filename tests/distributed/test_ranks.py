"""The processes that tests of several ranks run on: what fails there fails here, and the next job is not harmed."""

from __future__ import annotations

import os

import pytest
import torch
from distributed.ranks import Pool

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


def pid(rank):
    return os.getpid()


def raises(rank):
    raise ValueError("as it should")


def dies(rank):
    os._exit(7)


def test_a_process_is_kept_for_the_next_job_and_replaced_after_a_failure():
    pool = Pool()
    [first], [second] = pool.run(1, pid), pool.run(1, pid)
    assert first == second != os.getpid()
    with pytest.raises(AssertionError, match="ValueError: as it should"):
        pool.run(1, raises)
    with pytest.raises(AssertionError, match="rank 0 ended with exit status 7"):
        pool.run(1, dies)
    assert not pool.ranks
