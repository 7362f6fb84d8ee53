"""A residual network, the usual conditioner of couplings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import checked_dtype, checked_int, checked_number
from ..flow import NetBuilder, ProgramBuilder
from .net_steps import NotAProgram, dense
from .program_flow import draw_linear

__all__ = ["ResidualNet"]


class ResidualNet(nn.Module):
    """A linear layer, residual blocks of two ReLU layers each, and a linear layer.

    References:
        He et al. 2016 (identity mappings). Durkan et al. 2019 (Neural spline flows), Sec. 5 and B.1.

    Args:
        in_features, out_features: of the network.
        hidden_dim: width.
        hidden_depth: number of residual blocks.
        dropout: in [0, 1), within each block.
        generator: draws the weights, as torch.nn.Linear does; by default torch's global one.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size or a rate out of range.
        TypeError: a size that is no integer, a rate that is no number.

    Example:
        >>> ResidualNet(3, 7, hidden_dim=16)(torch.randn(5, 3)).shape
        torch.Size([5, 7])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_dim: int = 128,
        hidden_depth: int = 2,
        *,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = checked_int("ResidualNet", "in_features", in_features)
        out_features = checked_int("ResidualNet", "out_features", out_features)
        hidden_dim = checked_int("ResidualNet", "hidden_dim", hidden_dim)
        hidden_depth = checked_int("ResidualNet", "hidden_depth", hidden_depth, least=0)
        dropout = checked_number("ResidualNet", "dropout", dropout, least=0, below=1)
        checked_dtype("ResidualNet", dtype)

        def linear(inputs: int, outputs: int) -> nn.Linear:
            """Not drawn yet; torch.nn.utils.skip_init does the same, but not for fake tensors."""
            layer = nn.Linear(inputs, outputs, device="meta", dtype=dtype)
            for name, meta in list(layer.named_parameters()):
                setattr(layer, name, nn.Parameter(torch.empty(meta.shape, device=device, dtype=meta.dtype)))
            return layer

        self.dropout = dropout
        self.first = linear(in_features, hidden_dim)
        self.blocks = nn.ModuleList(
            nn.ModuleList([linear(hidden_dim, hidden_dim), linear(hidden_dim, hidden_dim)]) for _ in range(hidden_depth)
        )
        self.last = linear(hidden_dim, out_features)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                draw_linear(layer.weight, layer.bias, generator)

    def program_steps(self, builder: ProgramBuilder, steps: NetBuilder, value: int) -> int:
        """Append the network to a conditioner of a flow program."""
        if self.training and self.dropout:
            raise NotAProgram(self, "drops values while it trains")
        h = steps.dense(value, dense(self.first, builder))
        for block in self.blocks:
            inner, outer = (dense(layer, builder) for layer in block.children())  # type: ignore[arg-type]
            step = steps.dense(steps.act(h, "relu"), inner)
            h = steps.add(h, steps.dense(steps.act(step, "relu"), outer))
        return steps.dense(steps.act(h, "relu"), dense(self.last, builder))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, in_features]`` to ``[batch, out_features]``."""
        h = self.first(x)
        for block in self.blocks:
            inner, outer = block.children()
            step = F.dropout(F.relu(inner(F.relu(h))), self.dropout, self.training)
            h = h + outer(step)
        out: Tensor = self.last(F.relu(h))
        return out
