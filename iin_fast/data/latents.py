"""Latents: what an IIN is trained on, read from files and tables as people have them and checked to the last value."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..arrays import MISSING, to_numpy
from ..files import (
    LEAST_ROOM,
    MOST_RATIO,
    check_array,
    check_name,
    npz_bytes,
    parse_json,
    read_npz,
    read_tensors,
    serialize,
    write_file,
)
from ..iin.factors import RESIDUAL
from . import tables
from .labels import Concept, in_bins, read_concept
from .rows import chosen_rows, read_rows

__all__ = ["MISSING", "Latents", "class_context", "load_latents", "save_arrays"]

# Names under which a file or a table may hold latents, labels of all concepts, and the samples themselves.
_Z = ("z", "X", "x", "latents", "embeddings", "embedding", "features")
_LABELS = ("labels", "y", "targets")
_LABEL = ("y", "label", "target", "class")  # of one concept, whatever it holds
_IMAGES = ("images", "image", "text", "texts", "sentence", "sentences", "caption")
_NOTES = ("names", "donor", "position", "log_prob", "outlier_score")  # of the commands that write latents
_PAIRS = ("za", "zb", "factor", "shared")
_INDEX = ("", "Unnamed: 0", "__index_level_0__")  # of a column that pandas adds
_OWN = (
    0.5  # a column of texts or integers in which more than this share of the rows has a value of its own is no concept
)
_MOST_CLASSES = 30  # of whole numbers in a table without lists and numbered columns
_BLOCK = 2**22  # elements that are looked at together
_CONVERT = "np.savez('latents.npz', z=z, labels=labels, names=['digit', 'color'])"


@dataclass(frozen=True, eq=False, repr=False)
class Latents:
    """Latents of a pretrained model, with labels, as pairs, or alone.

    Made by :func:`load_latents`, :meth:`of` and :meth:`of_pairs`, which check everything.

    Attributes:
        z: ``[n, dim]``, float32 or float64. Of pairs: the first samples, then the second ones.
        labels: ``[n, concepts]`` int64, -1 where unknown; or None.
        names: of the concepts; empty without labels and pairs.
        shared: ``[pairs, concepts]`` bool, what row i and row pairs + i of ``z`` share; or None.
        images: the samples themselves, ``[n, …]`` numbers or texts, for pictures; or None.
        path: the file they came from; or None.
        classes: concept to what its codes stand for, where its labels were texts.
        values: concept to numbers ``[n]``, NaN where unknown, of a continuous one; its labels are bins of equal counts.
        edges: concept to the inner edges of these bins.
        sampled_from: rows of the file, where these are a random sample of them; or None.
        columns: of a table, the columns that ``z`` was made of, in order; empty where it was one of lists, or no table.
        notes: sentences that say what was taken for what, and what was left out.
    """

    z: Tensor
    labels: Tensor | None = None
    names: tuple[str, ...] = ()
    shared: Tensor | None = None
    images: np.ndarray[Any, Any] | None = None
    path: Path | None = None
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    values: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    edges: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    sampled_from: int | None = None
    columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        z: Tensor | ArrayLike | Any,
        labels: Tensor | ArrayLike | Mapping[str, Tensor | ArrayLike] | Any = None,
        names: Sequence[str] | None = None,
        *,
        continuous: Collection[str] = (),
        images: Any = None,
        path: Path | None = None,
    ) -> Latents:
        """Checked latents from arrays, or from a table: a frame of pandas or polars, an Arrow table, a Hugging Face dataset.

        Args:
            z: real floating-point numbers ``[n, dim]``, at least 2 features. Or a table, without ``labels``: latents are its
                column of lists, or its numbered columns (z0, z1, …), or all that hold fractions or more than 30 whole numbers; the
                others are concepts.
            labels: ``[n, concepts]``, ``[n]`` for one, name to ``[n]``, or a table; by default none. Integers, texts, or floats
                that are whole numbers are classes; other floats are a continuous concept, which pairs see in bins of equal
                counts. Unknown are -1, NaN, None and the empty text. Classes with far gaps (from 1000 on, and more than ten
                times their count) are coded without gaps; ``classes`` has their numbers as texts.
            names: of the columns of ``labels``; by default ``"0"``, ``"1"``, …, or ``"label"``.
            continuous: concepts whose numbers are values even where all are whole: -1 is one of them, too.
            images: one for each row of ``z``: numbers ``[n, …]`` or texts.
            path: named in errors, and recorded by a training.

        Raises:
            ImportError: a table, and no pyarrow (``pip install 'iin-fast[tables]'``).
            TypeError: z that is not floating-point, labels that are no labels.
            ValueError: shapes that don't match, NaN or Inf, labels below -1, names that don't fit.

        Example:
            >>> Latents.of(np.random.randn(4, 3), {"animal": ["cat", "dog", "", "cat"]}).classes
            {'animal': ('cat', 'dog')}
        """
        where = str(path or "Latents")
        if tables.is_table(z):
            if labels is not None or names is not None:
                raise ValueError(
                    f"{where}: z is a table and labels or names are given, expected the table alone, or arrays"
                )
            return _of_table(where, z, images, path, continuous=continuous)
        values = _floats(where, "z", z)
        pictures = _images(where, images, len(values))
        if labels is None:
            if names is not None and len(names):
                raise ValueError(f"{where}: names is {list(map(str, names))}, but there are no labels that they name")
            return cls(values, images=pictures, path=path)
        if tables.is_table(labels):
            labels = tables.columns_of(labels)[0]
        if isinstance(labels, Mapping):
            if names is not None:
                raise ValueError(f"{where}: names is given, expected none with labels that are a mapping")
            columns = {
                f"labels[{name!r}]": _array(where, f"labels[{name!r}]", column) for name, column in labels.items()
            }
            names = list(labels)
        else:
            table = _array(where, "labels", labels)
            if table.ndim not in (1, 2) or len(table) != len(values) or 0 in table.shape:
                expected = f"[{len(values)}, concepts] or [{len(values)}], a row for each of z"
                raise ValueError(f"{where}: labels have shape {list(table.shape)}, expected {expected}")
            names = ["label"] if names is None and table.ndim == 1 else names
            table = table[:, None] if table.ndim == 1 else table
            columns = {f"labels[:, {k}]": column for k, column in enumerate(table.T)}
        for name, column in columns.items():
            if column.shape != (len(values),):
                raise ValueError(f"{where}: {name} has shape {list(column.shape)}, expected [{len(values)}] like z")
        if not columns:
            raise ValueError(f"{where}: labels are empty, expected at least one concept")
        named = _names(where, names, len(columns))
        found = [
            read_concept(where, what, column, continuous=name in continuous)
            for name, (what, column) in zip(named, columns.items(), strict=True)
        ]
        return cls(values, images=pictures, path=path, **_labels(named, found))

    @classmethod
    def of_pairs(
        cls,
        za: Tensor | ArrayLike,
        zb: Tensor | ArrayLike,
        factor: Tensor | ArrayLike | None = None,
        names: Sequence[str] | None = None,
        *,
        shared: Tensor | ArrayLike | None = None,
        images: Any = None,
        path: Path | None = None,
    ) -> Latents:
        """Checked pairs of latents that share something.

        Args:
            za, zb: first and second samples, ``[pairs, dim]``.
            factor: the one concept that each pair shares, integers ``[pairs]`` from 0.
            names: of the concepts; by default ``"0"``, ``"1"``, …
            shared: in place of ``factor``: all that each pair shares, bool ``[pairs, concepts]``.
            images: of the first samples, then of the second ones: numbers ``[2 × pairs, …]`` or texts.
            path: named in errors, and recorded by a training.

        Raises:
            TypeError, ValueError: as :meth:`of`; both or none of ``factor`` and ``shared``, a negative code.
        """
        where = str(path or "Latents")
        a, b = _floats(where, "za", za), _floats(where, "zb", zb)
        if b.shape != a.shape:
            raise ValueError(f"{where}: zb has shape {list(b.shape)}, expected {list(a.shape)} like za")
        if b.dtype != a.dtype:
            raise TypeError(f"{where}: zb is {b.dtype}, expected {a.dtype} like za")
        if (factor is None) == (shared is None):
            raise ValueError(f"{where}: pairs za, zb need one of factor [n] and shared [n, concepts]")
        if shared is not None:
            mask = _array(where, "shared", shared)
            if mask.dtype != bool:
                raise TypeError(f"{where}: shared is {mask.dtype}, expected bool")
            if mask.ndim != 2 or len(mask) != len(a) or mask.shape[1] == 0:
                raise ValueError(f"{where}: shared has shape {list(mask.shape)}, expected [{len(a)}, concepts]")
        else:
            codes = _array(where, "factor", factor)
            if codes.dtype.kind not in "iu":
                raise TypeError(f"{where}: factor is {codes.dtype}, expected integers")
            if codes.shape != (len(a),):
                raise ValueError(f"{where}: factor has shape {list(codes.shape)}, expected [{len(a)}], one per pair")
            if codes.min() < 0:
                advice = "say what a pair shares with shared [n, concepts] where it is more than one concept"
                raise ValueError(f"{where}: factor has the value {codes.min()}, expected codes from 0; {advice}")
            concepts = int(codes.max()) + 1 if names is None else len(names)
            if codes.max() >= concepts:
                raise ValueError(f"{where}: factor has the value {codes.max()}, expected below {concepts}, the names")
            if concepts > 10_000:
                raise ValueError(f"{where}: factor has the value {codes.max()}, expected codes from 0 without gaps")
            mask = codes[:, None] == np.arange(concepts)
        named = _names(where, names, mask.shape[1])
        for k, name in enumerate(named):
            if not mask[:, k].any():
                raise ValueError(f"{where}: no pair shares {name!r}, expected at least one for each concept")
        pictures = _images(where, images, 2 * len(a))
        return cls(torch.cat([a, b]), names=named, shared=torch.from_numpy(mask), images=pictures, path=path)

    def __repr__(self) -> str:
        return f"Latents(n={self.n}, dim={self.dim}, kind={self.kind!r}, names={list(self.names)})"

    @property
    def n(self) -> int:
        """Rows of ``z``."""
        return len(self.z)

    @property
    def dim(self) -> int:
        """Features of a latent."""
        return self.z.shape[1]

    @property
    def kind(self) -> str:
        """``"labels"``, ``"pairs"`` or ``"unlabelled"``."""
        return "pairs" if self.shared is not None else "labels" if self.labels is not None else "unlabelled"

    def coded_like(
        self,
        classes: Mapping[str, Sequence[str]],
        edges: Mapping[str, Sequence[float]],
        names: Sequence[str] = (),
        where: str = "latents",
    ) -> Latents:
        """These latents with the codes that a training had for its texts and bins; a text that it did not know gets a code after those.

        Args:
            classes, edges, names: as the training's latents had them.
            where: named in errors.

        Raises:
            ValueError: a concept is of another kind here: texts, whole numbers or continuous ones.
        """
        if self.labels is None:
            return self
        for name in set(self.values) & set(names) - set(edges):
            raise ValueError(f"{where}: values of {name!r} are continuous, expected classes, as in the training")
        labels, known, values = self.labels.clone(), dict(self.classes), dict(self.values)
        for name in (set(names) | set(edges)) & set(known) - set(classes):  # of the training numbers
            texts = known.pop(name)
            if not _are_numbers(texts):
                raise ValueError(f"{where}: labels of {name!r} are texts, expected numbers, as in the training")
            k = self.names.index(name)
            labels[:, k] = torch.tensor([*map(int, texts), MISSING])[labels[:, k]]
        for name in set(classes) & set(self.names):
            k, order = self.names.index(name), list(classes[name])
            if name not in self.classes and not _are_numbers(order):
                raise ValueError(
                    f"{where}: labels of {name!r} are numbers, expected texts like {order[:5]}, as in the training"
                )
            codes, own = labels[:, k], self.classes.get(name)
            if own is None:  # few of the training's numbers, or others
                found = codes[codes != MISSING].unique()
                own = tuple(map(str, found.tolist()))
                codes = torch.where(codes == MISSING, MISSING, torch.searchsorted(found, codes))
            place = {text: code for code, text in enumerate(dict.fromkeys((*order, *own)))}
            labels[:, k] = torch.tensor([*(place[text] for text in own), MISSING])[codes]
            known[name] = tuple(place)
        for name in set(edges) & set(self.names):
            k = self.names.index(name)
            whole = labels[:, k].numpy()  # of whole numbers the numbers themselves
            values.setdefault(name, np.where(whole == MISSING, np.nan, whole.astype(np.float64)))
            labels[:, k] = torch.from_numpy(in_bins(values[name], edges[name]))
        bins = {name: tuple(edges.get(name, self.edges.get(name, ()))) for name in values}
        return replace(self, labels=labels, classes=known, values=values, edges=bins)

    def fingerprint(self) -> str:
        """SHA-256 of all that a training sees: z, labels, names, what pairs share. Hexadecimal."""
        digest = hashlib.sha256()
        for name, tensor in (("z", self.z), ("labels", self.labels), ("shared", self.shared)):
            if tensor is not None:
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
                digest.update(tensor.contiguous().numpy().data)
        digest.update(json.dumps(self.names).encode())
        return digest.hexdigest()


def load_latents(
    path: str | os.PathLike[str],
    *,
    sample: int | None = None,
    shard: tuple[int, int] | None = None,
    concepts: Sequence[str] = (),
    columns: Sequence[str] = (),
    continuous: Collection[str] = (),
) -> Latents:
    """Latents from a file of arrays (.npz, .npy, .safetensors, .pt) or a table (.csv, .parquet, .arrow, a dataset's folder).

    Arrays:

    - ``z`` ``[n, dim]`` (or ``X``, or the only matrix of floats) and ``labels`` (or ``y``) with ``names`` if there are any;
      or an array ``[n]`` for each concept. What labels may be says :meth:`Latents.of`;
    - ready pairs ``za``, ``zb`` ``[n, dim]`` and ``factor`` ``[n]`` (which concept they share) or ``shared``
      ``[n, concepts]`` (bool), with ``names``;
    - ``z`` alone.

    In a .safetensors file ``names`` is a JSON list in the metadata. ``images`` ``[n, …]``, numbers or texts, may be there
    for pictures; with pairs for the first samples, then the second ones. Tables are read as :meth:`Latents.of` reads them:
    a Hugging Face dataset is the folder that its ``save_to_disk`` wrote. ``notes`` of the result says what was left out.

    A file .npy, or a folder of them with one array in each (``z.npy``, ``digit.npy``), is not loaded but mapped. Of files larger than
    memory take a part: .npy and Parquet are then read in pieces.

    Args:
        path: the file or folder.
        sample: at most so many rows, drawn at random; always the same ones.
        shard: (i, n): part i of n, counted from 0, of the rows in order.
        concepts: arrays or columns that are labels for sure. Others are not taken for labels where each row has its own, or all
            have the same one.
        columns: of a table, those that the latents are made of, in this order (``columns`` of the latents of a training); by
            default they are told by their names and values.
        continuous: concepts whose numbers are values even where all are whole: -1 is one of them, too.

    Raises:
        FileNotFoundError: no such file.
        ImportError: safetensors, pyarrow or datasets is missing.
        TypeError, ValueError: a file that is damaged or of another kind, an array that is missing, of a wrong type or
            shape, or holds NaN or Inf.

    Example:
        >>> import tempfile, numpy as np
        >>> from iin_fast.data import load_latents
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(folder + "/latents.npz", z=np.ones((4, 2)), labels=np.arange(4)[:, None], names=["digit"])
        ...     latents = load_latents(folder + "/latents.npz")
        >>> latents.kind, latents.n, latents.dim, latents.names
        ('labels', 4, 2, ('digit',))
    """
    file = Path(path)
    rows = None if sample is None and shard is None else partial(chosen_rows, sample=sample, shard=shard)
    if file.suffix in tables.ENDINGS and file.is_file() or tables.is_table_folder(file):
        table, n = tables.read_table(file, rows)
        return _sampled(_of_table(str(file), table, None, file, concepts, columns, continuous), n if sample else None)
    arrays = _read_any(file, whole=rows is None)
    if rows is not None:
        if any(key in arrays for key in _PAIRS):
            raise ValueError(f"{file}: holds pairs, of which no sample or shard is read")
        key = _z_of(arrays)
        n = len(arrays[key]) if key is not None else 0
        chosen = rows(n)
        arrays = {
            k: read_rows(array, chosen) if array.ndim and len(array) == n else array for k, array in arrays.items()
        }
        found = _of_arrays(str(file), arrays, _names_of(file, arrays), file, (), concepts, continuous)
        return _sampled(found, n if sample else None)
    names = _names_of(file, arrays)
    pair_keys = [key for key in _PAIRS if key in arrays]
    if "z" in arrays and pair_keys:
        raise ValueError(f"{file}: holds z and {pair_keys}, expected samples or pairs, not both")
    if pair_keys:
        for key in ("za", "zb"):
            if key not in arrays:
                raise ValueError(f"{file}: holds {pair_keys}, but {key} is missing")
        if "labels" in arrays:
            raise ValueError(f"{file}: holds labels beside pairs, expected factor or shared, or z with labels")
        factor, shared = arrays.get("factor"), arrays.get("shared")
        options: dict[str, Any] = {"shared": shared, "images": arrays.get("images"), "path": file}
        return Latents.of_pairs(arrays["za"], arrays["zb"], factor, names, **options)
    return _of_arrays(str(file), arrays, names, file, (), concepts, continuous)


def _sampled(latents: Latents, n: int | None) -> Latents:
    """Latents that are a sample of ``n``, if they are."""
    return latents if n is None or n == latents.n else replace(latents, sampled_from=n)


def _names_of(file: Path, arrays: Mapping[str, Any]) -> list[str] | None:
    names: Any = arrays.get("names")
    if names is not None:
        names = np.asarray(names)
        if names.ndim != 1 or names.dtype.kind not in "US":
            raise TypeError(f"{file}: names is {names.dtype} of shape {list(names.shape)}, expected a list of strings")
        names = [text.decode(errors="replace") if isinstance(text, bytes) else str(text) for text in names.tolist()]
    return names


def _of_table(
    where: str,
    table: Any,
    images: Any,
    path: Path | None,
    sure: Sequence[str] = (),
    known: Sequence[str] = (),
    continuous: Collection[str] = (),
) -> Latents:
    columns, other = tables.columns_of(table)
    notes = [f"left out: {', '.join(map(repr, other))} (no numbers, texts or lists of one length)"] if other else []
    index = [name for name, column in columns.items() if name in _INDEX and name not in known and _counts(column)]
    if index:
        notes.append(f"left out: {', '.join(map(repr, index))}, an index that pandas wrote")
        columns = {name: column for name, column in columns.items() if name not in index}
    single = {name: column for name, column in columns.items() if column.ndim == 1}
    chosen: list[str] = []
    if known and (single == columns or any(name in columns for name in known)):
        chosen = _known_columns(where, single, known)
    elif single == columns:  # no lists: numbered columns, else those with fractions
        numbered: dict[str, list[tuple[int, str]]] = {}
        for name, column in single.items():
            stem = re.fullmatch(r"(.*?)(\d+)", name)
            if stem and column.dtype.kind in "fiu" and name not in sure:
                numbered.setdefault(stem[1], []).append((int(stem[2]), name))
        stems = [stem for stem in _Z if len(numbered.get(stem, ())) > 1] or numbered
        chosen = [name for _, name in max((sorted(numbered[stem]) for stem in stems), key=len, default=[])]
        if len(chosen) < 2:
            chosen = [name for name, column in single.items() if name not in sure and _is_measured(column)]
        if len(chosen) < 2:
            raise ValueError(
                f"{where}: has the columns {list(columns)[:12]}, but none with lists of numbers, and no two numbered ones "
                f"(z0, z1, …) or of measurements, which would be the latents; {_CONVERT} writes what you mean"
            )
    if chosen:
        for name in chosen:
            gaps = np.flatnonzero(~np.isfinite(columns[name]))
            if len(gaps):
                raise ValueError(
                    f"{where}: the column {name!r}, a feature, has no finite number in {len(gaps)} places (first: row "
                    f"{gaps[0]}), expected one in each row; fill it, or leave the row or the column out"
                )
        z = np.stack([columns.pop(name) for name in chosen], axis=1)
        notes.append(f"latents are the {len(chosen)} columns {chosen[0]} … {chosen[-1]}")
        columns = {"z": z.astype(z.dtype if z.dtype.kind == "f" else np.float32), **columns}
    arrays = columns | ({} if images is None else {"images": images})
    return replace(_of_arrays(where, arrays, None, path, notes, sure, continuous), columns=tuple(chosen))


def _known_columns(where: str, columns: Mapping[str, np.ndarray[Any, Any]], known: Sequence[str]) -> list[str]:
    """The columns that latents were made of before, which must be there."""
    missing = [name for name in known if name not in columns or columns[name].dtype.kind not in "fiu"]
    if missing:
        shown = ", ".join(map(repr, missing[:8])) + (", …" if len(missing) > 8 else "")
        raise ValueError(
            f"{where}: has no column of numbers {shown}, expected the {len(known)} columns that the training had as features; "
            f"there are: {', '.join(map(repr, list(columns)[:12]))}"
        )
    return list(known)


def _counts(column: np.ndarray[Any, Any]) -> bool:
    """Whether whole numbers only rise, as an index does."""
    return column.ndim == 1 and column.dtype.kind in "iu" and bool((column[1:] > column[:-1]).all())


def _is_measured(column: np.ndarray[Any, Any]) -> bool:
    """Whether a column holds measurements, not classes: fractions, or more whole numbers than there would be classes."""
    if column.dtype.kind not in "fiu":
        return False
    known = column[np.isfinite(column)]
    return bool((known % 1 != 0).any() or len(np.unique(known)) > _MOST_CLASSES)


def _of_arrays(
    where: str,
    arrays: Mapping[str, Any],
    names: Sequence[str] | None,
    path: Path | None,
    notes: Sequence[str] = (),
    sure: Sequence[str] = (),
    continuous: Collection[str] = (),
) -> Latents:
    """Latents and labels by their names; what is neither is left out, and noted."""
    notes = list(notes)
    named = {name: array if isinstance(array, Tensor) else np.asarray(array) for name, array in arrays.items()}
    key = _z_of(named)
    if key is None:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in named.items()) or "nothing"
        raise ValueError(f"{where}: holds {shapes}, but no z [n, dim] and no pairs za, zb, factor; {_CONVERT} writes z")
    if key != "z":
        notes.append(f"latents are {key!r}")
    z = named.pop(key)
    shown = next((k for k in _IMAGES if k in named and (k == "images" or len(named[k]) == len(z))), None)
    if shown is not None and _concepts({"": named[shown]}, len(z))[0]:
        notes.append(f"{shown!r} is taken for the samples themselves, which reports show, not for a concept")
    options: dict[str, Any] = {"images": None if shown is None else named.pop(shown), "path": path}
    labels: Any
    if "labels" in named or any(name in named and named[name].ndim == 2 for name in _LABELS):
        labels = named.pop(next(name for name in _LABELS if name in named))
    else:
        found, own = _concepts(named, len(z), sure)
        for name in (*found, *own):
            del named[name]
        labels = found or None
        if own:
            notes.append(f"no concepts: {', '.join(f'{name!r} ({why})' for name, why in own.items())}")
        if found and names is not None and len(names) == len(found) == 1:
            labels, names = dict(zip(names, found.values(), strict=True)), None
        elif found and names is not None:
            notes.append("names are those of the arrays; 'names' is left out")
            names = None
    reserved = [name for name in named if name in _NOTES and name != "names"]
    if reserved:
        notes.append(
            f"left out: {', '.join(map(repr, reserved))}, as the commands write it; a concept needs another name"
        )
    extra = [name for name in named if name not in _NOTES]
    if extra:
        notes.append(f"left out: {', '.join(f'{name!r} {list(named[name].shape)}' for name in extra)}")
    latents = Latents.of(z, labels, names, continuous=continuous, **options)
    for name in latents.values:
        bins = len(latents.edges[name]) + 1
        notes.append(f"{name!r} is continuous: pairs share it where both are in one of {bins} bins of equal counts")
    return replace(latents, notes=tuple(notes))


def _z_of(arrays: Mapping[str, Any]) -> str | None:
    """Which array holds the latents."""
    matrices = [name for name, array in arrays.items() if array.ndim == 2 and _is_float(array) and name not in _LABELS]
    usual = [name for name in _Z if name in matrices] if "z" not in arrays else ["z"]
    alone = matrices if len(matrices) == 1 else []
    return next(iter((*usual, *alone, *(name for name in _Z if name in arrays))), None)


def _concepts(
    arrays: Mapping[str, Any], n: int, sure: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """Arrays ``[n]`` that are labels of a concept, and those that tell no classes, with the reason."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    own: dict[str, str] = {}
    for name, values in arrays.items():
        array = to_numpy(values)
        if array.shape != (n,) or name in _NOTES or array.dtype.kind not in "fiubUSO":
            continue
        known = array[array == array]
        distinct = len(np.unique(known)) if array.dtype.kind != "O" else 2
        fractions = array.dtype.kind == "f" and (known % 1 != 0).any()
        if name in sure:
            found[name] = array
        elif distinct < 2:
            own[name] = "one value alone"
        elif distinct > _OWN * n and not fractions and name not in _LABEL:
            own[name] = "nearly each row has its own"
        else:
            found[name] = array
    return found, own


def _are_numbers(texts: Sequence[str]) -> bool:
    """Whether classes are whole numbers, which codes with far gaps were."""
    return all(text.isdecimal() and text == str(int(text)) for text in texts)


def _is_float(array: Any) -> bool:
    return bool(array.is_floating_point() if isinstance(array, Tensor) else array.dtype.kind == "f")


def _labels(names: tuple[str, ...], concepts: Sequence[Concept]) -> dict[str, Any]:
    """The fields of :class:`Latents` that say what is known of each row."""
    of = dict(zip(names, concepts, strict=True))
    return {
        "labels": torch.from_numpy(np.stack([concept.codes for concept in concepts], axis=1)),
        "names": names,
        "classes": {name: concept.classes for name, concept in of.items() if concept.classes},
        "values": {name: concept.values for name, concept in of.items() if concept.values is not None},
        "edges": {name: concept.edges for name, concept in of.items() if concept.values is not None},
    }


def _read_any(file: Path, whole: bool = True) -> dict[str, Any]:
    """The arrays of a file of any kind that holds arrays."""
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file, expected latents")
    if file.suffix == ".npy":
        return {"z": _read_npy(file, whole)}
    if file.is_dir() and any(file.glob("*.npy")):
        return {part.stem: _read_npy(part, whole) for part in sorted(file.glob("*.npy"))}
    if file.suffix in (".pt", ".pth"):
        return _read_torch(file)
    if file.suffix not in (".npz", ".safetensors"):
        known = ", ".join((".npz", ".npy", ".safetensors", ".pt", *tables.ENDINGS))
        raise ValueError(
            f"{file}: ends in {file.suffix or 'nothing'!r}, expected one of {known}, or a folder of datasets; "
            f"{_CONVERT} writes one of the first kind"
        )
    return read_arrays(file)


def _read_npy(file: Path, whole: bool) -> np.ndarray[Any, Any]:
    """An array of a .npy file, mapped: it is read where it is used.

    What is to be used ``whole`` may be written to, in memory alone; the system grants that up to about its memory.
    """
    try:
        with open(file, "rb") as stream:
            check_array(file.name, stream, file.stat().st_size)
        return np.load(file, mmap_mode="c" if whole else "r", allow_pickle=False)  # type: ignore[no-any-return]
    except OSError as error:
        raise ValueError(f"{file}: can't be mapped whole ({error}); take a sample or a shard of its rows") from error
    except Exception as error:  # numpy raises many types for bytes that are none of its own
        raise ValueError(f"{file}: damaged or no .npy file of a plain array ({error})") from error


def _read_torch(file: Path) -> dict[str, Any]:
    """The tensors of a file that ``torch.save`` wrote: one, a dictionary, or a pair of latents and labels."""
    line = "torch.save({'z': z, 'labels': labels}, 'latents.pt')"
    try:
        size = file.stat().st_size
        with zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > LEAST_ROOM + MOST_RATIO * size:
                raise ValueError("it unpacks to far more than its size")
        found = torch.load(file, map_location="cpu", weights_only=True)
        if isinstance(found, tuple | list) and len(found) == 2:
            found = {"z": found[0], "labels": found[1]}
        found = found if isinstance(found, Mapping) else {"z": found}
        arrays = {str(name): x if isinstance(x, Tensor) else np.asarray(x) for name, x in found.items()}
        for name, array in arrays.items():
            if isinstance(array, Tensor) and (array.layout != torch.strided or array.numel() > max(size, LEAST_ROOM)):
                raise ValueError(f"{name} is of shape {list(array.shape)}, more than the file holds, or sparse")
    except Exception as error:  # the unpickler raises many types
        text = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{file}: damaged, or holds more than tensors, texts and numbers ({text}); {line} writes them"
        ) from error
    return arrays


