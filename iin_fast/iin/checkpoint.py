"""How an IIN lies on disk: a folder with ``model.safetensors`` (the parameters) and ``config.json`` (what they are of).

The configuration stands in both files, in the header of the first for programs and in the second for people: a pair of
files that do not belong together is refused. So is a parameter file whose contents changed (CRC-32).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import checksum, parse_json, read_json, read_tensors, serialize, write_file

__all__ = ["DTYPES", "FORMAT", "VERSION", "check", "check_sizes", "config_file", "load", "save"]

FORMAT = "iin_fast.IIN"
VERSION = 1
SIZES = ("dim", "n_flows", "hidden_dim", "hidden_depth", "context_dim", "bins", "left_out", "flat")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def config_file(path: str | os.PathLike[str]) -> Path:
    """The configuration in the folder ``path``."""
    return Path(path) / "config.json"


def tensor_file(path: str | os.PathLike[str]) -> Path:
    """The parameters in the folder ``path``."""
    return Path(path) / "model.safetensors"


def save(path: str | os.PathLike[str], state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a state and its configuration into the folder ``path``.

    Raises:
        ValueError: NaN or Inf in a parameter.
        OSError: the folder can't be made or written.
    """
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"IIN.save: parameter {name!r} has NaN or Inf, and would not load again")
    text = json.dumps({"format": FORMAT, "version": VERSION, **config}, indent=2) + "\n"
    data = serialize(tensors, {"config": text, "crc32": checksum(tensors)})
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        write_file(tensor_file(path), data)
        write_file(config_file(path), text.encode())
    except OSError as error:
        message = f"IIN.save: can't write to path {os.fspath(path)!r}: {error.strerror}"
        raise OSError(error.errno, message) from error


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state and the configuration in the folder ``path``.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file that is damaged or not of iin-fast.
    """
    for file in (config_file(path), tensor_file(path)):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; IIN.load expects the folder that IIN.save wrote")
    config = _read_config(config_file(path))
    file = tensor_file(path)
    tensors, header = read_tensors(file)
    if "config" not in header or "crc32" not in header:
        raise ValueError(f"{file}: a safetensors file, but not of an IIN (no configuration in its header)")
    try:
        same = parse_json(header["config"]) == config
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise ValueError(f"{file}: written with another configuration than {config_file(path).name} beside it")
    if header["crc32"] != checksum(tensors):
        raise ValueError(f"{file}: damaged, its parameters are not those that were written (CRC-32 differs)")
    del config["format"], config["version"]
    return tensors, config


def check_sizes(config: Mapping[str, Any], elements: int) -> None:
    """Refuse sizes for which a file of so many elements is too small, before a model of them is made.

    Raises:
        TypeError, ValueError: a size that is no integer from 0, or too large.
    """
    sizes = {name: config.get(name) or 0 for name in SIZES}
    for name, size in sizes.items():
        if type(size) is not int or size < 0:
            raise TypeError(f"{name} is {size!r}, expected an integer from 0")
    kept = sizes["dim"] - sizes["left_out"]
    least = sizes["dim"]
    if config.get("coupling") == "linear" or config.get("flat") is not None:
        least += kept**2
    live = kept - sizes["flat"]
    inner = sizes["context_dim"] + sizes["hidden_depth"] * sizes["hidden_dim"] + live // 2 * max(1, sizes["bins"])
    least += sizes["n_flows"] * (live + sizes["hidden_dim"] * inner)
    if least > elements:
        raise ValueError(f"sizes of {least:,} parameters at least, but the file has {elements:,}")


def check(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare the loaded tensors with the state of a fresh model.

    Raises:
        ValueError: a parameter that is missing, unknown, of another shape or type, or not finite.
    """
    file = tensor_file(path)
    for name in expected:
        if name not in tensors:
            raise ValueError(f"{file}: parameter {name!r} is missing")
    for name, tensor in tensors.items():
        if name not in expected:
            raise ValueError(
                f"{file}: parameter {name!r} is not one of the model that {config_file(path).name} describes"
            )
        like = expected[name]
        if tensor.shape != like.shape:
            raise ValueError(f"{file}: parameter {name!r} has shape {list(tensor.shape)}, expected {list(like.shape)}")
        if tensor.dtype != like.dtype:
            raise ValueError(f"{file}: parameter {name!r} is {tensor.dtype}, expected {like.dtype}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: parameter {name!r} has NaN or Inf")


def _read_config(file: Path) -> dict[str, Any]:
    config = read_json(file)
    if config.get("format") != FORMAT:
        raise ValueError(f'{file}: not written by IIN.save (expected "format": "{FORMAT}")')
    if config.get("version") != VERSION:
        raise ValueError(
            f"{file}: version {config.get('version')!r} of the format, expected {VERSION}; update iin-fast"
        )
    return config
