"""Files that lie about their size, are broken, or use names that others keep: one line, at once, in little memory."""

import io
import json
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from iin_fast import IIN, Factors, PairSampler, concept_pairs
from iin_fast.data import Latents, load_latents, save_arrays
from iin_fast.iin.factors import factor_sizes

save_file = pytest.importorskip("safetensors.torch").save_file

Z = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
TAKEN = ["file", "allow_pickle", "__metadata__", "a.npy", "a\0b", "a\ud800"]


@pytest.mark.parametrize("name", TAKEN)
def test_names_that_files_keep_for_themselves_are_refused_where_they_enter(name, tmp_path):
    a, b, labels = torch.randn(4, 3), torch.randn(4, 3), np.arange(4)[:, None]
    for enter in (
        lambda: Latents.of(torch.randn(4, 3), labels, [name]),
        lambda: Latents.of_pairs(a, b, [0] * 4, [name]),
        lambda: factor_sizes(4, {name: 2}),
        lambda: IIN(4, {name: 2}, n_flows=1, hidden_dim=4),
        lambda: Factors({name: torch.ones(2, 2)}),
        lambda: concept_pairs(a, b, name=name),
        lambda: concept_pairs(a, b, rest=name),
        lambda: PairSampler(labels % 2, names=[name]),
        lambda: save_arrays(tmp_path / "x.npz", {name: Z}),
        lambda: save_arrays(tmp_path / "x.safetensors", {name: Z}),
    ):
        with pytest.raises(ValueError, match="take another name"):
            enter()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_every_other_name_comes_back(ending, tmp_path):
    from iin_fast.data.latents import read_arrays

    names = ["self", "args", "kwds", "compressed", "a/b", "../up", "ä 数", "<b>", "a\nb", "z.npz", " ", "__proto__"]
    arrays = {name: Z + i for i, name in enumerate(names)}
    found = read_arrays(save_arrays(tmp_path / f"x{ending}", arrays))
    assert set(found) == set(names) and all(np.array_equal(found[name], arrays[name]) for name in names)
    if ending == ".npz":  # numpy reads the same
        assert all(np.array_equal(array, arrays[name]) for name, array in np.load(tmp_path / "x.npz").items())


