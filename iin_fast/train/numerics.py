"""Where in a model the first NaN or Inf comes up."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..iin import IIN
from ..nn import NeuralSplineFlow
from ..ops.flow import reference as affine_blocks
from ..ops.flow_program import reference as programs

__all__ = ["first_not_finite", "not_finite_part"]

# The tensors of an affine flow, in the order in which its definition takes them.
STACKED = "loc scale weight_in bias_in weight_hidden bias_hidden weight_out bias_out permutation".split()


def not_finite_part(named: Iterable[tuple[str, Tensor | None]]) -> str:
    """Names the first tensor with NaN or Inf, and the first index of it (the block, in a stacked flow); or ``""``."""
    for name, tensor in named:
        if tensor is not None and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            place = (~torch.isfinite(tensor)).nonzero()[0].tolist()
            return f"{name}, block {place[0]}" if len(place) > 1 else name
    return ""


@torch.no_grad()
def first_not_finite(model: IIN, z: Tensor, context: Tensor | None = None) -> str:
    """Names the parameter, or the block and layer, where NaN or Inf first come up on latents ``[batch, dim]``; or ``""``."""
    found = not_finite_part(model.named_parameters())
    if found:
        return f"parameter {found}"
    x = z.to(model.device, model.dtype) if model.inputs is None else model.inputs(z.to(model.device, model.dtype))[0]
    if not torch.isfinite(x).all():
        return "the latents, as the flow gets them"
    flow: Any = model.flow
    told = None if context is None else context.to(x)
    layers = flow.program().layers if isinstance(flow, NeuralSplineFlow) else ()
    read = partial(programs._parameter, flow._tensors() if layers else ())
    for number, layer in enumerate(layers):
        x, logdet = programs._layer(layer, x, told, read, programs.DEFINITION, False)
        if not torch.isfinite(x).all() or not torch.isfinite(logdet).all():
            block, place = divmod(number, len(layers) // flow.n_flows)
            return f"block {block}, layer {place} ({type(layer).__name__.lower()})"
    for block in range(0 if layers else flow.n_flows):
        tensors = (getattr(flow, name)[block : block + 1] for name in STACKED)
        with _Watch() as watch:
            x, _ = affine_blocks.flow(x, None if told is None else told[None], *tensors)
        if watch.found:
            return f"block {block}, {_layer_of(watch, flow.hidden_depth + 2)}"
    return "" if torch.isfinite(x.square().sum(1)).all() else f"the squares of factors, which reach {x.abs().max():.1e}"


class _Watch(TorchDispatchMode):
    """Counts the linear layers until the first operation whose result has NaN or Inf."""

    def __init__(self) -> None:
        super().__init__()
        self.linears, self.found = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not self.found:
            self.linears += name in ("addmm", "mm")
            floating = isinstance(result, Tensor) and result.is_floating_point()
            if floating and not torch.isfinite(result).all():
                self.found = name
        return result


def _layer_of(watch: _Watch, depth: int) -> str:
    """What the operation that was found belongs to: the nets of a half run one after the other, scale first."""
    if watch.linears == 0:
        return "ActNorm"
    half, number = divmod(watch.linears - 1, 2 * depth)
    net, layer = divmod(number, depth)
    if watch.found in ("addmm", "mm", "leaky_relu"):
        return f"half {half}, {('scale', 'shift')[net]} net, layer {layer}"
    return f"half {half}, affine map"
