"""compat.iin against the numbers of the published code, and where that code has no answer."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from iin_fast.compat.iin import (
    BasicFullyConnectedNet,
    DoubleVectorCouplingBlock,
    EfficientVRNVP,
    FactorLoss,
    FactorTransformer,
    Flow,
    Loss,
    Shuffle,
    VectorActNorm,
    VectorTransformer,
    nll,
)
from iin_fast.testing import published_grads

VECTOR = ["vector_f32", "vector_f64"]
FACTOR = ["factor_f32", "factor_equal_f64"]
vector = pytest.mark.parametrize("golden", VECTOR, indirect=True)
factor = pytest.mark.parametrize("golden", FACTOR, indirect=True)
every = pytest.mark.parametrize("golden", VECTOR + FACTOR, indirect=True)


def config_of(golden, **more) -> dict:
    names = ("in_channel", "n_flow", "hidden_depth", "hidden_dim")
    return {"Transformer": dict(zip(names, golden.config(), strict=True)) | more}


def small(in_channel: int = 6, **more) -> dict:
    return {"Transformer": dict(in_channel=in_channel, n_flow=2, hidden_depth=1, hidden_dim=16) | more}


def vector_model(golden, state: str = "state") -> VectorTransformer:
    model = VectorTransformer(config_of(golden)).to(golden.dtype)
    model.load_state_dict(golden.under(state), strict=True)
    return model


def factor_model(golden) -> FactorTransformer:
    sizes = golden["sizes"].tolist()
    split = dict(n_factors=len(sizes)) if len(set(sizes)) == 1 else dict(factor_config=sizes)
    model = FactorTransformer(config_of(golden, **split)).to(golden.dtype)
    model.load_state_dict(golden.under("state"), strict=True)
    return model


def reload(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Published numbers


@vector
def test_vector_values_loss_and_gradients(golden):
    model = vector_model(golden)
    x = golden["x"].requires_grad_()
    z, logdet = model(x)
    golden.check(z, "z")
    golden.check(logdet, "logdet")
    loss, log, train_op = Loss({})(z, logdet, 0)
    assert train_op() is None and log["images"] == {}
    assert list(log["scalars"]) == ["loss", "reference_nll_loss", "nlogdet_loss", "nll_loss"]
    assert log["scalars"]["loss"] is loss
    for key in ("loss", "nll_loss", "nlogdet_loss"):
        golden.check(log["scalars"][key], key)
    loss.backward()
    golden.check(x.grad, "grad_x")
    golden.check_grads(published_grads(model))


@vector
def test_vector_reverse(golden):
    model = vector_model(golden)
    golden.check(model.reverse(golden["z"]), "reverse")
    golden.check(model(golden["z"], reverse=True), "reverse")


@pytest.mark.parametrize("golden", ["vector_start_f32", "vector_start_f64"], indirect=True)
@pytest.mark.parametrize("training", [True, False])
def test_vector_first_call(golden, training):
    """state0 is drawn from seed 0; the first call starts ActNorm and gives state_init."""
    model = vector_model(golden, "state0").train(training)
    z, logdet = model(golden["x"])
    golden.check(z, "first_z")
    golden.check(logdet, "first_logdet")
    want, got = golden.under("state_init"), model.state_dict()
    assert list(got) == list(want)
    for key, tensor in want.items():
        golden.close(got[key], tensor, key)


@pytest.mark.parametrize("golden", ["vector_start_f32", "vector_start_f64"], indirect=True)
def test_vector_draws_of_a_seed(golden):
    torch.manual_seed(0)
    got = VectorTransformer(config_of(golden)).to(golden.dtype).state_dict()
    for key, tensor in golden.under("state0").items():
        assert torch.equal(got[key], tensor), key


@factor
def test_factor_values_loss_and_gradients(golden):
    assert (golden["factors"] < 0).any() and (golden["factors"] >= 0).any()
    model = factor_model(golden)
    za, logdet_a = model(golden["a"])
    zb, logdet_b = model(golden["b"])
    assert isinstance(za, tuple) and len(za) == len(golden["sizes"])
    for k in range(len(za)):
        golden.check(za[k], f"za{k}")
        golden.check(zb[k], f"zb{k}")
    golden.check(logdet_a, "logdet_a")
    golden.check(logdet_b, "logdet_b")
    criterion = FactorLoss({"Loss": {"rho": golden["rho"].item()}})
    loss, log, train_op = criterion(
        {"example1": za, "example2": zb},
        {"example1": logdet_a, "example2": logdet_b},
        golden["factors"].numpy(),
        0,
    )
    assert train_op() is None and list(log["scalars"]) == ["loss", "loss1", "loss2"]
    for key, value in log["scalars"].items():
        golden.check(value, key)
    loss.backward()
    golden.check_grads(published_grads(model))


@factor
def test_pair_in_one_batch_gives_the_same(golden):
    model = factor_model(golden)
    n = len(golden["a"])
    z, logdet = model(torch.cat([golden["a"], golden["b"]]))
    loss, _, _ = FactorLoss({"Loss/rho": golden["rho"].item()})(
        {"example1": [part[:n] for part in z], "example2": [part[n:] for part in z]},
        {"example1": logdet[:n], "example2": logdet[n:]},
        golden["factors"],
        0,
    )
    golden.check(loss, "loss")


@factor
def test_factor_reverse(golden):
    model = factor_model(golden)
    golden.check(model.reverse([golden[f"za{k}"] for k in range(len(golden["sizes"]))]), "reverse_a")


@every
def test_state_dict_keys_order_shapes_and_types(golden):
    model = factor_model(golden) if "sizes" in golden else vector_model(golden)
    want, got = golden.under("state"), model.state_dict()
    assert list(got) == list(want)
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype and torch.equal(got[key], tensor), key


# The factor loss


def pair(batch: int = 4, sizes: tuple[int, ...] = (2, 3, 4)):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    a, b = ([draw(batch, size, 1, 1) for size in sizes] for _ in range(2))
    return {"example1": a, "example2": b}, {"example1": draw(batch), "example2": draw(batch)}


@pytest.mark.parametrize(
    ("code", "shared"), [(0, {0}), (1, {1}), (2, {2}), (-1, {0, 2}), (-2, {0, 1}), (5, set()), (-5, {0, 1, 2})]
)
def test_factor_codes(code, shared):
    samples, logdets = pair()
    rho = 0.9
    want = torch.zeros(4, dtype=torch.float64)
    for k, (a, b) in enumerate(zip(samples["example1"], samples["example2"], strict=True)):
        a, b, m = a.flatten(1), b.flatten(1), float(k in shared)
        want += 0.5 * (a**2).sum(1) + 0.5 * ((b - m * rho * a) ** 2).sum(1) / (1 - m * rho**2)
    want -= logdets["example1"] + logdets["example2"]
    loss, _, _ = FactorLoss({"Loss/rho": rho})(samples, logdets, np.full(4, code), 0)
    torch.testing.assert_close(loss, want.mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("to", [torch.as_tensor, lambda codes: torch.as_tensor(codes).to(torch.int32), np.asarray])
def test_factor_codes_of_any_kind(to):
    samples, logdets = pair()
    codes = np.array([0, -1, 2, -2])
    criterion = FactorLoss({})
    assert criterion.rho == 0.975
    loss = criterion(samples, logdets, to(codes), 0)[0]
    torch.testing.assert_close(loss, criterion(samples, logdets, codes, 0)[0], rtol=0, atol=0)


def test_logged_parts_of_the_loss_differentiate():
    samples, logdets = pair()
    logdets["example2"].requires_grad_()
    _, log, _ = FactorLoss({})(samples, logdets, np.zeros(4, dtype=int), 0)
    log["scalars"]["loss2"].backward()
    torch.testing.assert_close(logdets["example2"].grad, torch.full((4,), -0.25, dtype=torch.float64))


@pytest.mark.parametrize("rho", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_rho_outside_its_range(rho):
    with pytest.raises(ValueError, match=r"Loss/rho is .*, expected a finite number above 0 and below 1"):
        FactorLoss({"Loss": {"rho": rho}})


def test_losses_refuse_a_logdet_of_another_rank():
    samples, logdets = pair()
    logdets["example1"] = logdets["example1"][:, None]
    with pytest.raises(ValueError, match=r"FactorLoss: logdet has shape \[4, 1\], expected \[batch\]"):
        FactorLoss({})(samples, logdets, np.zeros(4, dtype=int), 0)
    with pytest.raises(ValueError, match="Loss: logdet"):
        Loss({})(torch.zeros(4, 2, 1, 1), torch.zeros(()), 0)


def test_losses_refuse_a_logdet_of_another_batch():
    samples, logdets = pair()
    logdets["example2"] = logdets["example2"][:3]
    with pytest.raises(ValueError, match=r"FactorLoss: logdet has shape \[3\], expected \[4\]"):
        FactorLoss({})(samples, logdets, np.zeros(4, dtype=int), 0)
    with pytest.raises(ValueError, match=r"Loss: logdet has shape \[3\], expected \[4\]"):
        Loss({})(torch.zeros(4, 2, 1, 1), torch.zeros(3), 0)


@pytest.mark.parametrize(
    "codes, error, message",
    [
        (torch.full((4,), 0.5), TypeError, "factors is torch.float32, expected integers"),
        (np.zeros((4, 1), dtype=int), ValueError, r"factors has shape \[4, 1\], expected \[4\], one for each pair"),
        (0, ValueError, r"factors has shape \[\], expected \[4\]"),
    ],
)
def test_factor_codes_that_are_none(codes, error, message):
    with pytest.raises(error, match=message):
        FactorLoss({})(*pair(), codes, 0)


def test_factors_of_other_sizes_are_refused():
    samples, logdets = pair()
    samples["example1"] = samples["example1"][::-1]
    with pytest.raises(ValueError, match=r"'example2'\] has shapes \[\[4, 2, 1, 1\], .*, expected \[\[4, 4, 1, 1\], "):
        FactorLoss({})(samples, logdets, np.zeros(4, dtype=int), 0)


@pytest.mark.parametrize("out", [torch.zeros(6, 6, 1, 1), [], None])
def test_one_tensor_is_no_sequence_of_factors(out):
    with pytest.raises(TypeError, match="out is a .*, expected a sequence of one or more factors"):
        FactorTransformer(small()).reverse(out)
    with pytest.raises(TypeError, match=r"samples\['example1'\] is a .*, expected a sequence of one or more factors"):
        FactorLoss({})({"example1": out, "example2": out}, {}, np.zeros(6, dtype=int), 0)


def test_no_pairs_give_nan_as_published():
    samples, logdets = pair(batch=0)
    assert FactorLoss({})(samples, logdets, np.zeros(0, dtype=int), 0)[0].isnan()


def test_nll():
    torch.testing.assert_close(nll(torch.full((3, 2, 2, 1), 2.0)), torch.full((3,), 8.0))


# What the published code cannot do


@pytest.mark.parametrize("channels", [2, 3, 6, 7])
@pytest.mark.parametrize("batch", [0, 1, 4])
def test_any_batch_and_number_of_channels(batch, channels):
    torch.manual_seed(0)
    model = VectorTransformer(small(channels)).double()
    x = torch.randn(batch, channels, 1, 1, dtype=torch.float64)
    for _ in range(2):
        z, logdet = model(x)
        assert z.shape == x.shape and logdet.shape == (batch,) and z.isfinite().all() and logdet.isfinite().all()
        torch.testing.assert_close(model.reverse(z), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels", [6, 7])
def test_logdet_is_that_of_the_jacobian(channels):
    torch.manual_seed(0)
    model = VectorTransformer(small(channels)).double()
    x = torch.randn(5, channels, dtype=torch.float64)
    _, logdet = model(x)
    for i in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda row: model(row[None])[0].flatten(), x[i])
        torch.testing.assert_close(logdet[i], torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-9, atol=1e-9)


class Reads(TorchDispatchMode):
    """Notes the calls whose result the host has to wait for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(func)
        return func(*args, **(kwargs or {}))


