"""Every op on every backend that a GPU has, in every type, against its definition in float64."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from op_cases import FLOW_BOUNDS
from torch import Tensor

from iin_fast.backends import NAMES, available, backend
from iin_fast.nn import Flow
from iin_fast.ops.flow import torch_products
from iin_fast.ops.flow_program import walk
from iin_fast.ops.types import HALF
from iin_fast.testing.backends import CASES, _run, dtypes_of

TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.02, torch.float16: 0.003}


def norm_error(got: Tensor, want: Tensor) -> float:
    """The norm of the difference, relative to the norm: a single kink of a LeakyReLU does not decide it."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape
    assert bool((got.isfinite() == want.isfinite()).all())
    largest = torch.linalg.vector_norm(want)
    return float(torch.linalg.vector_norm(got - want) / largest) if float(largest) > 0 else float(got.abs().sum())


def tolerance(op: str, dtype: torch.dtype, key: str) -> float:
    gradient = key.startswith("grad")
    if op == "flow" and dtype in HALF:
        return FLOW_BOUNDS[dtype][gradient]
    # through many layers a kink that falls on the other side changes a gradient by a finite step
    kinks = 50 if op == "flow" and gradient and dtype != torch.float64 else 1
    return TOLERANCES[dtype] * CASES[op][1] * kinks


Call = Callable[..., Any]


def worst_errors(call: Call, inputs: list[Any], name: str, allowed: Callable[[str], float]) -> dict[str, float]:
    """Every output and gradient of a call: its error by float64, in units of what is allowed."""
    exact = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
    with backend("reference"):
        want = _run(call, exact, {})
    with backend(name):
        got = _run(call, inputs, {})
    assert want.keys() <= got.keys() and not any(got[key].numel() for key in got.keys() - want.keys())
    return {key: norm_error(got[key], want[key]) / allowed(key) for key in want}


def demand(errors: dict[str, float]) -> None:
    wrong = {where: f"{error:.2g} x tolerance" for where, error in errors.items() if not error <= 1}
    assert errors and not wrong, wrong


@contextmanager
def tf32() -> Iterator[None]:
    """Float32 products in TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("op", CASES)
def test_equals_the_definition_in_float64(op: str, name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if op == "flow":  # its own kernels, which take wider nets; programs are an op of their own
        monkeypatch.setattr(sys.modules["iin_fast.ops.flow"], "WALKED", {})
    if name not in available(op, device):
        pytest.skip(f"{op} has no backend {name} on {device}")
    errors: dict[str, float] = {}
    for dtype in dtypes_of(op, device):
        for label, call, inputs in CASES[op][0](dtype, device):
            found = worst_errors(call, inputs, name, lambda key, dtype=dtype: tolerance(op, dtype, key))
            errors |= {f"{str(dtype).removeprefix('torch.')} {label} {key}": error for key, error in found.items()}
    demand(errors)


def test_flows_of_narrow_nets_as_programs(device: str) -> None:
    errors: dict[str, float] = {}
    for label, call, inputs in CASES["flow"][0](torch.float32, device):
        found = worst_errors(call, inputs, "cpp", lambda key: tolerance("flow", torch.float32, key))
        errors |= {f"{label} {key}": error for key, error in found.items()}
    demand(errors)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("products", [1, 3])
def test_programs_on_tensor_cores(products: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One product of TF32, as torch's setting allows, and three, which are held to float32."""
    monkeypatch.setattr(walk, "FLOAT32_PRODUCTS", products)
    judged = torch.float16 if products == 1 else torch.float32
    errors: dict[str, float] = {}
    for label, call, inputs in CASES["flow_program"][0](torch.float32, device):
        found = worst_errors(call, inputs, "cpp", lambda key: tolerance("flow_program", judged, key))
        errors |= {f"{label} {key}": error for key, error in found.items()}
    demand(errors)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("name", NAMES[1:])
def test_the_flow_in_tf32(name: str, device: str) -> None:
    if name not in available("flow", device):
        pytest.skip(f"flow has no backend {name} on {device}")
    errors: dict[str, float] = {}
    with tf32():
        for label, call, inputs in CASES["flow"][0](torch.float32, device):
            found = worst_errors(call, inputs, name, lambda key: tolerance("flow", torch.float16, key))
            errors |= {f"{label} {key}": error for key, error in found.items()}
    demand(errors)


