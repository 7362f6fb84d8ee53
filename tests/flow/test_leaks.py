"""No op keeps memory: what the C library has handed out is the same after many calls."""

import ctypes
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from iin_fast import nn
from iin_fast.functional import affine_coupling, pair_nll, rational_quadratic_spline

FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def handed_out() -> int:
    """Bytes that malloc has handed out and not got back."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        pytest.skip("mallinfo2 is glibc's, from 2.33 on")
    mallinfo2.restype = Mallinfo
    return int(mallinfo2().uordblks)


def calls() -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    x, context = torch.randn(5, 6), torch.randn(5, 3)
    raw = torch.randn(5, 6).requires_grad_()
    parts = [torch.randn(5, 6, count).requires_grad_() for count in (4, 4, 3)]
    flows = {
        "neural spline flow": nn.NeuralSplineFlow(6, 3, n_flows=2, hidden_dim=8, mixing="lu"),
        "autoregressive flow": nn.MaskedAutoregressiveFlow(6, 3, n_flows=2, hidden_dim=8),
        "RealNVP": nn.RealNVP(6, 3, n_flows=2, hidden_dim=8),
    }
    found: dict[str, Callable[[], Any]] = {
        name: lambda flow=flow: flow.log_prob(x, context).sum().backward() for name, flow in flows.items()
    }
    found["samples"] = lambda: flows["autoregressive flow"].sample((3,), context)
    flow = nn.Flow(6, 2, 8)
    found["flow"] = lambda: sum(t.sum() for t in flow(x)).backward()  # type: ignore[union-attr]
    found["affine coupling"] = lambda: affine_coupling(x, raw, raw)[0].sum().backward()
    found["spline"] = lambda: rational_quadratic_spline(x, *parts)[0].sum().backward()
    shared = torch.ones(5, 2, dtype=torch.bool)
    found["pair_nll"] = lambda: pair_nll(raw, x, x[:, 0], x[:, 1], shared, [2, 4], 0.9).sum().backward()
    return found


@pytest.mark.parametrize("name", calls())
def test_calls_keep_no_memory(name) -> None:
    call, times = calls()[name], 300
    for _ in range(50):
        call()
    gc.collect()
    before = handed_out()
    for _ in range(times):
        call()
    gc.collect()
    assert handed_out() - before < 50 * times
