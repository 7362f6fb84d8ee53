"""Checks of what the op ``flow_program`` is given. An error names the layer that reads the argument."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...checks import check_device, check_dtype, check_floating, check_kind
from ...flow import FlowProgram
from ...flow import layers as L
from .reference import _parameter, feature_order

__all__ = ["KEEP", "check_data", "check_parameters", "check_rows"]

OP = "flow_program"

# What forward keeps for backward: codes of csrc/common/keep.h, and 3 by size (flow_program_cpu.cpp). A compiled graph has to
# know how much that is, so there "auto" keeps nothing.
KEEP = {"auto": 3, "recompute": 0, "checkpoint": 1, "save": 2}


def check_rows(x: Tensor, context: Tensor | None, program: FlowProgram, types: tuple[torch.dtype, ...]) -> None:
    """Refuse an input or a context that is not the program's."""
    dim, wide = program.dim, program.context
    check_floating(OP, "x", x, types)
    if x.dim() != 2 or x.shape[1] != dim:
        raise ValueError(f"{OP}: x has shape {list(x.shape)}, expected [batch, {dim}]")
    if context is None:
        if wide:
            raise ValueError(f"{OP}: context is None, expected [{x.shape[0]}, {wide}]")
        return
    if not wide:
        raise ValueError(f"{OP}: context is given, expected None: the program has no context")
    check_floating(OP, "context", context, types)
    check_device(OP, "context", context, x, "x")
    check_dtype(OP, "context", context, x.dtype, "like x")
    if context.dim() != 2 or context.shape[0] != x.shape[0] or context.shape[1] != wide:
        raise ValueError(f"{OP}: context has shape {list(context.shape)}, expected [{x.shape[0]}, {wide}]")


def check_parameters(x: Tensor, parameters: Sequence[Tensor], program: FlowProgram) -> None:
    """Refuse parameters that the program cannot read."""
    if len(parameters) != program.tensors:
        raise ValueError(f"{OP}: parameters holds {len(parameters)} tensors, expected {program.tensors}")
    for number, value in enumerate(parameters):
        if not isinstance(value, Tensor):
            raise TypeError(f"{OP}: parameters[{number}] is a {type(value).__name__}, expected a torch.Tensor")
        check_device(OP, f"parameters[{number}]", value, x, "x")
    for number, (layer, reads) in enumerate(zip(program.layers, program.reads, strict=True)):
        for read in reads:
            where = f"{OP}: layer {number} ({L.kind(layer)})"
            name = f"{read.name}, parameters[{read.ref.tensor}],"
            value, end = parameters[read.ref.tensor], read.ref.offset + math.prod(read.shape)
            if read.integer:
                check_kind(where, name, value, torch.int64, "an int64 tensor")
            elif not (read.mask and value.dtype == torch.bool):
                check_dtype(where, name, value, x.dtype, "like x" + (", or bool" if read.mask else ""))
            if value.numel() < end:
                at = f" from element {read.ref.offset} on" if read.ref.offset else ""
                raise ValueError(
                    f"{where}: {name} has shape {list(value.shape)}, expected {list(read.shape)}{at}: {end} elements at least"
                )


@torch.no_grad()
def check_data(parameters: Sequence[Tensor], program: FlowProgram) -> None:
    """Refuse masks that let a feature depend on itself, and plain scales of 0: looks at values, so once for each set of parameters."""
    read = partial(_parameter, parameters)
    for number, layer in enumerate(program.layers):
        where = f"{OP}: layer {number} ({L.kind(layer)})"
        layer = layer.layer if isinstance(layer, L.Inverse) else layer
        if isinstance(layer, L.Autoregressive):
            like = next((p for p in parameters if p.is_floating_point()), torch.empty(0))
            order = feature_order(layer, program.dim, program.context, read, like.new_empty(0, dtype=torch.float32))
            cyclic = (order >= program.dim).nonzero().flatten().tolist()
            if cyclic:
                raise ValueError(
                    f"{where}: the masks let features {cyclic} depend on themselves, expected masks that are triangular in some order"
                )
        elif isinstance(layer, L.Shuffle):
            index = read(layer.index, program.dim)
            if not torch.equal(index.sort().values, torch.arange(program.dim, device=index.device)):
                raise ValueError(f"{where}: index is no permutation of 0 … {program.dim - 1}")
        elif isinstance(layer, (L.Affine, L.Linear)) and layer.form == "plain":
            scale = _plain_scale(layer, program.dim, read)
            if scale is not None and bool((scale == 0).any()):
                name = "scale" if isinstance(layer, L.Affine) else "diagonal"
                raise ValueError(f"{where}: {name} holds 0, expected no 0: the map would have no inverse")


def _plain_scale(layer: L.Affine | L.Linear, dim: int, read: partial[Tensor]) -> Tensor | None:
    if isinstance(layer, L.Affine):
        return None if layer.scale == L.ABSENT else read(layer.scale, dim)
    return read(layer.lower, dim, dim).diagonal() if layer.storage == "square" else read(layer.diagonal, dim)
