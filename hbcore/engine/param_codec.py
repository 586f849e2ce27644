"""``param_ecc``: parameters that are stored in fewer bits, with the missing bits kept in the state."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hbcore.distributed.placement import is_dtensor, local
from hbcore.engine.core import OptimizerCore
from hbcore.engine.corrections import PREFIX, Corrections, Loaded, fingerprint
from hbcore.errors import OptionError, StateWarning
from hbcore.state.codec import StateCodec
from hbcore.warn import warn_at_caller


@torch.no_grad()
def narrow(core: OptimizerCore, params: list[Tensor] | None = None) -> None:
    """Store float32 parameters, of all groups or ``params``, as ``param_ecc`` says.

    The tensor itself becomes narrower, and the missing bits go to the state. Does nothing while the optimizer is being built,
    whose parameters are all narrowed in the end.

    Raises:
        OptionError: a parameter is sharded, or somebody holds what accumulates its gradient.
    """
    codec = core.settings.param_codec
    if codec is None or core.building:
        return
    params = [*_everyone(core)] if params is None else params
    wide = [p for p in params if p.dtype == torch.float32]
    _say_what_is_left(core, codec, params)
    if not wide:
        return
    _refuse(codec, wide)
    for p in wide:
        parts = {name: torch.empty_like(p, dtype=dtype) for name, dtype in codec.parts("param", p.dtype).items()}
        for name, value in codec.write(parts, "param", p.detach()).items():
            parts[name].copy_(value)
        grad, p.grad = p.grad, None  # torch holds a gradient to its parameter's dtype, before the change and after it
        p.data = parts.pop("param")
        p.grad = None if grad is None else grad.to(p.dtype)
        core.state[p].update(parts)
    note(core)
    core.report.note(f"param_ecc={codec.name!r} stores float32 parameters as {wide[0].dtype}")
    warn_at_caller(
        f"{core.name}: param_ecc turned {len(wide)} float32 parameters into {wide[0].dtype}; the model now computes in that "
        "dtype, and the optimizer keeps the bits that are missing. model.state_dict() alone loses them; save the optimizer's "
        "state dict too, or hbcore.full_state(model, optimizer), which has the float32 weights.",
        StateWarning,
    )


def _say_what_is_left(core: OptimizerCore, codec: StateCodec, params: Iterable[Tensor]) -> None:
    left = [p.dtype for p in params if p.dtype not in (torch.float32, narrow_dtype(codec))]
    if left:
        text = (
            f"param_ecc={codec.name!r} leaves {len(left)} parameters as they are, of "
            f"{', '.join(sorted({str(dtype) for dtype in left}))}: it stores only float32 and {narrow_dtype(codec)} parameters"
        )
        core.report.note(text)
        warn_at_caller(f"{core.name}: {text}.", StateWarning)


def _refuse(codec: StateCodec, wide: Iterable[Tensor]) -> None:
    if any(map(is_dtensor, wide)):
        raise OptionError(
            f"param_ecc={codec.name!r} changes the parameters' dtype, which FSDP fixes; it does not support sharded parameters."
        )
    held = next((p for p in wide if is_held(p)), None)
    if held is not None:
        raise OptionError(
            f"param_ecc={codec.name!r} changes the parameters' dtype, and with it what accumulates their gradients, which "
            f"somebody holds of a parameter of shape {tuple(held.shape)}: under DistributedDataParallel, gradients would not "
            "be averaged any more. Make the optimizer first, then wrap the model; if it is not wrapped, delete losses and "
            "outputs that were computed before."
        )


def is_held(p: Tensor) -> bool:
    """Whether somebody keeps the node of the graph that accumulates the gradient of ``p``; torch makes one on demand.

    DistributedDataParallel does, whose hook on the node averages gradients; so does every graph that ends in ``p``. Such a node
    is lost if the dtype of ``p`` changes.
    """
    if not p.requires_grad or not p.is_leaf or not _outlives(p):
        return False
    gc.collect()  # the graph of a loss that nobody has any more may be waiting in a cycle
    return _outlives(p)


def _outlives(p: Tensor) -> bool:
    """Whether the node that accumulates the gradient of ``p`` is there after everybody here has let go of it."""
    with torch.enable_grad():
        _node_of(p).metadata["hbcore"] = True
        node = _node_of(p)
    return bool(node.metadata.pop("hbcore", False))


def _node_of(p: Tensor) -> Any:
    function: Any = p.expand_as(p).grad_fn
    return function.next_functions[0][0]


def narrow_dtype(codec: StateCodec) -> torch.dtype:
    """The dtype of float32 parameters that ``codec`` stores."""
    return codec.parts("param", torch.float32)["param"]


def note(core: OptimizerCore) -> None:
    """The parameters belong to their corrections now: the engine wrote both."""
    if core.settings.param_codec is None:
        return
    corrections, revision = core.corrections, core.state.revision.count
    if corrections.revision == revision:
        corrections.note()
    else:
        corrections.keep_to((p for p in _everyone(core) if beside(core.state.get(p, {}))), revision)


def beside(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """What is stored beside a parameter with this state, this rank's part."""
    return {name: local(t) for name, t in state.items() if str(name).startswith(PREFIX)}


