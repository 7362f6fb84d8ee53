"""Parts of files that are larger than memory: random samples and shards, of every kind of file."""

import numpy as np
import pytest
import torch

from iin_fast.data import load_latents
from iin_fast.data import rows as rows_module
from iin_fast.data.rows import chosen_rows, training_rows

N = 503
Z = np.random.default_rng(0).standard_normal((N, 4)).astype(np.float32)
DIGIT = np.arange(N) % 5


def test_rows_are_a_part_in_order():
    shards = [chosen_rows(N, None, (i, 7)) for i in range(7)]
    assert np.concatenate(shards).tolist() == list(range(N)) and {len(shard) for shard in shards} == {71, 72}
    sample = chosen_rows(N, 100, None)
    assert len(set(sample.tolist())) == 100 and (np.diff(sample) > 0).all()
    assert sample.tolist() == chosen_rows(N, 100, None).tolist() and sample.max() > 400
    assert np.isin(chosen_rows(N, 10, (3, 7)), shards[3]).all()
    assert len(chosen_rows(N, 9999, None)) == N
    many = np.bincount(chosen_rows(10**8, 10**5, None) // 10**7)  # from all over
    assert many.min() > 9000 and len(many) == 10
    for shard in ((7, 7), (0, N + 1), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="shard"):
            chosen_rows(N, None, shard)


@pytest.fixture(params=["folder", "npy", "npz", "pt", "parquet", "parts", "arrow", "stream", "csv", "datasets"])
def place(request, tmp_path):
    kind = request.param
    columns = {**{f"z{k}": Z[:, k] for k in range(4)}, "digit": DIGIT}
    if kind == "folder":
        np.save(tmp_path / "z.npy", Z)
        np.save(tmp_path / "digit.npy", DIGIT.astype(np.uint8))
        return tmp_path
    if kind == "npy":
        np.save(tmp_path / "z.npy", Z)
        return tmp_path / "z.npy"
    if kind == "npz":
        np.savez(tmp_path / "z.npz", z=Z, digit=DIGIT)
        return tmp_path / "z.npz"
    if kind == "pt":
        torch.save({"z": torch.from_numpy(Z), "digit": torch.from_numpy(DIGIT)}, tmp_path / "z.pt")
        return tmp_path / "z.pt"
    if kind == "datasets":
        pytest.importorskip("datasets").Dataset.from_dict({k: v.tolist() for k, v in columns.items()}).save_to_disk(
            tmp_path / "set"
        )
        return tmp_path / "set"
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import csv, parquet

    table = arrow.table(columns)
    if kind == "csv":
        csv.write_csv(table, tmp_path / "z.csv")
        return tmp_path / "z.csv"
    if kind == "parquet":
        parquet.write_table(table, tmp_path / "z.parquet", row_group_size=50)
        return tmp_path / "z.parquet"
    if kind == "parts":
        for k in range(4):
            parquet.write_table(table.slice(126 * k, 126), tmp_path / f"part-{k}.parquet")
        return tmp_path
    with (arrow.ipc.new_file if kind == "arrow" else arrow.ipc.new_stream)(
        str(tmp_path / "z.arrow"), table.schema
    ) as writer:
        writer.write_table(table, max_chunksize=60)
    return tmp_path / "z.arrow"


def test_of_every_kind_of_file(place):
    whole, sample = load_latents(place), load_latents(place, sample=80)
    rows = torch.from_numpy(chosen_rows(N, 80, None))
    assert whole.n == N and whole.sampled_from is None and sample.sampled_from == N
    assert torch.equal(sample.z, whole.z[rows]) and np.allclose(whole.z, Z)
    shards = [load_latents(place, shard=(i, 3)) for i in range(3)]
    assert torch.equal(torch.cat([shard.z for shard in shards]), whole.z)
    if whole.kind == "labels":
        assert torch.equal(sample.labels, whole.labels[rows]) and whole.labels[:, 0].tolist() == DIGIT.tolist()
        assert torch.equal(torch.cat([shard.labels for shard in shards]), whole.labels)
    assert load_latents(place, sample=N).sampled_from is None


def test_pairs_have_no_parts(tmp_path):
    np.savez(tmp_path / "pairs.npz", za=Z, zb=Z, factor=np.zeros(N, int))
    with pytest.raises(ValueError, match="holds pairs, of which no sample or shard is read"):
        load_latents(tmp_path / "pairs.npz", sample=5)


def test_a_training_samples_what_is_large(tmp_path, monkeypatch):
    np.save(tmp_path / "z.npy", Z)
    np.save(tmp_path / "digit.npy", DIGIT)
    assert training_rows(tmp_path) is None
    monkeypatch.setattr(rows_module, "LARGE", 1000)
    monkeypatch.setattr(rows_module, "ELEMENTS", 400)
    assert training_rows(tmp_path) == training_rows(tmp_path / "z.npy") == 100
    (tmp_path / "z.csv").write_bytes(bytes(2000))
    assert training_rows(tmp_path / "z.csv") is None and training_rows(tmp_path / "none.npy") is None


def test_a_file_larger_than_memory_is_sampled(tmp_path):
    """1 TB of holes."""
    n = 4_000_000_000
    with open(tmp_path / "z.npy", "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (n, 64)})
        stream.truncate(stream.tell() + 4 * n * 64)
    some = load_latents(tmp_path / "z.npy", sample=50)
    assert (some.n, some.dim, some.sampled_from) == (50, 64, n) and not some.z.any()
    assert load_latents(tmp_path / "z.npy", shard=(10**7, 10**8)).n == 40
    with pytest.raises(ValueError, match="z.npy: can't be mapped whole .*; take a sample or a shard of its rows"):
        load_latents(tmp_path / "z.npy")