def test_no_later_call_reads_from_the_device():
    model = FactorTransformer(small(n_factors=3))
    modules = [VectorActNorm, DoubleVectorCouplingBlock]
    composed = EfficientVRNVP(modules, 6, 2, 16, 1)
    criterion = FactorLoss({})
    codes = torch.tensor([0, 1, -1, 2])
    x = torch.randn(4, 6, 1, 1)
    model(x), composed(x.flatten(1))  # the start of ActNorm looks at its batch
    with Reads() as reads:
        for _ in range(2):
            z, logdet = model(x)
            both = {"example1": z, "example2": z}, {"example1": logdet, "example2": logdet}
            criterion(*both, codes, 0)[0].backward()
            model.reverse(z)
            composed(x.flatten(1))
        assert reads.found == []
        x.sum().item()
    assert reads.found == [torch.ops.aten._local_scalar_dense.default]  # what is looked for is seen


# Inputs


def test_accepted_shapes():
    model = VectorTransformer(small())
    x = torch.randn(4, 6)
    z, _ = model(x)
    assert z.shape == (4, 6, 1, 1)
    for shaped in (x[:, :, None, None], x[:, None, :], x[:, None, None, :], x[..., None]):
        assert torch.equal(model(shaped)[0], z)
    assert model.reverse(z.flatten(1)).shape == (4, 6, 1, 1)


