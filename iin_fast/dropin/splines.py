"""Rational-quadratic splines as nflows and normflows call them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import backend
from ..functional import spline_coupling
from ..ops.spline_coupling import parameter_count
from .registry import eligible, in_dynamo_onnx_export

__all__ = ["cdf", "net_scale", "packed_spline", "refuse_tails"]

OPTIONS = ("min_bin_width", "min_bin_height", "min_derivative")


def refuse_tails(allowed: tuple[str | None, ...]) -> Callable[[Any], str | None]:
    """A check of the spline's options; ``allowed`` are the tails that the library's class gives a meaning."""

    def refuse(module: Any) -> str | None:
        tails, bound = getattr(module, "tails", None), getattr(module, "tail_bound", 1.0)
        if not isinstance(tails, str | None) or tails not in allowed:
            return f"tails={tails!r}"
        if not isinstance(bound, int | float) or not bound > 0:
            return (
                f"tail_bound is a {type(bound).__name__}"
                if not isinstance(bound, int | float)
                else f"tail_bound={bound}"
            )
        bins = module.num_bins if hasattr(module, "num_bins") else module.unnormalized_widths.shape[-1]
        for name in OPTIONS:
            value = getattr(module, name)
            if not isinstance(value, float) or not 0 <= value or (name != OPTIONS[2] and value * bins > 1):
                return f"{name}={value!r}"
        return None

    return refuse


def net_scale(net: Any, *names: str) -> float | None:
    """What the libraries scale raw widths and heights by: 1 / sqrt(hidden features of the net)."""
    for name in names:
        if hasattr(net, name):
            return float(getattr(net, name)) ** -0.5
    return None


def packed_spline(
    module: Any,
    x: Tensor,  # [batch, ...]
    parameters: Tensor,  # [batch, ..., widths | heights | derivatives]
    bins: int,
    scale: float | None,
    inverse: bool,
) -> tuple[Tensor, Tensor] | None:  # [batch, ...], [batch]
    """The spline with the options of ``module``; None where the library's own code has to run."""
    if in_dynamo_onnx_export():  # the library's own code branches on values, the definition does not
        with backend("reference"):
            return _packed_spline(module, x, parameters, bins, scale, inverse)
    return _packed_spline(module, x, parameters, bins, scale, inverse)


def _packed_spline(
    module: Any, x: Tensor, parameters: Tensor, bins: int, scale: float | None, inverse: bool
) -> tuple[Tensor, Tensor] | None:
    if not eligible(x, parameters) or parameters.shape != (*x.shape, parameter_count(bins, module.tails)):
        return None
    box = None
    if module.tails is None:
        box = (0.0, 1.0, 0.0, 1.0)
        if torch.compiler.is_compiling():  # the domain can't be read
            return None
        if x.numel():
            low, high = torch.aminmax(x)
            if low < 0 or high > 1:  # the library raises
                return None
    if scale is not None:
        factor = torch.full((parameters.shape[-1],), scale, dtype=x.dtype, device=x.device)
        factor[2 * bins :] = 1
        parameters = parameters * factor
    return spline_coupling(
        x,
        parameters,
        bins=bins,
        inverse=inverse,
        tails=module.tails,
        tail_bound=1.0 if box else float(module.tail_bound),
        box=box,
        min_bin_width=module.min_bin_width,
        min_bin_height=module.min_bin_height,
        min_derivative=module.min_derivative,
    )


def coupling(original: Any, self: Any, inputs: Tensor, transform_params: Tensor, inverse: bool = False) -> Any:
    """``PiecewiseRationalQuadraticCoupling(Transform)._coupling_transform``."""
    scale = net_scale(self.transform_net, "hidden_features", "hidden_channels")
    if scale is None or not isinstance(transform_params, Tensor):
        return original(self, inputs, transform_params, inverse)
    if inputs.dim() == 4:
        batch, channels, *size = inputs.shape
        parameters = transform_params.reshape(batch, channels, -1, *size).permute(0, 1, 3, 4, 2)
    else:
        parameters = transform_params.reshape(*inputs.shape, -1) if inputs.numel() else transform_params
    found = packed_spline(self, inputs, parameters, self.num_bins, scale, inverse)
    return original(self, inputs, transform_params, inverse) if found is None else found


def autoregressive(
    original: Any, self: Any, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False
) -> Any:
    """``MaskedPiecewiseRationalQuadraticAutoregressive(Transform)._elementwise``."""
    found = None
    if isinstance(autoregressive_params, Tensor) and inputs.numel():
        scale = net_scale(self.autoregressive_net, "hidden_features")
        parameters = autoregressive_params.reshape(*inputs.shape[:2], -1)
        found = packed_spline(self, inputs, parameters, self.num_bins, scale, inverse)
    return original(self, inputs, autoregressive_params, inverse) if found is None else found


def cdf(original: Any, self: Any, inputs: Tensor, inverse: bool = False) -> Any:
    """``PiecewiseRationalQuadraticCDF._spline``: parameters of its own, the same for all rows."""
    raw = torch.cat([self.unnormalized_widths, self.unnormalized_heights, self.unnormalized_derivatives], -1)
    bins = self.unnormalized_widths.shape[-1]
    found = packed_spline(self, inputs, raw.expand(inputs.shape[:1] + raw.shape), bins, None, inverse)
    return original(self, inputs, inverse) if found is None else found
