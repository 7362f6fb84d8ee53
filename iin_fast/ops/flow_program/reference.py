"""Flow programs in plain torch: the executable definition that every backend is tested against.

The same walk runs programs layer by layer where there is no engine: ``maps`` then computes couplings and splines by the fused ops.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...flow import FlowProgram
from ...flow import layers as L
from ..affine_coupling.reference import affine_coupling
from ..autograd import has_values
from ..flow.layout import unpack
from ..spline_coupling.reference import spline_coupling

__all__ = ["DEFINITION", "Maps", "feature_order", "flow_program"]

Result = tuple[Tensor, Tensor]  # [batch, features], [batch]
Read = Callable[..., Tensor]  # (ref, *shape) -> a parameter of that shape


class Maps(NamedTuple):
    """What computes the transformers.

    affine: (x, raw scale or None, shift, squash, clamp, inverse), each ``[batch, features]``.
    spline: (x, raw ``[batch, features, count]``, transformer, inverse).
    dropout: in training without a program, the rate at which values before the last layer of a residual block are dropped.
    """

    affine: Callable[[Tensor, Tensor | None, Tensor, str, float, bool], Result]
    spline: Callable[[Tensor, Tensor, L.SplineTransformer, bool], Result]
    dropout: float = 0.0


def _spline(x: Tensor, raw: Tensor, t: L.SplineTransformer, inverse: bool) -> Result:
    minima = t.min_width, t.min_height, t.min_derivative
    return spline_coupling(x, raw, t.bins, t.tails, t.form, t.box, *minima, inverse)


DEFINITION = Maps(affine_coupling, _spline)


def flow_program(
    x: Tensor,  # [batch, dim]
    context: Tensor | None,  # [batch, context]
    parameters: Sequence[Tensor],
    program: FlowProgram,
    inverse: bool = False,
    base: bool = False,
    maps: Maps = DEFINITION,
) -> Result:  # [batch, dim], [batch]
    """The op; 16-bit types are computed in float32, and their log-det is float32."""
    dtype = x.dtype
    if dtype.itemsize == 2:
        x = x.float()
        context = None if context is None else context.float()
        parameters = [p.float() if p.is_floating_point() else p for p in parameters]
    read = partial(_parameter, parameters)
    total = x.new_zeros(x.shape[0])
    for layer in reversed(program.layers) if inverse else program.layers:
        x, logdet = _layer(layer, x, context, read, maps, inverse)
        total = total + logdet
    if base:
        total = total - 0.5 * (x * x).sum(1) - 0.5 * program.dim * math.log(2 * math.pi)
    return x.to(dtype), total


def _parameter(parameters: Sequence[Tensor], ref: L.Ref, *shape: int) -> Tensor:
    flat = parameters[ref.tensor].reshape(-1)
    return flat[ref.offset : ref.offset + math.prod(shape)].reshape(shape)


def _index(places: tuple[int, ...], x: Tensor) -> Tensor:
    """Places as a tensor beside x. Those on a GPU are kept: a copy from the host would make the GPU wait, and no CUDA graph holds it."""
    return _kept(places, x.device) if x.is_cuda and has_values(x) else torch.tensor(places, device=x.device).long()


@lru_cache(maxsize=1024)
def _kept(places: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(places, device=device).long()


def _layer(layer: L.Layer, x: Tensor, context: Tensor | None, read: Read, maps: Maps, inverse: bool) -> Result:
    if isinstance(layer, L.Inverse):
        return _layer(layer.layer, x, context, read, maps, not inverse)
    if isinstance(layer, L.Affine):
        return _affine(layer, x, read, inverse)
    if isinstance(layer, (L.Permute, L.Shuffle)):
        given = isinstance(layer, L.Shuffle)
        index = read(layer.index, x.shape[1]) if given else _index(layer.index, x)
        return x[:, index.argsort() if inverse else index], x.new_zeros(x.shape[0])
    if isinstance(layer, L.Linear):
        return _linear(layer, x, read, inverse)
    if isinstance(layer, L.Activation):
        slopes = torch.where(x < 0, torch.full_like(x, layer.slope), torch.ones_like(x))
        logdet = slopes.log().sum(1) if layer.exact else x.new_zeros(x.shape[0])
        return (x / slopes, -logdet) if inverse else (x * slopes, logdet)
    if isinstance(layer, L.Coupling):
        transformed = _index(layer.transformed, x)
        raw = _net(layer.net, x[:, _index(layer.conditioning, x)], context, read, maps.dropout)
        part, logdet = _transform(layer.transformer, x[:, transformed], raw, maps, inverse)
        return x.index_copy(1, transformed, part), logdet
    if inverse:
        return _sequential(layer, x, context, read, maps)
    return _transform(layer.transformer, x, _net(layer.net, x, context, read), maps, inverse)


def _softplus(raw: Tensor) -> Tensor:
    """log(1 + exp(raw)), exact at both ends; torch's has a step at its threshold."""
    return -F.logsigmoid(-raw)


