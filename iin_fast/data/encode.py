"""From a model and its data to latents: whatever holds the data, batch by batch, and into a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..arrays import to_numpy
from ..checks import check_floating, checked_int
from .adapters import Adapter, _in_evaluation
from .latents import Latents, save_arrays

__all__ = ["encode_all", "write_latents"]

LABELS = ("labels", "label", "y", "target", "targets")  # of a batch that is a mapping


def encode_all(adapter: Adapter | Callable[[Any], Tensor], x: Any, batch: int = 256) -> Tensor:
    """Latents ``[n, dim]`` of many inputs, ``batch`` at a time, on the CPU.

    Args:
        adapter: with ``encode``; or a module or function from a batch to latents ``[batch, dim]``. A module runs in
            evaluation mode, and afterwards its parts are in the modes that they had.
        x: a tensor or array ``[n, …]``, a sequence, an iterator over samples, a ``Dataset`` or a ``DataLoader``. Of samples that
            are tuples the first entry is the input, of mappings all that is no label. Pictures in bytes, ``[n, height, width, 1, 3
            or 4]``, become floats in [0, 1] with channels first.
        batch: inputs per call; a ``DataLoader`` has its own.

    Raises:
        TypeError, ValueError: an adapter that is none of these, no inputs, latents that are none, a batch that is not positive.

    Example:
        >>> encode_all(nn.Linear(4, 2), np.ones((5, 4), np.float32)).shape
        torch.Size([5, 2])
    """
    return _encoded("encode_all", adapter, x, batch)[0]


def write_latents(
    path: str | os.PathLike[str],
    adapter: Adapter | Callable[[Any], Tensor],
    x: Any,
    labels: Tensor | ArrayLike | Mapping[str, Tensor | ArrayLike] | Any = None,
    names: Sequence[str] | None = None,
    *,
    images: Any = None,
    batch: int = 256,
) -> Path:
    """Encodes data and writes a file of latents, which ``iin-fast train`` reads: from a model to a file in one call.

    Args:
        path: .npz or .safetensors.
        adapter, x, batch: of :func:`encode_all`.
        labels, names: of :meth:`Latents.of`; by default what ``x`` says: the second entry of samples that are tuples, or
            ``label`` of mappings. Without either there are none.
        images: for pictures, ``[n, …]`` numbers or texts.

    Raises:
        TypeError, ValueError: as :func:`encode_all` and :meth:`Latents.of`; texts as labels in .safetensors.

    Example:
        >>> import tempfile
        >>> from iin_fast.data import load_latents
        >>> data = [(torch.ones(4) * i, i % 2) for i in range(6)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load_latents(write_latents(folder + "/z.npz", nn.Linear(4, 2), data, names=["odd"]))
        Latents(n=6, dim=2, kind='labels', names=['odd'])
    """
    z, found = _encoded("write_latents", adapter, x, batch)
    latents = Latents.of(z, found if labels is None else labels, names, images=images)
    arrays: dict[str, Any] = {"z": latents.z}
    if latents.images is not None:
        arrays["images"] = latents.images
    if latents.labels is not None and not latents.classes and not latents.values:
        arrays |= {"labels": latents.labels, "names": np.array(latents.names)}
    elif latents.labels is not None:
        if Path(path).suffix != ".npz":
            raise ValueError(f"{os.fspath(path)}: labels have texts or fractions, which an .npz file can hold")
        for name, codes in zip(latents.names, latents.labels.T, strict=True):
            texts = np.array([*latents.classes.get(name, ()), ""])
            arrays[name] = latents.values.get(name, texts[codes] if name in latents.classes else codes.numpy())
    return save_arrays(path, arrays)


@torch.no_grad()
def _encoded(where: str, adapter: Any, x: Any, batch: int) -> tuple[Tensor, Any]:
    """Latents of all inputs, and the labels that came with them: an array, name to array, or None."""
    if not isinstance(adapter, Adapter) and not callable(adapter):
        kind = type(adapter).__name__
        raise TypeError(f"{where}: adapter is a {kind}, expected an object with encode(x), a module or a function")
    batch = checked_int(where, "batch", batch)
    module = adapter if isinstance(adapter, nn.Module) else getattr(adapter, "module", None)
    device = next((p.device for p in module.parameters()), None) if isinstance(module, nn.Module) else None
    parts, labels = [], []
    for inputs, known in map(_divided, _batches(x, batch)):
        inputs = _as_input(inputs)
        if device is not None:
            inputs = _on(inputs, device)
        if isinstance(adapter, Adapter):
            z = adapter.encode(inputs)
        elif isinstance(adapter, nn.Module):
            with _in_evaluation(adapter):
                z = adapter(**inputs) if isinstance(inputs, Mapping) else adapter(inputs)
        else:
            z = adapter(inputs)
        z = z if isinstance(z, Tensor) else torch.as_tensor(z)
        check_floating(where, "latents", z)
        if z.dim() != 2:
            raise ValueError(
                f"{where}: latents have shape {list(z.shape)}, expected [batch, dim]; iin_fast.data.from_layer pools feature maps"
            )
        parts.append(z.detach().cpu())
        labels.append(known)
    if not parts:
        raise ValueError(f"{where}: x is empty, expected at least one input")
    if labels[0] is None:
        return torch.cat(parts), None
    if isinstance(labels[0], Mapping):
        return torch.cat(parts), {name: np.concatenate([known[name] for known in labels]) for name in labels[0]}
    return torch.cat(parts), np.concatenate(labels)


def _batches(x: Any, batch: int) -> Iterator[Any]:
    """Batches of whatever holds the data."""
    if isinstance(x, DataLoader):
        yield from x
    elif isinstance(x, Dataset | IterableDataset):
        yield from DataLoader(x, batch_size=batch)
    elif isinstance(x, Tensor | np.ndarray):
        yield from (x[start : start + batch] for start in range(0, len(x), batch))
    elif isinstance(x, Mapping | str) or not isinstance(x, Iterable):
        raise TypeError(
            f"encode_all: x is a {type(x).__name__}, expected an array, a sequence, a Dataset or a DataLoader"
        )
    else:
        samples = iter(x)
        while some := list(islice(samples, batch)):
            if isinstance(some[0], tuple | Mapping | Tensor | np.ndarray):
                some = torch.utils.data.default_collate(some)
            yield some


def _divided(batch: Any) -> tuple[Any, Any]:
    """A batch as inputs and labels (an array, name to array, or None)."""
    if isinstance(batch, Mapping):
        known = {name: to_numpy(batch[name]) for name in LABELS if name in batch}
        inputs = {name: value for name, value in batch.items() if name not in known}
        return inputs, known or None
    if isinstance(batch, tuple | list) and len(batch) > 1 and isinstance(batch[0], Tensor):
        known = batch[1]
        if isinstance(known, Mapping):
            return batch[0], {str(name): to_numpy(value) for name, value in known.items()}
        if len(batch) > 2:
            return batch[0], {str(k): to_numpy(value) for k, value in enumerate(batch[1:])}
        return batch[0], to_numpy(known)
    return (
        batch[0] if isinstance(batch, tuple | list) and len(batch) == 1 and isinstance(batch[0], Tensor) else batch
    ), None


def _as_input(inputs: Any) -> Any:
    """Arrays as tensors; pictures in bytes as floats with channels first."""
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind in "fiub":
        inputs = torch.from_numpy(np.ascontiguousarray(inputs))
    if (
        isinstance(inputs, Tensor)
        and inputs.dtype == torch.uint8
        and inputs.dim() == 4
        and inputs.shape[-1] in (1, 3, 4)
    ):
        return inputs.movedim(-1, 1).float() / 255
    return inputs


def _on(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, Mapping):
        return {name: _on(value, device) for name, value in inputs.items()}
    return inputs.to(device) if isinstance(inputs, Tensor) else inputs