@pytest.mark.parametrize("shape", [(6,), (4, 5), (4, 5, 1, 1), (4, 6, 2, 2), (4, 6, 2)])
def test_refused_shapes(shape):
    model = VectorTransformer(small())
    for run in (model, model.reverse, model.realnvp):
        with pytest.raises(ValueError, match=r"input has shape .*, expected \[batch, 6\] or \[batch, 6, 1, 1\]"):
            run(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_refused_types(dtype):
    with pytest.raises(TypeError, match="dtype"):
        VectorTransformer(small())(torch.zeros(4, 6, dtype=dtype))
    with pytest.raises(TypeError, match="input is a list"):
        VectorTransformer(small())([1.0])


# Config


def test_flat_and_nested_config():
    flat = {f"Transformer/{key}": value for key, value in small()["Transformer"].items()}
    assert list(VectorTransformer(flat).state_dict()) == list(VectorTransformer(small()).state_dict())
    assert FactorTransformer(flat).n_factors == 2
    assert FactorLoss({"Loss/rho": 0.5}).rho == FactorLoss({"Loss": {"rho": 0.5}}).rho == 0.5


@pytest.mark.parametrize("key", ["in_channel", "n_flow", "hidden_depth", "hidden_dim"])
def test_config_without_a_key(key):
    config = small()
    del config["Transformer"][key]
    for broken in (config, {}, {"Transformer": None}):
        with pytest.raises(KeyError, match="config lacks 'Transformer/"):
            VectorTransformer(broken)
    with pytest.raises(KeyError, match=f"'Transformer/{key}'"):
        VectorTransformer(config)


def test_config_that_is_none_or_does_not_fit():
    with pytest.raises(TypeError, match="config is a NoneType, expected a mapping"):
        VectorTransformer(None)
    with pytest.raises(ValueError, match=r"factor_config \[2, 3\] sums to 5, expected Transformer/in_channel = 6"):
        FactorTransformer(small(factor_config=[2, 3]))


def test_factors_by_size_and_by_number():
    sizes = lambda model: [part.shape[1] for part in model(torch.randn(3, 7))[0]]  # noqa: E731
    assert sizes(FactorTransformer(small(7, factor_config=[1, 4, 2]))) == [1, 4, 2]
    assert sizes(FactorTransformer(small(7, n_factors=3))) == [3, 3, 1]
    assert sizes(FactorTransformer(small(7))) == [4, 3]


# Checkpoints


def test_loading_reports_published_names():
    model = VectorTransformer(small())
    state = model.state_dict()
    del state["realnvp.flow.1.flow.1.t.0.main.2.bias"]
    state["realnvp.flow.0.flow.1.s.0.main.0.weight"] = torch.zeros(16, 4)
    state["realnvp.flow.2.flow.0.loc"] = torch.zeros(1, 6, 1, 1)
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state)
    text = str(error.value)
    assert 'Missing key(s) in state_dict: "realnvp.flow.1.flow.1.t.0.main.2.bias"' in text
    assert 'Unexpected key(s) in state_dict: "realnvp.flow.2.flow.0.loc"' in text
    assert "size mismatch for realnvp.flow.0.flow.1.s.0.main.0.weight: copying a param with shape" in text


