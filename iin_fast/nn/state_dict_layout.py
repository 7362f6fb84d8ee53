"""What a stacked flow shows in its state_dict: which keys, in which order and shape.

A :class:`~iin_fast.nn.Flow` keeps its parameters stacked over blocks, halves and nets, weights in the panel layout of
its kernels. Neither belongs in a checkpoint. An :class:`Entry` says, for one key, which stored tensor it is cut from;
``export_tensors`` cuts, ``import_tensors`` puts the pieces back. Both move layout only: they work for parameters, for
their gradients, and for anything else of their shapes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.flow.layout import pack, unpack

__all__ = ["Entry", "check_permutation", "export_tensors", "import_tensors", "is_sharded", "keep_starts"]


@dataclass(frozen=True)
class Entry:
    """One key of a state_dict.

    ``name`` is the stored tensor, ``index`` the part of it, ``shape`` the shape under the key. ``panels`` gives the
    (out, in) of a weight that is stored in panels. ``inverse`` marks the inverse of a stored permutation, which is
    written and, when read, only compared.
    """

    key: str
    name: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    panels: tuple[int, int] | None = None
    inverse: bool = False


def export_tensors(entries: Iterable[Entry], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their keys. Stored tensors that are absent from ``stored`` are left out.

    Each result is a copy of its own, and differentiable.
    """
    neutral: dict[str, Tensor] = {}
    result = {}
    for entry in entries:
        if entry.name not in stored:
            continue
        if entry.name not in neutral:
            tensor = stored[entry.name]
            neutral[entry.name] = unpack(tensor, *entry.panels) if entry.panels else tensor
        piece = neutral[entry.name][entry.index]
        result[entry.key] = piece.argsort() if entry.inverse else piece.reshape(entry.shape).clone()
    return result


def import_tensors(
    entries: Iterable[Entry],
    current: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    prefix: str,
    *,
    keep_dtype: bool,
    missing: list[str],
    errors: list[str],
) -> dict[str, Tensor]:
    """The stored tensors that the keys of ``state`` describe; what is missing keeps its current value.

    Args:
        entries: the keys.
        current: the tensors as they are stored now.
        state: tensors under ``prefix`` + key; whole, or sharded over processes.
        prefix: stands before every key.
        keep_dtype: True keeps the type of ``state``, False converts to the stored type.
        missing: gets the keys that ``state`` lacks.
        errors: gets a message for every shape that does not fit.

    Returns:
        One tensor for each name of ``current``, in storage layout.

    Raises:
        ValueError: a tensor holds NaN or Inf, or an index is no permutation, or not the inverse of its partner.
    """
    entries = list(entries)
    state = {key: whole(state[key]) for key in (prefix + entry.key for entry in entries) if key in state}
    found: dict[str, list[tuple[Entry, Tensor]]] = {name: [] for name in current}
    complete = dict.fromkeys(current, True)
    for entry in entries:
        key = prefix + entry.key
        if key not in state:
            missing.append(key)
        elif not isinstance(state[key], Tensor):
            errors.append(f"{key} is a {type(state[key]).__name__}, expected a torch.Tensor")
        elif tuple(state[key].shape) != entry.shape:
            errors.append(
                f"size mismatch for {key}: copying a param with shape {state[key].shape} from checkpoint, "
                f"the shape in current model is {torch.Size(entry.shape)}."
            )
        else:
            check_values(key, state[key], entry)
            found[entry.name].append((entry, state[key]))
            continue
        if not entry.inverse:
            complete[entry.name] = False

    result = {}
    for name, pieces in found.items():
        if not pieces:
            result[name] = current[name]
            continue
        panels = pieces[0][0].panels
        shape = current[name].shape[:-1] + panels if panels else current[name].shape
        dtype, device = (pieces[0][1] if keep_dtype else current[name]).dtype, pieces[0][1].device
        if complete[name]:
            neutral = torch.empty(shape, dtype=dtype, device=device)
        else:
            kept = whole(current[name].detach())
            kept = unpack(kept, *panels) if panels else kept
            neutral = kept.to(device=device, dtype=dtype, copy=True)
        for entry, tensor in pieces:
            if not entry.inverse:
                neutral[entry.index] = tensor.detach().reshape(neutral[entry.index].shape).to(neutral)
        for entry, tensor in pieces:
            if entry.inverse and not tensor.is_meta and not torch.equal(tensor, neutral[entry.index].argsort()):
                raise ValueError(
                    f"load_state_dict: {prefix + entry.key} is not the inverse of the permutation it stands beside; "
                    f"the checkpoint is corrupt or foreign"
                )
        result[name] = sharded_like(current[name], pack(neutral) if panels else neutral)
    return result


def keep_starts(entries: Iterable[Entry], stored: dict[str, Tensor], state: Mapping[str, Any], prefix: str) -> None:
    """Set the flags of the ActNorms whose start a file holds without its flag; the next batch would overwrite it."""
    entries = list(entries)
    for entry in entries:
        if entry.name == "initialized" and prefix + entry.key not in state:
            start = [e for e in entries if e.name in ("loc", "scale") and e.index == entry.index]
            if any(prefix + e.key in state for e in start):
                stored["initialized"] = stored["initialized"].clone()
                stored["initialized"][entry.index] = 1


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor lies in parts over processes, as ``fully_shard`` lays parameters out."""
    return type(tensor).__name__ == "DTensor"


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which this process may hold a part."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sharded_like(like: Tensor, tensor: Tensor) -> Tensor:
    """This process' part of a tensor that all processes hold, if ``like`` is sharded."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements, src_data_rank=None)


def check_values(key: str, tensor: Tensor, entry: Entry) -> None:
    """Refuse a parameter that is not finite, and an index that is no permutation."""
    if tensor.is_meta:
        return
    if tensor.is_floating_point() and not (finite := tensor.isfinite()).all():
        raise ValueError(
            f"load_state_dict: {key} holds NaN or Inf in {int((~finite).sum())} of {tensor.numel()} values; "
            f"expected finite parameters: the checkpoint is corrupt, or was saved after training had diverged"
        )
    if entry.name == "permutation":
        check_permutation(key, tensor)


def check_permutation(key: str, tensor: Tensor) -> None:
    """Refuse an index ``[..., n]`` whose rows are no permutations."""
    rows = tensor.sort(dim=-1).values
    if not torch.equal(rows, torch.arange(rows.shape[-1], device=rows.device).expand_as(rows)):
        raise ValueError(
            f"load_state_dict: {key} is not a permutation of 0 … {rows.shape[-1] - 1}; "
            f"the checkpoint is corrupt or foreign"
        )
