"""The published parameter names of a stacked flow."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..nn import Flow
from ..nn.state_dict_layout import Entry

__all__ = ["Names", "PublishedFlow", "published_entries"]


@dataclass(frozen=True)
class Names:
    """What the three parts of one published block are called, after the number of the block."""

    norm: str
    coupling: str
    shuffle: str


def published_entries(flow: Flow, names: Names) -> Iterator[Entry]:
    """The published keys of ``flow`` in the published order.

    ``0.<norm>.loc``, ``0.<coupling>.s.1.main.0.weight`` (net s, half 1, first layer),
    ``0.<shuffle>.forward_shuffle_idx`` …
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
                layers: list[tuple[str, tuple[int, ...]]] = [("in", place)]
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
        *args, **kwargs: as :class:`iin_fast.nn.Flow`. The start of ActNorm is the published one, ``min_spread=0``.
    """

    def __init__(self, names: Names, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, min_spread=0.0, **kwargs)
        self.names = names

    def entries(self) -> Iterator[Entry]:
        return published_entries(self, self.names)