def test_loading_an_array_names_its_key():
    model = VectorTransformer(small())
    state = model.state_dict()
    key = "realnvp.flow.1.flow.1.t.0.main.2.bias"
    state[key] = state[key].numpy()
    with pytest.raises(RuntimeError, match=rf"{key} is a ndarray, expected a torch\.Tensor"):
        model.load_state_dict(state)


def test_loading_part_of_a_checkpoint():
    model, other = VectorTransformer(small()), VectorTransformer(small())
    key = "realnvp.flow.1.flow.1.s.1.main.2.weight"
    before, theirs = model.state_dict(), other.state_dict()
    result = model.load_state_dict({key: theirs[key]}, strict=False)
    assert len(result.missing_keys) == len(before) - 1 and not result.unexpected_keys
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (theirs if name == key else before)[name]), name


def test_loading_refuses_nan_and_foreign_indices():
    model = VectorTransformer(small())
    state = model.state_dict()
    state["realnvp.flow.1.flow.1.s.0.main.4.bias"][0] = float("nan")
    with pytest.raises(ValueError, match=r"realnvp\.flow\.1\.flow\.1\.s\.0\.main\.4\.bias holds NaN or Inf"):
        model.load_state_dict(state)
    state = model.state_dict()
    state["realnvp.flow.0.flow.2.backward_shuffle_idx"] = state["realnvp.flow.0.flow.2.backward_shuffle_idx"].roll(1)
    with pytest.raises(ValueError, match="backward_shuffle_idx is not the inverse"):
        model.load_state_dict(state)
    state = model.state_dict()
    state["realnvp.flow.0.flow.2.forward_shuffle_idx"][0] = 77
    with pytest.raises(ValueError, match="forward_shuffle_idx is not a permutation of 0 … 5"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    "copier",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: _loaded(VectorTransformer(small()), reload(model.state_dict())),
        lambda model: _loaded(VectorTransformer(small()), model.state_dict(), assign=True),
    ],
    ids=["deepcopy", "pickle", "file", "assign"],
)
def test_copies(copier):
    model = VectorTransformer(small())
    model(torch.randn(8, 6))
    twin = copier(model)
    x = 4 * torch.randn(8, 6) + 3
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), model.state_dict().values(), strict=True))


