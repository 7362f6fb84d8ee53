"""The elementary functions of triton_common."""

import torch
import triton
import triton.language as tl
from torch.testing import assert_close

from iin_fast.ops.triton_common import atan, launch, tanh


def test_elementary_functions_hold_to_the_last_bits() -> None:
    @triton.jit
    def kernel(x, t, a, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        v = tl.load(x + i)
        tl.store(t + i, tanh(v))
        tl.store(a + i, atan(v))

    sides = torch.cat([torch.logspace(-6, 2, 2040, dtype=torch.float64), torch.tensor([0.35, 0.25, 2.4142, 0.4142])])
    edges = torch.tensor([0.0, float("inf"), 1e30, 1e-30], dtype=torch.float64)
    for dtype, ulps in ((torch.float32, 4), (torch.float64, 4)):
        x = torch.cat([sides, edges]).to(dtype)
        x = torch.cat([x, -x])
        t, a = torch.empty_like(x), torch.empty_like(x)
        launch(kernel, (len(x) // 1024,), x=x, t=t, a=a, BLOCK=1024)
        tolerance = dict(rtol=ulps * torch.finfo(dtype).eps, atol=0)
        assert_close(t, x.double().tanh().to(dtype), **tolerance)
        assert_close(a, x.double().atan().to(dtype), **tolerance)
