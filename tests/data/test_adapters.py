"""Adapters: what a layer says, and what the network makes of an edited latent."""

import pytest
import torch
from torch import nn

from iin_fast import IIN
from iin_fast.data import (
    Adapter,
    encode_all,
    from_huggingface,
    from_layer,
    pool_features,
    unpool_features,
)

SHAPES = [((4, 6, 3, 5), None), ((4, 3, 5, 6), "last"), ((4, 15, 6), None), ((4, 6, 15), "first"), ((4, 6), None)]


@pytest.mark.parametrize("pool", ["mean", "max", "first", "flatten", "positions"])
@pytest.mark.parametrize("shape, channels", SHAPES)
def test_pool(shape, channels, pool):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = pool_features(features, pool, channels)
    last = channels == "last" or (channels is None and len(shape) == 3)
    rows = features if last or len(shape) == 2 else features.movedim(1, -1)
    rows = rows.reshape(4, -1, 6)  # [batch, positions, channels]
    expected = {
        "mean": rows.mean(1),
        "max": rows.max(1).values,
        "first": rows[:, 0],
        "flatten": features.reshape(4, -1),
        "positions": rows.reshape(-1, 6),
    }[pool]
    torch.testing.assert_close(z, expected)
    if pool == "max":
        with pytest.raises(ValueError, match="pool is 'max', expected one of 'mean'"):
            unpool_features(z, features, pool, channels)
        return
    torch.testing.assert_close(unpool_features(z, features, pool, channels), features)
    edited = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    back = unpool_features(edited, features, pool, channels)
    assert back.shape == features.shape
    torch.testing.assert_close(pool_features(back, pool, channels), edited)


class Net(nn.Module):
    """A convolutional classifier with a spatial layer, a vector layer, and one that gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.pair = Pair()
        self.neck = nn.Linear(6, 5)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        features, _ = self.pair(self.body(x))
        return self.head(self.drop(self.neck(scale * features.mean((2, 3)))))


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return 2 * x, 3


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_vector_layer(net, images):
    adapter = from_layer(net, "neck")
    assert isinstance(adapter, Adapter)
    expected = net.neck(2 * net.body(images).mean((2, 3)))
    z = adapter.encode(images)
    torch.testing.assert_close(z, expected)
    assert not z.requires_grad
    torch.testing.assert_close(adapter.resume(images, z), net(images))
    edited = torch.randn_like(z)
    torch.testing.assert_close(adapter.resume(images, edited), net.head(edited))
    assert not any(module._forward_hooks for module in net.modules())  # nothing stays behind


@pytest.mark.parametrize("pool", ["mean", "flatten", "positions", "first"])
@pytest.mark.parametrize("layer", ["body.1", "pair"])
def test_a_spatial_layer_and_back(net, images, layer, pool):
    adapter = from_layer(net, layer, pool=pool)
    scale = 1 if layer == "body.1" else 2
    features = scale * net.body(images)
    torch.testing.assert_close(adapter.features(images), features)
    z = adapter.encode(images)
    torch.testing.assert_close(adapter.resume(images, z), net(images))
    torch.testing.assert_close(adapter.resume(images, 3 * z + 1), rest(net, 3 * z + 1, features, pool, 2 / scale))


def rest(net: Net, z: torch.Tensor, features: torch.Tensor, pool: str, scale: float) -> torch.Tensor:
    edited = unpool_features(z, features, pool)
    return net.head(net.neck(scale * edited.mean((2, 3))))


def test_the_rest_of_a_classifier_reads_a_swap(net, images):
    """With an IIN between: swapping a factor with one's own changes nothing, swapping all gives the donor's answer."""
    adapter = from_layer(net, "neck")
    z = adapter.encode(images)
    iin = IIN(5, {"a": 2}, n_flows=2, hidden_dim=8, generator=torch.Generator().manual_seed(0))
    iin(z)
    with torch.no_grad():
        own, all_of_it = iin.swap(z, z, "a"), iin.swap(z, z.flip(0), ["a", "residual"])
    torch.testing.assert_close(adapter.resume(images, own), net(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.resume(images, all_of_it), net(images).flip(0), rtol=1e-4, atol=1e-4)


@pytest.fixture
def overwriting() -> nn.Sequential:
    """The second layer's output is overwritten by the third; the fifth's, a vector, by the sixth."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 5)
    return nn.Sequential(*layers, nn.ReLU(inplace=True), nn.Linear(5, 2)).eval()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("pool", ["mean", "max", "first", "flatten", "positions"])
