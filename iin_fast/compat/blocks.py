"""Blocks that both published code bases have in common: MLP, couplings, ActNorm, shuffle, sequence."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import checked_int
from ..functional import affine_coupling
from ..nn.actnorm import DataDependentStart, start_values

__all__ = ["Flow", "FullyConnected", "PublishedNorm", "Shuffle", "double_coupling", "flat"]


class FullyConnected(nn.Module):
    """An MLP with LeakyReLU (slope 0.01) whose layers stand in one Sequential, ``main``.

    Args:
        dim, hidden_dim, out_dim: input, hidden and output features.
        depth: number of hidden-to-hidden layers.
        use_tanh: end with tanh.
        norms: called with ``hidden_dim``, one normalisation for each of the first linear layers.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        hidden_dim: int,
        out_dim: int,
        use_tanh: bool,
        norms: Sequence[Callable[[int], nn.Module]],
    ) -> None:
        super().__init__()
        where = type(self).__name__
        dim, depth = checked_int(where, "dim", dim), checked_int(where, "depth", depth, least=0)
        hidden_dim, out_dim = (
            checked_int(where, "hidden_dim", hidden_dim),
            checked_int(where, "out_dim", out_dim, least=0),
        )
        layers: list[nn.Module] = []
        for i in range(depth + 1):
            layers.append(nn.Linear(hidden_dim if i else dim, hidden_dim))
            if i < len(norms):
                layers.append(norms[i](hidden_dim))
            layers.append(nn.LeakyReLU())
        layers.append(nn.Linear(hidden_dim, out_dim))
        if use_tanh:
            layers.append(nn.Tanh())
        self.main = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [batch, dim]`` to ``[batch, out_dim]``."""
        return self.main(x)  # type: ignore[no-any-return]

    def before_tanh(self, x: Tensor) -> Tensor:
        """``forward`` without the closing tanh, for couplings that fuse it."""
        for layer in self.main:
            if not isinstance(layer, nn.Tanh):
                x = layer(x)
        return x


def double_coupling(
    x: Tensor,  # [batch, channels]
    nets_s: nn.ModuleList,  # FullyConnected, each [batch, c + context] to [batch, channels - c]
    nets_t: nn.ModuleList,
    context: Tensor | None,  # [batch, context]
    inverse: bool,
) -> tuple[Tensor, Tensor]:  # [batch, channels], [batch]
    """Affine couplings in turn, c = ceil(channels / 2) conditioning; the halves are swapped before every odd one."""
    channels = x.shape[1]
    kept = channels - channels // 2
    logdet = x.new_zeros(x.shape[0])
    for i in reversed(range(len(nets_s))) if inverse else range(len(nets_s)):
        if i % 2 and not inverse:
            x = torch.cat([x[:, kept:], x[:, :kept]], dim=1)
        first, second = x[:, :kept], x[:, kept:]
        u = first if context is None else torch.cat([first, context], dim=1)
        raw, shift = nets_s[i].before_tanh(u), nets_t[i](u)  # type: ignore[operator]
        second, logdet_i = affine_coupling(second, raw, shift, squash="tanh", inverse=inverse)
        x = torch.cat([first, second], dim=1)
        logdet = logdet + logdet_i
        if i % 2 and inverse:
            x = torch.cat([x[:, channels - kept :], x[:, : channels - kept]], dim=1)
    return x, logdet


class PublishedNorm(DataDependentStart):
    """ActNorm over channels with the published parameter shapes: ``loc``, ``scale`` [1, channels, 1, 1]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        channels = checked_int(type(self).__name__, "the number of channels", channels)
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self._register_start((), False, None)

    def reset_parameters(self) -> None:
        """As before the first batch, which will start it anew."""
        self._forget_start()

    @torch.no_grad()
    def initialize(self, input: Tensor) -> None:
        """Start from ``[batch, channels(, height, width)]``, over batch and space; an empty one starts nothing.

        Raises:
            ValueError: NaN or Inf in the batch; then nothing has changed.
        """
        if input.numel() == 0:
            return
        rows = self._four(input).movedim(1, -1).flatten(0, -2)
        loc, scale = start_values(type(self).__name__, rows, min_spread=0.0)  # as published
        self.loc.copy_(loc.view_as(self.loc))
        self.scale.copy_(scale.view_as(self.scale))
        self._finish_start()

    def _four(self, input: Tensor) -> Tensor:
        channels = self.loc.shape[1]
        if input.dim() not in (2, 4) or input.shape[1] != channels:
            raise ValueError(
                f"{type(self).__name__}: input has shape {list(input.shape)}, "
                f"expected [batch, {channels}] or [batch, {channels}, height, width]"
            )
        return input[:, :, None, None] if input.dim() == 2 else input

    def _logdet(self, input: Tensor) -> Tensor:  # [batch]
        batch, _, height, width = input.shape
        return (height * width * self.scale.abs().log().sum()).repeat(batch)


