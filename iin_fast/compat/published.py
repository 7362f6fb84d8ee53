"""The published parameter names of a stacked flow, and the small things that both published code bases share."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iin_fast.nn import Flow
from iin_fast.nn.actnorm import DataDependentStart, start_values
from iin_fast.nn.border import Entry

__all__ = ["Names", "PublishedFlow", "PublishedNorm", "Shuffle", "flat", "published_entries"]


@dataclass(frozen=True)
class Names:
    """What the three parts of one published block are called, after the number of the block."""

    norm: str
    coupling: str
    shuffle: str


def published_entries(flow: Flow, names: Names) -> Iterator[Entry]:
    """The published keys of ``flow`` in the published order.

    ``0.<norm>.loc``, ``0.<coupling>.s.1.main.0.weight`` (net s, half 1, first layer), ``0.<shuffle>.forward_shuffle_idx`` …
    """
    channels = (1, flow.dim, 1, 1)
    for block in range(flow.n_flows):
        if flow.actnorm:
            yield Entry(f"{block}.{names.norm}.loc", "loc", (block,), channels)
            yield Entry(f"{block}.{names.norm}.scale", "scale", (block,), channels)
            yield Entry(f"{block}.{names.norm}.initialized", "initialized", (block,), ())
        for net, net_name in enumerate("st"):
            for half in (0, 1):
                place = (block, half, net)
                layers = [("in", place)]
                layers += [("hidden", (*place, layer)) for layer in range(flow.hidden_depth)]
                layers += [("out", place)]
                for number, (layer, index) in enumerate(layers):
                    # every linear layer is followed by an activation, so linear layers have the even numbers
                    key = f"{block}.{names.coupling}.{net_name}.{half}.main.{2 * number}"
                    matrix = flow.matrices[f"weight_{layer}"]
                    yield Entry(f"{key}.weight", f"weight_{layer}", index, matrix, matrix)
                    yield Entry(f"{key}.bias", f"bias_{layer}", index, matrix[:1])
        if flow.permute:
            key = f"{block}.{names.shuffle}"
            yield Entry(f"{key}.forward_shuffle_idx", "permutation", (block,), (flow.dim,))
            yield Entry(f"{key}.backward_shuffle_idx", "permutation", (block,), (flow.dim,), inverse=True)


class PublishedFlow(Flow):
    """A stacked flow whose state_dict has the published keys, shapes and order.

    Args:
        names: what the parts of a block are called.
        *args, **kwargs: as :class:`iin_fast.nn.Flow`.
    """

    def __init__(self, names: Names, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.names = names

    def entries(self) -> Iterator[Entry]:
        return published_entries(self, self.names)


class PublishedNorm(DataDependentStart):
    """ActNorm over channels with the published parameter shapes: ``loc``, ``scale`` [1, channels, 1, 1]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self._register_start((), False, None)

    @torch.no_grad()
    def initialize(self, input: Tensor) -> None:
        """Start from ``input`` [batch, channels(, height, width)], over batch and space; an empty one starts nothing."""
        if input.numel() == 0:
            return
        rows = self._four(input).movedim(1, -1).flatten(0, -2)
        loc, scale = start_values(rows)
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
        return (height * width * self.scale.abs().log().sum()).expand(batch)


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
        self.in_channels = in_channels
        index = torch.randperm(in_channels)
        self.register_buffer("forward_shuffle_idx", index)
        self.register_buffer("backward_shuffle_idx", index.argsort())

    def forward(self, x: Tensor, reverse: bool = False, conditioning: Any = None) -> Any:
        if reverse:
            return x[:, self.backward_shuffle_idx]
        return x[:, self.forward_shuffle_idx], 0


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
