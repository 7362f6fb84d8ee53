"""Gradients that backward adds to ``.grad`` itself, and the loss with its gradients in one call: the numbers of torch's own way."""

import contextvars
import copy
import math
import sys
import threading
from collections.abc import Callable, Iterator
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import iin_fast
from iin_fast import direct_gradients
from iin_fast.nn import Compose, MaskedAutoregressiveFlow, NeuralSplineFlow, RealNVP

DIM, CONTEXT = 4, 2


def spline() -> nn.Module:
    return NeuralSplineFlow(DIM, CONTEXT, n_flows=2, hidden_dim=16, hidden_depth=1)


def masked() -> nn.Module:
    return MaskedAutoregressiveFlow(DIM, CONTEXT, n_flows=2, hidden_dim=16)


def affine() -> nn.Module:
    return RealNVP(DIM, CONTEXT, n_flows=2, hidden_dim=16)


def wide() -> nn.Module:
    """Whose gradients do not come with the results."""
    return RealNVP(DIM, CONTEXT, n_flows=2, hidden_dim=600)


FLOWS = (spline, masked, affine, wide)
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def nll(flow: Any, x: Tensor, context: Tensor) -> Tensor:
    return -flow.log_prob(x, context).mean()  # type: ignore[no-any-return]


def torchs(flow: nn.Module, x: Tensor, context: Tensor, loss: Loss = nll) -> Tensor:
    value = loss(flow, x, context)
    value.backward()
    return value.detach()


def direct(flow: nn.Module, x: Tensor, context: Tensor, loss: Loss = nll) -> Tensor:
    with direct_gradients():
        return torchs(flow, x, context, loss)


def one_call(flow: Any, x: Tensor, context: Tensor) -> Tensor:
    return flow.nll_backward(x, context)  # type: ignore[no-any-return]


WAYS = (direct, one_call)


def made(maker: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    flow = maker().to(dtype)
    x, context = torch.randn(37, DIM, dtype=dtype), torch.randn(37, CONTEXT, dtype=dtype)
    flow.initialize(x, context) if hasattr(flow, "initialize") else None
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(torch.randn_like(p), alpha=0.4 / p.shape[-1])
    return flow, x, context


def grads(flow: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in flow.named_parameters()}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            assert torch.equal(found[name], value), name  # type: ignore[arg-type]


def assert_loss(found: Tensor, expected: Tensor) -> None:
    """To the rounding of a sum: nll_backward sums in float64, torch in the type of the rows."""
    assert found.dtype == expected.dtype and found.shape == ()
    torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(found.dtype).eps, atol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("maker", FLOWS)
def test_steps_have_the_bits_of_torchs_way(maker: Any, dtype: torch.dtype, way: Any) -> None:
    flow, x, context = made(maker, dtype)
    twin = copy.deepcopy(flow)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.01) for module in (flow, twin)]
    for step in range(5):  # from the third on gradients come with the results
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss, expected = way(flow, x + 0.1 * step, context), torchs(twin, x + 0.1 * step, context)
        assert not loss.requires_grad
        assert_loss(loss, expected)
        assert_same(grads(flow), grads(twin))
        assert any(value is not None and value.any() for value in grads(twin).values())
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("maker", FLOWS)
def test_gradients_add_up_and_frozen_parameters_get_none(maker: Any, way: Any) -> None:
    flow, x, context = made(maker)
    first = next(flow.parameters())
    first.requires_grad_(False)
    twin = copy.deepcopy(flow)
    for scale in (1.0, 2.0, 0.5, 1.0):
        way(flow, x * scale, context)
        torchs(twin, x * scale, context)
    assert first.grad is None
    assert_same(grads(flow), grads(twin))


@pytest.mark.parametrize("way", WAYS)
def test_gradients_do_not_share_memory_over_steps(way: Any) -> None:
    flow, x, context = made(spline)
    kept = []
    for _ in range(4):
        flow.zero_grad()
        way(flow, x, context)
        kept.append([p.grad for p in flow.parameters()])
    assert len({g.data_ptr() for step in kept for g in step}) == 4 * len(kept[0])  # type: ignore[union-attr]


