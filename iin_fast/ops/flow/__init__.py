"""The whole flow as one op; stands for the compiled op until that is built."""

from torch import Tensor

from . import reference

__all__ = ["flow"]


def flow(
    x: Tensor,  # [batch, dim]
    context: Tensor | None,  # [1 or n_flows, batch, context_dim]
    loc: Tensor,  # [n_flows, dim]
    scale: Tensor,  # [n_flows, dim]
    weight_in: Tensor,
    bias_in: Tensor,
    weight_hidden: Tensor,
    bias_hidden: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    permutation: Tensor,  # [n_flows, dim] int64
    *,
    leaky_slope: float = 0.01,
    activation_slope: float = 1.0,
    exact_logdet: bool = False,
    inverse: bool = False,
    memory: str = "auto",
) -> tuple[Tensor, Tensor]:  # [batch, dim], [batch]
    """See :func:`iin_fast.ops.flow.reference.flow`."""
    return reference.flow(
        x,
        context,
        loc,
        scale,
        weight_in,
        bias_in,
        weight_hidden,
        bias_hidden,
        weight_out,
        bias_out,
        permutation,
        leaky_slope,
        activation_slope,
        exact_logdet,
        inverse,
    )