def settle(core: OptimizerCore, final: bool = True) -> None:
    """Let no correction act on other weights than it belongs to. Waits for the device only after a load.

    A parameter that was written to goes on from what was written, without a correction; one whose dtype was changed, by
    ``model.float()``, gets the correction once and for all. Corrections from a checkpoint act on the weights that they were
    saved with: ``final`` says that all weights are loaded by now, and drops those that found others.
    """
    corrections, codec = core.corrections, core.settings.param_codec
    if corrections.waiting:
        with torch.no_grad():
            _receive(core, final)
    if codec is None or corrections.current(narrow_dtype(codec)):
        corrections.stale = 0
        return
    with torch.no_grad():
        _drop_stale(core, codec)
    note(core)


def _drop_stale(core: OptimizerCore, codec: StateCodec) -> None:
    corrections, dtype = core.corrections, narrow_dtype(codec)
    written = 0
    for p, version in zip(corrections.params, corrections.versions, strict=True):
        parts = beside(core.state.get(p, {}))
        if not parts or (p.dtype == dtype and p._version == version) or corrections.waits(p):
            continue
        if p.dtype == dtype:
            for t in parts.values():
                t.zero_()
            written += 1
            continue
        if p._version == version:
            _write(p, codec, parts)
        corrections.waiting.pop(p, None)
        for name in parts:
            del core.state[p][name]
        core.report.note(
            f"parameters that param_ecc={codec.name!r} stored as {dtype} are {p.dtype} now; what it kept beside them was added "
            "to them, unless they were written to, and it stores them no more"
        )
    if written:
        _tell(core, written)


def _tell(core: OptimizerCore, written: int) -> None:
    core.report.note("parameters were written to between steps, and go on from that, without what param_ecc kept beside them")
    core.corrections.stale += 1
    if core.corrections.stale == 2:
        warn_at_caller(
            f"{core.name}: {written} parameters were written to after each of the last steps. param_ecc's corrections do not "
            "belong to what was written and are dropped each time, so that updates too small for the parameters' dtype are "
            "lost; write to them less often, or use no param_ecc.",
            StateWarning,
        )


def _write(p: Tensor, codec: StateCodec, parts: Mapping[str, Tensor]) -> None:
    """Give a parameter of another dtype than ``codec`` stores the bits that it lacks."""
    own = local(p.detach())
    narrowed = own.to(narrow_dtype(codec))
    stored = {"param": narrowed, **{name: t.to(own.device) for name, t in parts.items()}}
    full = codec.read(stored, "param", torch.float32).to(own.dtype)
    own.copy_(torch.where(narrowed.to(own.dtype) == own, full, own))