def _positive(raw: Tensor, form: str, eps: float) -> tuple[Tensor, Tensor]:
    """s of raw, and log|s|."""
    if form == "exp":
        return raw.exp(), raw
    scale = raw if form == "plain" else _softplus(raw) + eps
    return scale, scale.abs().log()


def _affine(layer: L.Affine, x: Tensor, read: Read, inverse: bool) -> Result:
    dim = x.shape[1]
    shift = x.new_zeros(dim) if layer.shift == L.ABSENT else read(layer.shift, dim)
    if layer.scale == L.ABSENT:
        return x - shift if inverse else x + shift, x.new_zeros(x.shape[0])
    scale, log = _positive(read(layer.scale, dim), layer.form, layer.eps)
    logdet = log.sum().expand(x.shape[0])
    if layer.order == "scale_first":
        return ((x - shift) / scale, -logdet) if inverse else (x * scale + shift, logdet)
    return (x / scale - shift, -logdet) if inverse else (scale * (x + shift), logdet)


def _linear(layer: L.Linear, x: Tensor, read: Read, inverse: bool) -> Result:
    dim = x.shape[1]
    if layer.storage == "square":
        square = read(layer.lower, dim, dim)
        lower, upper, raw = square.tril(-1), square.triu(1), square.diagonal()
    else:
        size, device = dim * (dim - 1) // 2, x.device
        below, above = torch.tril_indices(dim, dim, -1, device=device), torch.triu_indices(dim, dim, 1, device=device)
        zeros = x.new_zeros(dim, dim)
        lower = zeros.index_put(tuple(below), read(layer.lower, size))
        upper = zeros.index_put(tuple(above), read(layer.upper, size))
        raw = read(layer.diagonal, dim)
    diagonal, log = _positive(raw, layer.form, layer.eps)
    logdet = log.sum().expand(x.shape[0])
    lower, upper = lower + torch.eye(dim, device=x.device, dtype=x.dtype), upper + diagonal.diag()
    bias = None if layer.bias == L.ABSENT else read(layer.bias, dim)
    if not inverse:
        return F.linear(F.linear(x, upper), lower, bias), logdet
    half = x if bias is None else x - bias
    half = torch.linalg.solve_triangular(lower, half.T, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(upper, half, upper=True).T, -logdet


_ACTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda v, _: v,
    "relu": lambda v, _: F.relu(v),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": lambda v, _: F.silu(v),
    "gelu": lambda v, _: F.gelu(v),
    "tanh": lambda v, _: torch.tanh(v),
    "sigmoid": lambda v, _: torch.sigmoid(v),
    "atan": lambda v, _: torch.atan(v),
}


def _net(net: L.Net, features: Tensor, context: Tensor | None, read: Read, dropout: float = 0.0) -> Tensor:
    """The raw values, ``[batch, sum of the outputs]``."""
    values = [features, features[:, :0] if context is None else context]
    for step, after in zip(net.steps, (*net.steps[1:], None), strict=True):
        if isinstance(step, L.Dense):
            source = values[step.source]
            if dropout and isinstance(after, L.Add):
                source = F.dropout(source, dropout)
            if isinstance(step, L.Panels):
                weight = unpack(read(step.weight, step.out * source.shape[1]), step.out, source.shape[1])
            else:
                weight = read(step.weight, step.out, source.shape[1])
            if step.mask != L.ABSENT:
                weight = weight * read(step.mask, step.out, source.shape[1]).detach()
            value = F.linear(source, weight, None if step.bias == L.ABSENT else read(step.bias, step.out))
        elif isinstance(step, L.Act):
            value = _ACTS[step.kind](values[step.source], step.slope)
        elif isinstance(step, L.Context):
            value = values[1][:, step.first : step.first + step.count]
        else:
            a, b = values[step.a], values[step.b]
            value = (
                a + b
                if isinstance(step, L.Add)
                else torch.cat([a, b], 1)
                if isinstance(step, L.Concat)
                else a * torch.sigmoid(b)
            )
        values.append(value)
    return torch.cat([values[output] for output in net.outputs], 1)


