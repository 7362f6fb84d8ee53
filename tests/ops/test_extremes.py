"""Properties of the ops for extreme raw values (±1e4, NaN, ±inf, denormal numbers), against the truth in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import iin_fast
from iin_fast.functional import affine_coupling, pair_nll
from iin_fast.ops import affine_coupling as coupling
from iin_fast.ops import pair_nll as pairs
from iin_fast.ops.affine_coupling import SQUASHES
from iin_fast.ops.flow import flow, pack, reference

EPS, TINY = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny
SPECIAL = [0.0, -0.0, 1e4, -1e4, 80.0, -80.0, 1e-45, -1e-40, 1e-4, float("nan"), float("inf"), -float("inf")]
NUMBERS = st.one_of(st.sampled_from(SPECIAL), st.floats(-1e4, 1e4, width=32), st.floats(-3, 3, width=32))
EXTREMES = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


def arrays(*shape: int) -> st.SearchStrategy[Tensor]:
    size = torch.Size(shape).numel()
    return st.lists(NUMBERS, min_size=size, max_size=size).map(lambda v: torch.tensor(v).reshape(shape))


def check(got: Tensor, truth: Tensor, bound: Tensor, required: Tensor | None = None) -> None:
    """What is not finite stays so; what is finite is within the bound, where ``required``."""
    truth = truth.detach()
    assert not (got.isfinite() & ~truth.isfinite()).any(), (got, truth)
    wanted = truth.isfinite() & bound.isfinite() & (truth.abs() < 1e38)
    if required is not None:
        wanted &= required
    error = (got.detach().double() - truth).abs()
    assert (error[wanted] <= bound.detach()[wanted]).all(), (got[wanted], truth[wanted], bound[wanted])


@pytest.mark.parametrize("squash", SQUASHES)
@pytest.mark.parametrize("inverse", [False, True])
def test_affine_coupling(squash: str, inverse: bool) -> None:
    @EXTREMES
    @given(arrays(2, 19), arrays(2, 19), arrays(2, 19))
    def run(x: Tensor, raw: Tensor, shift: Tensor) -> None:
        chosen = [x, shift] if squash == "none" else [x, raw, shift]
        leaves = [t.clone().requires_grad_() for t in chosen]
        wide = [t.double().requires_grad_() for t in chosen]
        clamp = SQUASHES[squash].clamp

        def split(of: list[Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
            return of[0], None if squash == "none" else of[1], of[-1]

        outputs = affine_coupling(*split(leaves), squash=squash, inverse=inverse)
        truths = coupling.reference.affine_coupling(*split(wide), squash, clamp, inverse)
        s = torch.zeros_like(x.double())
        if squash != "none":
            s = SQUASHES[squash].log_scale(raw.double(), clamp)
        factor = (-s if inverse else s).exp()
        # float32 has exp(s) and 1 / exp(s) as normal numbers
        normal = s.abs() < 87
        size = (
            (x.double().abs() + shift.double().abs()) * factor if inverse else x.double().abs() * factor
        ).nan_to_num(torch.inf) + shift.double().abs()
        check(outputs[0], truths[0], 32 * EPS * size + 8 * TINY, normal)
        check(outputs[1], truths[1], 8 * EPS * (s.abs() + 1).sum(1))
        ones = [torch.ones_like(t) for t in outputs]
        pairs = [(o, t, g) for o, t, g in zip(outputs, truths, ones, strict=True) if t.requires_grad]
        grads = torch.autograd.grad([o for o, _, _ in pairs], leaves, [g for *_, g in pairs])
        wanted = torch.autograd.grad([t for _, t, _ in pairs], wide, [g.to(t) for _, t, g in pairs])
        in_range = normal & (truths[0].abs() < 1e38)  # else y itself is infinite in float32
        for got, want in zip(grads, wanted, strict=True):
            check(got, want, 64 * EPS * (size + factor + 1) * max(1.0, clamp), in_range)

    run()


@pytest.mark.parametrize("rho", [1e-3, 0.5, 0.975, 0.999999])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_pair_nll(rho: float, backend: str) -> None:
    sizes, shared = [3, 0, 16], torch.tensor([[True, False, False], [False, True, True]])

    @EXTREMES
    @given(arrays(2, 19), arrays(2, 19), arrays(2), arrays(2))
    def run(za: Tensor, zb: Tensor, logdet_a: Tensor, logdet_b: Tensor) -> None:
        drawn = [za, zb, logdet_a, logdet_b]
        leaves, wide = ([t.clone().requires_grad_() for t in of] for of in (drawn, [t.double() for t in drawn]))
        with iin_fast.backend(backend):
            loss = pair_nll(*leaves, shared, sizes, rho, normalized=True)
            grads = torch.autograd.grad(loss.sum(), leaves)
        truth = pairs.reference.pair_nll(*wide, shared, sizes, rho, True)
        wanted = torch.autograd.grad(truth.sum(), wide)
        a, b, *logdets = (t.detach().double() for t in wide)
        precision = 1 / ((1 - rho) * (1 + rho))
        reach = (b - a).abs() + a.abs()
        size = (a.square() + reach.square() * precision + 10).sum(1) + sum(t.abs() for t in logdets)
        check(loss, truth, 16 * EPS * size)
        for got, want in zip(grads, wanted, strict=True):
            check(got, want, 16 * EPS * (reach * precision + 1) if got.dim() == 2 else torch.zeros(2).double())

    run()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("memory", ["save", "checkpoint", "invert"])
def test_flow(inverse: bool, memory: str) -> None:
    """One extreme value in each of some tensors; the compiled op in float64."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    clean = [
        *(randn(3, 5), randn(1, 3, 2), randn(2, 5), 1 + 0.3 * torch.tanh(randn(2, 5))),
        *(pack(randn(2, 2, 2, 7, 5)) / 5**0.5, randn(2, 2, 2, 7)),
        *(pack(randn(2, 2, 2, 1, 7, 7)) / 7**0.5, randn(2, 2, 2, 1, 7)),
        *(0.5 * pack(randn(2, 2, 2, 2, 7)) / 7**0.5, 0.5 * randn(2, 2, 2, 2)),
    ]
    permutation = torch.stack([torch.randperm(5, generator=generator) for _ in range(2)])

    @EXTREMES
    @given(
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 10**6), st.sampled_from(SPECIAL)), min_size=1, max_size=3)
    )
    def run(changes: list[tuple[int, int, float]]) -> None:
        tensors = [t.clone() for t in clean]
        for which, place, value in changes:
            if which == 3 and value == 0:
                continue  # a scale is not 0
            tensors[which].view(-1)[place % tensors[which].numel()] = value
        leaves, wide = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
        outputs = flow(*leaves, permutation, inverse=inverse, memory=memory, activation_slope=0.9)
        truths = reference.flow(*wide, permutation, 0.01, 0.9, False, inverse)
        grads = torch.autograd.grad(sum(o.sum() for o in outputs), leaves)
        wanted = torch.autograd.grad(sum(t.sum() for t in truths), wide)
        for got, want in zip(outputs, truths, strict=True):
            check(got, want, 1e-9 * (1 + want.detach().abs()))
        for got, want in zip(grads, wanted, strict=True):
            # a tanh that is 1 in one of both is next to 1 in the other, so infinities may be NaN
            largest = want[want.isfinite()].abs().amax() if want.isfinite().any() else torch.tensor(0.0)
            close = (1e-7 * (1 + largest)).expand(want.shape).double()
            check(got, want, close if memory == "save" else torch.full_like(want, torch.inf))

    run()