class Shuffle(nn.Module):
    """A fixed random permutation of the channels, as both published code bases have it.

    ``forward(x)`` gives (x permuted, 0), ``forward(x, reverse=True)`` the inverse alone.

    Args:
        in_channels: number of channels; the second dimension of the input.
    """

    forward_shuffle_idx: Tensor
    backward_shuffle_idx: Tensor

    def __init__(self, in_channels: int, **kwargs: Any) -> None:
        super().__init__()
        self.in_channels = in_channels = checked_int("Shuffle", "in_channels", in_channels)
        for name in ("forward_shuffle_idx", "backward_shuffle_idx"):
            self.register_buffer(name, torch.empty(in_channels, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the permutation anew, with torch's global generator."""
        index = torch.randperm(self.in_channels, device=self.forward_shuffle_idx.device)
        self.forward_shuffle_idx.copy_(index)
        self.backward_shuffle_idx.copy_(index.argsort())

    def forward(self, x: Tensor, reverse: bool = False, conditioning: Any = None) -> Any:
        if x.dim() < 2 or x.shape[1] != self.in_channels:
            raise ValueError(f"Shuffle: x has shape {list(x.shape)}, expected [batch, {self.in_channels}, …]")
        if reverse:
            return x[:, self.backward_shuffle_idx]
        return x[:, self.forward_shuffle_idx], 0


class Flow(nn.Module):
    """Modules one after the other, their log-dets added up.

    Args:
        module_list: classes, each called as ``module(in_channels, hidden_dim=…, depth=…)``.
        in_channels, hidden_dim, hidden_depth: passed to each.
    """

    def __init__(
        self, module_list: Sequence[Callable[..., nn.Module]], in_channels: int, hidden_dim: int, hidden_depth: int
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.flow = nn.ModuleList(
            module(in_channels, hidden_dim=hidden_dim, depth=hidden_depth) for module in module_list
        )

    def forward(self, x: Tensor, condition: Any = None, reverse: bool = False) -> Any:
        """Map ``x`` to (y, log-det); ``reverse=True`` gives x alone. ``condition`` is ignored, as published."""
        if reverse:
            for module in reversed(self.flow):
                x = module(x, reverse=True)
            return x
        logdet: Any = 0
        for module in self.flow:
            x, logdet_i = module(x)
            logdet = logdet + logdet_i
        return x, logdet


def flat(where: str, x: Tensor, channels: int) -> Tensor:  # [batch, channels]
    """``[batch, channels]`` from that or from ``[batch, channels, 1, 1]``, a batch of one included.

    Raises:
        ValueError: any other shape.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: input is a {type(x).__name__}, expected a torch.Tensor")
    if x.dim() > 1 and x.shape[1] == channels and x.numel() == x.shape[0] * channels:
        return x.flatten(1)
    squeezed = x.squeeze()  # published: any dimension of size 1, wherever it stands
    if squeezed.dim() == 2 and squeezed.shape[1] == channels:
        return squeezed
    raise ValueError(
        f"{where}: input has shape {list(x.shape)}, expected [batch, {channels}] or [batch, {channels}, 1, 1]"
    )
