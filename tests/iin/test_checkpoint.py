"""save and load: bit for bit, whole or not at all, and nothing foreign or damaged comes in."""

import json
import os
import sys

import pytest
import safetensors.torch
import torch

from iin_fast.files import checksum
from iin_fast.iin import IIN, checkpoint


@pytest.fixture
def model(make) -> IIN:
    return make(dtype=torch.float32)


@pytest.fixture
def folder(model, tmp_path):
    model.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factors", [{"digit": 3, "color": 2}, {"a": 8}, None])
@pytest.mark.parametrize("options", [{}, {"coupling": "spline", "bins": 5, "tail_bound": 4.0}])
def test_round_trip(make, tmp_path, dtype, factors, options):
    model = make(8, factors, dtype, **options)
    model.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    loaded = IIN.load(str(tmp_path))
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.config == model.config
    assert list(loaded.sizes) == list(model.sizes)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    z = torch.randn(5, 8, dtype=dtype)
    assert torch.equal(loaded.log_prob(z), model.log_prob(z))


def test_a_fresh_model_still_starts_from_its_first_batch(tmp_path):
    model = IIN(6, n_flows=2, hidden_dim=8, generator=torch.Generator().manual_seed(0))
    model.save(tmp_path)
    loaded = IIN.load(tmp_path)
    z = 4 * torch.randn(32, 6) + 2
    assert torch.equal(loaded(z)[0].tensor, model(z)[0].tensor)


def test_load_to_device(folder):
    assert IIN.load(folder, device="meta").device.type == "meta"


def test_save_over_another(make, folder):
    other = make(6, {"x": 2}, torch.float32)
    other.save(folder)
    assert IIN.load(folder).config == other.config
    assert len(os.listdir(folder)) == 2


def test_config_is_plain(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config == {
        "format": "iin_fast.IIN",
        "version": 1,
        "dim": 8,
        "factors": {"digit": 3, "color": 2, "residual": 3},
        "n_flows": 3,
        "hidden_dim": 16,
        "hidden_depth": 1,
        "coupling": "affine",
        "context_dim": 0,
        "dtype": "float32",
    }


def test_interrupted_save_keeps_the_old_one(make, folder, model, monkeypatch):
    expected = IIN.load(folder).state_dict()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", fail)
    with pytest.raises(OSError, match="can't write to path .*No space left"):
        make(seed=3, dtype=torch.float32).save(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    for name, tensor in IIN.load(folder).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_folder_that_cannot_be_made(model, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="IIN.save: can't write to path"):
            model.save(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_folder(model, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="IIN.save: can't write to path"):
        model.save(tmp_path)


def test_nan_is_not_saved(model, folder):
    name = next(name for name, _ in model.named_parameters())
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=f"IIN.save: parameter '{name}' has NaN or Inf"):
        model.save(folder)
    IIN.load(folder)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_missing_file(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        IIN.load(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file; IIN.load expects the folder"):
        IIN.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "damaged or no JSON file"),
        (b"\xff\xfe\x00garbage", "damaged or no JSON file"),
        (b'{"format": "iin_fast.IIN", "version"', "damaged or no JSON file"),
        (b'{"a": 1, "a": 2}', "a name twice"),
        (b"[" * 100_000, "damaged or no JSON file"),
        (b"[]", "holds a list, expected a JSON object"),
        (b'{"architectures": ["BertModel"], "hidden_size": 768}', "not written by IIN.save"),
        (b'{"format": "iin_fast.IIN", "version": 2}', "version 2 of the format, expected 1"),
        (b'{"format": "iin_fast.IIN"}', "version None"),
    ],
)
def test_bad_config(folder, content, message):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        IIN.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 10},
        {"factors": {"digit": 30}},
        {"factors": {"digit": 3, "residual": 1}},
        {"n_flows": 0},
        {"dtype": "int8"},
        {"extra": 1},
        {"dim": None},
        {"hidden_dim": "x"},
        {"dtype": []},
    ],
)
def test_config_that_describes_no_model(folder, change):
    rewrite(folder, config=change)
    with pytest.raises(ValueError, match="config.json: no valid configuration|model.safetensors: parameter"):
        IIN.load(folder)


def rewrite(folder, tensors=None, config=None):
    """A checkpoint whose two files agree with each other, with changed tensors or configuration."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    if tensors is not None:
        tensors(state)
    text = json.dumps({**json.loads((folder / "config.json").read_text()), **(config or {})})
    header = {"config": text, "crc32": checksum(state)}
    safetensors.torch.save_file(state, folder / "model.safetensors", header)
    (folder / "config.json").write_text(text)


def floating(state: dict[str, torch.Tensor]) -> str:
    return next(name for name, tensor in state.items() if tensor.is_floating_point())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop(floating(s)), "parameter '.*' is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "parameter 'extra' is not one of the model"),
        (lambda s: s.update({floating(s): torch.zeros(3)}), r"parameter '.*' has shape \[3\], expected"),
        (
            lambda s: s.update({floating(s): s[floating(s)].double()}),
            "parameter '.*' is torch.float64, expected torch.float32",
        ),
        (lambda s: s[floating(s)].view(-1)[:1].fill_(torch.nan), "parameter '.*' has NaN or Inf"),
        (lambda s: s[floating(s)].view(-1)[:1].fill_(torch.inf), "parameter '.*' has NaN or Inf"),
    ],
)
def test_bad_parameters(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=f"model.safetensors: {message}"):
        IIN.load(folder)


def test_foreign_safetensors(folder):
    safetensors.torch.save_file({"bert.embeddings": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors: a safetensors file, but not of an IIN"):
        IIN.load(folder)


def test_files_of_two_saves(make, folder, tmp_path):
    make(6, {"x": 2}, torch.float32).save(tmp_path / "other")
    (tmp_path / "other" / "config.json").replace(folder / "config.json")
    with pytest.raises(ValueError, match="model.safetensors: written with another configuration than config.json"):
        IIN.load(folder)


@pytest.mark.parametrize("content", [b"", b"garbage", bytes(100), b"\xff" * 100, b"PK\x03\x04" + bytes(200)])
def test_garbage_parameters(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors: damaged or no safetensors file"):
        IIN.load(folder)


def test_every_truncation_is_refused(folder):
    data = (folder / "model.safetensors").read_bytes()
    for size in (*range(0, 200, 7), *range(200, len(data), len(data) // 40), len(data) - 1):
        (folder / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(ValueError, match="model.safetensors"):
            IIN.load(folder)


def test_every_flipped_bit_is_refused_or_harmless(folder):
    data = (folder / "model.safetensors").read_bytes()
    expected = IIN.load(folder).state_dict()
    generator = torch.Generator().manual_seed(0)
    header = int.from_bytes(data[:8], "little") + 8
    places = [*range(8), *torch.randint(header, (60,), generator=generator).tolist()]
    places += torch.randint(header, len(data), (60,), generator=generator).tolist()
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        (folder / "model.safetensors").write_bytes(damaged)
        try:
            loaded = IIN.load(folder).state_dict()
        except ValueError as error:
            assert "model.safetensors" in str(error)
        else:
            assert place < header and all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_without_safetensors(model, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: model.save(folder), lambda: IIN.load(folder)):
        with pytest.raises(ImportError, match=r"pip install 'iin-fast\[io\]'"):
            call()
