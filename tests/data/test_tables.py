"""Data as people have them: every kind of file and frame, labels of every kind, and what is said of them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from iin_fast.data import Latents, load_latents, save_arrays, tables
from iin_fast.data.labels import bin_edges, in_bins, read_concept

random = np.random.default_rng(0)
N = 60
Z = random.standard_normal((N, 3)).astype(np.float32)
ANIMALS = np.array(["cat", "dog", "bird"])[np.arange(N) % 3]
AGE = random.uniform(20, 80, N)
CODES = [{"bird": 0, "cat": 1, "dog": 2}[animal] for animal in ANIMALS]


def columns():
    return {"id": np.arange(N), **{f"z{k}": Z[:, k] for k in range(3)}, "animal": ANIMALS, "age": AGE}


def check(latents):
    assert np.array_equal(latents.z.numpy(), Z) and latents.z.dtype == torch.float32
    assert latents.names == ("animal", "age") and latents.labels[:, 0].tolist() == CODES
    assert latents.classes == {"animal": ("bird", "cat", "dog")}
    assert np.allclose(latents.values["age"], AGE) and latents.labels[:, 1].bincount().tolist() == [20, 20, 20]
    text = " ".join(latents.notes)
    assert "'id' (nearly each row has its own)" in text and "'age' is continuous" in text and "3 bins" in text


def test_labels_of_every_kind():
    def codes(values):
        return read_concept("here", "kind", values).codes.tolist()

    assert codes(["b", "a", "", "b"]) == [1, 0, -1, 1]
    assert codes([2.0, np.nan, 0.0]) == [2, -1, 0] and codes(np.array([True, False])) == [1, 0]
    assert codes(np.array(["b", None, "a"], dtype=object)) == [1, -1, 0]
    assert codes(np.array([1, None, 0.0], dtype=object)) == [1, -1, 0]
    assert codes(torch.tensor([1, 0, -1])) == [1, 0, -1] and codes(torch.tensor([1.0, 0.0]).bfloat16()) == [1, 0]
    for wrong, message in (
        ([0, -2], "has the value -2, expected classes from 0, or -1 for unknown"),
        ([0.5, np.inf], "has Inf"),
        (np.array([1, "a"], dtype=object), "holds int, str, expected texts alone or numbers alone"),
        (np.array([1j]), "is complex128, expected integers"),
        (np.array([[1, 2]]), r"shape \[1, 2\], expected one label for each sample"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            read_concept("here", "kind", wrong)


def test_a_continuous_concept_comes_in_bins_of_equal_counts():
    values = random.standard_normal(1000)
    values[::10] = np.nan
    concept = read_concept("here", "size", values)
    assert (concept.codes == -1).sum() == 100 and set(np.bincount(concept.codes + 1)[1:]) == {90}
    order = np.argsort(values[~np.isnan(values)])
    assert (np.diff(concept.codes[~np.isnan(values)][order]) >= 0).all()
    few = np.array([0.5] * 90 + [0.7] * 10)  # no bin is empty where values repeat
    assert in_bins(few, bin_edges(few)).tolist() == [0] * 90 + [1] * 10


@pytest.mark.parametrize("kind", ["csv", "tsv", "semicolon", "parquet", "arrow", "stream", "feather"])
def test_files_of_tables(kind, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import csv, feather, parquet

    table = arrow.table(columns())
    if kind in ("csv", "tsv", "semicolon"):
        file = tmp_path / f"data.{'tsv' if kind == 'tsv' else 'csv'}"
        csv.write_csv(table, file, csv.WriteOptions(delimiter={"csv": ",", "tsv": "\t", "semicolon": ";"}[kind]))
    elif kind == "parquet":
        parquet.write_table(table, file := tmp_path / "data.parquet")
    elif kind == "feather":
        feather.write_feather(table, str(file := tmp_path / "data.feather"))
    else:
        file = tmp_path / "data.arrow"
        with (arrow.ipc.new_file if kind == "arrow" else arrow.ipc.new_stream)(str(file), table.schema) as writer:
            writer.write_table(table)
    latents = load_latents(file)
    if kind in ("csv", "tsv", "semicolon"):  # all numbers of a text are doubles
        assert latents.z.dtype == torch.float64
        latents = Latents.of(latents.z.float(), columns() and {"animal": ANIMALS, "age": AGE}), latents
        assert np.allclose(latents[1].z, Z) and torch.equal(latents[1].labels, latents[0].labels)
        assert latents[1].names == ("animal", "age")
    else:
        check(latents)


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow", "datasets"])
def test_frames(library):
    frames = pytest.importorskip(library)
    make = {"pyarrow": "table", "datasets": "Dataset"}.get(library, "DataFrame")
    make = getattr(frames, make).from_dict if library == "datasets" else getattr(frames, make)
    given = columns() if library != "datasets" else {k: v.tolist() for k, v in columns().items()}
    latents = Latents.of(make(given))
    if library == "datasets":
        assert np.allclose(latents.z, Z) and latents.labels[:, 0].tolist() == CODES
    else:
        check(latents)
    labels = make({"animal": ANIMALS.tolist()})
    assert Latents.of(Z, labels).names == ("animal",) and Latents.of(Z, labels).labels[:, 0].tolist() == CODES


def test_a_folder_of_a_hugging_face_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "embedding": datasets.Sequence(datasets.Value("float32")),
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["bad", "good"]),
        }
    )
    rows = {"embedding": Z.tolist(), "sentence": [f"text {i}" for i in range(N)], "label": [0, 1, -1] * 20}
    made = datasets.Dataset.from_dict(rows, features)
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": made.select(range(5)), "train": made}).save_to_disk(tmp_path / "splits")
    for folder in ("one", "splits"):
        latents = load_latents(tmp_path / folder)
        assert np.array_equal(latents.z, Z) and latents.names == ("label",) and latents.images[7] == "text 7"
        assert latents.classes == {"label": ("bad", "good")} and latents.labels[:3, 0].tolist() == [0, 1, -1]
        assert latents.notes == ("latents are 'embedding'",)


def test_a_folder_of_parquet_files_is_one_table(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = arrow.table(columns())
    for k in range(3):
        parquet.write_table(table.slice(20 * k, 20), tmp_path / f"part-{k}.parquet")
    check(load_latents(tmp_path))


def test_what_is_saved_as_csv_loads_again(tmp_path):
    file = save_arrays(tmp_path / "out.csv", {"z": torch.from_numpy(Z), "donor": np.arange(N), "animal": ANIMALS})
    assert file.read_text().splitlines()[0] == "z0,z1,z2,donor,animal"
    latents = load_latents(file)
    assert np.array_equal(latents.z.numpy().astype(np.float32), Z)  # to the last bit
    assert latents.names == ("animal",) and latents.labels[:, 0].tolist() == CODES
    with pytest.raises(ValueError, match=r"names has shape \[2\], expected columns of one table"):
        save_arrays(tmp_path / "two.csv", {"z": Z, "names": np.array(["a", "b"])})
    assert not (tmp_path / "two.csv").exists()


def test_a_csv_without_header_and_one_with_gaps(tmp_path):
    pytest.importorskip("pyarrow")
    np.savetxt(tmp_path / "bare.csv", Z, delimiter=",")
    bare = load_latents(tmp_path / "bare.csv")
    assert np.allclose(bare.z, Z) and bare.kind == "unlabelled"
    lines = [
        "z_1,z_0,animal,legs",
        *(f"{i}.5,{i}.25,{'' if i % 4 == 0 else 'ab'[i % 2]},{'' if i % 3 else 4 * (i % 2)}" for i in range(12)),
    ]
    (tmp_path / "gaps.csv").write_text("\n".join(lines))
    gaps = load_latents(tmp_path / "gaps.csv")
    assert gaps.z[3].tolist() == [3.25, 3.5]  # by number, not by place
    assert gaps.labels[:4].tolist() == [[-1, 0], [1, -1], [0, -1], [1, 4]]
    (tmp_path / "words.csv").write_text("a,b\nx,y\nx,z\n")
    with pytest.raises(
        ValueError, match=r"words.csv: has the columns \['a', 'b'\], but none .* np.savez\('latents.npz', z=z"
    ):
        load_latents(tmp_path / "words.csv")


def test_a_table_of_measurements(tmp_path):
    frames = pytest.importorskip("pandas")
    made = {"size": Z[:, 0], "weight": np.arange(N) + 100, "grade": np.arange(N) % 7, "kind": ANIMALS}
    latents = Latents.of(frames.DataFrame(made))
    assert latents.dim == 2 and latents.names == ("grade", "kind")
    assert latents.z[:, 1].tolist() == list(range(100, 160)) and latents.notes == (
        "latents are the 2 columns size … weight",
    )


def test_arrays_under_other_names(tmp_path):
    def saved(**arrays):
        np.savez(tmp_path / "a.npz", **arrays)
        return load_latents(tmp_path / "a.npz")

    usual = saved(X=Z, y=ANIMALS)
    assert usual.names == ("y",) and usual.labels[:, 0].tolist() == CODES and usual.notes == ("latents are 'X'",)
    assert saved(z=Z, labels=ANIMALS).names == ("label",) and saved(z=Z, y=np.arange(N)).labels.unique().numel() == N
    assert saved(z=Z, day=np.arange(N).astype("datetime64[D]")).notes == ("left out: 'day' [60]",)
    assert saved(z=Z, labels=ANIMALS, names=["animal"]).names == ("animal",)
    each = saved(vectors=Z, animal=ANIMALS, age=AGE, picture=np.zeros((N, 4, 4)), id=np.arange(N), same=np.ones(N))
    assert each.names == ("animal", "age") and each.notes[:3] == (
        "latents are 'vectors'",
        "no concepts: 'id' (nearly each row has its own), 'same' (one value alone)",
        "left out: 'picture' [60, 4, 4]",
    )
    assert saved(z=Z, labels=np.stack([CODES, np.full(N, np.nan)], 1)).labels[:, 1].unique().tolist() == [-1]
    for wrong, message in (
        ({"z": Z.reshape(N, 3, 1)}, r"z has shape \[60, 3, 1\], .*; z.reshape\(len\(z\), -1\)"),
        ({"z": np.ones((N, 3), int)}, r"z is int64, .*; z.astype\('float32'\)"),
        ({"a": Z, "b": Z}, r"holds a \[60, 3\], b \[60, 3\], but no z .* np.savez\('latents.npz', z=z"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            saved(**wrong)


def test_npy_and_torch_files(tmp_path):
    np.save(tmp_path / "z.npy", Z)
    latents = load_latents(tmp_path / "z.npy")
    assert latents.kind == "unlabelled" and np.array_equal(latents.z, Z)
    latents.z[0] = 7  # the file stays as it is
    assert np.array_equal(np.load(tmp_path / "z.npy"), Z)
    z, codes = torch.from_numpy(Z), torch.tensor(CODES)
    for saved in ({"z": z, "animal": ANIMALS.tolist()}, (z, codes), {"X": z, "y": codes.float()}):
        torch.save(saved, tmp_path / "z.pt")
        latents = load_latents(tmp_path / "z.pt")
        assert torch.equal(latents.z, z) and latents.labels[:, 0].tolist() == CODES
    torch.save(z, tmp_path / "z.pth")
    assert torch.equal(load_latents(tmp_path / "z.pth").z, z)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"module.pt: damaged, or holds more than tensors.*torch.save\(\{'z': z"):
        load_latents(tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"z.mat: ends in '.mat', expected .* np.savez"):
        (tmp_path / "z.mat").write_text("")
        load_latents(tmp_path / "z.mat")


READER = """
import json, resource, sys, time
from iin_fast.data import load_latents
import pyarrow.parquet, pyarrow.ipc, pyarrow.csv
load_latents(sys.argv[1])
for place in sys.argv[2:]:
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    try:
        load_latents(place)
        error = ""
    except (TypeError, ValueError) as found:
        error = str(found)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    print(json.dumps([place, time.process_time() - begin, grown, error]))
