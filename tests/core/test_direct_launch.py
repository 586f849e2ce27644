"""Compiled kernels are launched by the driver's function, with what Triton passes to it, or by Triton where that is not known.

Triton's own classes need a GPU. These have the calls of releases 3.4, 3.5 to 3.6, and 3.7, from the launcher on.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from hbcore.rules.direct_launch import launcher_of

GRID, ARGUMENTS = (5, 3, 2), [4096, 0.5, 7]
PACKED, ANNOTATIONS, SIGNATURE = (4, 1, 0), ["an annotation"], b"a signature"


class Launching:
    """What the launchers have in common: the driver's function notes what it is given."""

    scratch = 0

    def __init__(self) -> None:
        self.given: list[tuple[object, ...]] = []
        self.launch = lambda *passed: self.given.append(passed)

    def memory(self, x, y, z):
        return bytearray(x * y * z * self.scratch) if self.scratch else None


class Of34(Launching):
    def __call__(self, x, y, z, stream, function, *rest):
        self.launch(x, y, z, stream, function, False, False, self.memory(x, y, z), *rest)


class Of36(Launching):
    def __call__(self, x, y, z, stream, function, *rest):
        self.launch(x, y, z, stream, function, False, True, self.memory(x, y, z), None, *rest)


class Of37(Launching):
    def __call__(self, x, y, z, stream, function, packed, told, enter, leave, *rest):
        memory = self.memory(x, y, z)
        self.launch(x, y, z, stream, function, 0, 0, packed, told, enter, leave, memory, None, ANNOTATIONS, SIGNATURE, rest)


class WithMemory(Of36):
    """Of a kernel that needs global memory at each launch."""

    scratch = 64


class Reordered(Launching):
    def __call__(self, x, y, z, stream, function, *rest):
        self.launch(function, x, y, z, stream, *rest)


class Counted(Launching):
    """Passes on something else each time."""

    launches = 0

    def __call__(self, x, y, z, stream, function, *rest):
        Counted.launches += 1
        self.launch(x, y, z, stream, function, Counted.launches, *rest)


class Extended(Launching):
    """Adds to the kernel's arguments."""

    def __call__(self, x, y, z, stream, function, *rest):
        self.launch(x, y, z, stream, function, *rest, "more")


class Unpacked(Launching):
    """Does not say what was compiled."""

    def __call__(self, x, y, z, stream, function, packed, *rest):
        self.launch(x, y, z, stream, function, *rest)


class Chain:
    """Several hooks as one, as Triton has had them since 3.5."""

    def __init__(self, *calls):
        self.calls = list(calls)

    def __call__(self, *_):
        return [call() for call in self.calls]


class Kernel:
    """A compiled kernel; ``ordinary`` notes the launches that Triton made itself."""

    packed_metadata, function = PACKED, 4711

    def __init__(self, run, knobs):
        self.run, self.knobs, self.ordinary = run, knobs, []

    def __getitem__(self, grid):
        def runner(*arguments):
            self.ordinary.append((grid, arguments))
            runtime = self.knobs.runtime
            hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
            self.run(*grid, 17, self.function, self.packed_metadata, None, *hooks, *arguments)

        return runner


@pytest.fixture
def triton(monkeypatch):
    """A module in Triton's place, with a driver whose stream is 17 and without hooks."""
    knobs = SimpleNamespace(runtime=SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None))
    active = SimpleNamespace(get_current_stream=lambda device: 17 + device)
    modules = {"triton": ModuleType("triton"), "triton.runtime": ModuleType("triton.runtime")}
    modules["triton"].knobs = knobs
    modules["triton.runtime"].driver = SimpleNamespace(active=active)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return knobs


@pytest.mark.parametrize("release", [Of34, Of36, Of37])
def test_the_driver_is_given_what_triton_gives_it(triton, release):
    kernel = Kernel(release(), triton)
    launcher = launcher_of(kernel, 0)
    assert kernel.run.given == []  # to know them, nothing is launched
    launcher(GRID, ARGUMENTS)
    assert not kernel.ordinary
    kernel[GRID](*ARGUMENTS)
    first, second = kernel.run.given
    assert first == second and len(kernel.ordinary) == 1


@pytest.mark.parametrize("release", [WithMemory, Reordered, Counted, Extended, Unpacked])
def test_a_launcher_that_is_not_understood_is_left_to_triton(triton, release):
    kernel = Kernel(release(), triton)
    launcher_of(kernel, 0)(GRID, ARGUMENTS)
    assert kernel.ordinary == [(GRID, tuple(ARGUMENTS))] and len(kernel.run.given) == 1


def test_a_kernel_that_cannot_be_loaded_raises_when_it_is_launched(triton):
    def failed(*_):
        raise RuntimeError("out of resource: shared memory")

    launcher = launcher_of(Kernel(failed, triton), 0)
    with pytest.raises(RuntimeError, match="out of resource"):
        launcher(GRID, ARGUMENTS)


@pytest.mark.parametrize("where", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("hook", [lambda *_: None, Chain(lambda: None)], ids=["function", "chain"])
def test_hooks_see_launches(triton, where, hook):
    kernel = Kernel(Of36(), triton)
    launcher = launcher_of(kernel, 0)
    setattr(triton.runtime, where, hook)
    launcher(GRID, ARGUMENTS)
    assert len(kernel.ordinary) == 1
    setattr(triton.runtime, where, Chain())
    launcher(GRID, ARGUMENTS)
    assert len(kernel.ordinary) == 1 and len(kernel.run.given) == 2


def test_where_hooks_cannot_be_looked_for_triton_launches(triton):
    del triton.runtime.launch_exit_hook
    kernel = Kernel(Of36(), SimpleNamespace(runtime=SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)))
    launcher_of(kernel, 0)(GRID, ARGUMENTS)
    assert len(kernel.ordinary) == 1


def test_the_stream_is_the_devices_present_one(triton):
    kernel = Kernel(Of36(), triton)
    launcher_of(kernel, 3)(GRID, ARGUMENTS)
    assert kernel.run.given[0][3] == 20 and launcher_of(kernel, 3) is launcher_of(kernel, 3)


def test_the_installed_triton_has_a_launcher_that_is_understood():
    pytest.importorskip("triton.knobs")
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.runtime import driver

    run, given = CudaLauncher.__new__(CudaLauncher), []
    sizes = {f"{kind}_scratch_{what}": what == "align" for kind in ("global", "profile") for what in ("size", "align")}
    more = {"arg_annotations": ANNOTATIONS, "kernel_signature": SIGNATURE, "gsan_enabled": False, "num_ctas": 1}
    run.__dict__.update(sizes, **more, launch_cooperative_grid=False, launch_pdl=False, launch=lambda *p: given.append(p))
    before = driver._active
    driver.set_active(SimpleNamespace(get_current_stream=lambda device: 17))
    try:
        kernel = Kernel(run, SimpleNamespace(runtime=SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)))
        launcher_of(kernel, 0)(GRID, ARGUMENTS)
        assert not kernel.ordinary
        kernel[GRID](*ARGUMENTS)
    finally:
        driver._active = before
    assert given[0] == given[1]