def _loaded(model: nn.Module, state, **kwargs) -> nn.Module:
    model.load_state_dict(state, strict=True, **kwargs)
    return model


def test_a_step_moves_every_published_parameter():
    model = VectorTransformer(small())
    x = torch.randn(8, 6)
    model(x)
    before = model.state_dict()
    Loss({})(*model(x), 0)[0].backward()
    torch.optim.Adam(model.parameters(), lr=1e-2).step()
    for key, tensor in model.state_dict().items():
        fixed = key.endswith(("initialized", "shuffle_idx"))
        assert torch.equal(tensor, before[key]) == fixed, key


def test_same_seed_same_model_as_composed_of_modules():
    """The stacked flow draws what the modules draw, in their order."""
    modules = [VectorActNorm, DoubleVectorCouplingBlock, Shuffle]
    torch.manual_seed(4)
    stacked = EfficientVRNVP(modules, 6, 2, 16, 1)
    torch.manual_seed(4)
    composed = nn.ModuleDict({"flow": nn.ModuleList(Flow(modules, 6, 16, 1) for _ in range(2))})
    want, got = composed.state_dict(), stacked.state_dict()
    assert list(got) == list(want)
    assert all(torch.equal(got[key], want[key]) and got[key].dtype == want[key].dtype for key in want)


# Single blocks