def published(device: str, batch: int) -> tuple[Flow, Tensor]:
    """The published flow after its data-dependent start, in float64, and a batch; a small one on the CPU."""
    dim, n_flows, hidden, depth = (64, 12, 512, 2) if device == "cuda" else (8, 2, 16, 2)
    generator = torch.Generator().manual_seed(0)
    flow = Flow(dim, n_flows, hidden, depth, generator=generator, dtype=torch.float64)
    x = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    flow(torch.randn(256, dim, generator=generator, dtype=torch.float64))
    return flow.to(device), x.to(device)


@pytest.mark.parametrize("batch", [25, 1000])  # with CUDA C++ one cooperative launch, and a launch for each layer
@pytest.mark.parametrize("name", NAMES[1:])
def test_the_published_size(name: str, batch: int, device: str) -> None:
    if name not in available("flow", device):
        pytest.skip(f"flow has no backend {name} on {device}")
    flow, x = published(device, batch)
    errors: dict[str, float] = {}
    for dtype in (torch.float32, *(HALF if device == "cuda" else ())):
        # a flow with the values of this type, judged by the same values in float64
        low = copy.deepcopy(flow).to(dtype)
        leaves = dict(low.named_parameters())

        def call(
            x: Tensor, *values: Tensor, low: Flow = low, names: tuple[str, ...] = tuple(leaves)
        ) -> tuple[Tensor, Tensor]:
            return torch.func.functional_call(low, dict(zip(names, values, strict=True)), (x,))

        inputs = [x.to(dtype), *(p.detach() for p in leaves.values())]
        for tensor_cores in ("", "tf32") if dtype == torch.float32 and device == "cuda" else ("",):
            judged = torch.float16 if tensor_cores else dtype
            with tf32() if tensor_cores else nullcontext():
                found = worst_errors(call, inputs, name, lambda key, judged=judged: tolerance("flow", judged, key))
            errors |= {f"{dtype} {tensor_cores} {key}": error for key, error in found.items()}
    demand(errors)


@pytest.mark.parametrize("kind", ["float32", "tf32", "bfloat16", "float16"])
def test_the_published_size_at_a_large_batch(kind: str, device: str) -> None:
    # 16384 rows: both nets of a half in one launch, where they fit, and a backward in products of torch's. Outputs and gradients of
    # every 64th row are judged by float64, of those rows alone.
    if "cpp" not in available("flow", device) or (device == "cpu" and kind != "float32"):
        pytest.skip(f"flow has no backend cpp for {kind} on {device}")
    flow, x = published(device, 16384 if device == "cuda" else 512)
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    low, at = copy.deepcopy(flow).to(dtype), slice(None, None, 64)
    exact, x = copy.deepcopy(low).double(), x.to(dtype)

    def results(flow: Flow, x: Tensor, at: slice) -> dict[str, Tensor]:
        x = x.requires_grad_()
        z, logdet = (t[at] for t in flow(x))
        loss = 0.5 * z.double().square().sum() - logdet.double().sum()
        grads = torch.autograd.grad(loss, [x, *flow.parameters()])
        names = ["grad x", *(f"grad {name}" for name, _ in flow.named_parameters())]
        return {"z": z, "logdet": logdet} | dict(zip(names, grads, strict=True))

    with backend("reference"):
        want = results(exact, x[at].double(), slice(None))
    with tf32() if kind == "tf32" else nullcontext(), backend("cpp"):
        hidden = flow.bias_in.shape[3]
        assert device == "cpu" or torch_products.takes_products(x, hidden)
        with torch_products.forced(True) if device == "cpu" else nullcontext():
            got = results(low, x, at)
    assert torch.equal(got["grad x"].count_nonzero(1) > 0, torch.arange(len(x), device=device) % 64 == 0)
    got["grad x"] = got["grad x"][at]
    judged = torch.float16 if kind == "tf32" else dtype
    demand({key: norm_error(got[key], want[key]) / tolerance("flow", judged, key) for key in want})
