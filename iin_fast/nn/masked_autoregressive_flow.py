"""A masked autoregressive flow as one module."""

import math

import torch
from torch import Tensor

from ..checks import checked_choice, checked_int, checked_number
from ..flow import ProgramBuilder, affine, spline
from ..ops.spline_coupling import check_options, parameter_count
from .actnorm import MIN_SPREAD
from .mlp_flow import MlpFlow
from .program_flow import Orders, Stacked, identity_spline_

__all__ = ["MaskedAutoregressiveFlow"]

TRANSFORMERS = ("affine", "spline")
ORDERS = ("reversed", "random")
MIN_DERIVATIVE = 1e-3


class MaskedAutoregressiveFlow(MlpFlow):
    """The density of data, given a context or not, as a stack of masked autoregressive layers (MAF, or RQ-NSF (AR)).

    One layer: ActNorm; every feature is mapped by what a masked MLP (MADE) reads from the features before it, and from
    the context:

        affine:  y_i = x_i * exp(s_i) + t_i,  s = raw / (1 + |raw| / clamp),  log|det| = sum s
        spline:  y_i = a rational-quadratic spline of x_i, the identity beyond its box

    Between two layers the features are reversed, or permuted at random. The layers start as the identity. The first call of
    ``forward`` or ``log_prob`` starts ActNorm from its batch.

    The density takes one pass, a sample one step for each feature; each is one op. The parameters lie stacked in a few
    tensors, each with ``n_flows`` as its first dimension.

    See also :class:`iin_fast.nn.NeuralSplineFlow`, whose samples are as fast as its densities.

    References:
        Papamakarios, Pavlakou, Murray: Masked autoregressive flow for density estimation, 2017, arXiv 1705.07057.
        Germain et al.: MADE, 2015, Sec. 4. Durkan et al.: Neural spline flows, 2019, Sec. 3.3 (RQ-NSF (AR)).

    Args:
        dim: number of features.
        context_dim: number of features of the context; 0: none.
        n_flows: number of autoregressive layers.
        hidden_dim: width of the MLPs.
        hidden_depth: number of hidden-to-hidden layers of each MLP.
        transformer: "affine" or "spline".
        clamp: bound of the affine log-scale, log(1000) by default; splines ignore it.
        bins: of each spline; "affine" ignores it.
        tail_bound: half the width of the box in which the splines bend; "affine" ignores it.
        order: "reversed" or "random": of the features, from layer to layer.
        activation: of the MLPs: "relu", "leaky_relu", "elu", "silu", "gelu", "tanh" or "sigmoid".
        actnorm: False leaves ActNorm out.
        min_spread: of :class:`ActNorm`, what is taken as constant at the start.
        generator: draws the weights and orders; by default torch's global one.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size or an option out of range.
        TypeError: a size that is no integer, a bound that is no number, an ``actnorm`` that is not True or False.

    Example:
        >>> flow = MaskedAutoregressiveFlow(3, context_dim=2, n_flows=2, hidden_dim=16)
        >>> x, context = torch.randn(5, 3), torch.randn(5, 2)
        >>> flow.log_prob(x, context).shape, flow.sample((10,), context).shape
        (torch.Size([5]), torch.Size([10, 5, 3]))
        >>> z, logdet = flow(x, context)
        >>> torch.allclose(flow.inverse(z, context)[0], x, atol=1e-5)
        True
    """

    def __init__(
        self,
        dim: int,
        context_dim: int = 0,
        n_flows: int = 5,
        hidden_dim: int = 50,
        hidden_depth: int = 2,
        *,
        transformer: str = "affine",
        clamp: float = math.log(1000),
        bins: int = 8,
        tail_bound: float = 3.0,
        order: str = "reversed",
        activation: str = "relu",
        actnorm: bool = True,
        min_spread: float = MIN_SPREAD,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = "MaskedAutoregressiveFlow"
        sizes = context_dim, n_flows, hidden_dim, hidden_depth
        self._set_sizes(dim, 1, *sizes, activation, actnorm, min_spread, dtype)
        self.transformer = checked_choice(where, "transformer", transformer, TRANSFORMERS)
        self.clamp = checked_number(where, "clamp", clamp, above=0)
        self.bins = checked_int(where, "bins", bins)
        self.tail_bound = checked_number(where, "tail_bound", tail_bound, above=0)
        self.order = checked_choice(where, "order", order, ORDERS)
        check_options(where, self.bins, "linear", self.tail_bound, None, 1e-3, 1e-3, MIN_DERIVATIVE, "nflows")
        self.count = parameter_count(self.bins, "linear") if transformer == "spline" else 2  # raw values of a feature
        self._register(self.dim + self.context_dim, self.dim * self.count, device, dtype)
        self._register_masks(device)
        if order == "random":
            index = torch.empty(self.n_flows - 1, self.dim, dtype=torch.int64, device=device)
            self.register_buffer("permutation", index)
        self._finish(generator)

    def extra_repr(self) -> str:
        text = super().extra_repr() + f", transformer={self.transformer!r}"
        text += f", bins={self.bins}, tail_bound={self.tail_bound}" if self.transformer == "spline" else ""
        return text + f", order={self.order!r}"

    def _masks(self) -> dict[str, Tensor]:
        """MADE's, ``[out, in]`` as the weights: a unit of degree k reads features 1 … k, feature k what is below k.

        Under a context there are units of degree 0, which read the context alone, for the first feature.
        """
        dim, width = self.dim, self.hidden_dim
        with torch.device("cpu"):
            features = torch.arange(1, dim + 1)
            low = 0 if self.context_dim else min(1, dim - 1)
            hidden = low + torch.arange(width) * max(dim - low, 1) // width
            inputs = torch.cat([features, torch.zeros(self.context_dim, dtype=torch.int64)])
            outputs = features.repeat_interleave(self.count) if self.transformer == "spline" else features.repeat(2)
            masks = {"mask_in": hidden[:, None] >= inputs, "mask_out": outputs[:, None] > hidden}
            if self.hidden_depth:
                masks["mask_hidden"] = hidden[:, None] >= hidden
        return masks

    def _add_layers(self, builder: ProgramBuilder, stacked: Stacked, orders: Orders) -> None:
        for flow in range(self.n_flows):
            if flow:
                builder.permute(orders[flow - 1] if self.order == "random" else reversed(range(self.dim)))
            if self.actnorm:
                builder.affine(stacked("loc", flow), stacked("scale", flow), order="shift_first")
            if self.transformer == "spline":
                gain = self.hidden_dim**-0.5
                transformer = spline(self.bins, tail_bound=self.tail_bound, min_derivative=MIN_DERIVATIVE, gain=gain)
                builder.autoregressive(self._mlp(stacked, flow), transformer)
            else:
                builder.autoregressive(self._mlp(stacked, flow), affine(self.dim, "softclip", clamp=self.clamp))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters and orders anew, and forget the start of ActNorm."""
        super().reset_parameters(generator)
        if self.transformer == "spline":
            identity_spline_(self.bias_out, self.bins, self.count, MIN_DERIVATIVE)
