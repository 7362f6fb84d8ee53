"""torch.func and forward-mode AD: grad, jvp, vmap, per-sample gradients, ensembles, second derivatives; clear errors."""

import copy
import warnings

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import iin_fast
from iin_fast.backends import BackendUnavailable
from iin_fast.nn import ActNorm, Flow

from .cases import CASES, DIM, MODULES, Case, learned, normal, same, seeded, tensors

every = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
TOLERANCE = dict(rtol=1e-7, atol=1e-8)


def double(case: Case, batch: int = 4) -> tuple[torch.nn.Module, list]:
    """In float64, where two ways to a derivative agree to many digits."""
    inputs = [t.double() if t.is_floating_point() else t for t in case.inputs(batch)]
    return case.module().double(), inputs


def total(results: object) -> Tensor:
    """One number that weights all results differently."""
    return sum((t * torch.linspace(0.5, 1.5, t.numel()).reshape(t.shape)).sum() for t in tensors(results))


@every
def test_grad_is_that_of_autograd(case: Case):
    module, inputs = double(case)
    floating = tuple(i for i, t in enumerate(inputs) if t.is_floating_point())
    found = grad(lambda *a: total(module(*a)), argnums=floating)(*inputs)
    wanted = learned(module, inputs)[: len(floating)]
    expected = torch.autograd.grad(total(module(*inputs)), wanted, allow_unused=True)
    same(found, [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, expected, strict=True)], **TOLERANCE)


@every
def test_jvp_and_dual_numbers(case: Case):
    """Forward mode against reverse mode: u · (J v) = (J' u) · v."""
    module, (x, *rest) = double(case)
    v = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
    value, tangent = jvp(lambda x: total(module(x, *rest)), (x,), (v,))
    (reverse,) = torch.autograd.grad(total(module(x.requires_grad_(), *rest)), x)
    torch.testing.assert_close(tangent, (reverse * v).sum(), **TOLERANCE)
    torch.testing.assert_close(value, total(module(x, *rest)), **TOLERANCE)
    with forward_ad.dual_level():
        dual = total(module(forward_ad.make_dual(x.detach(), v), *rest))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent, **TOLERANCE)


