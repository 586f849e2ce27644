"""Running a function on several processes, with a watchdog: nobody waits for a rank that hangs."""

from __future__ import annotations

import io
import os
import socket
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 120


def on_ranks(count: int, function: Callable[..., Any], *args: Any, backend: str = "gloo") -> list[Any]:
    """Run ``function(rank, *args)``, a module-level function, on ``count`` processes; return what each one returned."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    job = (queue, backend, count, free_port(), function, args)
    processes = [context.Process(target=_main, args=(rank, *job)) for rank in range(count)]
    for process in processes:
        process.start()
    try:
        results = {rank: unpacked(data) for rank, data in (_next(queue, processes) for _ in processes)}
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
    failures = [text for text in results.values() if isinstance(text, Failure)]
    assert not failures, "\n".join(failures)
    return [results[rank] for rank in range(count)]


def _next(queue: Any, processes: list[Any]) -> tuple[int, bytes]:
    """The next rank's result; a rank that died without a word, or takes too long, is an error."""
    for _ in range(SECONDS):
        try:
            answer: tuple[int, bytes] = queue.get(timeout=1)
            return answer
        except Empty:
            dead = [p.exitcode for p in processes if p.exitcode]
            assert not dead, f"a rank ended with exit status {dead[0]}"
    raise TimeoutError(f"no rank answered within {SECONDS} seconds")


class Failure(str):
    """The traceback of a rank that raised."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _main(
    rank: int, queue: Any, backend: str, count: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count))
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, rank=rank, world_size=count)
        queue.put((rank, packed(function(rank, *args))))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        queue.put((rank, packed(Failure(traceback.format_exc()))))


def packed(value: Any) -> bytes:
    """Bytes: a queue would send a tensor's memory by reference, to a process that may have ended."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