def header(shape, dtype="<f4"):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def archive(file, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, content in members:
            made.writestr(name, content)
    return file


def tensors(file, entries, body=b"", metadata=None):
    head = {
        name: {"dtype": kind, "shape": shape, "data_offsets": span} for name, (kind, shape, span) in entries.items()
    }
    text = json.dumps(head | ({} if metadata is None else {"__metadata__": metadata})).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return file


def model_folder(folder, **config):
    """A small model with another configuration, in both of its files."""
    IIN(8, {"digit": 3}, n_flows=2, hidden_dim=8).save(folder)
    found = json.loads((folder / "config.json").read_text()) | config
    from safetensors.torch import load_file

    from iin_fast.files import checksum

    state, text = load_file(folder / "model.safetensors"), json.dumps(found)
    save_file(state, folder / "model.safetensors", {"config": text, "crc32": checksum(state)})
    (folder / "config.json").write_text(text)
    return folder


def hostile(folder):
    """Files and folders of models, none of which holds what it says."""
    big = io.BytesIO()
    with zipfile.ZipFile(big, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as made:
        with made.open("z.npy", "w") as stream:
            stream.write(header((1 << 16, 1 << 10)))
            for _ in range(256):
                stream.write(bytes(1 << 20))
    (folder / "bomb.npz").write_bytes(big.getvalue())  # 256 MiB of zeros in a quarter of one
    yield folder / "bomb.npz"
    yield archive(folder / "huge.npz", [("z.npy", header((10**12,)))])
    yield archive(folder / "overflow.npz", [("z.npy", header((2**40, 2**40)))])
    yield archive(folder / "negative.npz", [("z.npy", header((-1, 3)))])
    yield archive(folder / "nothing.npz", [("z.npy", header((10**15, 10), "<U0"))])
    yield archive(folder / "long.npz", [("z.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 30) + b" " * 100)])
    yield archive(folder / "deep.npz", [("z.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000)])
    yield archive(folder / "text.npz", [("readme.txt", b"no array")])
    yield archive(folder / "pickle.npz", [("z.npy", header((3,), "|O"))])
    (folder / "one.npz").write_bytes(header((2, 3)) + bytes(24))  # an array under the name of an archive
    yield folder / "one.npz"
    (folder / "empty.npz").write_bytes(b"")
    yield folder / "empty.npz"
    yield tensors(folder / "far.safetensors", {"z": ("F32", [10**12, 3], [0, 12 * 10**12])})
    yield tensors(folder / "wrong.safetensors", {"z": ("F32", [10**6, 10**6], [0, 24])}, bytes(24))
    yield tensors(folder / "four.safetensors", {"z": ("F4", [6, 4], [0, 12])}, bytes(12))
    yield tensors(folder / "six.safetensors", {"z": ("F6_E2M3", [4, 4], [0, 12])}, bytes(12))
    names = "[" * 20_000 + "]" * 20_000
    yield tensors(folder / "nested.safetensors", {"z": ("F32", [2, 3], [0, 24])}, bytes(24), {"names": names})
    numbers = json.dumps([["a"], ["b", "c"]])
    yield tensors(folder / "ragged.safetensors", {"z": ("F32", [2, 3], [0, 24])}, bytes(24), {"names": numbers})
    (folder / "head.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    yield folder / "head.safetensors"
    for number, config in enumerate(
        [
            *({name: size} for name in ("n_flows", "hidden_dim", "hidden_depth", "dim") for size in (10**4, 10**30)),
            {"context_dim": 10**6},
            {"left_out": 10**9},
            {"flat": 10**9, "left_out": 0},
            {"n_flows": True},
            {"n_flows": "9" * 10**6},
            {"hidden_dim": -5},
            {"coupling": "linear", "left_out": 0, "dim": 10**5},
            {"coupling": "spline", "bins": 10**9},
            {"coupling": "spline", "tail_bound": 10**400},
            {"min_spread": [[]]},
            {"factors": {"file": 3}},
            {"factors": [["digit", 3]]},
        ]
    ):
        yield model_folder(folder / f"model-{number}", **config)


# Reads each and prints the seconds, what memory grew by at most, and the error.
READER = """
import json, resource, sys, time
from pathlib import Path
from iin_fast import IIN
from iin_fast.data import load_latents

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

load_latents(sys.argv[1])
IIN.load(sys.argv[2])
for place in map(Path, sys.argv[3:]):
    begin, before = time.perf_counter(), peak()
    try:
        (IIN.load if place.is_dir() else load_latents)(place)
        error = ""
    except (TypeError, ValueError) as found:
        error = str(found)
    print(json.dumps([place.name, time.perf_counter() - begin, peak() - before, error]))
"""


def test_what_lies_about_its_size_is_refused_at_once_and_in_little_memory(tmp_path):
    good = save_arrays(tmp_path / "good.npz", {"z": Z}), model_folder(tmp_path / "good")
    places = list(hostile(tmp_path))
    words = [sys.executable, "-c", READER, *map(str, [*good, *places])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(places) > 30
    for name, seconds, megabytes, error in found:
        assert error and name in error, name
        assert seconds < 1 and megabytes < 200, (name, seconds, megabytes)


def test_packed_archives_of_usual_latents_are_read(tmp_path):
    labels = np.zeros((10_000, 1), dtype=np.int64)
    np.savez_compressed(tmp_path / "z.npz", z=np.ones((10_000, 64), dtype=np.float32), labels=labels)
    assert load_latents(tmp_path / "z.npz").n == 10_000