"""


def test_what_lies_about_its_size_is_refused(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    good = tmp_path / "good.parquet"
    parquet.write_table(arrow.table(columns()), good)
    flat = arrow.table({"z0": np.zeros(20_000_000, np.float32), "z1": np.zeros(20_000_000, np.float32)})
    parquet.write_table(flat, tmp_path / "bomb.parquet")  # some kilobytes
    torch.save({"z": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "wide.pt")
    with open(tmp_path / "lie.npy", "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 64)})
    whole = good.read_bytes()
    for ending in ("parquet", "arrow", "feather", "pt", "pth", "npy"):
        (tmp_path / f"noise.{ending}").write_bytes(b"no such file\0" * 9)
        (tmp_path / f"empty.{ending}").write_bytes(b"")
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "changed.parquet").write_bytes(whole[:200] + b"\xff" * 40 + whole[240:])
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n3\n")
    (tmp_path / "bytes.csv").write_bytes(b"z0,z1\n\xff\xfe,\x00\n")
    places = [file for file in sorted(tmp_path.iterdir()) if file != good]
    done = subprocess.run(
        [sys.executable, "-c", READER, *map(str, [good, *places])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(places) > 15
    for place, seconds, megabytes, error in found:
        assert error.startswith(place), (place, error)
        assert seconds < 2 and megabytes < 200, (place, seconds, megabytes)


def test_other_latents_get_the_codes_of_the_training():
    trained = Latents.of(Z, {"animal": ANIMALS, "age": AGE})
    other = Latents.of(Z[:4], {"age": AGE[:4], "animal": ["cow", "dog", "", "cat"]})
    coded = other.coded_like(trained.classes, trained.edges)
    assert coded.labels[:, 1].tolist() == [3, 2, -1, 1] and coded.classes["animal"] == ("bird", "cat", "dog", "cow")
    assert coded.labels[:, 0].tolist() == trained.labels[:4, 1].tolist()
    with pytest.raises(ValueError, match="labels of 'animal' are numbers, expected texts like"):
        Latents.of(Z, {"animal": CODES}).coded_like(trained.classes, trained.edges)


def test_whole_numbers_of_a_continuous_concept_fall_into_its_bins():
    trained = Latents.of(Z, {"age": AGE})
    assert trained.edges["age"]
    other = Latents.of(Z[:4], {"age": np.array([1, 50, 99, -1])})
    coded = other.coded_like(trained.classes, trained.edges, trained.names)
    wanted = np.searchsorted(trained.edges["age"], [1, 50, 99], side="right").tolist()
    assert coded.labels[:, 0].tolist() == [*wanted, -1]
    assert torch.equal(coded.coded_like(trained.classes, trained.edges).labels, coded.labels)  # twice is once
    with pytest.raises(ValueError, match="labels of 'age' are texts, expected numbers"):
        Latents.of(Z[:4], {"age": ["old", "young", "old", "old"]}).coded_like({}, trained.edges)
    with pytest.raises(ValueError, match="values of 'age' are continuous, expected classes"):
        trained.coded_like({}, {}, ["age"])


def test_a_shard_that_is_not_there_is_no_damaged_table(tmp_path):
    (tmp_path / "t.csv").write_text("z0,z1\n0.5,1.5\n2.5,3.5\n")
    with pytest.raises(ValueError, match="^load_latents: shard is 2 of 2"):
        load_latents(tmp_path / "t.csv", shard=(2, 2))
    with pytest.raises(TypeError, match="^load_latents: sample"):
        load_latents(tmp_path / "t.csv", sample=1.5)


def test_parts_are_of_the_latents_whatever_lies_beside_them(tmp_path):
    np.savez(tmp_path / "f.npz", z=np.arange(20.0).reshape(10, 2), vocabulary=np.arange(70))
    assert load_latents(tmp_path / "f.npz", shard=(1, 5)).z[:, 0].tolist() == [4.0, 6.0]
    assert load_latents(tmp_path / "f.npz", sample=3).n == 3


def test_latents_are_z_however_many_other_columns_are_numbered(tmp_path):
    header = ",".join([*(f"z{k}" for k in range(3)), *(f"q{k}" for k in range(1, 6))])
    rows = [",".join([*map(str, z), *map(str, np.arange(5) % 3)]) for z in Z]
    (tmp_path / "q.csv").write_text("\n".join([header, *rows]))
    latents = load_latents(tmp_path / "q.csv")
    assert torch.allclose(latents.z, torch.from_numpy(Z).to(latents.z.dtype)) and latents.dim == 3


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("first", ["0.5,1.5,2.5", "0.5,,2.5", "nan,1.5,-2.5e-3"])
def test_a_first_line_of_numbers_is_a_row(start, first, tmp_path):
    (tmp_path / "f.csv").write_text(start + first + "\n3.5,4.5,5.5\n", encoding="utf-8")
    table, n = tables.read_table(tmp_path / "f.csv")
    assert n == 2 and table.num_columns == 3


def test_names_that_count_are_names(tmp_path):
    (tmp_path / "pandas.csv").write_text("0,1,2\n0.5,1.5,2.5\n3.5,4.5,5.5\n")
    assert load_latents(tmp_path / "pandas.csv").z.tolist() == [[0.5, 1.5, 2.5], [3.5, 4.5, 5.5]]


def test_decimal_commas(tmp_path):
    (tmp_path / "german.csv").write_text("\ufeffz0;z1;tier\n1,5;-2,25;Bär\n3,5;4,25;Igel\n", encoding="utf-8")
    latents = load_latents(tmp_path / "german.csv")
    assert latents.z.tolist() == [[1.5, -2.25], [3.5, 4.25]]


def test_a_table_of_another_encoding_says_so(tmp_path):
    (tmp_path / "excel.csv").write_bytes("z0;z1;größe\n1.5;2.5;ä\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"excel.csv: .*a byte 0xf6 is no UTF-8; save the table as UTF-8 text"):
        load_latents(tmp_path / "excel.csv")


def test_unknown_texts_of_pandas_and_texts_of_bytes():
    pandas = pytest.importorskip("pandas")
    latents = Latents.of(Z[:4], {"a": pandas.Series(["x", pandas.NA, "y", "x"], dtype="string")})
    assert latents.labels[:, 0].tolist() == [0, -1, 1, 0]
    latents = Latents.of(Z[:4], {"a": pandas.Series([1, pandas.NA, 2, None], dtype="Int64").astype(object)})
    assert latents.labels[:, 0].tolist() == [1, -1, 2, -1]
    assert Latents.of(Z[:2], {"a": np.array(["ü".encode(), b"x"])}).classes["a"] == ("x", "ü")


def test_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two columns would have the name .a10."):
        save_arrays(tmp_path / "f.csv", {"a": np.zeros((2, 11)), "a1": np.zeros((2, 1))})


def test_what_is_sure_to_be_a_concept_is_one(tmp_path):
    np.savez(tmp_path / "one.npz", z=Z[:4], animal=np.full(4, "dog"))
    assert load_latents(tmp_path / "one.npz").labels is None
    assert load_latents(tmp_path / "one.npz", concepts=["animal"]).classes == {"animal": ("dog",)}


MEASURED = {"size": Z[:, 0], "weight": np.arange(N) + 100, "grade": np.arange(N) % 7, "acid": Z[:, 1]}


def test_columns_that_are_known_are_the_features_in_their_order(tmp_path):
    frames = pytest.importorskip("pandas")
    frame = frames.DataFrame(MEASURED)
    trained = Latents.of(frame)
    assert trained.columns == ("size", "weight", "acid") and trained.names == ("grade",)
    frame[["acid", "grade", "size", "weight"]].to_csv(tmp_path / "turned.csv", index=False)
    frame[:3].to_csv(tmp_path / "few.csv", index=False)  # three weights alone would be classes
    for name, rows in (("turned.csv", N), ("few.csv", 3)):
        found = load_latents(tmp_path / name, columns=trained.columns)
        assert found.columns == trained.columns and torch.allclose(found.z, trained.z[:rows].to(found.z))
    frame.drop(columns="acid").to_csv(tmp_path / "less.csv", index=False)
    with pytest.raises(ValueError, match="less.csv: has no column of numbers 'acid', expected the 3 columns"):
        load_latents(tmp_path / "less.csv", columns=trained.columns)


def test_an_empty_cell_makes_no_concept_of_a_feature():
    frames = pytest.importorskip("pandas")
    for name in ("acid", "weight"):
        frame = frames.DataFrame(MEASURED).astype({"weight": float})
        frame.loc[7, name] = np.nan
        with pytest.raises(
            ValueError, match=rf"the column '{name}', a feature, has no finite .* 1 places \(first: row 7\)"
        ):
            Latents.of(frame)
    frame = frames.DataFrame(MEASURED).astype({"grade": float})
    frame.loc[7, "grade"] = np.nan
    assert Latents.of(frame).labels[7].tolist() == [-1]


@pytest.mark.parametrize("names", [("a", "b"), (0, 1)])
def test_an_index_of_pandas_is_left_out(names, tmp_path):
    frames = pytest.importorskip("pandas")
    frame = frames.DataFrame({names[0]: Z[:, 0], names[1]: Z[:, 1]})
    frame.to_csv(tmp_path / "once.csv")
    frames.read_csv(tmp_path / "once.csv").to_csv(tmp_path / "twice.csv")
    frame[frame[names[0]] > 0].rename(columns=str).to_parquet(tmp_path / "some.parquet")
    for file in sorted(tmp_path.iterdir()):
        latents = load_latents(file)
        assert latents.columns == tuple(map(str, names)) and "an index that pandas wrote" in latents.notes[0], file


def test_what_has_a_name_of_another_use_is_noted(tmp_path):
    def saved(**arrays):
        np.savez(tmp_path / "a.npz", **arrays)
        return load_latents(tmp_path / "a.npz")

    found = saved(z=Z, position=ANIMALS, donor=np.arange(N), caption=ANIMALS, color=CODES)
    assert found.names == ("color",) and found.notes == (
        "'caption' is taken for the samples themselves, which reports show, not for a concept",
        "left out: 'position', 'donor', as the commands write it; a concept needs another name",
    )
    assert saved(emb=Z, x=np.arange(N) % 3).names == ("x",)


def test_classes_with_far_gaps_are_coded_without():
    def of(*values):
        return Latents.of(Z[: len(values)], {"shop": np.array(values)})

    trained = of(70_000, 5, -1, 8_000_007, 5)
    assert trained.labels[:, 0].tolist() == [1, 0, -1, 2, 0] and trained.classes == {"shop": ("5", "70000", "8000007")}
    for other, codes in ((of(5, 5, 70_000), [0, 0, 1]), (of(5, -1, 6), [0, -1, 3])):
        coded = other.coded_like(trained.classes, {}, ["shop"])
        assert coded.labels[:, 0].tolist() == codes and coded.classes["shop"][:3] == trained.classes["shop"]
    assert of(2, 999).labels[:, 0].tolist() == [2, 999] and not of(2, 999).classes
    older = trained.coded_like({}, {}, ["shop"])  # a run that took numbers as they are
    assert older.labels[:, 0].tolist() == [70_000, 5, -1, 8_000_007, 5] and not older.classes
    assert of(2000, 3000).coded_like({}, {"shop": (2500.0,)}, ["shop"]).labels[:, 0].tolist() == [0, 1]
    with pytest.raises(ValueError, match="labels of 'shop' are texts, expected numbers"):
        of("a", "b").coded_like({}, {}, ["shop"])


def test_a_continuous_concept_may_be_whole_and_below_zero(tmp_path):
    np.savez(tmp_path / "a.npz", z=Z[:4], age=np.array([-1, -2, 3, 0]))
    found = load_latents(tmp_path / "a.npz", concepts=["age"], continuous=["age"]).coded_like(
        {}, {"age": (-1.5, 1)}, ["age"]
    )
    assert found.values["age"].tolist() == [-1, -2, 3, 0] and found.labels[:, 0].tolist() == [1, 0, 2, 1]
    assert Latents.of(Z[:3], {"age": [np.nan] * 3}, continuous=["age"]).labels[:, 0].tolist() == [-1] * 3