@pytest.mark.parametrize("last", [1, 4])
def test_a_layer_whose_output_is_overwritten(overwriting, images, last, pool, inference):
    with torch.inference_mode(inference):
        expected = overwriting[: last + 1](images)
        assert (expected < 0).any()  # which ReLU overwrites
        adapter = from_layer(overwriting, str(last), pool=pool)
        assert torch.equal(adapter.features(images), expected)
        z = adapter.encode(images)
        assert torch.equal(z, pool_features(expected, pool))
        if pool != "max":
            kept = z.clone()
            torch.testing.assert_close(adapter.resume(images, z), overwriting(images))
            assert torch.equal(z, kept)


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of order")


@pytest.mark.parametrize("use", ["encode", "features", "resume", "an exception", "a wrong layer"])
def test_the_network_leaves_as_it_came(net, images, use):
    """Its modes, which may differ by module, its statistics and hooks."""
    net.body.append(nn.BatchNorm2d(6))
    net.train()
    net.neck.eval()
    calls = []
    net.neck.register_forward_hook(lambda *_: calls.append("hook"))
    modes = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    adapter = from_layer(net, "unused" if use == "a wrong layer" else "neck")
    assert [module.training for module in net.modules()] == modes
    if use == "an exception":
        net.head = Failing()
        with pytest.raises(RuntimeError, match="out of order"):
            adapter.encode(images)
    elif use == "a wrong layer":
        with pytest.raises(ValueError, match="ran 0 times"):
            adapter.encode(images)
    elif use == "resume":
        adapter.resume(images, torch.zeros(5, 5))
    else:
        found = getattr(adapter, use)(images)
        assert torch.equal(found, getattr(adapter, use)(images))  # dropout and batch statistics are off
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(len(module._forward_hooks) == (module is net.neck) for module in net.modules())
    assert set(calls) == {"hook"}


def test_encode_in_the_middle_of_a_training_step(net, images):
    """The gradients of the step are those without it."""
    net.train()

    def gradients(between):
        torch.manual_seed(3)
        loss = net(images).square().sum()
        between()
        found = torch.autograd.grad(loss, list(net.body.parameters()))
        return found

    expected = gradients(lambda: None)
    adapter = from_layer(net, "body.0", pool="flatten")
    for got, want in zip(gradients(lambda: adapter.encode(images)), expected, strict=True):
        assert torch.equal(got, want)


def test_ways_to_call(net, images):
    adapter = from_layer(net, "neck", decode=lambda z: z + 1)
    assert torch.equal(adapter.encode((images,)), adapter.encode(images))
    half = adapter.encode({"x": images, "scale": 0.5})
    torch.testing.assert_close(half, net.neck(net.body(images).mean((2, 3))))
    assert torch.equal(adapter.decode(half), half + 1)
    assert not hasattr(from_layer(net, "neck"), "decode")
    torch.testing.assert_close(encode_all(adapter, images, batch=2), adapter.encode(images))
    assert torch.equal(from_layer(net, "").encode(images), net(images))  # the network's own output


