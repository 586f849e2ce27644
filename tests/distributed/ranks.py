"""Running a function on several processes, with a watchdog: nobody waits for a rank that hangs."""

from __future__ import annotations

import io
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 120


def on_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run ``function(rank, *args)``, a module-level function, on ``count`` gloo processes; return what each one returned."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    port = free_port()
    processes = [context.Process(target=_main, args=(queue, rank, count, port, function, args)) for rank in range(count)]
    for process in processes:
        process.start()
    try:
        results = {rank: unpacked(data) for rank, data in (queue.get(timeout=SECONDS) for _ in processes)}
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
    failures = [text for text in results.values() if isinstance(text, Failure)]
    assert not failures, "\n".join(failures)
    return [results[rank] for rank in range(count)]


class Failure(str):
    """The traceback of a rank that raised."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _main(queue: Any, rank: int, count: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count))
    try:
        dist.init_process_group("gloo", rank=rank, world_size=count)
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
