"""What a GPU program relies on beside numbers: graphs, streams, devices, no synchronisation, large tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import iin_fast
from iin_fast.backends import NAMES, available, backend
from iin_fast.functional import affine_coupling, pair_nll, spline_coupling
from iin_fast.nn import Flow, NeuralSplineFlow
from iin_fast.ops.flow import torch_products
from iin_fast.ops.registry import gpu_ops

Leaves = list[Tensor]
Call = Callable[[Leaves], tuple[Tensor, ...]]


def _flow_case(device: str, batch: int) -> tuple[Call, Leaves]:
    hidden = 256 if batch > 1000 else 128
    flow = Flow(64, n_flows=3, hidden_dim=hidden, generator=torch.Generator().manual_seed(0)).to(device)
    x = torch.randn(batch, 64, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        flow(x)
    parameters = list(flow.parameters())

    def call(leaves: Leaves) -> tuple[Tensor, ...]:
        z, logdet = flow(leaves[0])
        loss = 0.5 * z.square().sum() - logdet.sum()
        return (z, logdet, *torch.autograd.grad(loss, [leaves[0], *parameters]))

    return call, [x]


def _program_case(device: str) -> Call:
    flow = NeuralSplineFlow(6, hidden_dim=64, generator=torch.Generator().manual_seed(0)).to(device)
    parameters = list(flow.parameters())

    def call(leaves: Leaves) -> tuple[Tensor, ...]:
        z, logdet = flow(leaves[0])
        loss = 0.5 * z.square().sum() - logdet.sum()
        return (z, logdet, *torch.autograd.grad(loss, [leaves[0], *parameters]))

    return call


def _with_grads(function: Callable[..., tuple[Tensor, ...]]) -> Call:
    def call(leaves: Leaves) -> tuple[Tensor, ...]:
        outputs = function(*leaves)
        return (*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves))

    return call


def _case(op: str, device: str, batch: int = 50, seed: int = 0) -> tuple[Call, Leaves]:
    """A forward and backward pass of an op, and its inputs."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    if op == "affine_coupling":
        call, leaves = _with_grads(affine_coupling), [draw(batch, 32) for _ in range(3)]
    elif op == "spline_coupling":

        def spline(x: Tensor, parameters: Tensor) -> tuple[Tensor, ...]:
            return spline_coupling(x, parameters, bins=8, tail_bound=3.0)

        call, leaves = _with_grads(spline), [draw(batch, 6), draw(batch, 6, 23)]
    elif op == "pair_nll":
        shared = torch.tensor([[True, False, True]]).expand(batch, 3).to(device).contiguous()

        def loss(za: Tensor, zb: Tensor, logdet_a: Tensor, logdet_b: Tensor) -> tuple[Tensor, ...]:
            return (pair_nll(za, zb, logdet_a, logdet_b, shared, [10, 10, 12], 0.9),)

        call, leaves = _with_grads(loss), [draw(batch, 32), draw(batch, 32), draw(batch), draw(batch)]
    elif op == "flow_program":
        call, leaves = _program_case(device), [draw(batch, 6)]
    else:
        call, leaves = _flow_case(device, batch)
        leaves = [draw(batch, 64)]
    return call, [leaf.requires_grad_() for leaf in leaves]


BOTH = [*((op, name) for op in gpu_ops() for name in NAMES[1:]), ("flow_program", "cpp")]


def _sized(usual: int) -> list[tuple[str, str, int]]:
    """Every op and backend with its batches.

    With CUDA C++ a flow of 50 rows is one cooperative launch, one of 300 a launch for each layer, one of 10000 two launches for each
    half, or products of torch's, and a backward in these.
    """
    flows = {"cpp": (50, 300, 10_000), "triton": (50, 300)}
    return [(op, name, batch) for op, name in BOTH for batch in (flows[name] if op == "flow" else (usual,))]


SIZED, LARGE = _sized(50), _sized(2000)


@contextmanager
def chosen(op: str, name: str, device: str) -> Iterator[None]:
    if name not in available(op, device):
        pytest.skip(f"{op} has no backend {name} on {device}")
    with backend(name):
        yield


def assert_equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max()) if b.numel() else 1.0))


