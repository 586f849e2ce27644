"""Running a function on several processes, with a watchdog: nobody waits for a rank that hangs.

The processes are kept from job to job, because most of what a short one costs is importing torch. Each job has a process group
of its own, and one that fails takes the processes along.
"""

from __future__ import annotations

import io
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from typing_extensions import Self

SECONDS = 120


class Pool:
    """Processes that wait for jobs. Each is started when a job first needs that many."""

    def __init__(self) -> None:
        self.ranks: list[tuple[Any, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.dismiss()

    def run(self, count: int, function: Callable[..., Any], *args: Any, backend: str = "gloo") -> list[Any]:
        """Run ``function(rank, *args)``, a module-level function, on ``count`` processes; return what each one returned."""
        while len(self.ranks) < count:
            self.ranks.append(started())
        port = free_port()
        for rank, (_, line) in enumerate(self.ranks[:count]):
            line.send((rank, backend, count, port, function, args))
        try:
            results = self._answers(count)
        except BaseException:
            self.dismiss()
            raise
        if backend == "nccl":  # whose contexts would hold memory on the GPU
            self.dismiss()
        return results

    def _answers(self, count: int) -> list[Any]:
        """What each rank says; the first that raised, died without a word or takes too long is an error."""
        pending = {line: rank for rank, (_, line) in enumerate(self.ranks[:count])}
        results: dict[int, Any] = {}
        deadline = time.monotonic() + SECONDS
        while pending:
            ready: list[Any] = connection.wait(list(pending), timeout=deadline - time.monotonic())
            if not ready:
                raise TimeoutError(f"ranks {sorted(pending.values())} did not answer within {SECONDS} seconds")
            for line in ready:
                rank = pending.pop(line)
                try:
                    results[rank] = torch.load(io.BytesIO(line.recv_bytes()), weights_only=False)
                except EOFError:
                    self.ranks[rank][0].join(timeout=5)
                    raise AssertionError(f"rank {rank} ended with exit status {self.ranks[rank][0].exitcode}") from None
                assert not isinstance(results[rank], Failure), results[rank]
        return [results[rank] for rank in range(count)]

    def dismiss(self) -> None:
        """End the processes."""
        for process, line in self.ranks:
            line.close()
            process.kill()
            process.join()
        self.ranks.clear()


class Failure(str):
    """The traceback of a rank that raised."""


def started() -> tuple[Any, Any]:
    """A process that waits for jobs, and the line to it. It ends with this one."""
    context = mp.get_context("spawn")
    line, other_end = context.Pipe()
    process = context.Process(target=serve, args=(other_end,), daemon=True)
    process.start()
    other_end.close()
    return process, line


def serve(line: Any) -> None:
    """Do the jobs that come, until the line ends."""
    torch.set_num_threads(1)
    while True:
        try:
            job = line.recv()
        except EOFError:
            return
        line.send_bytes(packed(answer(*job)))


def answer(rank: int, backend: str, count: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What the function returns, or how it failed."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count))
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, rank=rank, world_size=count)
        result = function(rank, *args)
        dist.barrier()
        dist.destroy_process_group()
        return result
    except Exception:
        return Failure(traceback.format_exc())


def packed(value: Any) -> bytes:
    """Bytes: a line would send a tensor's memory by reference, to a process that may have ended."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
