"""The flow in products of torch's own (iin_fast/ops/flow/torch_products.py), forced on a CPU; sizes choose it on GPUs alone."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from numerics import with_gradients
from op_cases import FLOW, FLOW_BOUNDS, SMALL_FLOW, FlowShape, cases, flow_inputs, rows_apart
from torch import Tensor
from torch.autograd import gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from iin_fast.ops.flow import KEEP, _calls, flow, torch_products
from iin_fast.ops.flow.flops import forward as forward_flops
from iin_fast.ops.flow.saved import saved_bytes

SHAPES = [*cases(FLOW, "cpp"), FlowShape(9, 7, 3, 70, 2, 5), FlowShape(9, 3, 2, 5, 0, 1, 2)]
SLOPES = [(0.9, True), (0.9, False), (1.0, False)]


@pytest.fixture(autouse=True)
def products() -> Iterator[None]:
    with torch_products.forced(True):
        yield


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


def wide(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_float64_equals_the_definition(shape: FlowShape, inverse: bool) -> None:
    arguments = flow_inputs(shape)
    arguments[0] = rows_apart(arguments[0])
    for slope, exact in SLOPES:
        call = partial(flow, inverse=inverse, activation_slope=slope, exact_logdet=exact, leaky_slope=0.1)
        expected = with_gradients(call, arguments, "reference")
        for memory in ("auto", "save"):
            for i, got in enumerate(with_gradients(partial(call, memory=memory), arguments)):
                assert got.shape == expected[i].shape
                assert got.numel() == 0 or relative(got, expected[i]) < 1e-12, (i, slope, exact)
        with torch.no_grad():  # buffers of one step
            for got, want in zip(call(*arguments), expected[:2], strict=True):
                assert got.numel() == 0 or relative(got, want) < 1e-12


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_float32_equals_the_definition(shape: FlowShape, inverse: bool) -> None:
    # slope 1, since at the kink of a LeakyReLU the last bit of an activation decides a gradient
    call = partial(flow, inverse=inverse, leaky_slope=1.0)
    expected = with_gradients(call, flow_inputs(shape, size=0.3), "reference")
    for i, got in enumerate(with_gradients(call, flow_inputs(shape, torch.float32, size=0.3))):
        assert got.dtype == torch.float32
        assert got.numel() == 0 or relative(got, expected[i]) < 1e-5, i


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [SMALL_FLOW, FlowShape(50, 64, 2, 256, 2), FlowShape(33, 9, 2, 70, 1, 2)], ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_types_of_16_bits_judged_by_float64(dtype: torch.dtype, shape: FlowShape, inverse: bool) -> None:
    arguments = flow_inputs(shape, dtype, size=0.5)
    expected = with_gradients(partial(flow, inverse=inverse), wide(arguments), "reference")

    def call(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:  # the op on a CPU refuses these types
        y, logdet, _ = _calls["products"](*tensors, 0.01, 1.0, False, inverse, KEEP["save"], False)
        return y, logdet

    for i, got in enumerate(with_gradients(call, arguments)):
        assert got.dtype == (torch.float32 if i == 1 else dtype)
        assert relative(got, expected[i]) < FLOW_BOUNDS[dtype][i > 1], i


class Watch(TorchDispatchMode):
    """Counts ops, and how often one reads or writes ``elements`` of a tensor."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.passes, self.ops = elements, 0, Counter[str]()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
        if not views and op._schema.name not in ("aten::empty_like", "aten::new_empty", "aten::detach"):
            self.ops[op._schema.name.split("::")[1]] += 1
            given = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | kwargs
            for argument in op._schema.arguments:
                value = given.get(argument.name)
                if isinstance(value, Tensor) and value.numel() == self.elements:
                    writes = argument.alias_info is not None and argument.alias_info.is_write
                    self.passes += 2 if writes and not argument.is_out else 1
        return result


def watched(n: int, depth: int, inverse: bool, context_dim: int = 0) -> tuple[Watch, Watch]:
    """What a call and its backward do."""
    batch, hidden = 97, 89  # primes: no other tensor has as many elements as an activation
    arguments = flow_inputs((batch, 6, n, hidden, depth, context_dim), torch.float32)
    leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in arguments]
    with Watch(batch * hidden) as forward:
        y, logdet = flow(*leaves, inverse=inverse)
    with Watch(batch * hidden) as backward:
        torch.autograd.backward([y, logdet], [torch.ones_like(y), torch.ones_like(logdet)])
    return forward, backward


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("inverse", [False, True])
def test_ops_and_passes_are_those_of_the_docs(depth: int, inverse: bool) -> None:
    less, more = watched(3, depth, inverse), watched(4, depth, inverse)
    # a product of each layer, a LeakyReLU behind each but the last
    block = Counter(
        addmm=4 * (depth + 2), leaky_relu_=4 * (depth + 1), affine_coupling=2, tanh_=2, index_select=1, cat=2
    )
    block.update(["copy_", "copy_", "div_", "sub_"] if inverse else ["add", "mul_"])
    assert more[0].ops - less[0].ops == block
    assert more[0].passes == 4 * 4 * 4 * (depth + 1)
    block = Counter(mm=4 * (2 * depth + 3), addmm=4, leaky_relu_backward=4 * (depth + 1), sum=4 * (depth + 2) + 2)
    block.update(affine_coupling_backward=2, tanh_backward=2, copy_=2, index_select=1, mul=1, add=1, cat=1, div_=1)
    block.update(["div", "cat", "neg", "neg_"] if inverse else ["mul_"])
    assert more[1].ops - less[1].ops == block
    assert more[1].passes == 4 * 4 * 8 * (depth + 1)


