"""Tables: CSV, Parquet, Arrow, frames of pandas and polars, Hugging Face datasets. pyarrow reads them all."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
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


def read_table(path: Path, rows: Callable[[int], NDArray[np.int64]] | None = None) -> tuple[Any, int]:
    """The table in a file, or in a folder that ``datasets`` or pyarrow wrote, and its number of rows.

    Args:
        path: the file or folder.
        rows: given the number of rows, those to read, in order; by default all. Of Parquet and Arrow the others are passed by.

    Raises:
        ImportError: the library that reads it is missing.
        ValueError: a damaged file, or one that unpacks to far more than its size.
    """
    if path.is_dir() and any((path / name).is_file() for name in HUGGING_FACE):
        try:
            from datasets import load_from_disk
        except ImportError as error:
            raise ImportError(f"{path} is read by datasets: pip install 'iin-fast[tables]'") from error
        table = load_from_disk(str(path))
        if isinstance(table, Mapping):  # splits
            table = table["train"] if "train" in table else next(iter(table.values()))
        return (table if rows is None else table.select(rows(len(table)))), len(table)
    arrow = _arrow()
    refused: list[Exception] = []  # what is wrong with the arguments is not wrong with the file

    def drawn(n: int) -> NDArray[np.int64]:
        assert rows is not None
        try:
            return rows(n)
        except (TypeError, ValueError) as error:
            refused.append(error)
            raise

    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    most = LEAST_ROOM + MOST_RATIO * sum(file.stat().st_size for file in files)
    opened: Any
    try:
        with ExitStack() as stack:
            if path.suffix in (".csv", ".tsv"):
                table = _read_csv(path)
                return (table if rows is None else table.take(drawn(len(table)))), len(table)
            if files[0].suffix == ".parquet":
                from pyarrow import parquet

                parts = [stack.enter_context(parquet.ParquetFile(file)) for file in files]
                n = sum(part.metadata.num_rows for part in parts)
                groups = [part.metadata.row_group(i) for part in parts for i in range(part.metadata.num_row_groups)]
                if rows is None:
                    _check_size(
                        max(sum(group.total_byte_size for group in groups), n * len(parts[0].schema_arrow)), most
                    )
                batches, schema = (batch for part in parts for batch in part.iter_batches()), parts[0].schema_arrow
            else:
                source = stack.enter_context(arrow.memory_map(str(path)))
                try:
                    opened = arrow.ipc.open_file(source)
                    batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
                    n = sum(opened.get_batch(i).num_rows for i in range(opened.num_record_batches))
                except arrow.ArrowInvalid:
                    source.seek(0)
                    opened = batches = arrow.ipc.open_stream(source)
                    n = 0
                schema = opened.schema
            table = _within(batches, schema, most, None if rows is None or not n else drawn(n))
            if rows is not None and not n:  # a stream does not know its length
                return table.take(drawn(len(table))), len(table)
            return table, n or len(table)
    except Exception as error:  # pyarrow raises many types for bytes that are none of its own
        if error in refused:
            raise
        raise ValueError(f"{path}: damaged or no {files[0].suffix} table ({error})") from error


def columns_of(table: Any) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """The columns as arrays: ``[n]``, or ``[n, size]`` of lists of one length; and the names of what is neither.

    Class labels of Hugging Face become texts.
    """
    arrow = _arrow()
    named: dict[str, list[str]] = {}
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
    """The delimiter is what the first line has most of; a first line of numbers is no header, unless it counts from 0.

    Where numbers are like 1,5, and commas don't delimit, they are decimal commas.
    """
    from pyarrow import csv

    _check_text(path)
    with open(path, encoding="utf-8-sig") as stream:
        lines = [stream.readline(1 << 20).strip("\r\n") for _ in range(20)]
    delimiter = max(",;\t", key=lines[0].count)
    cells = [[cell.strip().strip('"') for cell in line.split(delimiter)] for line in lines]
    comma = delimiter != "," and any(re.fullmatch(r"[-+]?\d+,\d+(e[-+]?\d+)?", x, re.I) for row in cells for x in row)
    first = [cell.replace(",", ".") if comma else cell for cell in cells[0]]
    numbers = [re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|nan", cell, re.I) for cell in first]
    named = first[1:] if first[0] == "" else first  # behind an index
    counted = named == [str(k) for k in range(len(named))]  # how pandas names columns without names
    bare = any(numbers) and all(number or not cell for number, cell in zip(numbers, first, strict=True)) and not counted
    return csv.read_csv(
        path,
        csv.ReadOptions(autogenerate_column_names=bare),
        csv.ParseOptions(delimiter=delimiter),
        csv.ConvertOptions(strings_can_be_null=True, decimal_point="," if comma else "."),
    )


def _check_text(path: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as stream:
        try:
            for block in iter(lambda: stream.read(1 << 20), b""):
                decoder.decode(block)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise ValueError(f"a byte {byte:#x} is no UTF-8; save the table as UTF-8 text") from None


def _within(batches: Iterator[Any], schema: Any, most: int, rows: NDArray[np.int64] | None = None) -> Any:
    """All batches, or these rows of them, as a table, unless they are larger than ``most`` bytes."""
    kept, size, start = [], 0, 0
    for batch in batches:
        stop = start + len(batch)
        if rows is not None:
            own = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]
            batch = batch.take(_arrow().array(own - start))
        start, size = stop, size + batch.nbytes
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
