"""From a model and data in any holder to latents and a file of them."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from iin_fast.data import encode_all, from_layer, load_latents, write_latents

X = torch.randn(11, 3, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(11) % 3


class Samples(Dataset):
    def __len__(self):
        return 11

    def __getitem__(self, i):
        return X[i], {"digit": int(Y[i]), "color": "red" if i % 2 else "blue"}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(48), nn.Linear(48, 5))


HOLDERS = {
    "tensor": lambda: X,
    "array": lambda: X.numpy(),
    "list": lambda: list(X),
    "list of arrays": lambda: list(X.numpy()),
    "iterator": lambda: iter(X),
    "generator of pairs": lambda: ((x, y) for x, y in zip(X, Y, strict=True)),
    "tensors": lambda: TensorDataset(X),
    "pairs": lambda: TensorDataset(X, Y),
    "dataset": Samples,
    "stream": Stream,
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=4),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_every_holder_gives_the_same_latents(module, holder):
    expected = module.eval()(X).detach()
    module.train()
    module[2].eval()
    before = [part.training for part in module.modules()], {k: v.clone() for k, v in module.state_dict().items()}
    layer = from_layer(module, "3")
    for model in (module, layer, lambda x: layer.encode(x).numpy()):
        z = encode_all(model, HOLDERS[holder](), batch=4)
        torch.testing.assert_close(z, expected)
        assert not z.requires_grad
    assert [part.training for part in module.modules()] == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in module.state_dict().items())
    assert not any(part._forward_hooks for part in module.modules())


def test_pictures_in_bytes():
    pictures = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)
    expected = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    for given in (pictures, list(pictures), torch.from_numpy(pictures)):
        torch.testing.assert_close(encode_all(nn.Flatten(), given, batch=3), expected.flatten(1))


def test_texts_and_inputs_by_name():
    lengths = encode_all(lambda texts: torch.tensor([[len(text), 1.0] for text in texts]), ["a", "bcd", "ef"], batch=2)
    assert lengths[:, 0].tolist() == [1, 3, 2]

    class Sum(nn.Module):
        def forward(self, a, b):
            return torch.stack([a + b, a - b], 1)

    samples = [{"a": torch.tensor(float(i)), "b": torch.tensor(1.0), "label": i % 2} for i in range(5)]
    assert encode_all(Sum(), samples, batch=2)[:, 0].tolist() == [1, 2, 3, 4, 5]


def test_a_file_in_one_call(module, tmp_path):
    latents = load_latents(write_latents(tmp_path / "a.npz", module, Samples(), batch=4))
    torch.testing.assert_close(latents.z, encode_all(module, X))
    assert latents.names == ("digit", "color") and latents.labels[:, 0].tolist() == Y.tolist()
    assert latents.classes == {"color": ("blue", "red")}
    latents = load_latents(write_latents(tmp_path / "b.safetensors", module, TensorDataset(X, Y), names=["digit"]))
    assert latents.names == ("digit",) and latents.labels[:, 0].tolist() == Y.tolist()
    assert load_latents(write_latents(tmp_path / "c.npz", module, X)).kind == "unlabelled"
    given = write_latents(tmp_path / "d.npz", module, TensorDataset(X, Y), {"odd": Y % 2}, images=[f"t{i}" for i in Y])
    assert load_latents(given).names == ("odd",) and load_latents(given).images[2] == "t2"
    with pytest.raises(ValueError, match="labels have texts or fractions, which an .npz file can hold"):
        write_latents(tmp_path / "e.safetensors", module, Samples())


def test_what_is_wrong_is_named(module):
    for call, message in (
        (lambda: encode_all(3, X), "adapter is a int, expected an object with encode"),
        (lambda: encode_all(module, X[:0]), "x is empty"),
        (lambda: encode_all(module, 7), "x is a int, expected an array, a sequence"),
        (lambda: encode_all(module, X, batch=0), "batch is 0"),
        (lambda: encode_all(nn.Identity(), X), r"latents have shape \[11, 3, 4, 4\], expected \[batch, dim\]"),
        (lambda: encode_all(lambda x: x.flatten(1).long(), X), "latents"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
