"""nn.Flow as a module: properties of the map, data-dependent start, state_dict, copies, errors."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from iin_fast.nn import Flow
from iin_fast.ops.flow.layout import unpack

CONFIGS = {
    "even": dict(dim=6),
    "odd": dict(dim=7),
    "two features": dict(dim=2, n_flows=4),
    "deep": dict(dim=5, n_flows=1, hidden_depth=4, hidden_dim=9),
    "shallow": dict(dim=6, hidden_depth=0),
    "wider than a panel": dict(dim=6, hidden_dim=70),
    "context": dict(dim=5, context_dim=3),
    "activation": dict(dim=6, activation_slope=0.9, exact_logdet=True),
    "no actnorm": dict(dim=6, actnorm=False),
    "no permutation": dict(dim=6, permute=False),
    "steep": dict(dim=4, leaky_slope=0.3),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(batch: int = 5, seed: int = 0, **kwargs) -> tuple[Flow, Tensor, Tensor | None]:
    """A started float64 flow, whose parameters are away from their start, and input for it."""
    config = dict(n_flows=3, hidden_dim=16, hidden_depth=1) | kwargs
    flow = Flow(**config, generator=seeded(seed), dtype=torch.float64)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(seed + 1), dtype=torch.float64)
    if flow.actnorm:
        flow.initialized.fill_(1)
        flow._started = (True,) * flow.n_flows
    x = torch.randn(batch, flow.dim, generator=seeded(seed + 2), dtype=torch.float64)
    context = torch.randn(batch, flow.context_dim, generator=seeded(seed + 3), dtype=torch.float64)
    return flow, x, context if flow.context_dim else None


def fresh(dim: int = 6, **kwargs) -> Flow:
    return Flow(dim, **(dict(n_flows=3, hidden_dim=16, generator=seeded()) | kwargs))


def batch_of(flow: Flow, n: int = 8, seed: int = 5) -> Tensor:
    return 3 * torch.randn(n, flow.dim, generator=seeded(seed), dtype=flow.weight_in.dtype) + 1


def reload(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def case(request: pytest.FixtureRequest) -> tuple[Flow, Tensor, Tensor | None]:
    return make(**request.param)


# The map


def test_inverse_undoes_forward(case):
    flow, x, context = case
    z, logdet = flow(x, context)
    x_again, inverse_logdet = flow.inverse(z, context)
    assert z.shape == x.shape and logdet.shape == (len(x),)
    assert not torch.allclose(z, x)
    torch.testing.assert_close(x_again, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inverse_logdet, -logdet, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_logdet_is_that_of_the_jacobian(case, direction):
    flow, x, context = case
    run = flow if direction == "forward" else flow.inverse
    _, logdet = run(x, context)
    for i in range(len(x)):
        one = None if context is None else context[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(lambda row, one=one: run(row[None], one)[0][0], x[i])
        torch.testing.assert_close(logdet[i], torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-9, atol=1e-9)


def test_empty_batch_and_one_row(case):
    flow, x, context = case
    z, logdet = flow(x[:0], None if context is None else context[:0])
    assert z.shape == (0, flow.dim) and logdet.shape == (0,)
    one, _ = flow(x[:1], None if context is None else context[:1])
    torch.testing.assert_close(one, flow(x, context)[0][:1], rtol=1e-10, atol=1e-10)


def test_context_of_every_block():
    flow, x, context = make(dim=5, context_dim=3)
    z, logdet = flow(x, context)
    again = flow(x, context.expand(3, -1, -1))
    torch.testing.assert_close(again, (z, logdet))
    other = torch.stack([context, context + 1, context])
    assert not torch.allclose(flow(x, other)[0], z)
    torch.testing.assert_close(flow.inverse(flow(x, other)[0], other)[0], x, rtol=1e-10, atol=1e-10)


def test_published_logdet_leaves_the_activation_out():
    exact, x, _ = make(dim=6, activation_slope=0.9, exact_logdet=True)
    published, _, _ = make(dim=6, activation_slope=0.9)
    torch.testing.assert_close(exact(x)[0], published(x)[0])
    assert (exact(x)[1] < published(x)[1] - 1e-3).all()


def test_every_parameter_gets_a_gradient_and_a_step(case):
    flow, x, context = case
    before = copy.deepcopy(flow.state_dict())
    z, logdet = flow(x, context)
    (z.square().sum() - logdet.sum()).backward()
    torch.optim.Adam(flow.parameters(), lr=1e-2).step()
    learned = before.keys() - {"initialized", "permutation"}
    for key, tensor in flow.state_dict().items():
        assert torch.equal(tensor, before[key]) == (key not in learned or tensor.numel() == 0), key


def test_number_of_parameters():
    flow = Flow(64, n_flows=2)
    per_net = 512 * 32 + 512 + 2 * (512 * 512 + 512) + 32 * 512 + 32
    assert sum(p.numel() for p in flow.parameters()) == 2 * (4 * per_net + 2 * 64)
    assert len(list(flow.parameters())) == 8


# Parameters at the start


def test_draws_are_those_of_linear_layers_in_the_published_order():
    flow = fresh(7, n_flows=2, hidden_dim=70, hidden_depth=1, context_dim=2)
    state = flow.state_dict()
    torch.manual_seed(0)
    for block in range(2):
        for net in (0, 1):
            for half in (0, 1):
                first, hidden, last = nn.Linear(4 + 2, 70), nn.Linear(70, 70), nn.Linear(70, 3)
                place = (block, half, net)
                for name, layer, index in (("in", first, place), ("hidden", hidden, (*place, 0)), ("out", last, place)):
                    assert torch.equal(state[f"weight_{name}"][index], layer.weight)
                    assert torch.equal(state[f"bias_{name}"][index], layer.bias)
        assert torch.equal(state["permutation"][block], torch.randperm(7))


def test_generator_alone_decides():
    torch.manual_seed(1)
    first = fresh().state_dict()
    torch.manual_seed(2)
    second, other = fresh().state_dict(), fresh(generator=seeded(9)).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["weight_in"], other["weight_in"])
    assert not torch.equal(first["permutation"], other["permutation"])


def test_reset_parameters_forgets_the_start():
    flow = fresh()
    flow(batch_of(flow))
    flow.reset_parameters(seeded())
    again = fresh()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in flow.state_dict().items())
    torch.testing.assert_close(flow(batch_of(flow))[0], again(batch_of(flow))[0])


# The data-dependent start


@pytest.mark.parametrize("training", [True, False])
def test_first_forward_normalises_block_by_block(training):
    flow = fresh(dtype=torch.float64).train(training)
    x = batch_of(flow)
    z, logdet = flow(x)
    assert flow.initialized.tolist() == [1, 1, 1]
    torch.testing.assert_close(flow(x), (z, logdet))
    h = x
    for block in range(3):
        normal = flow.scale[block] * (h + flow.loc[block])
        torch.testing.assert_close(normal.mean(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(normal.std(0), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-5)
        h, _ = flow._transform(h, None, block=block)
    torch.testing.assert_close(h, z)


def test_start_happens_once():
    flow = fresh()
    flow(batch_of(flow))
    loc = flow.loc.clone()
    flow(batch_of(flow, seed=6) + 5)
    assert torch.equal(flow.loc, loc)


def test_one_row_starts_with_scale_one():
    flow = fresh()
    x = batch_of(flow, 1)
    z, logdet = flow(x)
    assert torch.equal(flow.loc[0], -x[0])
    assert torch.equal(flow.scale, torch.ones(3, 6))
    assert z.isfinite().all() and logdet.isfinite().all()


def test_feature_without_spread_starts_finite():
    flow = fresh(dtype=torch.float64)
    x = batch_of(flow)
    x[:, 2] = 4.0
    with pytest.warns(UserWarning, match=r"Flow, block 0: 1 \(2\) of 6 features \(almost\) don't vary"):
        z, logdet = flow(x)
    assert 0.1 < flow.scale[0, 2] < 1
    assert z.isfinite().all() and logdet.isfinite().all()


def test_empty_batch_and_inverse_start_nothing():
    flow = fresh()
    flow(torch.zeros(0, 6))
    flow.inverse(batch_of(flow))
    assert not flow.initialized.any()
    assert torch.equal(flow.loc, torch.zeros(3, 6)) and torch.equal(flow.scale, torch.ones(3, 6))
    flow(batch_of(flow))
    assert flow.initialized.all()


def test_blocks_that_have_started_keep_their_start():
    flow = fresh()
    state = flow.state_dict()
    state["initialized"][1] = 1
    state["loc"][1] = 0.5
    flow.load_state_dict(state)
    flow(batch_of(flow))
    assert (flow.loc[1] == 0.5).all()
    assert (flow.loc[0] != 0).all() and (flow.loc[2] != 0).all()


def test_initialize_is_what_the_first_forward_does():
    by_forward, by_hand = fresh(context_dim=2), fresh(context_dim=2)
    x, context = batch_of(by_hand), torch.randn(8, 2, generator=seeded())
    by_forward(x, context)
    by_hand.initialize(x, context)
    assert torch.equal(by_forward.loc, by_hand.loc) and torch.equal(by_forward.scale, by_hand.scale)


class NoSync(TorchDispatchMode):
    """Fails at every operation that would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_no_later_call_reads_from_the_device():
    flow = fresh()
    x = batch_of(flow).requires_grad_()
    flow(x)  # the start of ActNorm looks at its batch
    with NoSync():
        for _ in range(2):
            z, logdet = flow(x)
            (z.square().sum() - logdet.sum()).backward()
            flow.inverse(z)
    with pytest.raises(AssertionError), NoSync():
        x.sum().item()


