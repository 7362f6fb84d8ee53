"""Rows shared by several threads give the bits that one thread gives. The flow has tests of its own in test_flow.py."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import iin_fast
from iin_fast.functional import affine_coupling, pair_nll, spline_coupling

ROWS, DIM = 3000, 33  # several pieces of work for each thread, and an odd rest


def affine(random: torch.Generator) -> tuple[list[Tensor], Callable[..., object]]:
    return [torch.randn(ROWS, DIM, generator=random) for _ in range(3)], lambda x, raw, t: affine_coupling(x, raw, t)


def spline(random: torch.Generator) -> tuple[list[Tensor], Callable[..., object]]:
    inputs = [torch.randn(ROWS, DIM, generator=random), torch.randn(ROWS, DIM, 11, generator=random)]
    return inputs, lambda x, raw: spline_coupling(x, raw, bins=4, tail_bound=2.0)


def pair(random: torch.Generator) -> tuple[list[Tensor], Callable[..., object]]:
    inputs = [torch.randn(ROWS, DIM, generator=random) for _ in range(2)]
    inputs += [torch.randn(ROWS, generator=random) for _ in range(2)]
    shared = torch.rand(ROWS, 2, generator=random) < 0.5
    return inputs, lambda za, zb, la, lb: (pair_nll(za, zb, la, lb, shared, sizes=[20, 13], rho=0.9),)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", [affine, spline, pair])
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_with_any_number_of_threads(
    op: Callable[..., tuple[list[Tensor], Callable[..., object]]],
    count: int,
    dtype: torch.dtype,
    threads: Callable[[int], None],
) -> None:
    inputs, run = op(torch.Generator().manual_seed(0))

    def results() -> list[Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
        with iin_fast.backend("cpp"):
            outputs = run(*leaves)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs])]

    threads(1)
    want = results()
    threads(count)
    for ours, alone in zip(results(), want, strict=True):
        assert torch.equal(ours, alone)
