"""Files that appear whole or not at all, and tensors in them."""

import json
import os
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["checksum", "safetensors_library", "serialize", "sync_folder", "write_file"]


def write_file(file: Path, data: bytes) -> None:
    """The file appears with all of ``data`` or stays as it was, also when the machine stops."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


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