@pytest.mark.parametrize("inverse", [False, True])
def test_the_flops_are_those_of_the_op(inverse: bool) -> None:
    leaves = [t if t is None or not t.is_floating_point() else t.requires_grad_() for t in flow_inputs(SMALL_FLOW)]
    once = forward_flops(*(None if t is None else t.shape for t in leaves))
    with FlopCounterMode(display=False) as counter:
        y, logdet = flow(*leaves, inverse=inverse)
        assert counter.get_total_flops() == once
        (y.sum() + logdet.sum()).backward()
    assert counter.get_total_flops() == 3 * once


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("context_dim", [0, 3])
def test_nothing_asks_for_a_value(inverse: bool, context_dim: int) -> None:
    # Tensors on device meta have none; and no op mixes them with those of a CPU. So a CUDA graph can hold all of it.
    shape = FlowShape(11, 7, 2, 70, 1, context_dim)
    given = [None if t is None else t.to("meta") for t in flow_inputs(shape, torch.bfloat16)]
    y, logdet, saved = torch_products.flow(*given, 0.01, 0.9, True, inverse, KEEP["save"], False)
    assert (y.shape, y.dtype, logdet.shape, logdet.dtype) == ((11, 7), torch.bfloat16, (11,), torch.float32)
    assert saved.numel() == saved_bytes(given[0], 70, 1, 2, inverse)
    options = 0.01, 0.9, inverse, KEEP["save"], context_dim > 0, True, False
    grads = torch_products.flow_backward(y, logdet, y, saved, *given[1:], *options)
    for grad, of in zip(grads, [g for g in given if g is not None or context_dim == 0][:10], strict=True):
        assert (grad is None and of is None) or (grad.shape, grad.dtype, grad.device) == (of.shape, of.dtype, of.device)


