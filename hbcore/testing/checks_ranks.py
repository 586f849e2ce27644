"""Checks on several processes, under FSDP2. Each function is sent a pool of processes, see :mod:`hbcore.testing.ranks`."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbcore.errors import RuleError
from hbcore.testing import expect
from hbcore.testing.ranks import Pool
from hbcore.testing.subject import Check, Loose, Subject, drawn

SHAPES = ((9, 16), (16,), (5, 7), (1, 8))
"""Two ranks have unequal parts of them, and the second has none of the last."""


class Run(NamedTuple):
    """What came of a training.

    Attributes:
        values: the whole parameters, by name.
        refused: what the RuleError of the first step said; empty if it stepped.
    """

    values: dict[str, Tensor]
    refused: str = ""


def shards_follow_one_process(subject: Subject, pool: Pool, ranks: int) -> None:
    """If this fails, training on several GPUs with FSDP2 gives another model, and nobody is told."""
    alone = follow(0, subject, sharded=False)
    assert not alone.refused, f"expected six steps in one process, found RuleError: {alone.refused}"
    before = dict(Loose(SHAPES).named_parameters())
    for rank, run in enumerate(_on(pool, ranks, follow, subject)):
        if run.refused:
            expect.same(run.values, before, f"rank {rank} of {ranks}, which refused to step")
        else:
            expect.close(run.values, alone.values, 1e-5, f"rank {rank} of {ranks}, six steps, against one process")


def a_sharded_run_resumes_exactly(subject: Subject, pool: Pool, ranks: int) -> None:
    """If this fails, an interrupted run on several GPUs gives a different result from an uninterrupted one."""
    for rank, (straight, resumed) in enumerate(_on(pool, ranks, resume, subject)):
        expect.same(resumed.values, straight.values, f"rank {rank} of {ranks}, three steps, a state dict and three more")


def _on(pool: Pool, ranks: int, job: Any, subject: Subject) -> list[Any]:
    try:
        pickle.dumps(subject)
    except Exception as error:
        raise AssertionError(
            f"expected an optimizer that other processes can import, found {type(error).__name__}: {error}; define its class "
            "in a module, not in a function"
        ) from error
    try:
        return pool.run(ranks, job, subject)
    except (AssertionError, TimeoutError) as error:
        raise AssertionError(f"expected {ranks} ranks to train, found {error}") from error


def follow(rank: int, subject: Subject, sharded: bool = True) -> Run:
    """Six steps."""
    model, optimizer = _built(subject, sharded)
    try:
        _train(subject, model, optimizer, range(6))
    except RuleError as error:
        return Run(_whole(model), str(error))
    return Run(_whole(model))


def resume(rank: int, subject: Subject) -> tuple[Run, Run]:
    """Six steps straight; and three, and three with a new optimizer that loaded the state dict of the first."""
    straight = follow(rank, subject)
    if straight.refused:
        return straight, straight
    model, optimizer = _built(subject, True)
    _train(subject, model, optimizer, range(3))
    resumed = subject.optimizer(list(model.named_parameters()))
    resumed.load_state_dict(optimizer.state_dict())
    _train(subject, model, resumed, range(3, 6))
    return straight, Run(_whole(model))


def _built(subject: Subject, sharded: bool) -> tuple[Loose, Any]:
    model = Loose(SHAPES)
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    return model, subject.optimizer(list(model.named_parameters()))


def _train(subject: Subject, model: Loose, optimizer: Any, steps: range) -> None:
    for step in steps:
        closure = partial(_backward, model, step)
        if "closure" in subject.capabilities:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def _backward(model: Loose, step: int) -> Tensor:
    """Gradients that pull to targets, without a backward: a parameter by itself has no use for FSDP2's hooks."""
    p: Any  # a Parameter, or a DTensor
    for name, p in model.named_parameters():
        target: Any = drawn(f"{name} {step}", tuple(p.shape))
        if hasattr(p, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            target = distribute_tensor(target, p.device_mesh, p.placements)
        p.grad = p.detach() - target
    return torch.zeros(())


def _whole(model: Loose) -> dict[str, Tensor]:
    whole = {}
    for name, p in model.named_parameters():
        gathered = p.full_tensor() if hasattr(p, "full_tensor") else p
        whole[name] = gathered.detach().clone()
    return whole


RANK_CHECKS = (
    Check(shards_follow_one_process, excludes=frozenset({"sparse"}), stored=True),
    Check(a_sharded_run_resumes_exactly, excludes=frozenset({"sparse"}), stored=True),
)