def class_context(
    where: str, labels: Tensor | None, names: Sequence[str], concept: str, classes: int | None = None
) -> Tensor:
    """The class of a concept as the context of a conditional IIN, one-hot: ``[n, classes]`` float32.

    Args:
        where: named in errors.
        labels, names: as :class:`Latents` has them.
        concept: one of ``names``.
        classes: how many the model knows; by default as many as there are.

    Raises:
        ValueError: no labels, another concept, a label that is missing or of a class that the model does not know.
    """
    if labels is None or concept not in names:
        known = ", ".join(names) if labels is not None else "none"
        raise ValueError(f"{where}: the context is the class of {concept!r}, expected labels of it; there are: {known}")
    codes = labels[:, list(names).index(concept)]
    if (codes < 0).any():
        raise ValueError(f"{where}: labels of {concept!r}, the context, have -1 (unknown), expected classes from 0")
    if classes is None:
        classes = int(codes.max()) + 1
    if codes.max() >= classes:
        raise ValueError(
            f"{where}: labels of {concept!r}, the context, have the class {codes.max()}, expected below {classes}, as many "
            "as the model knows"
        )
    return torch.nn.functional.one_hot(codes, classes).float()


def save_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Tensor | ArrayLike]) -> Path:
    """Write named arrays to ``.npz``, ``.safetensors`` or ``.csv``; the file appears whole or not at all.

    In a table the columns of a matrix ``z`` are z0, z1, …

    Raises:
        ValueError: another ending, a name that such files keep for themselves, arrays that are no columns of one table.
        OSError: the file can't be written.
    """
    file = Path(path)
    for name in arrays:
        check_name(f"{file}: arrays have the name", name)
    plain = {
        k: v.detach().cpu().contiguous().numpy() if isinstance(v, Tensor) else np.asarray(v) for k, v in arrays.items()
    }
    if file.suffix == ".npz":
        data = npz_bytes(plain)
    elif file.suffix == ".safetensors":
        metadata = {k: json.dumps(v.tolist()) for k, v in plain.items() if v.dtype.kind == "U"}
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in plain.items() if v.dtype.kind != "U"}
        data = serialize(tensors, metadata)
    elif file.suffix == ".csv":
        data = _csv_bytes(file, plain)
    else:
        raise ValueError(f"{file}: ends in {file.suffix or 'nothing'!r}, expected .npz, .safetensors or .csv")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, data)
    return file