@pytest.mark.parametrize("way", WAYS)
def test_hooks_of_parameters_run(way: Any) -> None:
    flow, x, context = made(spline)
    twin = copy.deepcopy(flow)
    seen: dict[str, list[Tensor]] = {"mine": [], "torchs": []}
    for name, module in (("mine", flow), ("torchs", twin)):
        parameters = list(module.parameters())
        parameters[0].register_hook(lambda g: 2 * g)
        parameters[1].register_post_accumulate_grad_hook(lambda p, name=name: seen[name].append(p.grad.clone()))  # type: ignore[misc]
    for _ in range(2):
        way(flow, x, context)
        torchs(twin, x, context)
    assert_same(grads(flow), grads(twin))
    assert len(seen["mine"]) == 2 and all(map(torch.equal, seen["mine"], seen["torchs"]))


def test_a_hook_that_comes_between_forward_and_backward_runs() -> None:
    flow, x, context = made(spline)
    with direct_gradients():
        loss = nll(flow, x, context)
    first = next(flow.parameters())
    first.register_hook(torch.zeros_like)
    loss.backward()
    assert first.grad is not None and not first.grad.any()


def test_hooks_run_once_for_all_that_comes_to_a_parameter() -> None:
    """The loss calls the flow twice, and has a term of its own for each parameter. A step of an optimizer may be a hook."""
    results = []
    for way in (direct, torchs):
        flow, x, context = made(spline)
        seen: list[Any] = []
        clamped, stepped, *others = flow.parameters()
        clamped.register_hook(lambda g: g.clamp(-0.01, 0.01))
        optimizer = torch.optim.SGD([stepped], lr=0.1)

        def step(p: Tensor, optimizer: Any = optimizer, seen: list[Any] = seen) -> None:
            seen.append("step")
            optimizer.step()
            optimizer.zero_grad()

        stepped.register_post_accumulate_grad_hook(step)  # type: ignore[arg-type]
        torch.autograd.graph.register_multi_grad_hook(
            others[:3], lambda gs, seen=seen: seen.append([g is None for g in gs])
        )
        way(flow, x, context, several)
        assert seen.count("step") == 1 and len(seen) == 2
        results.append((grads(flow), stepped.detach(), seen))
    assert_same(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1]) and results[0][2] == results[1][2]


