"""The random numbers of matrix rules in C++: a stack's rows take one call instead of a hundred small operations of torch."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hbcore.engine.backends.cpp.build import load
from hbcore.engine.backends.cpp.prelude import PRELUDE
from hbcore.errors import CompileError
from hbcore.rules import row_noise
from hbcore.rules.row_noise import Words

WORTH_A_THREAD = 8192
"""Calls of Philox for which a thread of its own pays."""

SOURCE = (
    PRELUDE
    + """
constexpr int64_t TILE = 1024;

// Each row's calls of Philox from first to first + count, one word in each of four planes of [rows, count].
extern "C" void row_words(const int64_t* keys, int64_t rows, int64_t first, int64_t count, int64_t step, int64_t draw,
                          int64_t* const* planes, int64_t threads) {
    const int64_t across = (count + TILE - 1) / TILE;
    int64_t *a = planes[0], *b = planes[1], *c = planes[2], *d = planes[3];
    #pragma omp parallel for num_threads(threads) if(threads > 1)
    for (int64_t tile = 0; tile < rows * across; ++tile) {
        const int64_t row = tile / across, start = tile % across * TILE, end = start + TILE < count ? start + TILE : count;
        const uint64_t key = uint64_t(keys[row]);
        #pragma omp simd
        for (int64_t i = start; i < end; ++i) {
            uint32_t w[4];
            philox(key, uint64_t(first + i), w, uint32_t(step), uint32_t(draw));
            a[row * count + i] = w[0];
            b[row * count + i] = w[1];
            c[row * count + i] = w[2];
            d[row * count + i] = w[3];
        }
    }
}
"""
)


def words(keys: Tensor, first: int, count: int, step: int, draw: int, memory: Tensor) -> Words:
    """See :func:`hbcore.rules.row_noise.words`, which makes them where C++ cannot be compiled."""
    function = _function()
    if function is None:
        return row_noise.words(keys, first, count, step, draw, memory)
    total, keys = len(keys) * count, keys.contiguous()
    planes = memory[:4, :total]
    addresses = (ctypes.c_void_p * 4)(*map(Tensor.data_ptr, planes.unbind()))
    threads = max(1, min(torch.get_num_threads(), total // WORTH_A_THREAD))
    function(keys.data_ptr(), len(keys), first, count, step, draw, addresses, threads)
    a, b, c, d = planes.view(4, len(keys), count).unbind()
    return a, b, c, d


@lru_cache(maxsize=1)
def _function() -> Any:
    """The compiled function; None where there is none, which the segments report."""
    try:
        function = load(SOURCE).row_words
    except CompileError:
        return None
    function.argtypes = (ctypes.c_void_p, *[ctypes.c_int64] * 5, ctypes.c_void_p, ctypes.c_int64)
    function.restype = None
    return function
