"""Files that appear whole or not at all, and what files of others are read by: nothing is trusted that they say of themselves."""

import io
import json
import math
import os
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "check_array",
    "check_name",
    "checksum",
    "npz_bytes",
    "parse_json",
    "read_json",
    "read_npz",
    "read_tensors",
    "safetensors_library",
    "serialize",
    "sync_folder",
    "try_to_write",
    "write_file",
]

TAKEN_NAMES = ("file", "allow_pickle", "__metadata__")  # by numpy.savez and safetensors
MOST_TEXT = 1 << 24  # bytes of a JSON file, or of a header
MOST_RATIO, LEAST_ROOM = 20, 1 << 26  # what an archive may unpack to: times its size, and bytes beside that


def write_file(file: Path, data: bytes) -> None:
    """The file appears with all of ``data`` or stays as it was, also when the machine stops."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as error:  # it names the temporary file, or none, as on a full disk
        raise OSError(error.errno, error.strerror or str(error), str(file)) from error
    finally:
        with suppress(OSError):  # a folder that is read-only or gone, which the first error says
            temporary.unlink(missing_ok=True)
    sync_folder(file.parent)


def try_to_write(folder: Path) -> None:
    """Before work whose result will lie there.

    Raises:
        OSError: that names the folder.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from error


def sync_folder(folder: Path) -> None:
    """New names in the folder reach the disk."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def safetensors_library() -> ModuleType:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("IIN.save and IIN.load need safetensors: pip install 'iin-fast[io]'") from error
    return safetensors


def serialize(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file; the same content gives the same bytes (safetensors itself shuffles the metadata)."""
    data = memoryview(safetensors_library().torch.save(tensors, metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:end]))
    text = json.dumps({**header, "__metadata__": dict(sorted(metadata.items()))}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    return b"".join([len(text).to_bytes(8, "little"), text, data[end:]])


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of all bytes, in the order of the names."""
    crc = 0
    for _, tensor in sorted(tensors.items()):
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def check_name(where: str, name: object) -> None:
    """Refuse a name that files or the libraries that write them could not keep apart.

    Raises:
        TypeError: no string, or an empty one.
        ValueError: a name that numpy.savez or safetensors take for themselves, or of characters that no file name holds.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"{where} {name!r}, expected a non-empty string")
    taken = name in TAKEN_NAMES or name.endswith(".npy")
    if taken or "\0" in name or any("\ud800" <= letter <= "\udfff" for letter in name):
        why = "which files of arrays keep for themselves" if taken else "whose characters no file can hold"
        raise ValueError(f"{where} {name!r}, {why}; take another name")


def npz_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """An .npz file. numpy.savez takes some names for its own arguments, and stamps files with the time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
    return buffer.getvalue()


def read_npz(file: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file. What its headers say is compared with the file before anything is read.

    Raises:
        ValueError: a file that is damaged, of Python objects, or holds far more than its size.
    """
    found: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            size, most = sum(member.file_size for member in members), LEAST_ROOM + MOST_RATIO * file.stat().st_size
            if size > most:
                raise ValueError(f"it unpacks to {size:,} bytes, expected at most {most:,}; numpy.savez packs nothing")
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name in found or name == member.filename:
                    raise ValueError(f"it holds {member.filename!r} twice, or as no array")
                with archive.open(member) as stream:
                    check_array(name, stream, member.file_size)
                with archive.open(member) as stream:
                    found[name] = np.lib.format.read_array(stream, allow_pickle=False)
    except Exception as error:  # zipfile and numpy raise a dozen types for bytes that are none of theirs
        raise ValueError(f"{file}: damaged or no .npz file of plain arrays ({error})") from error
    return found


def check_array(name: str, stream: IO[bytes], size: int) -> None:
    """Refuse an array whose header promises another number of bytes than the file has."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"{name} has version {version} of the format, expected one of {list(readers)}")
    shape, _, dtype = readers[version](stream)
    if dtype.hasobject:
        raise ValueError(f"{name}: it holds Python objects")
    expected = math.prod(shape) * dtype.itemsize + stream.tell()
    if dtype.itemsize == 0 or min(shape, default=0) < 0 or expected != size:
        raise ValueError(f"{name} is {dtype} of shape {list(shape)}, but has {size} bytes, expected {expected}")


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        ImportError: safetensors is missing.
        ValueError: a file that is damaged, or has tensors of a type that torch lacks.
    """
    safetensors = safetensors_library()
    try:
        with open(file, "rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        if header > MOST_TEXT:
            raise ValueError(f"a header of {header:,} bytes, expected at most {MOST_TEXT:,}")
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        for name, tensor in tensors.items():
            if tensor.dtype == torch.float4_e2m1fn_x2:  # torch reads it and computes nothing with it
                raise ValueError(f"{name} has elements of 4 bits, expected 8 bits at least")
    except Exception as error:
        raise ValueError(f"{file}: damaged or no safetensors file ({error})") from error
    return tensors, metadata


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: a file that is damaged, too large, nested too deep, has a name twice, or holds no object.
    """
    try:
        size = file.stat().st_size
        if size > MOST_TEXT:
            raise ValueError(f"{size:,} bytes, expected at most {MOST_TEXT:,}")
        found = parse_json(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: damaged or no JSON file ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: holds a {type(found).__name__}, expected a JSON object")
    return found


def parse_json(text: str) -> Any:
    """What a text says; a name that stands twice is refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            raise ValueError(f"a name twice in {names}")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)
