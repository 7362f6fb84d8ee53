"""What the flows with plain MLPs as conditioners share."""

import torch
from torch import Tensor, nn

from ..checks import checked_choice, checked_dtype, checked_flag, checked_int, checked_number
from ..flow import Ref, Weights, mlp
from ..flow.layers import Net
from .program_flow import ProgramFlow, Stacked, draw_linear, empty

__all__ = ["ACTIVATIONS", "MlpFlow"]

# Of the conditioners, and the slope of each: that of leaky_relu below 0, alpha of elu.
ACTIVATIONS = {"relu": 0.0, "leaky_relu": 0.01, "elu": 1.0, "silu": 0.0, "gelu": 0.0, "tanh": 0.0, "sigmoid": 0.0}


class MlpFlow(ProgramFlow):
    """``n_flows`` layers with an MLP each, of ``hidden_depth + 2`` linear layers; a new one gives zeros."""

    n_flows: int
    hidden_dim: int
    hidden_depth: int
    activation: str
    actnorm: bool

    def _set_sizes(
        self,
        dim: int,
        least: int,
        context_dim: int,
        n_flows: int,
        hidden_dim: int,
        hidden_depth: int,
        activation: str,
        actnorm: bool,
        min_spread: float,
        dtype: torch.dtype | None,
    ) -> None:
        where = type(self).__name__
        self.dim = checked_int(where, "dim", dim, least=least)
        self.context_dim = checked_int(where, "context_dim", context_dim, least=0)
        self.n_flows = checked_int(where, "n_flows", n_flows)
        self.hidden_dim = checked_int(where, "hidden_dim", hidden_dim)
        self.hidden_depth = checked_int(where, "hidden_depth", hidden_depth, least=0)
        self.activation = checked_choice(where, "activation", activation, tuple(ACTIVATIONS))
        self.actnorm = checked_flag(where, "actnorm", actnorm)
        self.min_spread = checked_number(where, "min_spread", min_spread, least=0)
        checked_dtype(where, dtype)

    def _register(
        self, inputs: int, outputs: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """Add ActNorm and the weights of MLPs from ``inputs`` features to ``outputs``."""

        def stack(*shape: int) -> nn.Parameter:
            return empty(self.n_flows, *shape, device=device, dtype=dtype)

        width, depth = self.hidden_dim, self.hidden_depth
        self._register_actnorm(self.n_flows if self.actnorm else 0, device, dtype)
        self.weight_in, self.bias_in = stack(width, inputs), stack(width)
        if depth:
            self.weight_hidden, self.bias_hidden = stack(depth, width, width), stack(depth, width)
        self.weight_out, self.bias_out = stack(outputs, width), stack(outputs)

    def extra_repr(self) -> str:
        text = f"{self.dim}, context_dim={self.context_dim}, n_flows={self.n_flows}, hidden_dim={self.hidden_dim}"
        return text + f", hidden_depth={self.hidden_depth}" + ("" if self.actnorm else ", actnorm=False")

    def _mlp(self, stacked: Stacked, flow: int) -> Net:
        """That of one layer, with the masks where there are any."""

        def dense(out: int, part: str, *index: int) -> Weights:
            mask: Ref = stacked(f"mask_{part}")
            return Weights(out, stacked(f"weight_{part}", *index), stacked(f"bias_{part}", *index), mask)

        hidden = [dense(self.hidden_dim, "hidden", flow, k) for k in range(self.hidden_depth)]
        layers = [dense(self.hidden_dim, "in", flow), *hidden, dense(self.weight_out.shape[1], "out", flow)]
        slope = ACTIVATIONS[self.activation]
        return mlp(layers, activation=self.activation, slope=slope, context=self.context_dim > 0)

    def _draw_mlp(self, flow: int, generator: torch.Generator | None) -> None:
        draw_linear(self.weight_in[flow], self.bias_in[flow], generator)
        for k in range(self.hidden_depth):
            draw_linear(self.weight_hidden[flow, k], self.bias_hidden[flow, k], generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters and permutations anew, and forget the start of ActNorm."""
        self._forget_actnorm()
        self._fill_masks()
        for flow in range(self.n_flows):
            self._draw_mlp(flow, generator)
        self.weight_out.zero_()
        self.bias_out.zero_()
        permutation: Tensor | None = self._buffers.get("permutation")
        for row in range(0 if permutation is None else permutation.shape[0]):
            self._draw_permutation(row, generator)
