"""Latents from files: every kind comes in as it was written, and everything that is wrong is named."""

import json
import os
import re

import numpy as np
import pytest
import torch

from iin_fast.data import Latents, load_latents, save_arrays

save_file = pytest.importorskip("safetensors.torch").save_file

Z = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
LABELS = np.array([[0, 1], [1, -1], [2, 0], [0, 0], [1, 1], [-1, -1]])


@pytest.fixture
def write(tmp_path):
    def write(**arrays):
        np.savez(tmp_path / "latents.npz", **arrays)
        return tmp_path / "latents.npz"

    return write


def test_samples_with_labels(write):
    latents = load_latents(write(z=Z, labels=LABELS, names=["digit", "color"]))
    assert latents.kind == "labels" and (latents.n, latents.dim) == (6, 3)
    assert repr(latents) == "Latents(n=6, dim=3, kind='labels', names=['digit', 'color'])"
    assert torch.equal(latents.z, torch.from_numpy(Z)) and latents.labels.tolist() == LABELS.tolist()
    assert load_latents(write(z=Z, labels=LABELS)).names == ("0", "1")
    assert load_latents(write(z=Z, labels=LABELS > 0)).labels.dtype == torch.int64


def test_pairs(write):
    latents = load_latents(write(za=Z, zb=-Z, factor=np.array([0, 1, 2, 0, 1, 0]), names=["a", "b", "c"]))
    assert latents.kind == "pairs" and latents.n == 12
    assert torch.equal(latents.z[6:], -latents.z[:6])
    assert latents.shared.int().argmax(1).tolist() == [0, 1, 2, 0, 1, 0]
    both = np.array([[True, False], [True, True]] * 3)
    assert load_latents(write(za=Z, zb=Z, shared=both)).shared.tolist() == both.tolist()
    texts = [str(i) for i in range(12)]
    assert load_latents(write(za=Z, zb=Z, shared=both, images=texts)).images.tolist() == texts


def test_alone_and_types(write):
    latents = load_latents(write(z=Z))
    assert latents.kind == "unlabelled" and latents.labels is None and latents.names == ()
    assert load_latents(write(z=Z.astype(np.float64))).z.dtype == torch.float64
    assert load_latents(write(z=Z.astype(np.float16))).z.dtype == torch.float32
    assert load_latents(write(z=Z, images=["one"] * 6)).images.tolist() == ["one"] * 6


def test_safetensors(tmp_path):
    file = tmp_path / "latents.safetensors"
    tensors = {"z": torch.from_numpy(Z).bfloat16(), "labels": torch.from_numpy(LABELS)}
    save_file(tensors, file, {"names": json.dumps(["digit", "color"])})
    latents = load_latents(file)
    assert latents.z.dtype == torch.float32 and torch.equal(latents.z, tensors["z"].float())
    assert latents.names == ("digit", "color") and latents.labels.tolist() == LABELS.tolist()
    file.write_bytes(b"12345678 no tensors")
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        load_latents(file)


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_what_is_saved_loads_again(tmp_path, ending):
    file = save_arrays(
        tmp_path / "new" / f"out{ending}", {"z": torch.from_numpy(Z), "labels": LABELS, "names": np.array(["a", "b"])}
    )
    latents = load_latents(file)
    assert np.array_equal(latents.z, Z) and latents.names == ("a", "b") and latents.labels.tolist() == LABELS.tolist()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    with pytest.raises(ValueError, match="expected .npz, .safetensors or .csv"):
        save_arrays(tmp_path / "out.pt", {"z": Z})


def test_fingerprint_sees_every_value():
    def print_of(z=Z, labels=LABELS, names=("a", "b")):
        return Latents.of(z, labels, names).fingerprint()

    other_z, other_labels = Z.copy(), LABELS.copy()
    other_z[3, 1] = np.nextafter(other_z[3, 1], 9)
    other_labels[5, 0] = 0
    prints = [print_of(), print_of(other_z), print_of(labels=other_labels), print_of(names=("a", "c"))]
    prints += [Latents.of(Z).fingerprint(), print_of(Z.astype(np.float64))]
    assert len(set(prints)) == len(prints) and print_of() == print_of(Z.copy())
    pairs = [Latents.of_pairs(Z, Z, factor, "ab").fingerprint() for factor in ([0, 1, 0, 1, 0, 1], [0, 1, 0, 1, 1, 1])]
    assert pairs[0] != pairs[1]