def test_sampling_through_a_decoder():
    """An unsupervised IIN on an autoencoder's latents: its samples, decoded, look like the data; noise does not."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(20, 4, generator=generator))[0]

    class LinearAutoencoder:  # the five lines
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x @ basis

        def decode(self, z: torch.Tensor) -> torch.Tensor:
            return z @ basis.T

    model = LinearAutoencoder()
    angle = 6.3 * torch.rand(3000, generator=generator)
    ring = torch.stack([angle.cos(), angle.sin(), (2 * angle).cos(), (2 * angle).sin()], 1)  # latents on a curve
    data = (ring + 0.05 * torch.randn(3000, 4, generator=generator)) @ basis.T
    z = encode_all(model, data)
    iin = IIN(4, n_flows=6, hidden_dim=64, hidden_depth=1, generator=generator)
    optimizer = torch.optim.Adam(iin.parameters(), 3e-3)
    for _ in range(400):
        loss = -iin.log_prob(z[torch.randint(len(z), (256,), generator=generator)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pictures = model.decode(iin.sample(500, generator))
    noise = model.decode(z.mean(0) + z.std(0) * torch.randn(500, 4, generator=generator))
    distance = torch.cdist(pictures, data).min(1).values.mean() / torch.cdist(noise, data).min(1).values.mean()
    assert distance < 0.5


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda n, x: from_layer(3, "neck"), TypeError, "module is a int"),
        (lambda n, x: from_layer(n, "nack"), ValueError, "layer is 'nack', expected one of body"),
        (lambda n, x: from_layer(n, "neck", pool="median"), ValueError, "pool is 'median'"),
        (lambda n, x: from_layer(n, "neck", channels="middle"), ValueError, "channels is 'middle'"),
        (lambda n, x: from_layer(n, "unused").encode(x), ValueError, "'unused' ran 0 times"),
        (lambda n, x: from_layer(Twice(), "inner").encode(x), ValueError, "ran 2 times"),
        (lambda n, x: from_layer(n, "neck").resume(x, torch.zeros(5, 4)), ValueError, r"z has shape \[5, 4\]"),
        (lambda n, x: from_layer(n, "body").resume(x, torch.zeros(5, 6).double()), TypeError, "z has dtype float64"),
        (lambda n, x: pool_features(x[0, 0, 0]), ValueError, r"features has shape \[8\]"),
        (lambda n, x: pool_features(x.long()), TypeError, "features has dtype int64"),
        (lambda n, x: encode_all(3, x), TypeError, r"adapter is a int, expected an object with encode\(x\)"),
        (lambda n, x: encode_all(from_layer(n, "neck"), x[:0]), ValueError, "x is empty"),
        (lambda n, x: encode_all(from_layer(n, "neck"), x, 0), ValueError, "batch is 0"),
        (lambda n, x: from_huggingface(n, pool="flatten"), ValueError, "pool is 'flatten'"),
        (lambda n, x: from_huggingface(n, 3), TypeError, "tokenizer is a int"),
        (lambda n, x: from_huggingface(3), TypeError, "model is a int"),
        (lambda n, x: from_huggingface(n, layer="last"), TypeError, "layer is 'last'"),
        (lambda n, x: from_huggingface(n).encode("text"), TypeError, "texts need a tokenizer"),
        (lambda n, x: from_huggingface(n, len).encode([3]), TypeError, "one or more strings"),
    ],
)
def test_bad_input(net, images, call, error, message):
    with pytest.raises(error, match=message):
        call(net, images)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.inner(x))


TEXTS = ["a b c", "a", "c b a c b a", "b c"]


class Tokenizer:
    """Words to numbers, padded; as a Hugging Face tokenizer is called."""

    def __call__(self, texts, padding, truncation, return_tensors):
        assert padding and truncation and return_tensors == "pt"
        rows = [["abc".index(word) + 1 for word in text.split()] for text in texts]
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.mark.parametrize("pool", ["mean", "max", "first", "last"])
def test_huggingface_texts(pool):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertModel(config).train()
    adapter = from_huggingface(model, Tokenizer(), pool=pool)
    z = adapter.encode(TEXTS)
    assert z.shape == (4, 16) and isinstance(adapter, Adapter)
    assert all(module.training for module in model.modules())
    model.eval()
    with torch.no_grad():
        for row, text in enumerate(TEXTS):  # one by one there is no padding
            states = model(**Tokenizer()([text], True, True, "pt")).last_hidden_state[0]
            expected = {"mean": states.mean(0), "max": states.max(0).values, "first": states[0], "last": states[-1]}
            torch.testing.assert_close(z[row], expected[pool], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encode_all(adapter, TEXTS, batch=3), z, rtol=1e-4, atol=1e-5)
    last = from_huggingface(model, Tokenizer(), pool=pool, layer=-1)
    torch.testing.assert_close(last.encode(TEXTS), z)
    embedded = from_huggingface(model, Tokenizer(), pool=pool, layer=0).encode(TEXTS)
    assert not torch.allclose(embedded, z)
    with pytest.raises(ValueError, match="layer is 7, expected -3 to 2"):
        from_huggingface(model, Tokenizer(), layer=7).encode(TEXTS)


def test_huggingface_pictures(images):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    model = transformers.ViTModel(config).eval()
    z = from_huggingface(model, pool="first").encode(images)
    with torch.no_grad():
        expected = model(pixel_values=images).last_hidden_state[:, 0]
    torch.testing.assert_close(z, expected)
    assert torch.equal(from_huggingface(model, pool="first").encode({"pixel_values": images}), z)
