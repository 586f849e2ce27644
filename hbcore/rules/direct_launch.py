"""Launching compiled Triton kernels by the driver's own function, past what Triton does in Python at every launch.

A launch by ``compiled[grid](...)`` makes two closures, asks for the device and the stream, builds what hooks would be told of
the launch and calls them, though there are none, and only then calls the driver's function with addresses and numbers. That
function is called here with the same arguments: Triton's launcher is asked once for each kernel, with marks in place of what
differs from launch to launch, what it would pass on. Where the answer is not understood, Triton's own way is taken.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

Launcher: TypeAlias = Callable[[tuple[int, int, int], Sequence[Any]], None]
"""``launcher(grid, arguments)`` runs one compiled kernel on the device that it was made for, which is the current one."""

VARYING = 5
"""What comes first in a launch: the grid's three sizes, the stream and the function."""


@lru_cache(maxsize=1024)
def launcher_of(compiled: Any, device: int) -> Launcher:
    """What launches a compiled kernel, made once for each.

    Args:
        compiled: a kernel compiled for ``device``, which is the current one now, as ``kernel.warmup`` returns it.
        device: the index of a GPU.
    """

    def ordinary(grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        compiled[grid](*arguments)

    try:
        hooked, (launch, middle, together) = _hook_test(compiled), _passed_on(compiled)
        stream_of = _stream_function(device)
    except Exception:  # a Triton that keeps these things elsewhere, or a kernel that needs more for each launch
        return ordinary
    function = compiled.function

    def direct(grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        if hooked():
            compiled[grid](*arguments)
        elif together:
            launch(*grid, stream_of(device), function, *middle, tuple(arguments))
        else:
            launch(*grid, stream_of(device), function, *middle, *arguments)

    return direct


def _hook_test(compiled: Any) -> Callable[[], Any]:
    """A function that says whether somebody asked to be told of launches, as profilers do.

    A hook does something if it is a function, or a chain of them that is not empty.

    Raises:
        AttributeError: there is no place where hooks are known to be set.
    """
    from triton import knobs

    places: Any = knobs  # whose ``runtime`` may be replaced

    def hooked() -> bool:
        runtime = places.runtime
        before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
        return (before is not None and getattr(before, "calls", True)) or (after is not None and getattr(after, "calls", True))

    hooked()
    if hasattr(type(compiled), "launch_enter_hook"):  # where older releases look
        raise AttributeError("launch hooks are set in two places")
    return hooked


def _stream_function(device: int) -> Callable[[int], int]:
    """What returns the address of a device's current stream."""
    from triton.runtime import driver

    found: Callable[[int], int] = driver.active.get_current_stream
    found(device)
    return found


def _passed_on(compiled: Any) -> tuple[Callable[..., None], tuple[Any, ...], bool]:
    """The driver's function, what Triton passes to it between the function and the kernel's arguments, and whether these are
    passed as one tuple.

    Raises:
        Exception: whatever a launcher raises that computes with the grid or the stream, as it does for kernels that need memory
            of their own; or is otherwise made.
    """
    run = compiled.run  # loads the kernel
    first, second = _recorded(run, compiled), _recorded(run, compiled)
    if first[0] != second[0] or first[1] != second[1]:
        raise ValueError("the launcher passes on something else each time")
    return run.launch, *first


def _recorded(run: Any, compiled: Any) -> tuple[tuple[Any, ...], bool]:
    """What ``run``, without its function, was about to pass on."""
    marks, arguments = [object() for _ in range(VARYING)], (object(), object())
    seen: list[tuple[Any, ...]] = []
    probe = copy.copy(run)
    probe.launch = lambda *passed: seen.append(passed)
    probe(*marks, compiled.packed_metadata, None, None, None, *arguments)
    [passed] = seen
    together = passed[-1] == arguments
    middle = passed[VARYING:-1] if together else passed[VARYING : -len(arguments)]
    rest = (arguments,) if together else arguments
    if passed != (*marks, *middle, *rest) or not any(each is compiled.packed_metadata for each in middle):
        raise ValueError("the launcher passes on its arguments in another order")
    return middle, together
