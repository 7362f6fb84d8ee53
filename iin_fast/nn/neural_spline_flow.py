"""A neural spline flow as one module."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..checks import checked_choice, checked_dtype, checked_int, checked_number
from ..flow import Block, ProgramBuilder, Weights, residual, spline
from ..ops.spline_coupling import check_options, parameter_count
from .actnorm import MIN_SPREAD
from .program_flow import Orders, ProgramFlow, Stacked, draw_linear, empty, identity_spline_
from .state_dict_layout import Entry, import_tensors, keep_starts

__all__ = ["NeuralSplineFlow"]

MIXINGS = ("lu", "permutation")
MIN_DERIVATIVE = 1e-3
MIN_DIAGONAL = 1e-3  # of LULinear


class NeuralSplineFlow(ProgramFlow):
    """The density of data, given a context or not, as a stack of rational-quadratic spline couplings (RQ-NSF (C)).

    One block: ActNorm; a :class:`SplineCoupling` of each half of the features by the other; a random permutation, and
    with ``mixing="lu"`` an :class:`LULinear` after it. Every conditioner is a :class:`ResidualNet`, whose raw widths and
    heights are divided by the square root of its width, as nflows does (docs/decisions.md). The splines start as
    the identity. The first call of ``forward`` or ``log_prob`` starts ActNorm from its batch, so that what the splines see
    lies in their box; beyond it they are the identity.

    All blocks run as one op. Their parameters lie stacked in a few tensors, each with the dimensions
    ``[n_flows, coupling of the block, …]`` in front. While it trains with ``dropout``, the flow runs layer by layer in plain torch.

    See also :class:`iin_fast.nn.Flow`, the affine flow of the IIN.

    References:
        Durkan, Bekasov, Murray, Papamakarios: Neural spline flows, 2019, arXiv 1906.04032, Sec. 3.

    Args:
        dim: number of features, at least 2.
        context_dim: number of features of the context; 0: none.
        n_flows: number of blocks.
        bins: of each spline.
        hidden_dim: width of the conditioners.
        hidden_depth: residual blocks of each conditioner.
        tail_bound: half the width of the box in which the splines bend.
        mixing: "lu" or "permutation".
        dropout: of the conditioners, in [0, 1).
        min_spread: of :class:`ActNorm`, what is taken as constant at the start.
        generator: draws the weights and permutations; by default torch's global one.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size or an option out of range.
        TypeError: a size that is no integer, a tail_bound or dropout that is no number.

    Example:
        >>> flow = NeuralSplineFlow(3, context_dim=2, n_flows=2, hidden_dim=16)
        >>> x, context = torch.randn(5, 3), torch.randn(5, 2)
        >>> flow.log_prob(x, context).shape, flow.sample((10,), context).shape
        (torch.Size([5]), torch.Size([10, 5, 3]))
        >>> z, logdet = flow(x, context)
        >>> torch.allclose(flow.inverse(z, context)[0], x, atol=1e-4)
        True
    """

    def __init__(
        self,
        dim: int,
        context_dim: int = 0,
        n_flows: int = 5,
        bins: int = 8,
        hidden_dim: int = 128,
        hidden_depth: int = 2,
        *,
        tail_bound: float = 3.0,
        mixing: str = "lu",
        dropout: float = 0.0,
        min_spread: float = MIN_SPREAD,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = "NeuralSplineFlow"
        self.dim = dim = checked_int(where, "dim", dim, least=2)
        self.context_dim = context_dim = checked_int(where, "context_dim", context_dim, least=0)
        self.n_flows = n_flows = checked_int(where, "n_flows", n_flows)
        self.bins = bins = checked_int(where, "bins", bins)
        self.hidden_dim = hidden_dim = checked_int(where, "hidden_dim", hidden_dim)
        self.hidden_depth = hidden_depth = checked_int(where, "hidden_depth", hidden_depth, least=0)
        self.tail_bound = checked_number(where, "tail_bound", tail_bound, above=0)
        self.dropout = checked_number(where, "dropout", dropout, least=0, below=1)
        self.mixing = checked_choice(where, "mixing", mixing, MIXINGS)
        self.min_spread = checked_number(where, "min_spread", min_spread, least=0)
        checked_dtype(where, dtype)
        check_options(where, bins, "linear", self.tail_bound, None, 1e-3, 1e-3, MIN_DERIVATIVE, "nflows")
        self.count = parameter_count(bins, "linear")  # raw values of a feature
        kept = dim - dim // 2  # features that condition
        outputs = dim // 2 * self.count

        def stack(*shape: int) -> nn.Parameter:
            return empty(n_flows, *shape, device=device, dtype=dtype)

        self._register_actnorm(n_flows, device, dtype)
        self.weight_in, self.bias_in = stack(2, hidden_dim, kept + context_dim), stack(2, hidden_dim)
        if hidden_depth:  # [n_flows, coupling, residual block, (inner, outer), …]
            self.weight_hidden = stack(2, hidden_depth, 2, hidden_dim, hidden_dim)
            self.bias_hidden = stack(2, hidden_depth, 2, hidden_dim)
        self.weight_out, self.bias_out = stack(2, outputs, hidden_dim), stack(2, outputs)
        if mixing == "lu":
            self.lu_weight, self.lu_bias = stack(dim, dim), stack(dim)
        self.register_buffer("permutation", torch.empty(n_flows, dim, dtype=torch.int64, device=device))
        self._finish(generator)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, context_dim={self.context_dim}, n_flows={self.n_flows}, bins={self.bins}, "
            f"hidden_dim={self.hidden_dim}, hidden_depth={self.hidden_depth}, tail_bound={self.tail_bound}, "
            f"mixing={self.mixing!r}"
        )

    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def _add_layers(self, builder: ProgramBuilder, stacked: Stacked, orders: Orders) -> None:
        size, width = self.dim // 2, self.hidden_dim  # of the transformed part

        def dense(out: int, name: str, *index: int) -> Weights:
            return Weights(out, stacked(f"weight_{name}", *index), stacked(f"bias_{name}", *index))

        for flow in range(self.n_flows):
            builder.affine(stacked("loc", flow), stacked("scale", flow), order="shift_first")
            for number in (0, 1):
                at = flow, number
                net = residual(
                    dense(width, "in", *at),
                    [
                        Block(dense(width, "hidden", *at, k, 0), dense(width, "hidden", *at, k, 1))
                        for k in range(self.hidden_depth)
                    ],
                    dense(size * self.count, "out", *at),
                    context=self.context_dim > 0,
                    last_activation=True,
                )
                first, last = range(size), range(self.dim - size, self.dim)
                conditioning = range(size, self.dim) if number else range(self.dim - size)
                transformer = spline(
                    self.bins, tail_bound=self.tail_bound, min_derivative=MIN_DERIVATIVE, gain=width**-0.5
                )
                builder.coupling(conditioning, first if number else last, net, transformer)
            builder.permute(orders[flow])
            if self.mixing == "lu":
                builder.linear(
                    stacked("lu_weight", flow), bias=stacked("lu_bias", flow), storage="square", eps=MIN_DIAGONAL
                )

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters and permutations anew, and forget the start of ActNorm."""
        self._forget_start()
        for flow in range(self.n_flows):
            for at in ((flow, 0), (flow, 1)):
                draw_linear(self.weight_in[at], self.bias_in[at], generator)
                for k in range(self.hidden_depth):
                    for which in (0, 1):
                        draw_linear(self.weight_hidden[at][k, which], self.bias_hidden[at][k, which], generator)
                draw_linear(
                    self.weight_out[at], self.bias_out[at], generator
                )  # a seed gives the flow that it always gave
            self._draw_permutation(flow, generator)
        self.weight_out.zero_()
        identity_spline_(self.bias_out, self.bins, self.count, MIN_DERIVATIVE)
        if self.mixing == "lu":
            self.lu_bias.zero_()
            self.lu_weight.zero_().diagonal(dim1=1, dim2=2).fill_(math.log(math.expm1(1 - MIN_DIAGONAL)))

    # Files written when the layers were modules of their own

    def _entries(self) -> Iterator[Entry]:
        """What each key of such a file is of the stacked parameters."""
        stride = 5 if self.mixing == "lu" else 4
        stacked = dict(self._parameters) | dict(self._buffers)

        def entry(key: str, name: str, *index: int) -> Entry:
            tensor = stacked[name]
            return Entry(key, name, index, tuple(tensor.shape[len(index) :]) if tensor is not None else ())

        for flow in range(self.n_flows):
            first = f"layers.{stride * flow}"
            for name in ("loc", "scale", "initialized"):
                yield entry(f"{first}.{name}", name, flow)
            for number in (0, 1):
                net = f"layers.{stride * flow + 1 + number}.conditioner"
                for kind in ("weight", "bias"):
                    yield entry(f"{net}.first.{kind}", f"{kind}_in", flow, number)
                    for k in range(self.hidden_depth):
                        for which in (0, 1):
                            yield entry(f"{net}.blocks.{k}.{which}.{kind}", f"{kind}_hidden", flow, number, k, which)
                    yield entry(f"{net}.last.{kind}", f"{kind}_out", flow, number)
            yield entry(f"layers.{stride * flow + 3}.permutation", "permutation", flow)
            if self.mixing == "lu":
                for kind in ("weight", "bias"):
                    yield entry(f"layers.{stride * flow + 4}.{kind}", f"lu_{kind}", flow)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if any(key.startswith(prefix + "layers.") for key in state_dict):
            entries = list(self._entries())
            names = {entry.name for entry in entries}
            keep_dtype = local_metadata.get("assign_to_params_buffers", False)
            stored = import_tensors(
                entries,
                {name: getattr(self, name) for name in names},
                state_dict,
                prefix,
                keep_dtype=keep_dtype,
                missing=missing_keys,
                errors=error_msgs,
            )
            keep_starts(entries, stored, state_dict, prefix)
            read = {prefix + entry.key for entry in entries}
            rest = {key: value for key, value in state_dict.items() if key not in read}
            state_dict = rest | {prefix + name: value for name, value in stored.items()}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
