"""Latents on disk: what an IIN is trained on, read from .npz or .safetensors and checked to the last value."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..arrays import MISSING, to_numpy
from ..files import check_name, npz_bytes, parse_json, read_npz, read_tensors, serialize, write_file
from ..iin.factors import RESIDUAL

__all__ = ["MISSING", "Latents", "class_context", "load_latents", "save_arrays"]

# What a file may hold. ``donor`` and ``position`` are notes of the commands that write latents.
_KNOWN = ("z", "labels", "names", "za", "zb", "factor", "shared", "images", "donor", "position")


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
    """

    z: Tensor
    labels: Tensor | None = None
    names: tuple[str, ...] = ()
    shared: Tensor | None = None
    images: np.ndarray[Any, Any] | None = None
    path: Path | None = None

    @classmethod
    def of(
        cls,
        z: Tensor | ArrayLike,
        labels: Tensor | ArrayLike | Mapping[str, Tensor | ArrayLike] | None = None,
        names: Sequence[str] | None = None,
        *,
        images: Any = None,
        path: Path | None = None,
    ) -> Latents:
        """Checked latents from arrays.

        Args:
            z: real floating-point numbers ``[n, dim]``, at least 2 features.
            labels: integers ``[n, concepts]``, -1 where unknown, or name to ``[n]``; by default none.
            names: of the columns of ``labels``; by default ``"0"``, ``"1"``, …
            images: one for each row of ``z``: numbers ``[n, …]`` or texts.
            path: named in errors, and recorded by a training.

        Raises:
            TypeError: z that is not floating-point, labels that are not integers.
            ValueError: shapes that don't match, NaN or Inf, labels below -1, names that don't fit.
        """
        where = str(path or "Latents")
        values = _floats(where, "z", z)
        if labels is None:
            if names is not None and len(names):
                raise ValueError(f"{where}: names is {list(map(str, names))}, but there are no labels that they name")
            return cls(values, images=_images(where, images, len(values)), path=path)
        if isinstance(labels, Mapping):
            if names is not None:
                raise ValueError(f"{where}: names is given, expected none with labels that are a mapping")
            names = list(labels)
            columns = [_array(where, f"labels[{name!r}]", column) for name, column in labels.items()]
            for name, column in zip(names, columns, strict=True):
                if column.shape != (len(values),):
                    shape = list(column.shape)
                    raise ValueError(f"{where}: labels[{name!r}] has shape {shape}, expected [{len(values)}] like z")
            labels = np.stack(columns, axis=1) if columns else np.zeros((len(values), 0), dtype=np.int64)
        table = _array(where, "labels", labels)
        if table.dtype.kind not in "iub":
            raise TypeError(f"{where}: labels are {table.dtype}, expected integers (-1 where a label is missing)")
        if table.ndim != 2 or len(table) != len(values) or table.shape[1] == 0:
            expected = f"[{len(values)}, concepts], a row for each of z and at least one column"
            if table.ndim == 1:
                expected += "; for one concept labels[:, None]"
            raise ValueError(f"{where}: labels have shape {list(table.shape)}, expected {expected}")
        if table.dtype == np.uint64 and table.max() > np.iinfo(np.int64).max:
            raise ValueError(f"{where}: labels have the value {table.max()}, expected at most 2^63 - 1")
        codes = table.astype(np.int64)
        if codes.min() < MISSING:
            raise ValueError(
                f"{where}: labels have the value {codes.min()}, expected classes from 0, or -1 for unknown"
            )
        named = _names(where, names, codes.shape[1])
        return cls(values, torch.from_numpy(codes), named, images=_images(where, images, len(values)), path=path)

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

    def fingerprint(self) -> str:
        """SHA-256 of all that a training sees: z, labels, names, what pairs share. Hexadecimal."""
        digest = hashlib.sha256()
        for name, tensor in (("z", self.z), ("labels", self.labels), ("shared", self.shared)):
            if tensor is not None:
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
                digest.update(tensor.contiguous().numpy().data)
        digest.update(json.dumps(self.names).encode())
        return digest.hexdigest()


def load_latents(path: str | os.PathLike[str]) -> Latents:
    """Latents from a file: ``.npz`` (``numpy.savez``) or ``.safetensors``.

    The file holds one of:

    - ``z`` ``[n, dim]`` and ``labels`` ``[n, concepts]`` (integers, -1 where unknown), with ``names`` if there are any;
    - ready pairs ``za``, ``zb`` ``[n, dim]`` and ``factor`` ``[n]`` (which concept they share) or ``shared``
      ``[n, concepts]`` (bool), with ``names``;
    - ``z`` alone.

    In a .safetensors file ``names`` is a JSON list in the metadata. ``images`` ``[n, …]``, numbers or texts, may be there
    for pictures; with pairs for the first samples, then the second ones.

    Raises:
        FileNotFoundError: no such file.
        ImportError: safetensors is missing.
        TypeError, ValueError: a file that is damaged or of another kind, an array that is missing, unknown, of a wrong
            type or shape, or holds NaN or Inf.

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
    arrays = read_arrays(file)
    unknown = sorted(set(arrays) - set(_KNOWN))
    if unknown:
        raise ValueError(f"{file}: holds {unknown}, expected z, labels, names, or za, zb, factor, names, or z alone")
    names = arrays.get("names")
    if names is not None:
        names = np.asarray(names)
        if names.ndim != 1 or names.dtype.kind not in "US":
            raise TypeError(f"{file}: names is {names.dtype} of shape {list(names.shape)}, expected a list of strings")
        names = [text.decode(errors="replace") if isinstance(text, bytes) else str(text) for text in names.tolist()]
    pair_keys = [key for key in ("za", "zb", "factor", "shared") if key in arrays]
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
    if "z" not in arrays:
        raise ValueError(f"{file}: holds {sorted(arrays)}, but no z [n, dim] and no pairs za, zb, factor")
    return Latents.of(arrays["z"], arrays.get("labels"), names, images=arrays.get("images"), path=file)


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
    """Write named arrays to ``.npz`` or ``.safetensors``; the file appears whole or not at all.

    Raises:
        ValueError: another ending, a name that such files keep for themselves.
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
    else:
        raise ValueError(f"{file}: ends in {file.suffix or 'nothing'!r}, expected .npz or .safetensors")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, data)
    return file


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
        raise TypeError(f"{where}: {name} is {kind}, expected real floating-point numbers")
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    if tensor.dim() != 2 or tensor.shape[0] == 0 or tensor.shape[1] < 2:
        shape = list(tensor.shape)
        raise ValueError(f"{where}: {name} has shape {shape}, expected [n, dim] with n from 1 and dim from 2")
    finite = torch.isfinite(tensor)
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        count = int((~finite).sum())
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