def _csv_bytes(file: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    columns: dict[str, Any] = {}
    for name, array in arrays.items():
        if array.ndim not in (1, 2) or len(array) != len(next(iter(arrays.values()))):
            raise ValueError(
                f"{file}: {name} has shape {list(array.shape)}, expected columns of one table, or another ending"
            )
        named = {name: array} if array.ndim == 1 else {f"{name}{k}": column for k, column in enumerate(array.T)}
        for k in set(named) & set(columns):
            raise ValueError(
                f"{file}: two columns would have the name {k!r}, expected another ending, or another name than {name!r}"
            )
        columns |= {k: column.astype(str) for k, column in named.items()}  # the shortest digits that give the number
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode()


def read_arrays(file: Path) -> dict[str, Any]:
    """All arrays of a file, by its ending; ``names`` in the metadata of a .safetensors file is one of them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one of another kind.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, expected arrays in .npz or .safetensors")
    if file.suffix == ".npz":
        return dict(read_npz(file))
    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: ends in {file.suffix or 'nothing'!r}, expected .npz or .safetensors")
    tensors, metadata = read_tensors(file)
    arrays: dict[str, Any] = dict(tensors)
    if "names" in metadata:
        try:
            names = parse_json(metadata["names"])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: names in the metadata are no JSON list ({error})") from error
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"{file}: names in the metadata are {metadata['names'][:80]}, expected a list of strings")
        arrays["names"] = np.asarray(names, dtype=str)
    return arrays


def read_split(file: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows that a run was trained on, and those that it held out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged.
    """
    arrays = read_arrays(file)
    for name in ("train", "held_out"):
        rows = arrays.get(name)
        if rows is None or rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise ValueError(f"{file}: {name} is missing or no list of rows")
        if len(rows) and rows.min() < 0:
            raise ValueError(f"{file}: {name} has the row {rows.min()}, expected rows from 0")
    return arrays["train"].astype(np.int64), arrays["held_out"].astype(np.int64)


def _array(where: str, name: str, values: Any) -> np.ndarray[Any, Any]:
    try:
        return to_numpy(values)
    except ValueError as error:  # rows of unequal length
        raise ValueError(f"{where}: {name} is no array ({error})") from error


def _floats(where: str, name: str, values: Any) -> Tensor:
    """Finite ``[n, dim]`` as float32, or float64 where it came so."""
    if isinstance(values, Tensor):
        tensor = values.detach().cpu()
        kind = str(tensor.dtype)
        good = tensor.is_floating_point()
    else:
        array = _array(where, name, values)
        kind, good = str(array.dtype), array.dtype.kind == "f"
        tensor = (
            torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32 if array.itemsize <= 4 else np.float64))
            if good
            else torch.empty(0)
        )
    if not good:
        advice = (
            f"; {name}.astype('float32') makes some of integers"
            if kind.startswith(("int", "uint", "torch.int"))
            else ""
        )
        raise TypeError(f"{where}: {name} is {kind}, expected real floating-point numbers{advice}")
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    if tensor.dim() != 2 or tensor.shape[0] == 0 or tensor.shape[1] < 2:
        shape = list(tensor.shape)
        advice = f"; {name}.reshape(len({name}), -1), or a mean over positions, makes one row of each sample"
        raise ValueError(
            f"{where}: {name} has shape {shape}, expected [n, dim] with n from 1 and dim from 2{advice * (len(shape) > 2)}"
        )
    count, row, column = 0, -1, -1
    rows = max(1, _BLOCK // tensor.shape[1])
    for start in range(0, len(tensor), rows):  # a mask of all would be large
        places = (~torch.isfinite(tensor[start : start + rows])).nonzero()
        if len(places) and not count:
            row, column = start + int(places[0, 0]), int(places[0, 1])
        count += len(places)
    if count:
        raise ValueError(
            f"{where}: {name} has NaN or Inf in {count} places (first: row {row}, feature {column}), "
            "expected finite numbers"
        )
    return tensor.contiguous()


def _names(where: str, names: Sequence[str] | None, concepts: int) -> tuple[str, ...]:
    if names is None:
        return tuple(str(k) for k in range(concepts))
    named = tuple(names)
    for name in named:
        check_name(f"{where}: names has", name)
    if len(named) != concepts:
        raise ValueError(f"{where}: names has {len(named)} names {list(named)}, expected {concepts}, one per concept")
    if len(set(named)) != len(named):
        raise ValueError(f"{where}: names has one twice: {list(named)}")
    if RESIDUAL in named:
        raise ValueError(f"{where}: names has {RESIDUAL!r}, which is what the concepts leave over; take another name")
    return named


def _images(where: str, images: Any, n: int) -> np.ndarray[Any, Any] | None:
    if images is None:
        return None
    array = _array(where, "images", images)
    if array.ndim == 0 or len(array) != n:
        raise ValueError(f"{where}: images has shape {list(array.shape)}, expected [{n}, …] like z")
    if array.dtype.kind not in "fiubUS" or (array.dtype.kind in "US" and array.ndim != 1):
        raise TypeError(f"{where}: images is {array.dtype} of shape {list(array.shape)}, expected numbers or texts [n]")
    return array
