"""The flow as eager PyTorch usually has it, one kernel per operation: the baseline of the benchmarks."""

import torch
from torch import Tensor, nn

from ..compat.state_dict_names import Names, published_entries
from ..nn import Flow
from ..nn.state_dict_layout import export_tensors

__all__ = ["EagerFlow", "eager_flow"]

NAMES = Names(norm="norm", coupling="coupling", shuffle="shuffle")


def eager_flow(flow: Flow, *, reads_flag: bool = True) -> "EagerFlow":
    """A plain-torch copy of ``flow`` with the same weights, that runs the operations of the published code one by one.

    Every net is its own Sequential of Linear, LeakyReLU and Tanh; halves are chunked and concatenated; features are
    shuffled by index; ActNorm reads its ``initialized`` flag from the device at every call.

    Args:
        flow: to copy; later changes of either side do not reach the other.
        reads_flag: read ``initialized`` from the device at every call, and bring ones there from the host, as published.
            False leaves both out, so that torch.compile sees one graph, and a CUDA graph can hold it; ``flow`` must then
            have had its data-dependent start.

    Returns:
        A module with ``forward(z) -> (z, log-det [batch])`` and ``reverse(z) -> x``, on the device and of the type of
        ``flow``. Both take ``context`` as the flow does.

    Example:
        >>> flow = Flow(6, n_flows=2, hidden_dim=16)
        >>> x = torch.randn(5, 6)
        >>> z, logdet = flow(x)
        >>> torch.allclose(z, eager_flow(flow)(x)[0], atol=1e-5)
        True
    """
    eager = EagerFlow(flow).to(device=flow.weight_in.device, dtype=flow.weight_in.dtype)
    stored = dict(flow.named_parameters()) | dict(flow.named_buffers())
    with torch.no_grad():
        state = export_tensors(published_entries(flow, NAMES), stored)
    eager.blocks.load_state_dict(state)
    for module in eager.modules():
        if isinstance(module, EagerActNorm):
            module.reads_flag = reads_flag
    return eager.train(flow.training)


class EagerFlow(nn.Module):
    """Blocks one after the other; see :func:`eager_flow`."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(EagerBlock(flow) for _ in range(flow.n_flows))

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logdet: Tensor | int = 0
        for i, block in enumerate(self.blocks):
            z, logdet_i = block(z, _of_block(context, i))
            logdet = logdet + logdet_i
        return z, torch.as_tensor(logdet)

    def reverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        for i in reversed(range(len(self.blocks))):
            z = self.blocks[i].reverse(z, _of_block(context, i))  # type: ignore[operator]
        return z


class EagerBlock(nn.Module):
    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.norm = EagerActNorm(flow.dim) if flow.actnorm else None
        self.activation = EagerActivation(flow.activation_slope, flow.exact_logdet)
        self.coupling = EagerCoupling(flow)
        self.shuffle = EagerShuffle(flow.dim) if flow.permute else None

    def forward(self, h: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | int]:
        logdet: Tensor | int = 0
        if self.norm is not None:
            h, logdet = self.norm(h)
        h, logdet_activation = self.activation(h)
        h, logdet_coupling = self.coupling(h, context)
        if self.shuffle is not None:
            h = h[:, self.shuffle.forward_shuffle_idx]
        return h, logdet + logdet_activation + logdet_coupling

    def reverse(self, h: Tensor, context: Tensor | None) -> Tensor:
        if self.shuffle is not None:
            h = h[:, self.shuffle.backward_shuffle_idx]
        h = self.activation.reverse(self.coupling.reverse(h, context))
        return h if self.norm is None else self.norm.reverse(h)


class EagerActNorm(nn.Module):
    """Works on [batch, channels, 1, 1] inside, as the published code does."""

    initialized: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        self.reads_flag = True

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        h = h[:, :, None, None]
        if self.reads_flag and self.initialized.item() == 0:
            with torch.no_grad():
                self.loc.copy_(-h.mean(0, keepdim=True))
                self.scale.copy_(1 / (h.std(0, keepdim=True) + 1e-6))
            self.initialized.fill_(1)
        logdet = h.shape[2] * h.shape[3] * self.scale.abs().log().sum()
        ones = torch.ones(h.shape[0]).to(h) if self.reads_flag else h.new_ones(h.shape[0])
        logdet = logdet * ones
        return (self.scale * (h + self.loc)).flatten(1), logdet

    def reverse(self, h: Tensor) -> Tensor:
        return (h[:, :, None, None] / self.scale - self.loc).flatten(1)


class EagerActivation(nn.Module):
    def __init__(self, slope: float, exact_logdet: bool) -> None:
        super().__init__()
        self.slope = slope
        self.exact_logdet = exact_logdet

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor | int]:
        if self.slope == 1:
            return h, 0
        scaling = self._scaling(h)
        return h * scaling, scaling.log().sum(1) if self.exact_logdet else 0

    def reverse(self, h: Tensor) -> Tensor:
        return h if self.slope == 1 else h / self._scaling(h)

    def _scaling(self, h: Tensor) -> Tensor:
        return (h >= 0).to(h) + (h < 0).to(h) * self.slope


class EagerCoupling(nn.Module):
    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.s = nn.ModuleList(EagerNet(flow, use_tanh=True) for _ in range(2))
        self.t = nn.ModuleList(EagerNet(flow, use_tanh=False) for _ in range(2))

    def forward(self, h: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | int]:
        logdet: Tensor | int = 0
        for i in range(2):
            if i == 1:
                h = torch.cat(torch.chunk(h, 2, dim=1)[::-1], dim=1)
            first, second = torch.chunk(h, 2, dim=1)
            u = first if context is None else torch.cat((first, context), dim=1)
            s = self.s[i](u)
            h = torch.cat((first, second * s.exp() + self.t[i](u)), dim=1)
            logdet = logdet + torch.sum(s.view(h.shape[0], -1), dim=1)
        return h, logdet

    def reverse(self, h: Tensor, context: Tensor | None) -> Tensor:
        for i in (1, 0):
            first, second = torch.chunk(h, 2, dim=1)
            u = first if context is None else torch.cat((first, context), dim=1)
            h = torch.cat((first, (second - self.t[i](u)) * self.s[i](u).neg().exp()), dim=1)
            if i == 1:  # the smaller half comes first here, so an odd number of features does not chunk evenly
                size = h.shape[1] // 2
                h = torch.cat((h[:, size:], h[:, :size]), dim=1)
        return h


class EagerNet(nn.Module):
    def __init__(self, flow: Flow, use_tanh: bool) -> None:
        super().__init__()
        shapes = [flow.matrices["weight_in"], *[flow.matrices["weight_hidden"]] * flow.hidden_depth]
        layers: list[nn.Module] = []
        for out_features, in_features in shapes:
            layers += [nn.Linear(in_features, out_features), nn.LeakyReLU(flow.leaky_slope)]
        out_features, in_features = flow.matrices["weight_out"]
        layers.append(nn.Linear(in_features, out_features))
        self.main = nn.Sequential(*layers, *([nn.Tanh()] if use_tanh else []))

    def forward(self, u: Tensor) -> Tensor:
        return self.main(u)  # type: ignore[no-any-return]


class EagerShuffle(nn.Module):
    forward_shuffle_idx: Tensor
    backward_shuffle_idx: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("forward_shuffle_idx", torch.arange(dim))
        self.register_buffer("backward_shuffle_idx", torch.arange(dim))


def _of_block(context: Tensor | None, block: int) -> Tensor | None:
    if context is None or context.dim() == 2:
        return context
    return context[block if context.shape[0] > 1 else 0]