def _transform(transformer: L.Transformer, x: Tensor, raw: Tensor, maps: Maps, inverse: bool) -> Result:
    features = x.shape[1]
    if isinstance(transformer, L.SplineTransformer):
        raw = raw.unflatten(1, (features, transformer.count))
        if transformer.gain != 1:
            sizes, slopes = raw[..., : 2 * transformer.bins], raw[..., 2 * transformer.bins :]
            raw = torch.cat([sizes * transformer.gain, slopes], -1)
        if not transformer.wrap:
            return maps.spline(x, raw, transformer, inverse)
        y, logdet = maps.spline(x if inverse else _wrapped(x, transformer.right), raw, transformer, inverse)
        return _wrapped(y, transformer.right) if inverse else y, logdet
    if transformer.gain != 1:
        raw = raw * transformer.gain
    shift = raw[:, _slice(transformer.places("shift", features))]
    scale = None if transformer.squash == "none" else raw[:, _slice(transformer.places("scale", features))]
    return maps.affine(x, scale, shift, transformer.squash, transformer.clamp, inverse)


def _wrapped(x: Tensor, bound: float) -> Tensor:
    return torch.remainder(x, 2 * bound) - bound


def _slice(places: range) -> slice:
    return slice(places.start, places.stop, places.step)


# ---------------------------------------------------------------- autoregressive layers


def feature_order(layer: L.Autoregressive, dim: int, context: int, read: Read, like: Tensor) -> Tensor:
    """For each feature how many steps after the start of sampling all it reads is known, ``[dim]``.

    ``dim`` where a feature depends on itself, so that there is no order.
    """
    depends = [torch.eye(dim, device=like.device, dtype=like.dtype), like.new_zeros(context, dim)]
    for step in layer.net.steps:
        if isinstance(step, L.Dense):
            source = depends[step.source]
            if step.mask == L.ABSENT:
                found = source.amax(0, keepdim=True).expand(step.out, dim)
            else:
                mask = read(step.mask, step.out, source.shape[0]) != 0
                found = (mask.to(source.dtype) @ source).clamp(max=1)
        elif isinstance(step, L.Act):
            found = depends[step.source]
        elif isinstance(step, L.Concat):
            found = torch.cat([depends[step.a], depends[step.b]])
        elif isinstance(step, L.Context):
            found = depends[1][step.first : step.first + step.count]
        else:
            found = torch.maximum(depends[step.a], depends[step.b])
        depends.append(found)
    raw = torch.cat([depends[output] for output in layer.net.outputs])
    transformer = layer.transformer
    if isinstance(transformer, L.SplineTransformer):
        features = raw.unflatten(0, (dim, transformer.count)).amax(1)
    else:
        features = raw[_slice(transformer.places("shift", dim))]
        if transformer.squash != "none":
            features = torch.maximum(features, raw[_slice(transformer.places("scale", dim))])
    level = like.new_zeros(dim)
    for _ in range(dim):  # the longest way to each feature; it has at most dim - 1 steps
        level = torch.where(features > 0, level + 1, torch.zeros_like(level)).amax(1)
    return level


def _sequential(layer: L.Autoregressive, y: Tensor, context: Tensor | None, read: Read, maps: Maps) -> Result:
    """The inverse, in the order of the masks. Features that are not known yet are 0, and no derivative passes through them."""
    dim = y.shape[1]
    with torch.no_grad():
        order = feature_order(layer, dim, 0 if context is None else context.shape[1], read, y.detach())
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._is_tracing()
    last = dim - 1 if traced else min(int(order.max()), dim - 1)
    owners = _index(tuple(_owners(layer.transformer, dim)), y)
    x = torch.zeros_like(y)
    for step in range(last):
        now = order == step
        raw = torch.where(now[owners], _net(layer.net, x, context, read), 0.0)
        found, _ = _transform(layer.transformer, torch.where(now, y, 0.0), raw, maps, True)
        x = torch.where(now, found, x)
    return _transform(layer.transformer, y, _net(layer.net, x, context, read), maps, True)


def _owners(transformer: L.Transformer, dim: int) -> list[int]:
    """The feature that each raw value belongs to."""
    if isinstance(transformer, L.SplineTransformer):
        return [j for j in range(dim) for _ in range(transformer.count)]
    places = dict(zip(transformer.places("shift", dim), range(dim), strict=True))
    if transformer.squash != "none":
        places |= dict(zip(transformer.places("scale", dim), range(dim), strict=True))
    return [places[i] for i in range(len(places))]