# The layout of the state_dict


def test_state_dict_shows_matrices_not_panels():
    flow = fresh(7, hidden_dim=70, hidden_depth=3, context_dim=2)
    state = flow.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "loc": (3, 7),
        "scale": (3, 7),
        "weight_in": (3, 2, 2, 70, 6),
        "bias_in": (3, 2, 2, 70),
        "weight_hidden": (3, 2, 2, 3, 70, 70),
        "bias_hidden": (3, 2, 2, 3, 70),
        "weight_out": (3, 2, 2, 3, 70),
        "bias_out": (3, 2, 2, 3),
        "initialized": (3,),
        "permutation": (3, 7),
    }
    assert torch.equal(state["weight_in"], unpack(flow.weight_in.detach(), 70, 6))
    assert all(value.is_contiguous() and not value.requires_grad for value in state.values())
    assert not {"loc", "scale", "initialized"} & fresh(actnorm=False).state_dict().keys()
    assert "permutation" not in fresh(permute=False).state_dict()


def test_keep_vars_stays_differentiable():
    flow = fresh()
    flow.state_dict(keep_vars=True)["weight_in"][0].sum().backward()
    assert (flow.weight_in.grad[0] == 1).all() and (flow.weight_in.grad[1:] == 0).all()


def test_round_trip_through_a_file(case):
    flow, x, context = case
    other = make(seed=7, **_config_of(flow))[0]
    assert not torch.allclose(other(x, context)[0], flow(x, context)[0])
    other.load_state_dict(reload(flow.state_dict()), strict=True)
    torch.testing.assert_close(other(x, context), flow(x, context), rtol=0, atol=0)