class Count(TorchDispatchMode):
    """Counts calls of this package's ops."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.namespace == "iin_fast"
        return func(*args, **(kwargs or {}))


def stacked(case: Case, inputs: list, size: int) -> tuple[list, tuple]:
    """``size`` different batches, stacked along the last dimension of the inputs that have a batch."""
    many = [
        torch.stack([t + 0.1 * i if t.is_floating_point() else t.roll(i, 0) for i in range(size)], -1)
        if place < case.batched
        else t
        for place, t in enumerate(inputs)
    ]
    return many, tuple(-1 if place < case.batched else None for place in range(len(inputs)))


@every
def test_vmap_runs_one_batch(case: Case):
    module, inputs = double(case)
    many, dims = stacked(case, inputs, 3)
    with Count() as one:
        module(*inputs)
    with Count() as counted, warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where it falls back to a loop
        found = vmap(lambda *a: tensors(module(*a)), in_dims=dims)(*many)
    assert counted.calls == one.calls
    for i in range(3):
        wanted = module(*(t[..., i] if dim else t for t, dim in zip(many, dims, strict=True)))
        same([t[i] for t in found], wanted, **TOLERANCE)


@every
def test_gradients_through_vmap(case: Case):
    module, inputs = double(case)
    many, dims = stacked(case, inputs, 3)
    wanted = learned(module, many)

    def gradients(results: list[Tensor]) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(sum(t.square().sum() for t in results), wanted, allow_unused=True)
        return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True))

    if not wanted:
        pytest.skip("nothing to learn")
    mapped = gradients(tensors(vmap(lambda *a: tuple(tensors(module(*a))), in_dims=dims)(*many)))
    loop = [module(*(t[..., i] if dim else t for t, dim in zip(many, dims, strict=True))) for i in range(3)]
    same(mapped, gradients(tensors(loop)), **TOLERANCE)


@every
def test_second_derivatives(case: Case):
    module, (x, *rest) = double(case, 2)

    def curved(x: Tensor) -> Tensor:
        return sum(t.square().sum() for t in tensors(module(x, *rest)))

    wanted = torch.autograd.functional.hessian(curved, x)
    torch.testing.assert_close(hessian(curved)(x), wanted, **TOLERANCE)
    torch.testing.assert_close(jacrev(grad(curved))(x), wanted, **TOLERANCE)
    torch.testing.assert_close(jacfwd(curved)(x), grad(curved)(x), **TOLERANCE)


@every
def test_vectorized_jacobian(case: Case):
    """torch.autograd maps the backward of an ordinary graph."""
    module, (x, *rest) = double(case, 2)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(module(x, *rest)))

    wanted = torch.autograd.functional.jacobian(run, x)
    same(torch.autograd.functional.jacobian(run, x, vectorize=True), wanted, **TOLERANCE)


@pytest.mark.parametrize("case", [c for c in MODULES if not c.mean], ids=lambda case: case.name)
def test_gradients_of_each_sample(case: Case):
    module, inputs = double(case)
    parameters = dict(module.named_parameters())
    if not parameters:
        pytest.skip("nothing to learn")

    def loss(parameters: dict[str, Tensor], *row: Tensor) -> Tensor:
        return total(functional_call(module, parameters, tuple(t[None] for t in row)))

    found = vmap(grad(loss), in_dims=(None, *[0] * len(inputs)))(parameters, *inputs)
    for i in range(4):
        wanted = torch.autograd.grad(total(module(*(t[i : i + 1] for t in inputs))), list(parameters.values()))
        same([found[name][i] for name in parameters], wanted, **TOLERANCE)


@pytest.mark.parametrize("case", [c for c in MODULES if not c.mean], ids=lambda case: case.name)
def test_ensemble(case: Case):
    """One call of several models with parameters of their own."""
    module, inputs = double(case)
    models = [copy.deepcopy(module) for _ in range(3)]
    with torch.no_grad():
        for i, model in enumerate(models):
            for parameter in model.parameters():
                parameter += 0.1 * i
    parameters, buffers = stack_module_state(models)

    def run(parameters: dict, buffers: dict, *inputs: Tensor) -> list[Tensor]:
        return tensors(functional_call(module, (parameters, buffers), inputs))

    found = vmap(run, in_dims=(0, 0, *[None] * len(inputs)))(parameters, buffers, *inputs)
    for i, model in enumerate(models):
        same([t[i] for t in found], model(*inputs), **TOLERANCE)


def test_compiled_transforms():
    coupling = next(case for case in MODULES if case.name == "AffineCoupling").module()
    x = normal(1, 5, DIM)

    def score(x: Tensor) -> Tensor:
        return grad(lambda row: total(coupling(row[None])))(x)

    compiled = torch.compile(vmap(score), fullgraph=True, backend="aot_eager")
    same(compiled(x), vmap(score)(x))


def test_forced_backend_refuses():
    case = next(case for case in MODULES if case.name == "Flow")
    flow, x = case.module(), normal(1, 5, DIM)
    with iin_fast.backend("cpp"), pytest.raises(BackendUnavailable, match="under torch.func and forward-mode AD only"):
        grad(lambda x: total(flow(x)))(x)
    with iin_fast.backend("reference"):
        grad(lambda x: total(flow(x)))(x)


@pytest.mark.parametrize("module", [Flow(DIM, n_flows=2, hidden_dim=8, generator=seeded()), ActNorm(DIM)], ids=type)
def test_start_of_actnorm_under_transforms_is_refused(module):
    x = normal(1, 4, DIM)
    for transformed in (lambda: vmap(module)(x[None]), lambda: grad(lambda x: total(module(x)))(x)):
        with pytest.raises(RuntimeError, match=rf"{type(module).__name__}: .*call initialize\(x\) before"):
            transformed()
    assert not module.initialized.any() and (module.loc == 0).all()
