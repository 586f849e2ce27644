"""One pass that multiplies each matrix by its own number and rounds to another dtype."""

from __future__ import annotations

import pytest
import torch

from hb_muon.rescale import rescaled


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 64, 96), (1, 1, 4097)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_kernel_rounds_as_torch_does(shape, dtype):
    pytest.importorskip("triton")
    from hb_muon.rescale_kernel import INTERPRETED, launch

    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("needs Triton's interpreter or a GPU")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    factor = torch.linspace(0.5, 2, shape[0]).view(-1, 1, 1)
    out = torch.empty(shape, dtype=dtype)
    launch(out, x, factor)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds
    torch.testing.assert_close(out, (x * factor).to(dtype), rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_without_it_the_result_is_the_same(dtype):
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factor = torch.tensor([0.5, 3.0], dtype=torch.float64).view(-1, 1, 1)
    assert torch.equal(rescaled(x, factor, dtype), (x * factor).to(dtype))