def test_stacked_flow_is_its_modules_one_after_the_other():
    modules = [VectorActNorm, DoubleVectorCouplingBlock, Shuffle]
    stacked = EfficientVRNVP(modules, 7, 3, 16, 1).double()
    blocks = nn.ModuleList(Flow(modules, 7, 16, 1) for _ in range(3)).double()
    blocks.load_state_dict(stacked.flow.state_dict(), strict=True)
    x = 2 * torch.randn(5, 7, dtype=torch.float64) + 1
    z, logdet = stacked(x)
    h, total = x, 0
    for block in blocks:
        h, logdet_i = block(h, condition=None)
        total = total + logdet_i
    torch.testing.assert_close((z, logdet), (h, total), rtol=1e-12, atol=1e-12)
    for block in reversed(blocks):
        h = block(h, reverse=True)
    torch.testing.assert_close(h, x, rtol=1e-10, atol=1e-10)
    back, nothing = stacked.reverse(z)
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
    assert nothing is None


@pytest.mark.parametrize(
    "modules",
    [[VectorActNorm, DoubleVectorCouplingBlock], [Shuffle, DoubleVectorCouplingBlock, VectorActNorm, Shuffle]],
)
def test_other_lists_of_modules(modules):
    flow = EfficientVRNVP(modules, 6, 2, 16, 1).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    z, logdet = flow(x)
    assert z.shape == (5, 6) and logdet.shape == (5,)
    torch.testing.assert_close(flow(z, reverse=True)[0], x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [6, 7])
def test_coupling_block(channels, n_blocks):
    block = DoubleVectorCouplingBlock(channels, 16, depth=1, n_blocks=n_blocks).double()
    x = torch.randn(4, channels, dtype=torch.float64)
    y, logdet = block(x)
    torch.testing.assert_close(block(y, reverse=True), x, rtol=1e-11, atol=1e-11)
    jacobian = torch.autograd.functional.jacobian(lambda row: block(row[None])[0][0], x[0])
    torch.testing.assert_close(logdet[0], torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-10, atol=1e-10)


def test_vector_actnorm_over_space():
    norm = VectorActNorm(3)
    x = 3 * torch.randn(4, 3, 5, 6) + 1
    y, logdet = norm(x)
    assert y.shape == x.shape and logdet.shape == (4,)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.std((0, 2, 3)), torch.ones(3), rtol=0, atol=1e-2)
    torch.testing.assert_close(logdet, (30 * norm.scale.log().sum()).expand(4))
    torch.testing.assert_close(norm.reverse(y), x, rtol=1e-5, atol=1e-5)
    assert norm(torch.randn(1, 3))[0].shape == (1, 3)
    assert torch.is_tensor(VectorActNorm(3, logdet=False)(x))
    with pytest.raises(ValueError, match=r"VectorActNorm: input has shape \[4, 2\], expected \[batch, 3\]"):
        norm(torch.zeros(4, 2))


def test_shuffle():
    shuffle = Shuffle(6)
    x = torch.randn(4, 6, 2, 2)
    y, logdet = shuffle(x)
    assert logdet == 0 and torch.equal(shuffle(y, reverse=True), x)
    assert list(shuffle.state_dict()) == ["forward_shuffle_idx", "backward_shuffle_idx"]
    for shape in ((4, 7), (4, 5), (6,)):
        with pytest.raises(ValueError, match=r"Shuffle: x has shape .*, expected \[batch, 6, …\]"):
            shuffle(torch.zeros(shape))


def test_fully_connected_net():
    net = BasicFullyConnectedNet(4, 1, hidden_dim=8, use_tanh=True, use_bn=True, out_dim=3)
    kinds = [type(layer).__name__ for layer in net.main]
    hidden = ["Linear", "BatchNorm1d", "LeakyReLU"]
    assert kinds == [*hidden, *hidden, "Linear", "Tanh"]
    out = net(torch.randn(5, 4))
    assert out.shape == (5, 3) and out.abs().max() < 1
    assert BasicFullyConnectedNet(4, 2)(torch.randn(5, 4)).shape == (5, 4)
