"""Tables: CSV, Parquet, Arrow, frames of pandas and polars, Hugging Face datasets. pyarrow reads them all."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import LEAST_ROOM, MOST_RATIO

__all__ = ["ENDINGS", "columns_of", "is_table", "is_table_folder", "read_table"]

ENDINGS = (".csv", ".tsv", ".parquet", ".arrow", ".feather")
HUGGING_FACE = ("dataset_info.json", "dataset_dict.json", "state.json")


def is_table(value: Any) -> bool:
    """Whether ``value`` is a frame of pandas or polars, an Arrow table or a Hugging Face dataset."""
    return hasattr(value, "__arrow_c_stream__") or hasattr(value, "with_format")


def is_table_folder(folder: Path) -> bool:
    """Whether a folder holds a Hugging Face dataset, or Parquet files."""
    return folder.is_dir() and (
        any((folder / name).is_file() for name in HUGGING_FACE) or any(folder.glob("*.parquet"))
    )


def read_table(path: Path) -> Any:
    """The table in a file, or in a folder that ``datasets`` or pyarrow wrote.

    Raises:
        ImportError: the library that reads it is missing.
        ValueError: a damaged file, or one that unpacks to far more than its size.
    """
    if path.is_dir() and not any((path / name).is_file() for name in HUGGING_FACE):
        arrow = _arrow()
        return arrow.concat_tables([read_table(file) for file in sorted(path.glob("*.parquet"))])
    if path.is_dir():
        try:
            from datasets import load_from_disk
        except ImportError as error:
            raise ImportError(f"{path} is read by datasets: pip install 'iin-fast[tables]'") from error
        return load_from_disk(str(path))
    arrow = _arrow()
    most = LEAST_ROOM + MOST_RATIO * path.stat().st_size
    try:
        if path.suffix in (".csv", ".tsv"):
            return _read_csv(path)
        if path.suffix == ".parquet":
            import pyarrow.parquet

            with pyarrow.parquet.ParquetFile(path) as opened:
                meta = opened.metadata
                groups = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
                _check_size(max(sum(groups), meta.num_rows * meta.num_columns), most)
                return _within(opened.iter_batches(), opened.schema_arrow, most)
        with arrow.memory_map(str(path)) as source:
            try:
                opened = arrow.ipc.open_file(source)
                batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
            except arrow.ArrowInvalid:
                source.seek(0)
                opened = batches = arrow.ipc.open_stream(source)
            return _within(batches, opened.schema, most)
    except Exception as error:  # pyarrow raises many types for bytes that are none of its own
        raise ValueError(f"{path}: damaged or no {path.suffix} table ({error})") from error


def columns_of(table: Any) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """The columns as arrays: ``[n]``, or ``[n, size]`` of lists of one length; and the names of what is neither.

    Of a dictionary of Hugging Face splits the one called ``train`` is taken. Their class labels become texts.
    """
    arrow = _arrow()
    named: dict[str, list[str]] = {}
    if isinstance(table, Mapping):  # splits
        table = table["train"] if "train" in table else next(iter(table.values()))
    if hasattr(table, "with_format"):
        named = {name: kind.names for name, kind in table.features.items() if getattr(kind, "names", None)}
        table = table.with_format("arrow")[:]
    table = table if isinstance(table, arrow.Table) else arrow.table(table)
    found: dict[str, NDArray[Any]] = {}
    other: list[str] = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        array = _array(column)
        if array is None or name in found:
            other.append(name)
        elif name in named and array.dtype.kind == "i":
            found[name] = np.array([*named[name], ""])[array]
        else:
            found[name] = array
    return found, other


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise ImportError("tables are read by pyarrow: pip install 'iin-fast[tables]'") from error
    return pyarrow


def _read_csv(path: Path) -> Any:
    """The delimiter is what the first line has most of; a first line of numbers is no header."""
    from pyarrow import csv

    with open(path, encoding="utf-8", errors="replace") as stream:
        head = stream.readline(1 << 20).strip()
    delimiter = max(",;\t", key=head.count)
    bare = all(re.fullmatch(r'"?[-+.\deE]+"?', cell.strip()) for cell in head.split(delimiter))
    return csv.read_csv(
        path,
        csv.ReadOptions(autogenerate_column_names=bare),
        csv.ParseOptions(delimiter=delimiter),
        csv.ConvertOptions(strings_can_be_null=True),
    )


def _within(batches: Iterator[Any], schema: Any, most: int) -> Any:
    """All batches as a table, unless they are larger than ``most`` bytes."""
    kept, size = [], 0
    for batch in batches:
        size += batch.nbytes
        _check_size(size, most)
        kept.append(batch)
    return _arrow().Table.from_batches(kept, schema)


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"it unpacks to {size:,} bytes or more, expected at most {most:,}")


def _array(column: Any) -> NDArray[Any] | None:
    """A column as an array; None of dates, structures, lists of several lengths."""
    arrow = _arrow()
    types = arrow.types
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if types.is_decimal(kind):
        column = column.cast(arrow.float64())
        kind = column.type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind):
        return np.array(["" if text is None else text for text in column.to_pylist()], dtype=str)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        if column.null_count or not (types.is_floating(kind.value_type) or types.is_integer(kind.value_type)):
            return None
        rows = np.concatenate([chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in column.chunks] or [[]])
        if len(set(rows.tolist())) != 1:
            return None
        flat = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks])
        return flat.reshape(len(rows), -1)
    if types.is_floating(kind) or types.is_integer(kind) or types.is_boolean(kind):
        if types.is_boolean(kind):
            column = column.cast(arrow.int8())
        array: NDArray[Any] = column.to_numpy()
        return array
    return None
