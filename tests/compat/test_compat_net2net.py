"""compat.net2net against the numbers of the published code, and where that code has no answer."""

import copy

import pytest
import torch
from torch import nn

from iin_fast.compat import net2net
from iin_fast.compat.net2net import (
    NLL,
    ActNorm,
    BasicFullyConnectedNet,
    ConditionalFlatCouplingFlow,
    ConditionalFlow,
    InvLeakyRelu,
    InvParametricRelu,
    PureAffineFlatCouplingFlow,
    UnconditionalFlatCouplingFlow,
    nll,
)
from iin_fast.testing import published_grads

CONDITIONAL = ["conditional_f32", "conditional_lrelu_f32"]
conditional = pytest.mark.parametrize("golden", CONDITIONAL, indirect=True)
unconditional = pytest.mark.parametrize("golden", ["net2net_uncond_f64"], indirect=True)


def conditional_model(golden) -> ConditionalFlatCouplingFlow:
    in_channels, conditioning_dim, embedding_dim, n_flows, hidden_depth, hidden_dim = golden.config()
    model = ConditionalFlatCouplingFlow(
        in_channels=in_channels,
        conditioning_dim=conditioning_dim,
        embedding_dim=embedding_dim,
        hidden_dim=hidden_dim,
        hidden_depth=hidden_depth,
        n_flows=n_flows,
        activation=str(golden.arrays["activation"]),
        conditioning_hidden_dim=hidden_dim,
        conditioning_depth=1,
    )
    model.load_state_dict(golden.under("state"), strict=True)
    return model


def unconditional_model(golden) -> UnconditionalFlatCouplingFlow:
    in_channels, n_flows, hidden_depth, hidden_dim = golden.config()
    model = UnconditionalFlatCouplingFlow(in_channels, n_flows, hidden_dim, hidden_depth).to(golden.dtype)
    model.load_state_dict(golden.under("state"), strict=True)
    return model


def small(in_channels: int = 6, **kwargs) -> ConditionalFlatCouplingFlow:
    torch.manual_seed(0)
    config = dict(conditioning_dim=3, embedding_dim=4, hidden_dim=16, hidden_depth=1, n_flows=2) | kwargs
    return ConditionalFlatCouplingFlow(in_channels, **config).double()


