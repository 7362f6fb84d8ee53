"""Hard inputs for all backends of an op, and how far from the truth their results may lie."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from op_cases import BACKEND, LONGEST_SUM, SUM_UNITS
from torch import Tensor
from torch.testing import assert_close

import iin_fast

__all__ = [
    "at_the_edge_of_overflow",
    "check_not_finite",
    "of_gradients",
    "spoiled",
    "RHOS",
    "SIZES",
    "check_near_one",
    "check_sums",
    "compare_with_definition",
    "fixed_weights",
    "long_terms",
    "pairs_near_one",
    "with_gradients",
]


def as_tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else found


def fixed_weights(outputs: Sequence[Tensor]) -> list[Tensor]:
    """For the sum that gradients are taken of: between 0.5 and 1.5, so that no two errors cancel."""
    generator = torch.Generator().manual_seed(1)
    return [0.5 + torch.rand(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in outputs]


def with_gradients(
    call: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    backend: str = BACKEND,
    weights: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Outputs of ``call(*tensors)``, and the gradients of their weighted sum by the floating tensors."""
    leaves = [t.detach().clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    with iin_fast.backend(backend):
        outputs = as_tuple(call(*leaves))
    pairs = [(o, w) for o, w in zip(outputs, weights or fixed_weights(outputs), strict=True) if o.requires_grad]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    grads = torch.autograd.grad([o for o, _ in pairs], wanted, [w for _, w in pairs], materialize_grads=True)
    return [t.detach() for t in (*outputs, *grads)]


def compare_with_definition(
    call: Callable[..., Tensor | tuple[Tensor, ...]], tensors: Sequence[Tensor | None], float32: float
) -> None:
    """Each output and gradient, relative to its largest element. ``float32``: the tolerance in that type.

    Torch rounds 16-bit gradients of the definition at several places, a kernel once.
    """
    for got, want in zip(with_gradients(call, tensors), with_gradients(call, tensors, "reference"), strict=True):
        eps = torch.finfo(want.dtype).eps
        relative = {torch.float64: 1e-12, torch.float32: float32}.get(tensors[0].dtype, 4 * eps)  # type: ignore[union-attr]
        largest = want.abs().max().item() if want.numel() else 0.0
        assert_close(got, want, rtol=relative, atol=relative * max(1.0, largest))


def long_terms(dtype: torch.dtype, backend: str = BACKEND) -> Iterator[Tensor]:
    """Terms [2, n], equal and random, with and without cancellation."""
    generator = torch.Generator().manual_seed(0)
    for n in (70_001, 196_608, 999_983, 1_000_000):
        if n > LONGEST_SUM[backend]:
            continue
        equal = torch.tensor([[-1.7779], [0.1]], dtype=torch.float64).expand(2, n)
        random = torch.randn(2, n, generator=generator, dtype=torch.float64)
        for terms in (equal, random, random.abs()):
            yield terms.to(dtype).contiguous()


def check_sums(got: Tensor, terms: Tensor, backend: str = BACKEND) -> None:
    """At most twice the error of torch.sum, or SUM_UNITS of the last place of the result or of its largest parts."""
    truth = [math.fsum(row) for row in terms.tolist()]
    eps = torch.finfo(got.dtype).eps
    for ours, torchs, true, row in zip(got.tolist(), terms.sum(1).tolist(), truth, terms.double(), strict=True):
        bound = max(2 * abs(torchs - true), SUM_UNITS[backend] * eps * max(abs(true), row.norm().item()))
        assert abs(ours - true) <= bound, f"{row.numel()} terms: {ours!r} for {true!r}, torch {torchs!r}"


RHOS = [0.3, 0.975, 0.999999, 1 - 1e-8]
SIZES = [3, 5, 40]


def pairs_near_one(rho: float) -> tuple[list[Tensor], Tensor]:
    """za, zb, logdet_a and logdet_b in float32, and shared; shared factors are drawn with that correlation."""
    generator = torch.Generator().manual_seed(0)
    a, noise = torch.randn(2, 20, sum(SIZES), generator=generator, dtype=torch.float64)
    shared = torch.rand(20, len(SIZES), generator=generator) < 0.7
    m = shared.repeat_interleave(torch.tensor(SIZES), 1)
    b = torch.where(m, rho * a + math.sqrt((1 - rho) * (1 + rho)) * noise, noise)
    return [a.float(), b.float(), torch.zeros(20), torch.zeros(20)], shared


def check_near_one(
    loss: Tensor, grad_a: Tensor, grad_b: Tensor, za: Tensor, zb: Tensor, shared: Tensor, rho: float
) -> None:
    """The normalized loss of SIZES, and its gradients for a gradient of 1, are right to rounding."""
    a, b = za.double(), zb.double()
    m = shared.repeat_interleave(torch.tensor(SIZES), 1).double()
    variance = m * (1 - rho) * (1 + rho) + (1 - m)
    pull = (b - m * rho * a) / variance
    terms = 0.5 * (a.square() + (b - m * rho * a) * pull + variance.log()) + math.log(2 * math.pi)
    eps = torch.finfo(loss.dtype).eps
    assert ((loss - terms.sum(1)).abs() <= 4 * eps * terms.abs().sum(1)).all()
    assert ((grad_b - pull).abs() <= 4 * eps * pull.abs().amax()).all()
    assert ((grad_a - (a - m * rho * pull)).abs() <= 4 * eps * pull.abs().amax()).all()


def spoiled(tensors: Sequence[Tensor | None], every: bool = True) -> Iterator[tuple[str, list[Tensor | None]]]:
    """The floating tensors with NaN, inf or -inf at random places of one of them, and of all.

    ``every``: each of them with each of the three; else they take turns.
    """
    generator = torch.Generator().manual_seed(0)
    given = [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point() and t.numel() > 0]
    for turn, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        for places in (*([i] for i in given if every or i % 3 == turn), given):
            changed = list(tensors)
            for i in places:
                changed[i] = tensors[i].clone()  # type: ignore[union-attr]
                few = 1 + torch.randint(2, (), generator=generator).item() if len(places) == 1 else 1
                at = torch.randperm(changed[i].numel(), generator=generator)[:few]
                changed[i].view(-1)[at] = bad
            yield f"{bad} in {places}", changed


def check_not_finite(got: Tensor, want: Tensor, label: object, how: str = "kinds") -> None:
    """NaN and each infinity stand where the definition ``want`` has them.

    ``how``: "kinds"; "places": any of the three; "none lost": any of the three, and maybe elsewhere too.
    """
    if how == "none lost":
        assert not (got.isfinite() & ~want.isfinite()).any(), (label, got, want)
        return
    for what in (torch.isnan, torch.isposinf, torch.isneginf) if how == "kinds" else (torch.isfinite,):
        assert torch.equal(what(got), what(want)), (label, what.__name__, got, want)


def of_gradients(squash: str) -> str:
    """How gradients of a squash are checked: that of softclip is a difference of two products in the definition."""
    return "places" if squash == "softclip" else "kinds"


def at_the_edge_of_overflow() -> tuple[list[Tensor], list[Tensor]]:
    """x, raw and shift of float32 couplings with squash "identity", the gradient of y, and the gradients in float64.

    The gradient times exp(s) is infinite, times x exp(s) it is not.
    """
    x, raw, grad = torch.tensor([[1e-20, -1e-25]]), torch.tensor([[80.0, 88.0]]), torch.tensor([[1e10, -1e8]])
    slope = raw.double().exp()
    truths = [grad * slope, grad * x.double() * slope, grad.double()]
    return [x, raw, torch.zeros(1, 2), grad], truths


def compare_not_finite(
    call: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    of_gradients: str = "kinds",
    every: bool = True,
) -> None:
    """Outputs and gradients of ``call(*tensors)``; what is spoiled in turn are its tensors and the outputs' gradients.

    ``of_gradients``: how gradients are checked. Where one is a sum of infinities, it may be of either kind.
    """
    weights = fixed_weights(as_tuple(call(*tensors)))
    for label, changed in spoiled([*tensors, *weights], every):
        given, grads = changed[: len(tensors)], changed[len(tensors) :]
        ours, definition = (with_gradients(call, given, name, grads) for name in (BACKEND, "reference"))
        for i, (got, want) in enumerate(zip(ours, definition, strict=True)):
            check_not_finite(got, want, (label, i), "kinds" if i < len(weights) else of_gradients)