@pytest.mark.parametrize("frozen", [(True, False), (False, True)])
def test_parameters_that_freeze_or_thaw_between_forward_and_backward(frozen: tuple[bool, bool]) -> None:
    flow, x, context = made(spline)
    twin = copy.deepcopy(flow)
    for module, way in ((flow, direct_gradients(True)), (twin, direct_gradients(False))):
        first = next(module.parameters()).requires_grad_(not frozen[0])
        with way:
            loss = nll(module, x, context)
        first.requires_grad_(not frozen[1])
        loss.backward()
        assert frozen[1] or first.grad is None
    if not frozen[1]:
        assert_same(grads(flow), grads(twin))


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_another_kind(way: Any) -> None:
    flow, x, context = made(spline)
    twin = copy.deepcopy(flow)
    for module in (flow, twin):
        first, second, third, *_ = module.parameters()
        if hasattr(first, "grad_dtype"):
            first.grad_dtype = torch.float64
        second.grad = torch.zeros_like(second).to_sparse()
        third.grad = torch.zeros_like(third).requires_grad_()
    way(flow, x, context)
    torchs(twin, x, context)
    for p, q in zip(flow.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and p.grad.dtype == q.grad.dtype
        assert p.grad.layout == q.grad.layout
        assert torch.equal(p.grad.to_dense(), q.grad.to_dense())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("maker", FLOWS)
def test_anomalies_are_found(maker: Any, way: Any) -> None:
    flow, x, context = made(maker)
    with torch.no_grad():
        list(flow.parameters())[2].view(-1)[0] = float("nan")
    with (
        pytest.warns(UserWarning, match="Anomaly Detection has been enabled"),
        torch.autograd.detect_anomaly(),
        pytest.raises(RuntimeError, match="returned nan values"),
    ):
        way(flow, x, context)


def test_the_parameters_are_no_part_of_the_graph() -> None:
    flow, x, context = made(masked)

    def inputs(loss: Tensor) -> int:
        return len(loss.grad_fn.next_functions[0][0].next_functions[0][0].next_functions)  # type: ignore[union-attr]

    assert inputs(nll(flow, x, context)) > 4
    with direct_gradients():
        assert inputs(nll(flow, x, context)) <= 3
        with direct_gradients(False):
            assert inputs(nll(flow, x, context)) > 4
        parameters = list(flow.parameters())
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            torch.autograd.grad(nll(flow, x, context), parameters)
    assert all(p.grad is None for p in parameters)


def test_of_two_processes_the_graph_knows_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, x, context = made(masked)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with direct_gradients():
        found = torch.autograd.grad(nll(flow, x, context), list(flow.parameters()))
    assert all(torch.isfinite(g).all() for g in found)


def test_derivatives_by_data_alone_leave_grad_alone() -> None:
    flow, x, context = made(spline)
    for inputs in ([x], [context], [x, context]):
        for tensor in (x, context):
            tensor.requires_grad_(any(tensor is i for i in inputs))
        expected = torch.autograd.grad(nll(flow, x, context), inputs)
        with direct_gradients():
            found = torch.autograd.grad(nll(flow, x, context), inputs)
            nll(flow, x, context).backward(inputs=inputs)
        assert all(map(torch.equal, found, expected))
        for tensor, value in zip(inputs, expected, strict=True):
            assert torch.equal(tensor.grad, value)  # type: ignore[arg-type]
            tensor.grad = None
        assert all(p.grad is None for p in flow.parameters())


def several(flow: Any, x: Tensor, context: Tensor) -> Tensor:
    """Two calls, another term, and a loss of samples' results."""
    penalty = sum((p.square().sum() for p in flow.parameters()), x.new_zeros(()))
    z, logdet = flow(x, context)
    return nll(flow, x, context) + 0.5 * nll(flow, 2 * x, context) + 0.1 * penalty + z.sum() - logdet.mean()


def test_a_loss_of_several_terms() -> None:
    flow, x, context = made(spline, torch.float64)
    twin = copy.deepcopy(flow)
    x.requires_grad_()
    direct(flow, x, context, several)
    mine, x.grad = x.grad, None
    torchs(twin, x, context, several)
    torch.testing.assert_close(mine, x.grad, rtol=1e-12, atol=1e-12)
    for (name, p), q in zip(flow.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.filterwarnings("ignore:Using backward")  # with create_graph
def test_second_derivatives_and_a_graph_that_is_kept() -> None:
    flow, x, context = made(spline, torch.float64)
    twin = copy.deepcopy(flow)
    with direct_gradients():
        loss = nll(flow, x, context)
        loss.backward(retain_graph=True)
        loss.backward()
    other = nll(twin, x, context)
    other.backward(retain_graph=True)
    other.backward()
    assert_same(grads(flow), grads(twin))
    for module, way in ((flow, direct_gradients(True)), (twin, direct_gradients(False))):
        module.zero_grad()
        with way:
            nll(module, x, context).backward(create_graph=True)
    squares = [sum(p.grad.square().sum() for p in module.parameters()) for module in (flow, twin)]  # type: ignore[union-attr]
    mine, theirs = (
        torch.autograd.grad(square, list(module.parameters()))  # type: ignore[arg-type]
        for square, module in zip(squares, (flow, twin), strict=True)
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_gradients_go_on_from_parameters_that_are_computed() -> None:
    flow, x, context = made(spline)
    name = next(name for name, p in flow.named_parameters() if p.dim() > 2)

    class Half(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value / 2

    torch.nn.utils.parametrize.register_parametrization(flow, name, Half())
    twin = copy.deepcopy(flow)
    for way in (direct, one_call, direct, direct, direct):
        flow.zero_grad()
        twin.zero_grad()
        way(flow, x, context)
        torchs(twin, x, context)
        assert_same(grads(flow), grads(twin))
        assert all(p.grad is not None for p in flow.parameters())
    original = next(p for n, p in flow.named_parameters() if "original" in n)
    expected = torch.autograd.grad(nll(flow, x, context), original)
    flow.zero_grad()
    with direct_gradients():
        assert torch.equal(*expected, *torch.autograd.grad(nll(flow, x, context), original))
    assert all(p.grad is None for p in flow.parameters())


def test_the_mode_is_that_of_a_thread_and_ends_with_its_block() -> None:
    flow, x, context = made(spline)
    found: list[tuple[Tensor, ...]] = []

    def elsewhere() -> None:
        found.append(torch.autograd.grad(nll(flow, x, context), list(flow.parameters())))

    with direct_gradients():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert found
    elsewhere()
    with pytest.raises(ZeroDivisionError), direct_gradients():
        raise ZeroDivisionError
    elsewhere()
    with pytest.raises(TypeError, match="direct_gradients: mode is"), direct_gradients(1):  # type: ignore[arg-type]
        pass


def test_a_block_that_another_thread_closes() -> None:
    def generator() -> Iterator[None]:
        with direct_gradients():
            yield

    open_one = generator()
    contextvars.copy_context().run(next, open_one)
    errors: list[BaseException] = []

    def close() -> None:
        try:
            open_one.close()
        except BaseException as error:  # for the thread that asserts
            errors.append(error)

    thread = threading.Thread(target=close)
    thread.start()
    thread.join()
    assert not errors


@pytest.mark.parametrize("way", WAYS)
def test_threads_that_share_parameters_lose_no_gradient(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that both find no gradient: the second waits, and adds to the first's."""
    flow, x, context = made(affine, torch.float64)
    twin = copy.deepcopy(flow)
    old = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(30):
            flow.zero_grad()
            both = Barrier(2)

            def backward(both: Barrier = both) -> None:
                both.wait()
                way(flow, x, context)

            threads = [threading.Thread(target=backward) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            twin.zero_grad()
            torchs(twin, x, context)
            torchs(twin, x, context)
            assert_same(grads(flow), grads(twin))
    finally:
        sys.setswitchinterval(old)


def test_saved_tensors_that_come_back_as_copies() -> None:
    flow, x, context = made(spline)
    twin = copy.deepcopy(flow)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        for _ in range(4):
            direct(flow, x, context)
            torchs(twin, x, context)
    assert_same(grads(flow), grads(twin))


def test_checkpointed_calls() -> None:
    flow, x, context = made(spline)
    twin = copy.deepcopy(flow)

    def kept(module: Any, x: Tensor, context: Tensor) -> Tensor:
        return checkpoint(lambda x: nll(module, x, context), x, use_reentrant=False)  # type: ignore[no-any-return]

    for _ in range(4):
        direct(flow, x, context, kept)
        with direct_gradients():
            loss = kept(flow, x, context)
        loss.backward()  # outside of the block
        torchs(twin, x, context)
        torchs(twin, x, context)
        assert_same(grads(flow), grads(twin))


def test_a_stack_of_layers_and_one_that_is_no_program() -> None:
    class Odd(nn.Module):
        """A layer that no program knows."""

        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(DIM))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + self.shift, x.new_zeros(len(x))

        def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
            return z - self.shift, z.new_zeros(len(z))

    for layers in ([], [Odd()]):
        torch.manual_seed(0)
        stack = [NeuralSplineFlow(DIM, n_flows=1, hidden_dim=8), *layers, RealNVP(DIM, n_flows=1, hidden_dim=8)]
        flow = Compose(stack)
        assert (flow.program() is None) == bool(layers)
        x = torch.randn(20, DIM)
        flow.initialize(x)
        twin = copy.deepcopy(flow)
        for _ in range(4):
            flow.nll_backward(x)
            (-twin.log_prob(x).mean()).backward()
        assert_same(grads(flow), grads(twin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 50, 100_003])
def test_the_loss_of_nll_backward_is_the_mean_to_its_last_digit(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    flow, x = RealNVP(3, n_flows=1, hidden_dim=4, dtype=dtype), torch.randn(rows, 3, dtype=dtype)
    flow.initialize(torch.randn(9, 3, dtype=dtype))
    with torch.no_grad():
        exact = -math.fsum(flow.log_prob(x).tolist()) / rows
    torch.testing.assert_close(
        flow.nll_backward(x), torch.tensor(exact, dtype=dtype), rtol=torch.finfo(dtype).eps, atol=0
    )
    mean = flow.scale.grad.clone()  # type: ignore[union-attr]
    (-flow.log_prob(x).mean()).backward()
    assert torch.equal(flow.scale.grad, mean + mean)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_shows(value: float) -> None:
    flow, x, context = made(affine)
    x[3, 1] = value
    assert not one_call(flow, x, context).isfinite() and not nll(flow, x, context).isfinite()


def test_nll_backward_takes_what_log_prob_takes() -> None:
    flow, x, context = made(spline)
    twin = copy.deepcopy(flow)
    loss = flow.nll_backward(x[:36].view(4, 9, DIM), context[0])  # type: ignore[operator]
    expected = -twin.log_prob(x[:36].view(4, 9, DIM), context[0]).mean()  # type: ignore[operator]
    expected.backward()
    assert_loss(loss, expected)
    assert_same(grads(flow), grads(twin))
    x.requires_grad_()
    flow.nll_backward(x, context)  # type: ignore[operator]
    nll(twin, x.detach().requires_grad_(), context).backward()
    assert x.grad is not None and x.grad.any()
    assert_same(grads(flow), grads(twin))


def test_nll_backward_asks_a_density_of_the_users_own() -> None:
    class Shifted(NeuralSplineFlow):
        def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return super().log_prob(x + 1, context)

    torch.manual_seed(0)
    flow, x = Shifted(3, n_flows=1, hidden_dim=8), torch.randn(9, 3)
    twin = copy.deepcopy(flow)
    loss = flow.nll_backward(x)
    torchs_loss = -twin.log_prob(x).mean()
    torchs_loss.backward()
    assert_loss(loss, torchs_loss)
    assert_same(grads(flow), grads(twin))


def test_nll_backward_asks_a_density_that_one_flow_has() -> None:
    flow, x, context = made(spline)
    own = flow.log_prob
    flow.log_prob = lambda x, context=None: 2 * own(x, context)  # type: ignore[assignment, operator]
    assert_loss(one_call(flow, x, context), nll(flow, x, context))


def test_nll_backward_computes_parameters_once() -> None:
    """As a spectral norm does, whose state goes on at each look."""
    flow, x, context = made(spline)
    name = next(name for name, p in flow.named_parameters() if p.dim() > 2)
    looks: list[int] = []

    class Noise(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            looks.append(1)
            return value * (1 + 0.01 * len(looks))

    torch.nn.utils.parametrize.register_parametrization(flow, name, Noise(), unsafe=True)
    twin = copy.deepcopy(flow)
    looks.clear()
    found = one_call(flow, x, context)
    assert len(looks) == 1
    looks.clear()
    assert_loss(found, torchs(twin, x, context))
    assert_same(grads(flow), grads(twin))


def test_nll_backward_where_another_device_is_the_default() -> None:
    flow, x, context = made(spline)
    expected = nll(flow, x, context)
    with torch.device("meta"):
        found = one_call(flow, x, context)
    assert_loss(found, expected)
    assert_loss(one_call(flow, x, context), expected)


def test_nll_backward_refuses() -> None:
    flow, x, context = made(spline)
    one: Any = flow
    with pytest.raises(ValueError, match=r"NeuralSplineFlow: x has shape \[0, 4\], expected one row at least"):
        one.nll_backward(x[:0], context[:0])
    with pytest.raises(ValueError, match="context is None"):
        one.nll_backward(x)
    with pytest.raises(TypeError, match="float64"):
        one.nll_backward(x.double(), context.double())
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        one.nll_backward(x, context)
    flow.requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad"):
        one.nll_backward(x, context)
    assert all(p.grad is None for p in flow.parameters())


def test_nan_in_the_data_reaches_the_loss_and_the_gradients() -> None:
    flow, x, context = made(affine)
    x[3, 1] = torch.nan
    twin = copy.deepcopy(flow)
    loss, expected = one_call(flow, x, context), torchs(twin, x, context)
    assert loss.isnan() and expected.isnan()
    for p, q in zip(flow.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, equal_nan=True, rtol=0, atol=0)


def test_under_autocast_as_torch() -> None:
    flow, x, context = made(spline)
    twin = copy.deepcopy(flow)
    with torch.autocast("cpu", torch.bfloat16):
        for way in WAYS:
            way(flow, x, context)
            torchs(twin, x, context)
    assert_same(grads(flow), grads(twin))


def test_the_function_is_public() -> None:
    assert iin_fast.direct_gradients is direct_gradients and "direct_gradients" in iin_fast.__all__