@pytest.mark.parametrize("inverse", [False, True])
def test_only_halves_and_activations_are_kept(inverse: bool) -> None:
    leaves = [t if t is None or not t.is_floating_point() else t.requires_grad_() for t in flow_inputs(SMALL_FLOW)]
    own = {t.data_ptr() for t in leaves if t is not None}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        flow(*leaves, inverse=inverse)
    batch, dim, n, hidden, depth, *_ = SMALL_FLOW
    numbers = 2 * n * batch * (dim + dim // 2 * (1 + inverse) + 2 * (depth + 1) * hidden)
    bound = 8 * (numbers + inverse * batch * dim) + 4 * 256
    assert 8 * numbers <= sum(kept.values()) <= bound


def test_second_derivatives_come_from_the_definition() -> None:
    leaves = [t if t is None or not t.is_floating_point() else t.requires_grad_() for t in flow_inputs((3, 4, 1, 5, 1))]
    assert gradgradcheck(partial(flow, leaky_slope=0.3), leaves, atol=1e-4)


@pytest.mark.parametrize("wanted", ["x", "context", "loc", "weight_hidden", "bias_out"])
def test_only_the_wanted_gradients_are_given(wanted: str) -> None:
    names = "x context loc scale weight_in bias_in weight_hidden bias_hidden weight_out bias_out permutation".split()
    arguments = flow_inputs(SMALL_FLOW)
    (leaf,) = (t.requires_grad_() for name, t in zip(names, arguments, strict=True) if name == wanted)
    grads = []
    for products in (True, False):
        with torch_products.forced(products):
            (grad,) = torch.autograd.grad(flow(*arguments)[0].sum(), leaf)  # nothing depends on the log-det
        grads.append(grad)
    assert relative(*grads) < 1e-12


def test_inputs_and_gradients_are_left_alone() -> None:
    arguments = flow_inputs(SMALL_FLOW)
    x = arguments[0].requires_grad_()
    copies = [None if t is None else t.detach().clone() for t in arguments]
    y, logdet = flow(*arguments)
    grads = torch.ones_like(y), torch.ones_like(logdet)
    y.backward(grads[0], retain_graph=True)
    first = x.grad.clone()
    with torch.no_grad():
        y.zero_()  # what backward reads is not the output
    x.grad = None
    torch.autograd.backward([y], [grads[0]])
    assert torch.equal(x.grad, first)
    assert all(torch.equal(g, torch.ones_like(g)) for g in grads)
    for value, copy in zip(arguments, copies, strict=True):
        assert value is None or torch.equal(value, copy)


def test_a_wrong_permutation_stays_inside() -> None:
    *arguments, permutation = flow_inputs(SMALL_FLOW)
    for inverse in (False, True):
        assert len(with_gradients(partial(flow, inverse=inverse), [*arguments, permutation.fill_(10**6)])) == 12


def test_compile_vmap_and_autocast_see_one_op() -> None:
    arguments = flow_inputs(SMALL_FLOW)
    want = flow(*arguments)
    x, context, *parameters = arguments
    with Watch(0) as watch:
        mapped = torch.vmap(lambda x, context: flow(x, context, *parameters))(x[None], context[None])
    assert "addmm" not in watch.ops
    assert relative(mapped[0][0], want[0]) < 1e-12
    with torch.autocast("cpu"), Watch(0) as watch:
        flow(*(t.float() if t is not None and t.is_floating_point() else t for t in arguments))
    assert "addmm" not in watch.ops
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(str(module.graph))
        return module

    got = torch.compile(flow, fullgraph=True, backend=backend)(*arguments)
    assert len(graphs) == 1 and "addmm" not in graphs[0]
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 1e-12


def test_memory_that_keeps_the_output_alone_stays_with_the_kernels() -> None:
    arguments = flow_inputs(SMALL_FLOW)
    arguments[0].requires_grad_()
    for memory, products in {"save": True, "auto": True, "invert": False}.items():
        with Watch(0) as watch:
            flow(*arguments, memory=memory)
        assert ("addmm" in watch.ops) == products


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_products, "_forced", [])
    monkeypatch.setattr(torch_products, "has_values", lambda x: True)
    many, hidden = torch_products.ROWS, torch_products.HIDDEN

    def takes(batch: int, hidden: int, dtype: torch.dtype, is_cuda: bool = True) -> bool:
        x: Any = SimpleNamespace(shape=(batch, 64), dtype=dtype, is_cuda=is_cuda)
        return torch_products.takes_products(x, hidden)

    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert takes(many, hidden, dtype) and not takes(many - 1, hidden, dtype)
    assert not takes(many, hidden - 1, torch.bfloat16)
    assert not takes(many, hidden, torch.bfloat16, is_cuda=False)
    torch.use_deterministic_algorithms(True)
    try:
        assert not takes(many, hidden, torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch_products, "has_values", lambda x: False)
    assert not takes(many, hidden, torch.bfloat16)


def test_what_fits_the_kernel_of_both_nets(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(shared_memory_per_multiprocessor=torch_products.NETS_ROOM)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(torch_products, "_forced", [])

    def fit(
        hidden: int,
        inside: int,
        out: int,
        dtype: torch.dtype = torch.bfloat16,
        is_cuda: bool = True,
        batch: int = 2**20,
        tf32: bool = False,
    ) -> bool:
        x: Any = SimpleNamespace(
            shape=(batch, 64), dtype=dtype, is_cuda=is_cuda, element_size=lambda: dtype.itemsize, device="cuda"
        )
        return torch_products.nets_fit(x, hidden, inside, out, tf32)

    most = torch_products.NETS
    assert fit(most, most, 1024) and fit(256, 1, 8) and fit(260, 1, 4, torch.float32)
    assert not fit(most + 8, 32, 32) and not fit(most, most + 1, 32)
    assert not fit(260, 32, 32) and not fit(256, 32, 4) and not fit(258, 32, 32, torch.float32)
    assert not fit(256, 32, 32, torch.float64) and not fit(256, 32, 32, is_cuda=False)
    few = torch_products.NETS_TF32_ROWS
    assert fit(256, 32, 32, torch.float32, batch=few, tf32=True) and fit(256, 32, 32, tf32=True)
    assert not fit(256, 32, 32, torch.float32, batch=few + 1, tf32=True)
    device.shared_memory_per_multiprocessor -= 1
    assert not fit(256, 32, 32)
    with torch_products.forced(True):
        assert not fit(256, 32, 32)


@pytest.mark.parametrize("inverse", [False, True])
def test_backward_of_what_the_kernel_of_both_nets_saved(inverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel saves what products save."""
    arguments, calls = flow_inputs(SMALL_FLOW), 0

    def kernel(x: Tensor, context: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return torch_products.flow(x, context, *rest)

    expected = with_gradients(partial(flow, inverse=inverse), arguments)
    monkeypatch.setattr(torch_products, "nets_fit", lambda *_: True)
    monkeypatch.setattr(torch.ops.iin_fast, "flow", kernel)
    for got, want in zip(with_gradients(partial(flow, inverse=inverse), arguments), expected, strict=True):
        assert got.numel() == 0 or relative(got, want) < 1e-12
    with torch.no_grad():
        assert relative(flow(*arguments, inverse=inverse)[0], expected[0]) < 1e-12
    assert calls == 2
