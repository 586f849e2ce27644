"""What a rule launches and allocates on a GPU, without one: its tensors, on the meta device, say that they are on a GPU."""

from __future__ import annotations

from collections import Counter

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hbcore.api import Context, launching
from hbcore.rules.row_noise import normal

SILENT = ("aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view")
"""Operations that launch nothing, beside those that return views."""


class Launches(TorchDispatchMode):
    """Counts torch's operations on the device, and kernels, while it is entered."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found = Counter()
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.device.type == "meta"))
        for module in modules():
            monkeypatch.setattr(module, "run", self.run)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # of torch's products of float16 with a float32 result, these have no shape function
        out = kwargs["out"] if str(func) in ("aten.baddbmm.dtype_out", "aten.bmm.dtype_out") else func(*args, **(kwargs or {}))
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if not view and not str(func).startswith(SILENT) and any(t.is_meta for t in tensors):
            self.found[str(func)] += 1
        return out

    def run(self, kernel, *_, **__):
        self.found[kernel.__name__] += 1


class Peak(Launches):
    """Also finds the most bytes that are alive at once, beside what ``given`` lies in.

    Attributes:
        peak: those bytes.
    """

    def __init__(self, monkeypatch, given):
        super().__init__(monkeypatch)
        self.peak, self._alive = 0, {}
        self._given = {t.untyped_storage()._cdata for t in tree_leaves(given) if isinstance(t, torch.Tensor)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_meta):
            if storage._cdata not in self._given:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def modules():
    """Where kernels are launched."""
    from hbcore.rules import factor_kernel, float32_kernel, noise_kernel, products_kernel, square_kernel

    return factor_kernel, float32_kernel, noise_kernel, products_kernel, square_kernel, launching


def stack_of(rule, products, shape, refresh, step=3.0):
    """An update, a state and a context of ``shape``, which begins with the number of rows, on the meta device."""
    x, keys = torch.empty(shape, device="meta"), torch.empty(shape[0], dtype=torch.int64, device="meta")
    slots = rule.slots(torch.empty(shape[1:], device="meta"))
    state = {name: torch.empty((shape[0], *slot.shape), device="meta") for name, slot in slots.items()}
    context = Context(**dict.fromkeys(Context._fields))._replace(
        products=products, step=torch.tensor(step, dtype=torch.float64), refresh=refresh,
        probe=lambda like: normal(keys, like[0].numel(), 1, 1).view(like.shape),
        into=lambda name: x if name == "update" else state[name],
    )  # fmt: skip
    return x, state, context