def _config_of(flow: Flow) -> dict:
    names = "dim n_flows hidden_dim hidden_depth context_dim leaky_slope activation_slope exact_logdet actnorm permute"
    return {name: getattr(flow, name) for name in names.split()}


def test_loading_carries_the_start():
    started, flow = fresh(), fresh(generator=seeded(3))
    started(batch_of(started))
    flow.load_state_dict(started.state_dict())
    loc = flow.loc.clone()
    flow(batch_of(flow, seed=8) + 9)
    assert torch.equal(flow.loc, loc)
    flow.load_state_dict(fresh().state_dict())
    flow(batch_of(flow, seed=8) + 9)
    assert not torch.equal(flow.loc, loc)


def test_loading_inside_a_model_reports_keys_with_their_prefix():
    model = nn.ModuleDict({"a": fresh(), "b": fresh()})
    state = model.state_dict()
    del state["a.bias_in"]
    state["b.weight_in"] = torch.zeros(3, 2, 2, 5, 3)
    state["b.panel"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state)
    text = str(error.value)
    assert 'Missing key(s) in state_dict: "a.bias_in"' in text
    assert 'Unexpected key(s) in state_dict: "b.panel"' in text
    assert "size mismatch for b.weight_in: copying a param with shape torch.Size([3, 2, 2, 5, 3])" in text
    assert "the shape in current model is torch.Size([3, 2, 2, 16, 3])" in text


def test_loading_part_of_a_state_leaves_the_rest():
    flow, other = fresh(), fresh(generator=seeded(4))
    kept = flow.weight_out.clone()
    result = flow.load_state_dict({"weight_in": other.state_dict()["weight_in"], "x": torch.ones(1)}, strict=False)
    assert "weight_out" in result.missing_keys and result.unexpected_keys == ["x"]
    assert torch.equal(flow.weight_in, other.weight_in) and torch.equal(flow.weight_out, kept)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["scale", "weight_hidden"])
def test_loading_refuses_nan_and_inf(key, value):
    model = nn.Sequential(fresh())
    before = model[0].weight_in.clone()
    state = fresh(generator=seeded(4)).state_dict(prefix="0.")
    state[f"0.{key}"].view(-1)[3] = value
    with pytest.raises(ValueError, match=rf"0\.{key} holds NaN or Inf in 1 of"):
        model.load_state_dict(state)
    assert torch.equal(model[0].weight_in, before)


def test_loading_refuses_what_is_no_permutation():
    state = fresh().state_dict()
    state["permutation"][1, 0] = state["permutation"][1, 1]
    with pytest.raises(ValueError, match="permutation is not a permutation of 0 … 5"):
        fresh().load_state_dict(state)


