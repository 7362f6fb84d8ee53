"""spline_coupling in Triton: what its kernels alone have. The rest is in tests/ops/test_spline_*.py."""

import math

import pytest
import torch

import iin_fast
from iin_fast.functional import spline_coupling
from iin_fast.ops.spline_coupling import parameter_count


@pytest.mark.parametrize(("bins", "features"), [(64, 252), (1, 16_384)])
def test_logdets_of_long_rows(bins: int, features: int) -> None:
    """Added by one program in many steps, and by many programs. Every term is the log of the slope of the first knot, of a
    size whose multiples round to one side."""
    raw = torch.zeros(1, 1, parameter_count(bins, None))
    raw[..., 2 * bins] = math.log(math.expm1(math.exp(0.618793) - 1e-3))
    x = torch.full((1, 1), -1.0)
    with iin_fast.backend("triton"):
        term = spline_coupling(x, raw, bins=bins, tails=None)[1].double()
        found = spline_coupling(x.repeat(1, features), raw.expand(1, features, -1), bins=bins, tails=None)[1]
    assert found.item() == pytest.approx(features * term.item(), rel=1.2e-7, abs=0)
