"""The op ``spline_coupling``: argument checks, choice of the backend, autograd.

Files: reference.py (plain torch, the definition), csrc/spline_coupling (CPU and CUDA) and triton.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...backends import chosen, needs_definition
from ...checks import (
    autocast_enabled,
    check_device,
    check_dtype,
    check_floating,
    checked_choice,
    checked_flag,
    checked_int,
    checked_number,
)
from ..autograd import followed
from ..registry import Op, register
from ..types import accumulator_type
from . import reference

__all__ = ["check_options", "parameter_count", "rational_quadratic_spline", "spline_coupling"]

# Codes of csrc/spline_coupling/spline_coupling.h.
TAILS = {"linear": 0, "none": 1, "circular": 2}
PARAMETERIZATIONS = {"nflows": 0, "zuko": 1}
_TAILS = {code: name for name, code in TAILS.items()}
_FORMS = {code: name for name, code in PARAMETERIZATIONS.items()}


def parameter_count(bins: int, tails: str | None = "linear") -> int:
    """Raw values that a spline takes: ``bins`` widths, ``bins`` heights, and derivatives: ``bins - 1`` for linear tails,
    ``bins`` for circular ones, ``bins + 1`` without tails."""
    return 2 * bins + {"linear": bins - 1, "none": bins + 1, "circular": bins}[tails or "none"]


def spline_coupling(
    x: Tensor,
    parameters: Tensor,
    *,
    bins: int,
    inverse: bool = False,
    tails: str | None = "linear",
    tail_bound: float = 1.0,
    box: tuple[float, float, float, float] | None = None,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    parameterization: str = "nflows",
) -> tuple[Tensor, Tensor]:
    r"""A monotone rational-quadratic spline of every feature, and its log-determinant, in one pass.

    Bins are :math:`w = w_{min} + (1 - w_{min} K)\,\mathrm{softmax}(\text{raw})`, heights alike, slopes at the knots
    :math:`d_{min} + \mathrm{softplus}(\text{raw})`; within bin k, with :math:`\theta = (x - x_k) / w_k`,
    :math:`\delta = h_k / w_k`,

    .. math:: y = y_k + h_k \frac{\delta\theta^2 + d_k\theta(1-\theta)}{\delta + (d_k + d_{k+1} - 2\delta)\theta(1-\theta)}.

    The ends of the box map to its ends exactly, and nothing in the box is mapped out of it; a type of 16 bits has the box
    rounded to its numbers. A NaN or infinite raw value makes y and log-det NaN for every element that uses it, but for a
    width or height of -inf with "nflows", a bin of the smallest size. An element outside of the box uses none, unless tails are None.

    Args:
        x: ``[batch, ...]``, float32, float64, bfloat16 or float16, any strides; batch may be 0.
        parameters: ``[batch, ..., P]`` like ``x``: ``bins`` raw widths, ``bins`` raw heights and the raw derivatives of
            an element side by side, as a network emits them; or ``[batch, features * P]`` for ``x [batch, features]``.
            P is ``parameter_count(bins, tails)``.
        bins: K, at least 1.
        inverse: compute x from y.
        tails: "linear": the identity outside ``[-tail_bound, tail_bound]``, slope 1 at its ends; "circular": the same
            box, the slope at its end is that at its start; None: no tails are meant, K + 1 derivatives; a coordinate
            outside the box continues in a straight line with the slope of the outer knot, so nothing is undefined.
        tail_bound: half the width of the box, above 0.
        box: left, right, bottom, top, instead of ``tail_bound``; only with tails None.
        min_bin_width, min_bin_height: smallest bin, as a part of the box; times ``bins`` at most 1.
        min_derivative: smallest slope at a knot. With "zuko" the bound of its ``slope`` argument, in (0, 1).
        parameterization: "nflows" (above; also that of normflows and sbi), or "zuko": softmax of softly bounded widths and
            heights without a smallest bin, slopes exp(softly bounded raw).

    Returns:
        ``y`` like ``x``, and the log-determinant ``[batch]`` in nats of the map that was computed, in float32 for inputs
        of 16 bits. Both are differentiable, to any order.

    Raises:
        TypeError: a dtype that is not floating, dtypes that differ, bins that are no integer, bounds that are no numbers.
        ValueError: shapes or devices that don't fit, unknown tails or parameterization, bounds out of range or not finite.

    References:
        Durkan, Bekasov, Murray, Papamakarios: Neural spline flows, 2019, Sec. 3.1. Gregory, Delbourgo: Piecewise rational
        quadratic interpolation to monotonic data, 1982.

    Example:
        >>> import torch, iin_fast
        >>> x, parameters = torch.randn(5, 4), torch.randn(5, 4, 23)
        >>> y, logdet = iin_fast.functional.spline_coupling(x, parameters, bins=8, tail_bound=3.0)
        >>> back, _ = iin_fast.functional.spline_coupling(y, parameters, bins=8, tail_bound=3.0, inverse=True)
        >>> torch.allclose(back, x, atol=1e-4)
        True
    """
    op = "spline_coupling"
    tails, limits = check_options(
        op, bins, tails, tail_bound, box, min_bin_width, min_bin_height, min_derivative, parameterization
    )
    _check(op, x, "parameters", parameters)
    if x.dim() < 1:
        raise ValueError(f"{op}: x has shape [], expected [batch, ...]")
    count = parameter_count(bins, tails)
    if x.dim() == 2 and parameters.shape == (x.shape[0], x.shape[1] * count):
        parameters = parameters.unflatten(1, (x.shape[1], count))
    if parameters.shape != (*x.shape, count):
        raise ValueError(
            f"{op}: parameters has shape {list(parameters.shape)}, expected {[*x.shape, count]}: {bins} widths, {bins} "
            f"heights and {count - 2 * bins} derivatives for each element of x"
        )
    if x.dim() == 2:
        return _run(x, (parameters,), bins, tails, parameterization, limits, inverse)
    rows = x.reshape(x.shape[0], x.shape[1:].numel())
    parameters = parameters.reshape(*rows.shape, count)
    y, logdet = _run(rows, (parameters,), bins, tails, parameterization, limits, inverse)
    return y.reshape(x.shape), logdet


def rational_quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *,
    inverse: bool = False,
    tails: str | None = "linear",
    tail_bound: float = 1.0,
    box: tuple[float, float, float, float] | None = None,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    parameterization: str = "nflows",
) -> tuple[Tensor, Tensor]:
    """The spline of :func:`spline_coupling`, element by element.

    Three tensors are read where they are, any row strides. Slices ``[..., :K]``, ``[..., K : 2 * K]``, ``[..., 2 * K :]`` of one
    tensor are read as that one.

    Args:
        x: ``[...]``.
        widths, heights: raw, ``[..., K]``.
        derivatives: raw, ``[..., K - 1]`` for linear tails, ``[..., K]`` for circular ones, ``[..., K + 1]`` for None.

    The other arguments are those of :func:`spline_coupling`.

    Returns:
        ``y`` and the logarithm of its derivative by x, both ``[...]``.

    Raises:
        TypeError, ValueError: as :func:`spline_coupling`.

    Example:
        >>> import torch, iin_fast
        >>> x, w, h, d = torch.randn(5), torch.randn(5, 8), torch.randn(5, 8), torch.randn(5, 7)
        >>> y, logabsdet = iin_fast.functional.rational_quadratic_spline(x, w, h, d, tail_bound=3.0)
        >>> y.shape, logabsdet.shape
        (torch.Size([5]), torch.Size([5]))
    """
    op = "rational_quadratic_spline"
    values = {"widths": widths, "heights": heights, "derivatives": derivatives}
    for name, value in values.items():
        _check(op, x, name, value)
    bins = widths.shape[-1] if widths.dim() else 0
    if bins < 1:
        raise ValueError(
            f"{op}: widths has shape {list(widths.shape)}, expected {[*x.shape, 'bins']}, of one bin at least"
        )
    tails, limits = check_options(
        op, bins, tails, tail_bound, box, min_bin_width, min_bin_height, min_derivative, parameterization
    )
    counts = bins, bins, parameter_count(bins, tails) - 2 * bins
    for count, (name, value) in zip(counts, values.items(), strict=True):
        if value.shape != (*x.shape, count):
            raise ValueError(f"{op}: {name} has shape {list(value.shape)}, expected {[*x.shape, count]}")
    flat = [part.reshape(x.numel(), 1, part.shape[-1]) for part in _together(widths, heights, derivatives)]
    y, logdet = _run(x.reshape(-1, 1), flat, bins, tails, parameterization, limits, inverse)
    return y.reshape(x.shape), logdet.reshape(x.shape)


class _Adjacent(torch.autograd.Function):
    """Three slices that lie side by side in one tensor, as that tensor: a view, and its gradient is cut, not added up."""

    @staticmethod
    def forward(ctx: Any, widths: Tensor, heights: Tensor, derivatives: Tensor) -> Tensor:
        ctx.sizes = [part.shape[-1] for part in (widths, heights, derivatives)]
        return widths.as_strided((*widths.shape[:-1], sum(ctx.sizes)), widths.stride())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return grad.split(ctx.sizes, -1)


def _together(*parts: Tensor) -> Sequence[Tensor]:
    """``[..., K | K | derivatives]`` as one tensor where they lie so."""
    if followed() or needs_definition():
        return parts
    widths, heights, derivatives = parts
    one_storage: Any = torch._C._is_alias_of  # type: ignore[attr-defined]
    start, bins = widths.storage_offset(), widths.shape[-1]
    adjacent = (
        widths.stride(-1) == 1
        and widths.stride() == heights.stride() == derivatives.stride()
        and heights.storage_offset() == start + bins
        and derivatives.storage_offset() == start + 2 * bins
        and one_storage(widths, heights)
        and one_storage(widths, derivatives)
        # or only the first one would count what is written into it before backward
        and (not torch.is_grad_enabled() or widths._base is heights._base is derivatives._base is not None)
    )
    return (_Adjacent.apply(*parts),) if adjacent else parts


def _check(op: str, x: Tensor, name: str, value: Tensor) -> None:
    check_floating(op, "x", x)
    check_floating(op, name, value)
    check_device(op, name, value, x, "x")
    if not autocast_enabled(x):
        check_dtype(op, name, value, x.dtype, "like x")


def check_options(
    op: str,
    bins: int,
    tails: str | None,
    tail_bound: float,
    box: tuple[float, float, float, float] | None,
    min_bin_width: float,
    min_bin_height: float,
    min_derivative: float,
    parameterization: str,
) -> tuple[str, tuple[float, ...]]:
    """Refuse options that make no spline; gives the name of the tails, and left, right, bottom, top, the three minima."""
    if tails not in ("linear", "circular", None):
        raise ValueError(f"{op}: tails is {tails!r}, expected 'linear', 'circular' or None")
    checked_choice(op, "parameterization", parameterization, tuple(PARAMETERIZATIONS))
    checked_int(op, "bins", bins)
    tail_bound = checked_number(op, "tail_bound", tail_bound)
    min_bin_width = checked_number(op, "min_bin_width", min_bin_width)
    min_bin_height = checked_number(op, "min_bin_height", min_bin_height)
    min_derivative = checked_number(op, "min_derivative", min_derivative)
    if box is not None and tails is not None:
        raise ValueError(f"{op}: box is {box}, expected None with tails {tails!r}; give tail_bound")
    if not tail_bound > 0:
        raise ValueError(f"{op}: tail_bound is {tail_bound}, expected a number above 0")
    left = bottom = -tail_bound
    right = top = tail_bound
    if box is not None:
        if not isinstance(box, (tuple, list)) or len(box) != 4:
            raise ValueError(f"{op}: box is {box!r}, expected four numbers: left, right, bottom, top")
        left, right, bottom, top = (checked_number(op, "an edge of box", edge) for edge in box)
        if not (left < right and bottom < top):
            raise ValueError(f"{op}: box is {box}, expected left < right and bottom < top")
    if parameterization == "zuko":
        if not 0 < min_derivative < 1:
            raise ValueError(f"{op}: min_derivative is {min_derivative}, expected a slope between 0 and 1 for zuko")
    else:
        for name, value in (("min_bin_width", min_bin_width), ("min_bin_height", min_bin_height)):
            if not 0 <= value * bins <= 1:
                raise ValueError(f"{op}: {name} is {value}, expected between 0 and 1 / bins = {1 / bins:.4g}")
        if not min_derivative >= 0:
            raise ValueError(f"{op}: min_derivative is {min_derivative}, expected at least 0")
    return tails or "none", (left, right, bottom, top, min_bin_width, min_bin_height, min_derivative)


def _edges_in(dtype: torch.dtype, edges: tuple[float, ...]) -> tuple[float, ...]:
    """left, right, bottom, top as x of 16 bits can have them, so that they map to each other. A box between two neighbours
    stays as it is."""
    digits, least = (8, -133) if dtype == torch.bfloat16 else (11, -24)
    units = [max(math.frexp(edge)[1] - digits, least) for edge in edges]
    left, right, bottom, top = (math.ldexp(round(math.ldexp(e, -u)), u) for e, u in zip(edges, units, strict=True))
    return (left, right, bottom, top) if left < right and bottom < top else edges


def _run(
    x: Tensor, values: Sequence[Tensor], bins: int, tails: str, form: str, limits: tuple[float, ...], inverse: bool
) -> tuple[Tensor, Tensor]:
    """``values``: raw values in one tensor, or in three."""
    inverse = checked_flag("spline_coupling", "inverse", inverse)
    if x.dtype.itemsize == 2 and not autocast_enabled(x):
        limits = (*_edges_in(x.dtype, limits[:4]), *limits[4:])
    backend = chosen("spline_coupling", x)
    if backend == "reference":
        left, right, bottom, top, width, height, slope = limits
        return reference.spline_coupling(
            x,
            torch.cat(tuple(values), -1),
            bins,
            tails,
            form,
            (left, right, bottom, top),
            width,
            height,
            slope,
            inverse,
        )
    parameters, heights, derivatives = (*values, None, None)[:3]
    options = bins, TAILS[tails], PARAMETERIZATIONS[form], *limits, inverse
    return _calls[backend](x, parameters, heights, derivatives, *options)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=accumulator_type(x.dtype))


def _fake_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    parameters: Tensor,
    heights: Tensor | None,
    derivatives: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    values = parameters, heights, derivatives
    return x.new_empty(x.shape), *(x.new_empty((0,) if v is None else v.shape) for v in values)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, parameters, heights, derivatives, *ctx.options = inputs
    ctx.save_for_backward(x, parameters, heights, derivatives)


def _definition(ctx: Any) -> tuple[Callable[..., Any], Sequence[Any]]:
    bins, tails, form, left, right, bottom, top, width, height, slope, inverse = ctx.options
    options = bins, _TAILS[tails], _FORMS[form], (left, right, bottom, top), width, height, slope, inverse

    def definition(x: Tensor, *values: Tensor | None) -> tuple[Tensor, Tensor]:
        return reference.spline_coupling(x, torch.cat([v for v in values if v is not None], -1), *options)

    return definition, ctx.saved_tensors


def _backward(kernel: Any, ctx: Any, grad_y: Tensor, grad_logdet: Tensor) -> tuple[Tensor | None, ...]:
    x, *values = ctx.saved_tensors
    grad_x, *grads = kernel(grad_y, grad_logdet, x, *values, *ctx.options)
    found = [None if v is None else g for v, g in zip(values, grads, strict=True)]
    return grad_x, *found, *(None,) * len(ctx.options)


_calls = register(Op("spline_coupling", _setup, _backward, _definition, _fake, _fake_backward))