@pytest.mark.needs_cuda
@pytest.mark.parametrize(("op", "name", "batch"), SIZED)
def test_a_graph_replays_with_changed_input(op: str, name: str, batch: int, device: str) -> None:
    with chosen(op, name, device):
        call, leaves = _case(op, device, batch)
        _, others = _case(op, device, batch, seed=7)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call(leaves)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # an allocation outside torch's allocator, or a synchronisation, fails here
            outputs = call(leaves)
        with torch.no_grad():
            for leaf, other in zip(leaves, others, strict=True):
                leaf.copy_(other)
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize()
        assert_equal(outputs, call(leaves))


@pytest.mark.needs_cuda
@pytest.mark.parametrize(("op", "name", "batch"), SIZED)
def test_nothing_synchronises(op: str, name: str, batch: int, device: str) -> None:
    with chosen(op, name, device):
        call, leaves = _case(op, device, batch)
        want = call(leaves)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = call(leaves)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_equal(got, want)


@pytest.mark.needs_cuda
@pytest.mark.parametrize(("op", "name", "batch"), LARGE)
def test_two_streams_do_not_mix(op: str, name: str, batch: int, device: str) -> None:
    with chosen(op, name, device):
        cases = [_case(op, device, batch, seed=seed) for seed in (1, 2)]
        want = [call(leaves) for call, leaves in cases]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in cases]
        got: list[tuple[Tensor, ...]] = [(), ()]
        for _ in range(5):
            for i, ((call, leaves), stream) in enumerate(zip(cases, streams, strict=True)):
                with torch.cuda.stream(stream):
                    got[i] = call(leaves)
        torch.cuda.synchronize()
        for a, b in zip(got, want, strict=True):
            assert_equal(a, b)