def _receive(core: OptimizerCore, final: bool) -> None:
    """Let what a checkpoint brought act on the weights, where they are those that it was saved with."""
    corrections, others = core.corrections, 0
    for p, loaded in corrections.waiting.items():
        if not corrections.waits(p):
            continue
        rounded, fits = _belongs(p, loaded)
        if fits:
            _join(core, p, loaded)
            corrections.met(p)
        elif final:
            for t in beside(core.state.get(p, {})).values():
                t.zero_()
            corrections.note_one(p)
            core.report.note("weights are not those that the checkpoint's param#ecc was saved with, and go on without it")
            others += rounded
    if final:
        corrections.await_weights({})
    if others:
        warn_at_caller(
            f"{core.name}: {others} parameters hold other weights than those that the checkpoint's param#ecc was saved with; "
            "they go on without it, rounded to its dtype. Load the model's state dict that was saved along with the "
            "optimizer's; full weights go into the model with hbcore.load_full_state.",
            StateWarning,
        )


def _belongs(p: Tensor, loaded: Loaded) -> tuple[bool, bool]:
    """Whether the weights are rounded as the codec does it, and whether they are those that a correction was saved with."""
    own = local(p.detach())
    narrowed = own.to(narrow_dtype(loaded.codec))
    if own.dtype != narrowed.dtype and not torch.equal(narrowed.to(own.dtype), own):
        return False, False
    found = None if is_dtensor(p) else fingerprint(narrowed)
    return True, found is None or loaded.sum is None or bool(found.cpu() == loaded.sum.cpu())


def _join(core: OptimizerCore, p: Tensor, loaded: Loaded) -> None:
    """Take over corrections that belong to ``p``."""
    codec = core.settings.param_codec
    if loaded.parts is None:
        return
    if codec is None or p.dtype != narrow_dtype(codec):
        _write(p, loaded.codec, loaded.parts)
        core.report.note(f"the checkpoint's weights were stored by param_ecc={loaded.codec.name!r}, and are {p.dtype} now")
        return
    full = loaded.codec.read({"param": local(p.detach()), **loaded.parts}, "param", torch.float32)
    put_full(core, p, full)
    core.report.note(f"the checkpoint's weights were stored by param_ecc={loaded.codec.name!r}, and by {codec.name!r} now")


def put_full(core: OptimizerCore, p: Tensor, full: Tensor) -> None:
    """Store float32 weights in a parameter and beside it; does nothing for a parameter that has nothing beside it."""
    codec, targets = core.settings.param_codec, {"param": local(p.detach()), **beside(core.state.get(p, {}))}
    if codec is None or len(targets) == 1 or p.dtype != narrow_dtype(codec):
        return
    for name, value in codec.write(targets, "param", full.to(targets["param"].device, torch.float32)).items():
        targets[name].copy_(value)
    core.corrections.note_one(p)


def full_of(core: OptimizerCore, p: Tensor) -> Tensor | None:
    """The float32 weights of a parameter, in the parameter's memory order; None if nothing is kept beside it."""
    codec, parts = core.settings.param_codec, beside(core.state.get(p, {}))
    if codec is None or not parts or p.dtype != narrow_dtype(codec) or core.corrections.waits(p):
        return None
    return codec.read({"param": local(p.detach()), **parts}, "param", torch.float32)


@contextmanager
def restoring(cores: Iterable[OptimizerCore]) -> Iterator[None]:
    """For a block that moves parameters and puts the same bits back: their corrections still belong to them then."""
    found: list[tuple[Corrections, list[int]]] = []
    for core in cores:
        settle(core)
        found.append((core.corrections, [p._version for p in core.corrections.params]))
    try:
        yield
    finally:
        for corrections, before in found:
            corrections.forgive(before)


def _everyone(core: OptimizerCore) -> Iterator[Tensor]:
    return (p for group in core.groups for p in group["params"])
