"""The flow in plain torch: the executable definition that every backend of ``flow`` is tested against.

One block (Esser et al. 2020, Sec. 3.1; Dinh et al. 2017; Kingma and Dhariwal 2018), for ``x [batch, dim]``, with
``c = ceil(dim / 2)`` features that condition and ``dim - c`` that are transformed:

    actnorm      h = scale * (x + loc)                                 log-det: sum log |scale|
    activation   h = h if h >= 0 else activation_slope * h             log-det: 0, or exact (see ``exact_logdet``)
    half 0       h[c:] = h[c:] * exp(s) + t,  s = tanh(S0(u)), t = T0(u), u = (h[:c], context)     log-det: sum s
    swap         h = (h[c:], h[:c])
    half 1       as half 0, with the nets S1, T1
    permutation  y = h[permutation]

A net is ``hidden_depth + 2`` linear layers with LeakyReLU between them. Its weights lie in panels (layout.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import unpack

__all__ = ["flow"]


def conditioner(
    u: Tensor,  # [batch, in]
    weight_in: Tensor,  # [in * hidden], panels
    bias_in: Tensor,  # [hidden]
    weight_hidden: Tensor,  # [hidden_depth, hidden * hidden], panels
    bias_hidden: Tensor,  # [hidden_depth, hidden]
    weight_out: Tensor,  # [hidden * out], panels
    bias_out: Tensor,  # [out]
    leaky_slope: float,
) -> Tensor:  # [batch, out]
    """One net of a coupling, before its squash."""
    hidden = bias_in.shape[0]
    a = F.leaky_relu(F.linear(u, unpack(weight_in, hidden, u.shape[1]), bias_in), leaky_slope)
    for weight, bias in zip(weight_hidden, bias_hidden, strict=True):
        a = F.leaky_relu(F.linear(a, unpack(weight, hidden, hidden), bias), leaky_slope)
    return F.linear(a, unpack(weight_out, bias_out.shape[0], hidden), bias_out)


def flow(
    x: Tensor,  # [batch, dim]
    context: Tensor | None,  # [1 or n_flows, batch, context_dim]
    loc: Tensor,  # [n_flows, dim]
    scale: Tensor,  # [n_flows, dim]
    weight_in: Tensor,  # [n_flows, 2 (half), 2 (s, t), (c + context_dim) * hidden]
    bias_in: Tensor,  # [n_flows, 2, 2, hidden]
    weight_hidden: Tensor,  # [n_flows, 2, 2, hidden_depth, hidden * hidden]
    bias_hidden: Tensor,  # [n_flows, 2, 2, hidden_depth, hidden]
    weight_out: Tensor,  # [n_flows, 2, 2, hidden * (dim - c)]
    bias_out: Tensor,  # [n_flows, 2, 2, dim - c]
    permutation: Tensor,  # [n_flows, dim] int64, y[:, j] = h[:, permutation[j]]
    leaky_slope: float = 0.01,
    activation_slope: float = 1.0,
    exact_logdet: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:  # [batch, dim], [batch]
    """The whole stack. ``inverse=True`` computes x from y; its log-det is that of the inverse map, in nats.

    ``exact_logdet`` adds log(activation_slope) for every feature that the activation scaled; the published net2net code
    leaves it out. 16-bit tensors are computed in float32; the log-det stays float32.
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        y, logdet = flow(
            x.float(),
            None if context is None else context.float(),
            loc.float(),
            scale.float(),
            weight_in.float(),
            bias_in.float(),
            weight_hidden.float(),
            bias_hidden.float(),
            weight_out.float(),
            bias_out.float(),
            permutation,
            leaky_slope,
            activation_slope,
            exact_logdet,
            inverse,
        )
        return y.to(x.dtype), logdet
    n_flows, dim = loc.shape
    half = dim - dim // 2
    logdet = x.new_zeros(x.shape[0])

    def nets(block: int, i: int, u: Tensor) -> tuple[Tensor, Tensor]:
        if context is not None:
            u = torch.cat([u, context[block if context.shape[0] > 1 else 0]], dim=1)
        raw, shift = (
            conditioner(
                u,
                weight_in[block, i, net],
                bias_in[block, i, net],
                weight_hidden[block, i, net],
                bias_hidden[block, i, net],
                weight_out[block, i, net],
                bias_out[block, i, net],
                leaky_slope,
            )
            for net in (0, 1)
        )
        return torch.tanh(raw), shift

    h = x
    if not inverse:
        for block in range(n_flows):
            h = scale[block] * (h + loc[block])
            logdet = logdet + scale[block].abs().log().sum()
            if activation_slope != 1.0:
                negative = h < 0
                h = torch.where(negative, activation_slope * h, h)
                if exact_logdet:
                    logdet = logdet + negative.sum(1) * torch.tensor(activation_slope, dtype=x.dtype).log()
            for i in (0, 1):
                if i == 1:
                    h = torch.cat([h[:, half:], h[:, :half]], dim=1)
                u, v = h[:, :half], h[:, half:]
                s, t = nets(block, i, u)
                h = torch.cat([u, v * s.exp() + t], dim=1)
                logdet = logdet + s.sum(1)
            h = h[:, permutation[block]]
        return h, logdet

    for block in reversed(range(n_flows)):
        h = h[:, permutation[block].argsort()]
        for i in (1, 0):
            u, v = h[:, :half], h[:, half:]
            s, t = nets(block, i, u)
            h = torch.cat([u, (v - t) * (-s).exp()], dim=1)
            logdet = logdet - s.sum(1)
            if i == 1:
                h = torch.cat([h[:, dim - half :], h[:, : dim - half]], dim=1)
        if activation_slope != 1.0:
            negative = h < 0
            h = torch.where(negative, h / activation_slope, h)
            if exact_logdet:
                logdet = logdet - negative.sum(1) * torch.tensor(activation_slope, dtype=x.dtype).log()
        h = h / scale[block] - loc[block]
        logdet = logdet - scale[block].abs().log().sum()
    return h, logdet