def inputs(batch: int = 5, channels: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return 2 * draw(batch, channels, 1, 1) + 1, draw(batch, 3)


# Published numbers


@conditional
def test_conditional_values_and_gradients(golden):
    model = conditional_model(golden)
    x = golden["x"].requires_grad_()
    z, logdet = model(x, golden["cond"])
    golden.check(z, "z")
    golden.check(logdet, "logdet")
    NLL()(z, logdet)[0].backward()
    golden.check(x.grad, "grad_x")
    golden.check_grads(published_grads(model))


@conditional
def test_conditional_reverse(golden):
    model = conditional_model(golden)
    golden.check(model.reverse(golden["z"], golden["cond"]), "reverse")
    golden.check(model(golden["z"], golden["cond"], reverse=True), "reverse")
    golden.check(model.reverse(golden["z"], golden["cond"][:, :, None, None]), "reverse")


@unconditional
def test_unconditional_values_and_gradients(golden):
    model = unconditional_model(golden)
    x = golden["x"].requires_grad_()
    z, logdet = model(x)
    golden.check(z, "z")
    golden.check(logdet, "logdet")
    NLL()(z, logdet)[0].backward()
    if "grad_x" in golden:
        golden.check(x.grad, "grad_x")
    golden.check_grads(published_grads(model))


@unconditional
def test_unconditional_reverse(golden):
    golden.check(unconditional_model(golden).reverse(golden["z"]), "reverse")


@pytest.mark.parametrize("golden", ["conditional_start_f32"], indirect=True)
def test_conditional_first_call(golden):
    """With sequential conditioning and an embedder whose ActNorm starts too."""
    torch.manual_seed(0)
    model = ConditionalFlatCouplingFlow(
        8, 4, 5, 20, 1, 2, "sequential", "lrelu", 12, conditioning_depth=1, conditioner_use_an=True
    )
    for key, tensor in golden.under("state0").items():
        assert torch.equal(model.state_dict()[key], tensor), key
    z, logdet = model(golden["x"], golden["cond"])
    golden.check(z, "first_z")
    golden.check(logdet, "first_logdet")
    golden.check(model.reverse(z, golden["cond"]), "reverse")
    want, got = golden.under("state_init"), model.state_dict()
    assert list(got) == list(want)
    for key, tensor in want.items():
        golden.close(got[key], tensor, key)


@pytest.mark.parametrize("golden", [*CONDITIONAL, "net2net_uncond_f64"], indirect=True)
def test_state_dict_keys_order_shapes_and_types(golden):
    model = conditional_model(golden) if "cond" in golden else unconditional_model(golden)
    want, got = golden.under("state"), model.state_dict()
    assert list(got) == list(want)
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype and torch.equal(got[key], tensor), key


# The conditional flow


@pytest.mark.parametrize("option", ["none", "parallel", "sequential"])
@pytest.mark.parametrize("channels", [6, 7])
def test_conditioning_options(option, channels):
    model = small(channels, conditioning_option=option)
    x, cond = inputs(channels=channels)
    z, logdet = model(x, cond)
    assert not torch.allclose(model(x, cond + 1)[0], z)
    torch.testing.assert_close(model.reverse(z, cond), x, rtol=1e-10, atol=1e-10)
    layers = [key for key in model.state_dict() if key.startswith("conditioning_layers")]
    assert len(layers) == (0 if option == "none" else 4)
    (z.square().sum() - logdet.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_contexts_of_the_options():
    x, cond = inputs()
    for option in ("parallel", "sequential"):
        model = small(conditioning_option=option)
        first, second = model.conditioning_layers
        embedding = model.embedder(cond)[:, :, None, None]
        a = first(embedding)
        b = second(embedding if option == "parallel" else a)
        want = model.sub_layers(x.flatten(1), torch.stack([a, b]).flatten(2))
        torch.testing.assert_close(model(x, cond)[0].flatten(1), want[0])


@pytest.mark.parametrize("activation", ["lrelu", "none"])
@pytest.mark.parametrize("option", ["none", "sequential"])
def test_same_seed_same_model_and_numbers_as_composed_of_blocks(activation, option):
    torch.manual_seed(3)
    stacked = ConditionalFlow(6, 3, 16, 1, 2, option, activation)
    torch.manual_seed(3)
    composed = nn.ModuleDict({"sub_layers": nn.ModuleList(), "conditioning_layers": nn.ModuleList()})
    for _ in range(2):
        block = net2net.ConditionalFlatDoubleCouplingFlowBlock(6, 3, 16, 1, activation)
        composed["sub_layers"].append(block)
        if option == "sequential":
            composed["conditioning_layers"].append(nn.Conv2d(3, 3, 1))
    want, got = composed.state_dict(), stacked.state_dict()
    assert list(got) == list(want)
    assert all(torch.equal(got[key], want[key]) for key in want)
    x, embedding = (tensor.float() for tensor in inputs())
    h, context, total = x, embedding[:, :, None, None], 0
    for i, block in enumerate(composed["sub_layers"]):
        context = composed["conditioning_layers"][i](context) if option == "sequential" else context
        h, logdet = block(h, context)
        total = total + logdet
    z, logdet = stacked(x, embedding)
    torch.testing.assert_close((z, logdet), (h, total), rtol=1e-5, atol=1e-5)


def test_exact_logdet_is_that_of_the_jacobian_and_the_published_is_not():
    x, cond = inputs()
    published, exact = small(), small(exact_logdet=True)
    _, logdet = exact(x, cond)
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(
            lambda row, i=i: exact(row[None], cond[i : i + 1])[0].flatten(), x[i].flatten()
        )
        torch.testing.assert_close(logdet[i], torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-9, atol=1e-9)
    counted = (published(x, cond)[1] - logdet) / -torch.tensor(0.9, dtype=torch.float64).log()
    torch.testing.assert_close(counted, counted.round(), rtol=0, atol=1e-9)  # number of features that were scaled
    assert counted.min() >= 0 and counted.max() > 1
    torch.testing.assert_close(published(x, cond)[0], exact(x, cond)[0])


def test_normalised_embedders():
    x, cond = inputs()
    for kwargs in (dict(conditioner_use_bn=True), dict(conditioner_use_an=True)):
        model = small(**kwargs)
        z, _ = model(x, cond)
        assert z.shape == x.shape
        copied = small(**kwargs)
        copied.load_state_dict(model.state_dict(), strict=True)
        torch.testing.assert_close(copied.eval()(x, cond), model.eval()(x, cond))
    keys = small(conditioner_use_an=True).state_dict()
    assert [key for key in keys if key.startswith("embedder.main.1.")] == [
        "embedder.main.1.loc",
        "embedder.main.1.scale",
        "embedder.main.1.initialized",
    ]


def test_condition_of_integers():
    model = small().float()
    x, _ = inputs()
    z, _ = model(x.float(), torch.arange(15).view(5, 3))
    assert z.dtype == torch.float32


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch):
    model = small(7)
    x, cond = inputs(batch, 7)
    z, logdet = model(x, cond)
    assert z.shape == (batch, 7, 1, 1) and logdet.shape == (batch,) and z.isfinite().all()
    torch.testing.assert_close(model.eval().reverse(z, cond), x, rtol=1e-10, atol=1e-10)


# Start of ActNorm


def test_start_in_training_only():
    x, cond = inputs()
    model = small()
    model.eval()(x, cond)
    assert not model.sub_layers.initialized.any()
    model.train()(x, cond)
    assert model.sub_layers.initialized.all()


def test_reverse_before_the_start():
    x, cond = inputs()
    model = small()
    with pytest.raises(RuntimeError, match="reverse was called in training mode before the first forward"):
        model.reverse(x, cond)
    assert model.eval().reverse(x, cond).shape == x.shape
    with pytest.raises(RuntimeError, match="allow_reverse_init=True"):
        ActNorm(6).reverse(x)
    norm = ActNorm(6, allow_reverse_init=True).double()
    norm.reverse(x)
    torch.testing.assert_close(norm.loc, -x.mean(0, keepdim=True))


def test_pure_affine_has_nothing_to_start():
    flow = PureAffineFlatCouplingFlow(6, 2, 16, 1).double()
    x, _ = inputs()
    torch.testing.assert_close(flow(flow.reverse(x))[0], x, rtol=1e-10, atol=1e-10)
    assert not any("norm" in key or "shuffle" in key for key in flow.state_dict())


# Unconditional flows


@pytest.mark.parametrize("kind", [UnconditionalFlatCouplingFlow, PureAffineFlatCouplingFlow])
@pytest.mark.parametrize("channels", [6, 7])
def test_unconditional_round_trip_and_logdet(kind, channels):
    torch.manual_seed(0)
    flow = kind(channels, 2, 16, 1).double()
    x, _ = inputs(channels=channels)
    z, logdet = flow(x.flatten(1))
    assert z.shape == x.shape
    torch.testing.assert_close(flow.reverse(z), x, rtol=1e-10, atol=1e-10)
    jacobian = torch.autograd.functional.jacobian(lambda row: flow(row[None])[0].flatten(), x[0].flatten())
    torch.testing.assert_close(logdet[0], torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-9, atol=1e-9)
    other = kind(channels, 2, 16, 1).double()
    other.load_state_dict(flow.state_dict(), strict=True)
    torch.testing.assert_close(other(x)[0], z)
    torch.testing.assert_close(copy.deepcopy(flow)(x)[0], z)


def test_blocks_are_the_stacks_of_one():
    x, _ = inputs(channels=7)
    for block_kind, flow_kind in (
        (net2net.UnconditionalFlatDoubleCouplingFlowBlock, UnconditionalFlatCouplingFlow),
        (net2net.PureAffineDoubleCouplingFlowBlock, PureAffineFlatCouplingFlow),
    ):
        block, flow = block_kind(7, 16, 1).double(), flow_kind(7, 1, 16, 1).double()
        flow.load_state_dict(block.state_dict(prefix="sub_layers.0."), strict=True)
        torch.testing.assert_close(block(x), flow(x))
        torch.testing.assert_close(block.reverse(x), flow.reverse(x))


def test_samples():
    flow, x_cond = UnconditionalFlatCouplingFlow(6, 2, 16, 1).double().eval(), inputs()[1]
    torch.manual_seed(0)
    first = flow.sample(4)
    torch.manual_seed(0)
    assert torch.equal(flow.sample(4), first) and first.shape == (4, 6, 1, 1) and first.dtype == torch.float64
    assert small().eval().sample(x_cond).shape == (5, 6, 1, 1)
    assert flow.get_last_layer() is flow.sub_layers.weight_out


# Parts


def test_activations():
    x = torch.tensor([[1.0, -2.0], [-3.0, -4.0]])
    y, logdet = InvLeakyRelu(0.5)(x)
    assert torch.equal(y, torch.tensor([[1.0, -1.0], [-1.5, -2.0]])) and logdet == 0
    assert torch.equal(InvLeakyRelu(0.5)(y, reverse=True), x)
    torch.testing.assert_close(InvLeakyRelu(0.5, exact_logdet=True)(x)[1], torch.tensor([0.5, 0.25]).log())
    assert net2net.IgnoreLeakyRelu()(x) == (x, 0.0)
    learned = InvParametricRelu(0.5)
    learned(x)[0].sum().backward()
    assert learned.alpha.grad == -9 and list(learned.state_dict()) == ["alpha"]


def test_nll():
    z, logdet = torch.ones(2, 3, 1, 1), torch.tensor([1.0, 2.0])
    assert torch.equal(nll(z), torch.full((2,), 1.5)) and torch.equal(nll(z.flatten(1)), nll(z))
    loss, log = NLL()(z, logdet, split="val")
    assert loss == 0 and list(log) == [f"val/{k}_loss" for k in ("total", "reference_nll", "nlogdet", "nll")]
    with pytest.raises(ValueError, match=r"NLL: logdet has shape \[2, 1\], expected \[batch\]"):
        NLL()(z, logdet[:, None])
    with pytest.raises(ValueError, match=r"NLL: logdet has shape \[1\], expected \[2\]"):
        NLL()(z, logdet[:1])


# Errors


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            dict(conditioning_option="all"),
            "conditioning_option is 'all', expected one of 'none', 'parallel', 'sequential'",
        ),
        (dict(activation="relu"), "activation is 'relu', expected one of 'lrelu', 'none'"),
        (dict(conditioner_use_bn=True, conditioner_use_an=True), "use_bn and use_an are both True"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


def test_bad_parts():
    with pytest.raises(ValueError, match="activation is 'relu'"):
        net2net.ConditionalFlatDoubleCouplingFlowBlock(6, 3, 16, 1, "relu")
    with pytest.raises(ValueError, match="affine is False"):
        ActNorm(3, affine=False)
    with pytest.raises(ValueError, match="use_bn and use_an are both True"):
        BasicFullyConnectedNet(3, 1, use_bn=True, use_an=True)


@pytest.mark.parametrize("cond", [torch.zeros(5, 4), torch.zeros(5, 3, 2, 2), torch.zeros(3)])
def test_bad_conditions(cond):
    x, _ = inputs()
    with pytest.raises(ValueError, match=r"has shape .*, expected \[batch, 3\] or \[batch, 3, 1, 1\]"):
        small()(x, cond)


def test_batches_that_differ():
    x, cond = inputs()
    with pytest.raises(ValueError, match=r"context has shape \[4, 4\], expected \[5, 4\]"):
        small()(x, cond[:4])