def test_loading_converts_or_assigns():
    half = {k: v.half() if v.is_floating_point() else v for k, v in fresh(generator=seeded(4)).state_dict().items()}
    keys = set(half)
    flow = fresh()
    flow.load_state_dict(half)
    assert flow.weight_in.dtype == torch.float32 and set(half) == keys
    torch.testing.assert_close(flow.state_dict()["weight_in"], half["weight_in"].float(), rtol=0, atol=0)
    flow.load_state_dict(half, assign=True)
    assert flow.weight_in.dtype == torch.float16 and isinstance(flow.weight_in, nn.Parameter)


def test_meta_device_and_assign():
    flow, real = Flow(6, n_flows=2, hidden_dim=16, device="meta"), fresh(n_flows=2)
    real(batch_of(real))
    flow.load_state_dict(real.state_dict(), assign=True)
    torch.testing.assert_close(flow(batch_of(real)), real(batch_of(real)))


# Copies


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda flow: pickle.loads(pickle.dumps(flow))])
def test_copies_keep_the_start_and_are_their_own(copier):
    flow = fresh()
    flow(batch_of(flow))
    twin = copier(flow)
    x = batch_of(flow, seed=8) + 9
    torch.testing.assert_close(twin(x), flow(x), rtol=0, atol=0)
    with torch.no_grad():
        twin.weight_in.zero_()
    assert flow.weight_in.any()


def test_to_converts_everything_and_keeps_the_start():
    flow = fresh()
    x = batch_of(flow)
    z, logdet = flow(x)
    flow.to(torch.float64)
    assert {p.dtype for p in flow.parameters()} == {torch.float64}
    z_double, logdet_double = flow(x.double())
    torch.testing.assert_close((z_double.float(), logdet_double.float()), (z, logdet), rtol=1e-4, atol=1e-4)
    bare = fresh(actnorm=False).double()
    assert bare(x.double())[0].dtype == torch.float64


# Errors


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(6), ValueError, r"has shape \[6\], expected \[batch, 6\]"),
        (torch.zeros(2, 6, 1, 1), ValueError, r"has shape \[2, 6, 1, 1\], expected \[batch, 6\]"),
        (torch.zeros(2, 5), ValueError, r"has shape \[2, 5\], expected \[batch, 6\]"),
        (torch.zeros(2, 6, dtype=torch.int64), TypeError, "has dtype int64"),
        (torch.zeros(2, 6, dtype=torch.complex64), TypeError, "has dtype complex64"),
        (torch.zeros(2, 6, device="meta"), ValueError, "is on meta, expected cpu like the parameters"),
        ([[0.0] * 6], TypeError, "is a list, expected a torch.Tensor"),
    ],
)
def test_bad_input(direction, x, error, message):
    flow = fresh()
    name, run = ("x", flow) if direction == "forward" else ("z", flow.inverse)
    with pytest.raises(error, match=f"Flow: {name} {message}"):
        run(x)


@pytest.mark.parametrize(
    ("context", "error", "message"),
    [
        (None, ValueError, r"context is None, expected \[4, 2\]"),
        (torch.zeros(3, 2), ValueError, r"context has shape \[3, 2\], expected \[4, 2\] or \[3, 4, 2\]"),
        (torch.zeros(2, 4, 2), ValueError, r"context has shape \[2, 4, 2\]"),
        (torch.zeros(4, 2, dtype=torch.int32), TypeError, "context has dtype int32"),
        (torch.zeros(4, 2, device="meta"), ValueError, "context is on meta, expected cpu like x"),
    ],
)
def test_bad_context(context, error, message):
    with pytest.raises(error, match=message):
        fresh(context_dim=2)(torch.zeros(4, 6), context)


def test_context_that_nobody_reads():
    with pytest.raises(ValueError, match=r"context is \[4, 2\], expected None"):
        fresh()(torch.zeros(4, 6), torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(dim=1), "dim is 1, expected an integer of at least 2"),
        (dict(n_flows=0), "n_flows is 0"),
        (dict(hidden_dim=0), "hidden_dim is 0"),
        (dict(hidden_depth=-1), "hidden_depth is -1, expected an integer of at least 0"),
        (dict(context_dim=-1), "context_dim is -1"),
        (dict(activation_slope=0.0), "activation_slope is 0.0, expected a finite number above 0"),
        (dict(memory="none"), "memory is 'none', expected one of 'auto', 'save', 'checkpoint', 'invert'"),
    ],
)
def test_bad_sizes(kwargs, message):
    with pytest.raises(ValueError, match=message):
        fresh(**kwargs)


def test_densities_of_arguments_that_dont_fit() -> None:
    flow = Flow(6, context_dim=3, n_flows=1, hidden_dim=8)
    with pytest.raises(ValueError, match=r"Flow: context has shape \[3, 3\], expected one that broadcasts against x"):
        flow.log_prob(torch.randn(5, 6), torch.randn(3, 3))
    with pytest.raises(TypeError, match="Flow: x is a list"):
        flow.log_prob([[0.0] * 6], torch.randn(1, 3))