@pytest.mark.needs_cuda
@pytest.mark.parametrize(("op", "name"), BOTH)
def test_a_device_that_is_not_the_current_one(op: str, name: str, device: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    with chosen(op, name, device):
        call, leaves = _case(op, "cuda:1")
        first, firsts = _case(op, "cuda:0")
        with torch.cuda.device(0):
            got, want = call(leaves), first(firsts)
            assert torch.cuda.current_device() == 0
        assert_equal(tuple(t.to("cuda:0") for t in got), want)


@pytest.mark.needs_cuda
def test_tensors_on_two_devices_are_refused(device: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    x = torch.randn(3, 4, device="cuda:0")
    with pytest.raises(ValueError, match="device"):
        affine_coupling(x, x.to("cuda:1"), x)


@pytest.mark.parametrize(("op", "name", "batch"), SIZED + [(op, name, 300) for op, name in BOTH if op != "flow"])
def test_the_same_bits_every_time(op: str, name: str, batch: int, device: str) -> None:
    with chosen(op, name, device):
        call, leaves = _case(op, device, batch)
        for a, b in zip(call(leaves), call(leaves), strict=True):
            assert torch.equal(a, b)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("memory", ["save", "invert"])
def test_a_small_batch_takes_a_launch_or_two_each_way(memory: str, device: str) -> None:
    """In clusters of blocks a table of permutations comes before the launch that does it all."""
    clusters = torch.cuda.get_device_capability()[0] >= 9
    with chosen("flow", "cpp", device):
        flow = Flow(64, n_flows=3, hidden_dim=128, memory=memory, device=device)
        x = torch.randn(50, 64, device=device, requires_grad=True)
        flow(x)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            z, logdet = flow(x)
            torch.autograd.grad(0.5 * z.square().sum() - logdet.sum(), [x, *flow.parameters()])
            torch.cuda.synchronize()
    launched = [event.name for event in profiler.events() if "flow_" in event.name]
    checks = 1 if memory == "invert" else 0  # backward looks whether the inverse finds the input of some rows
    assert len(launched) == (1 + checks) * (1 + clusters) + 1, launched
    whole = "flow_cluster_kernel" if clusters else "flow_persistent_kernel"
    assert all(whole in name or "flow_table_kernel" in name for name in launched[:-1])
    assert sum(whole in name for name in launched) == 1 + checks
    assert "flow_persistent_backward_kernel" in launched[-1]


@pytest.mark.needs_cuda
@pytest.mark.parametrize("batch", [50, 4096])
def test_a_program_takes_five_launches(batch: int, device: str) -> None:
    """Packing and the walk; packing, the walk back, and the sums of gradients. (Many parameters share a few launches.)"""
    with chosen("flow_program", "cpp", device):
        call, leaves = _program_case(device), [torch.randn(batch, 6, device=device, requires_grad=True)]
        call(leaves)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call(leaves)
            torch.cuda.synchronize()
    launched = [event.name for event in profiler.events() if "program_" in event.name]
    for kernel in ("program_forward_kernel", "program_backward_kernel"):
        assert sum(kernel in name for name in launched) == 1, launched
    assert not any("program_table" in name for name in launched)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("products", [True, False])
def test_a_large_batch_of_wide_nets_runs_in_one_launch_for_both_nets_or_in_products_of_torch(
    products: bool, device: str
) -> None:
    with chosen("flow", "cpp", device):
        call, leaves = _flow_case(device, 10_000)
        leaves[0].requires_grad_()
        fit = not products and torch_products.nets_fit(leaves[0], 256, 32, 32, False)
        with torch_products.forced(True) if products else nullcontext():
            call(leaves)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                call(leaves)
                torch.cuda.synchronize()
    names = [event.name for event in profiler.events()]
    assert any("flow_nets_kernel" in name for name in names) == fit
    assert any("coupling_forward_kernel" in name for name in names) != fit
    assert any("coupling_backward_kernel" in name for name in names)  # backward is in products


@pytest.mark.needs_cuda
@pytest.mark.parametrize("memory", ["save", "invert"])
def test_one_kernel_and_one_for_each_layer_give_the_same_bits(memory: str, device: str) -> None:
    with chosen("flow", "cpp", device):
        flow = Flow(64, n_flows=3, hidden_dim=500, memory=memory, device=device)
        rows = torch.randn(100, 64, device=device)  # layer by layer, in the tiles that 64 rows have
        flow(rows)
        results = []
        for batch in (50, 100):
            x = rows[:batch].clone().requires_grad_()
            z, logdet = flow(x)
            (grad_x,) = torch.autograd.grad(0.5 * z.square().sum() - logdet.sum(), x)
            results.append((z, logdet, grad_x))
        for small, large in zip(*results, strict=True):
            assert torch.equal(small, large[:50])


@pytest.mark.parametrize("name", NAMES[1:])
def test_compile_takes_the_flow_in_one_graph(name: str, device: str) -> None:
    with chosen("flow", name, device):
        flow = Flow(16, n_flows=2, hidden_dim=32, generator=torch.Generator().manual_seed(0)).to(device)
        x = torch.randn(20, 16, device=device)
        z, logdet = flow(x)
        backend_of_compile = "inductor" if device == "cuda" else "aot_eager"
        compiled = torch.compile(flow, fullgraph=True, backend=backend_of_compile)
        assert_equal(compiled(x), (z, logdet))


@contextmanager
def enough_memory() -> Iterator[None]:
    """Other processes may take what was free a moment ago."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        pytest.skip("too little memory")


@pytest.mark.needs_cuda
@pytest.mark.parametrize("name", NAMES[1:])
def test_more_elements_than_an_int32_counts(name: str, device: str) -> None:
    rows, features = 3, 2**30 + 8
    if torch.cuda.mem_get_info()[0] < 5 * 2 * rows * features:
        pytest.skip("too little memory")
    with chosen("affine_coupling", name, device), torch.no_grad(), enough_memory():
        x, raw, shift = (torch.empty(rows, features, device=device, dtype=torch.bfloat16) for _ in range(3))
        for t, value in ((x, 1.0), (raw, 0.5), (shift, 0.25)):
            t.fill_(value)
        x[-1, -8:] = 2.0
        y, logdet = affine_coupling(x, raw, shift)
        small, small_logdet = affine_coupling(x[:, -8:], raw[:, -8:], shift[:, -8:])
        assert torch.equal(y[:, -8:], small)
        torch.testing.assert_close(logdet, small_logdet / 8 * features, rtol=1e-3, atol=0)


@pytest.mark.needs_cuda
def test_a_model_checks_itself(device: str) -> None:
    model = iin_fast.IIN(32, {"color": 8}, n_flows=2, hidden_dim=64).to(device)
    model(torch.randn(64, 32, device=device))
    comparison = iin_fast.testing.compare_backends(model, torch.randn(25, 32, device=device))
    assert comparison.rows and comparison.ok, str(comparison)
