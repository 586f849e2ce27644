"""Symmetric products: the kernel, under Triton's interpreter here and on a GPU where there is one, and the choice of it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hb_muon import symmetric
from hb_muon.symmetric import Tiling, Winner, half_and_mirror, symmetric_product

SIZES = ((2, 64, 32), (2, 40, 48), (2, 40, 72), (1, 33, 17), (2, 1, 5), (1, 17, 1))
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}  # the interpreter cuts bits off where a GPU rounds to nearest
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
EVERY_DTYPE = pytest.mark.parametrize("dtype", ROUNDING, ids=str)
BY_POINTERS, BY_DESCRIPTORS = (Tiling(32, 16, 4, 2, described, band=2) for described in (False, True))
EVERY_TILING = pytest.mark.parametrize("tiling", [BY_POINTERS, BY_DESCRIPTORS], ids=["pointers", "descriptors"])


def stack(batch, n, k, dtype, seed=0):
    x = torch.randn(batch, n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x / k**0.5).to(dtype).to(DEVICE)


def as_columns(x):
    """The same matrices, stored column by column."""
    return x.mT.contiguous().mT


def check(out, expected, dtype, scale=None):
    """Each entry within a unit in the last place, which is what cutting off may take, of the sum that it is, in float32."""
    assert out.dtype == dtype
    bound = ROUNDING[dtype] * expected.abs() + 1e-5 * (expected.abs().max() if scale is None else scale)
    assert bool(((out.double() - expected).abs() <= bound).all())


@needs_triton
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("storage", ["rows", "columns"])
@EVERY_TILING
@EVERY_DTYPE
def test_a_gram_matrix(dtype, tiling, storage, size):
    x = stack(*size, dtype)
    x = as_columns(x) if storage == "columns" else x
    out = half_and_mirror(x, x.mT, tiling=tiling)
    check(out, x.double() @ x.double().mT, dtype)
    assert torch.equal(out, out.mT)
    assert out.is_contiguous()


@needs_triton
@pytest.mark.parametrize("added", ["rows", "columns", "expanded"])
@pytest.mark.parametrize(("batch", "n"), [(1, 32), (3, 45)])
@EVERY_TILING
@EVERY_DTYPE
def test_a_product_of_polynomials_plus_another(dtype, tiling, batch, n, added):
    """``alpha a b + beta c``, rounded once; the two commute to rounding errors."""
    gram = stack(batch, n, n, torch.float64)
    gram = gram @ gram.mT
    a, b = (0.3 * gram).to(dtype), (gram @ gram - 0.5 * gram).to(dtype)
    c = (gram + gram.mT).to(dtype)
    c = {"rows": c, "columns": as_columns(c), "expanded": c[:1].expand(batch, n, n)}[added]
    out = half_and_mirror(a, b, c, alpha=0.7, beta=-1.3, tiling=tiling)
    product = a.double() @ b.double()
    expected = 0.7 * product - 1.3 * c.double()
    check(out.tril(), expected.tril(), dtype, scale=10.0)
    asymmetry = (product - product.mT).abs().max()
    assert (out.double() - expected).abs().max() <= 4 * ROUNDING[dtype] * expected.abs().max() + asymmetry


@needs_triton
@EVERY_TILING
def test_only_entries_of_the_stack_are_read(tiling):
    """Not the neighbours of the matrices, nor their own next rows: each is surrounded by NaN, and ragged."""
    for n, k in ((33, 17), (40, 48), (48, 40)):
        around = torch.full((2, n + 8, k + 8), torch.nan, dtype=torch.float16, device=DEVICE)
        for whole in (around, around.mT.contiguous().mT):
            x = whole[:, :n, :k]
            x.copy_(stack(2, n, k, torch.float16))
            check(half_and_mirror(x, x.mT, tiling=tiling), x.double() @ x.double().mT, torch.float16)


@needs_triton
@pytest.mark.parametrize("across", [1, 2, 5, 9])
@pytest.mark.parametrize("band", [1, 2, 4])
def test_every_tile_is_computed_once(across, band):
    """What no tile wrote would be what was there before; ``n`` one short of whole tiles."""
    x = stack(1, 16 * across - 1, 16, torch.float16)
    out = torch.full((1, x.shape[1], x.shape[1]), torch.nan, dtype=torch.float16, device=DEVICE)
    from hb_muon.symmetric_kernel import launch_half

    launch_half(out, x, x.mT, None, 1.0, 0.0, Tiling(16, 16, 4, 2, band=band))
    check(out, x.double() @ x.double().mT, torch.float16)


@needs_triton
def test_entries_without_neighbours():
    x = stack(2, 20, 48, torch.float16)[:, :, ::3]
    check(half_and_mirror(x, x.mT), x.double() @ x.double().mT, torch.float16)


@needs_triton
def test_an_empty_stack():
    x = torch.empty(0, 4, 3, dtype=torch.float16, device=DEVICE)
    assert half_and_mirror(x, x.mT).shape == (0, 4, 4)


@needs_triton
@pytest.mark.parametrize(
    ("a", "b", "c", "message"),
    [
        ((2, 4, 3), (2, 3, 5), None, "no square product"),
        ((2, 4, 3), (1, 3, 4), None, "no square product"),
        ((2, 4, 3), (2, 3, 4), (2, 4, 3), "no square product"),
    ],
)
def test_shapes_that_make_no_square_product(a, b, c, message):
    a, b, c = (None if s is None else torch.ones(s, dtype=torch.float16, device=DEVICE) for s in (a, b, c))
    with pytest.raises(ValueError, match=message):
        half_and_mirror(a, b, c)


@needs_triton
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float16", "bfloat16")])
def test_dtypes_that_the_kernel_does_not_take(dtypes):
    a, b = (torch.ones(1, 4, 4, dtype=getattr(torch, d), device=DEVICE) for d in dtypes)
    with pytest.raises(ValueError, match="one of float16 and bfloat16"):
        half_and_mirror(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.5, 0.0), (0.5, -3.0)])
def test_what_a_symmetric_product_is(dtype, alpha, beta):
    x = stack(2, 9, 14, torch.float64).to(dtype)
    for c in (None, (x @ x.mT)):
        given = x.new_full((2, 9, 9), torch.nan)
        out = symmetric_product(x, x.mT, c, alpha, beta)
        assert torch.equal(symmetric_product(x, x.mT, c, alpha, beta, given), out)
        assert torch.equal(given, out)
        expected = alpha * x.double() @ x.double().mT
        expected = expected if c is None else expected + beta * c.double()
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=60 * torch.finfo(dtype).eps)
        assert out.dtype == dtype


def test_the_kernel_is_chosen_in_the_measured_ranges_alone(monkeypatch):
    large, wide = Tiling(tile=128), Tiling(tile=64)
    rows = (Winner(1024, 4 * 1024**2, False, large), Winner(256, 0, False, wide), Winner(512, 0, True, wide))
    monkeypatch.setattr(symmetric, "WINNERS", rows)
    monkeypatch.setattr(symmetric, "usable", lambda device: True)

    class On:
        """The looks of a stack on a GPU."""

        def __init__(self, *shape, dtype=torch.float16, device="cuda"):
            self.shape, self.dtype, self.device = shape, dtype, torch.device(device)

    assert symmetric.fastest(On(4, 1024, 2048)) is large
    assert symmetric.fastest(On(3, 1024, 2048)) is wide
    assert symmetric.fastest(On(4, 1024, 1024)) is wide
    assert symmetric.fastest(On(4, 1023, 4096)) is wide
    assert symmetric.fastest(On(64, 255, 4096)) is None
    assert symmetric.fastest(On(64, 256, 256)) is None
    assert symmetric.fastest(On(4, 1024, 2048, dtype=torch.float32)) is None
    assert symmetric.fastest(On(4, 1024, 2048, device="cpu")) is None
    monkeypatch.setattr(symmetric, "usable", lambda device: False)
    assert symmetric.fastest(On(4, 1024, 2048)) is None


# --- machine code -------------------------------------------------------------------------------------------------------


def compile_for_hopper(tilings, out):
    """What runs in another process: Triton's interpreter, on in this one, compiles nothing."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hb_muon.symmetric_kernel import half_product

    results = []
    for tiling, (a_rows, b_rows) in itertools.product(tilings, ((True, False), (False, True))):
        tile, depth = tiling.tile, tiling.depth
        flags = {"EVEN": True, "DESCRIBED": tiling.described, "A_ROWS": a_rows, "B_ROWS": b_rows}
        constants = {"TILE": tile, "DEPTH": depth, "BAND": tiling.band, **flags}
        types = dict.fromkeys(half_product.arg_names, "i32") | dict.fromkeys(("alpha", "beta"), "fp32")
        types |= dict.fromkeys("abd", "*fp16") | {"out": "*fp16"}
        if tiling.described:
            for name, whole in (("a", a_rows), ("b", not b_rows)):
                types[name] = f"tensordesc<fp16[{tile},{depth}]>" if whole else f"tensordesc<fp16[{depth},{tile}]>"
        types |= dict.fromkeys(constants, "constexpr")
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(half_product.arg_names) if types[name] in ("i32", "*fp16")
        }
        options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
        source = ASTSource(half_product, types, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        results.append({"ptx": compiled.asm["ptx"], "shared": compiled.metadata.shared, "described": tiling.described})
    Path(out).write_text(json.dumps(results))


@needs_triton
def test_the_machine_code_for_hopper(tmp_path):
    """Tensor cores by ``wgmma``, loads that run ahead, 16 bytes a store, no spills, memory that a processor has."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "ignore", __file__, str(tmp_path / "code.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    if done.returncode and re.search("ptxas|No module named 'triton|Cannot find .*backend", done.stderr):
        pytest.skip(f"Triton cannot compile for NVIDIA GPUs here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "code.json").read_text())
    assert len(results) == 4
    for code in results:
        assert "wgmma.mma_async" in code["ptx"]
        assert ("cp.async.bulk.tensor" if code["described"] else "cp.async.cg") in code["ptx"]
        assert set(re.findall(r"st\.global[\w.]*", code["ptx"])) == {"st.global.v4.b32"}
        assert not re.search(r"(ld|st)\.local", code["ptx"])
        assert code["shared"] <= 227 * 1024


if __name__ == "__main__":
    compile_for_hopper((Tiling(), Tiling(described=True)), sys.argv[1])