BAD = Z.copy()
BAD[4, 2] = np.inf


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"z": BAD}, ValueError, r"z has NaN or Inf in 1 places \(first: row 4, feature 2\)"),
        ({"z": np.ones((6, 3), int)}, TypeError, "z is int64, expected real floating-point"),
        ({"z": Z.astype(complex)}, TypeError, "z is complex128"),
        ({"z": Z[0]}, ValueError, r"z has shape \[3\], expected \[n, dim\]"),
        ({"z": Z[:0]}, ValueError, r"z has shape \[0, 3\]"),
        ({"z": Z[:, :1]}, ValueError, r"z has shape \[6, 1\]"),
        ({"z": Z, "labels": LABELS[:5]}, ValueError, r"labels have shape \[5, 2\], expected \[6, concepts\]"),
        ({"z": Z, "labels": LABELS[:, :0]}, ValueError, r"labels have shape \[6, 0\]"),
        ({"z": Z, "labels": LABELS * 1j}, TypeError, r"labels\[:, 0\] is complex128, expected integers"),
        ({"z": Z, "labels": LABELS - 1}, ValueError, "has the value -2, expected classes from 0, or -1"),
        ({"z": Z, "labels": LABELS, "names": ["a"]}, ValueError, r"names has 1 names \['a'\], expected 2"),
        ({"z": Z, "labels": LABELS, "names": ["a", "a"]}, ValueError, "names has one twice"),
        ({"z": Z, "labels": LABELS, "names": ["a", "residual"]}, ValueError, "take another name"),
        ({"z": Z, "labels": LABELS, "names": ["a", ""]}, TypeError, "names has '', expected a non-empty string"),
        ({"z": Z, "labels": LABELS, "names": [1, 2]}, TypeError, "names is int64"),
        ({"z": Z, "names": ["a"]}, ValueError, "there are no labels that they name"),
        (
            {"za": Z, "zb": Z, "factor": np.zeros(6, int), "images": ["x"] * 6},
            ValueError,
            r"shape \[6\], expected \[12",
        ),
        ({"za": Z, "zb": Z, "factor": LABELS[:, 0], "labels": LABELS}, ValueError, "holds labels beside pairs"),
        ({"z": Z, "images": ["x"]}, ValueError, r"images has shape \[1\], expected \[6"),
        ({"labels": LABELS}, ValueError, r"but no z \[n, dim\]"),
        ({"z": Z, "za": Z}, ValueError, "expected samples or pairs, not both"),
        ({"za": Z, "factor": np.zeros(6, int)}, ValueError, "but zb is missing"),
        ({"za": Z, "zb": Z}, ValueError, "need one of factor"),
        ({"za": Z, "zb": Z[:3], "factor": np.zeros(6, int)}, ValueError, r"zb has shape \[3, 3\], expected \[6, 3\]"),
        ({"za": Z, "zb": Z.astype(float), "factor": np.zeros(6, int)}, TypeError, "zb is torch.float64, expected"),
        ({"za": Z, "zb": BAD, "factor": np.zeros(6, int)}, ValueError, "zb has NaN or Inf"),
        ({"za": Z, "zb": Z, "factor": np.zeros(6)}, TypeError, "factor is float64"),
        ({"za": Z, "zb": Z, "factor": np.zeros(5, int)}, ValueError, r"factor has shape \[5\], expected \[6\]"),
        ({"za": Z, "zb": Z, "factor": np.array([0, -1] * 3)}, ValueError, "factor has the value -1"),
        ({"za": Z, "zb": Z, "factor": np.array([0, 2] * 3)}, ValueError, "no pair shares '1'"),
        ({"za": Z, "zb": Z, "factor": np.array([0, 2] * 3), "names": ["a", "b"]}, ValueError, "expected below 2"),
        ({"za": Z, "zb": Z, "shared": np.zeros((6, 2))}, TypeError, "shared is float64, expected bool"),
        ({"za": Z, "zb": Z, "shared": np.ones((5, 2), bool)}, ValueError, r"shared has shape \[5, 2\]"),
    ],
)
def test_what_is_wrong_is_named(write, arrays, error, message):
    with pytest.raises(error, match=message) as raised:
        load_latents(write(**arrays))
    assert "latents.npz: " in str(raised.value)


def test_files_that_are_none(tmp_path, write):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_latents(tmp_path / "none.npz")
    (tmp_path / "z.mat").write_text("1,2")
    with pytest.raises(ValueError, match="ends in '.mat', expected one of .npz, .npy, .safetensors"):
        load_latents(tmp_path / "z.mat")
    for content in (b"", b"no archive"):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(ValueError, match="damaged or no .npz file"):
            load_latents(tmp_path / "bad.npz")
    whole = write(z=Z).read_bytes()
    (tmp_path / "bad.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or no .npz file"):
        load_latents(tmp_path / "bad.npz")
    with pytest.raises(ValueError, match="Python objects"):
        load_latents(write(z=np.array([{}, None], dtype=object)))


def test_labels_by_name():
    latents = Latents.of(torch.from_numpy(Z), {"digit": [0, 1, 0, 1, 0, 1], "color": torch.arange(6)})
    assert latents.names == ("digit", "color") and latents.labels[:, 1].tolist() == list(range(6))
    with pytest.raises(ValueError, match=r"labels\['digit'\] has shape \[2\], expected \[6\] like z"):
        Latents.of(Z, {"digit": [0, 1]})


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_error_while_writing_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch, step):
    file = save_arrays(tmp_path / "z.npz", {"z": np.zeros((2, 3))})
    before = file.read_bytes()

    def full(*paths):
        raise OSError(28, "No space left on device", *map(str, paths[:1] if step == "replace" else ()))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match=f"No space left on device: '{re.escape(str(file))}'$"):
        save_arrays(file, {"z": np.ones((2, 3))})
    assert os.listdir(tmp_path) == ["z.npz"] and file.read_bytes() == before
