"""Files of torch.optim's optimizers become hbcore's, with the arguments that continue them exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from core.test_counterparts import IDS, PAIRS, Training, furthest
from rounding import drift

import hbcore
from hbcore.errors import CheckpointError
from hbcore.migrate import sources
from hbcore.migrate.apply import convert_checkpoint, migrate


@pytest.mark.parametrize("pair", PAIRS, ids=IDS)
def test_a_file_of_torchs_goes_on_with_the_arguments_that_are_told(pair):
    before = Training(pair, False, torch.float32)
    before.run(range(5))
    saved = copy.deepcopy(before.optimizer.state_dict())
    assert sources.recognise(saved).name == "torch"
    migrated = migrate(saved)
    assert migrated.optimizer == pair.name
    after = Training(pair._replace(shared={}, ours=migrated.options), True, torch.float32, before)
    after.optimizer.load_state_dict(migrated.state_dict)
    after.scheduler.load_state_dict(before.scheduler.state_dict())
    for training in (before, after):
        training.run(range(5, 20))
    assert furthest(after, before) < (pair.bound or drift(torch.float32, 20))


def test_another_optimizer_is_refused_by_name():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = torch.optim.NAdam([p])
    optimizer.step()
    with pytest.raises(CheckpointError, match=r"NAdam, whose rule is not that of AdamW"):
        convert_checkpoint(optimizer.state_dict(), hbcore.get("AdamW")([p]))
    radam = torch.optim.RAdam([p])
    radam.step()
    with pytest.raises(CheckpointError, match="no library's"):
        migrate(radam.state_dict())
