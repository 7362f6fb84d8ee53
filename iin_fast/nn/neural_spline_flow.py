"""A neural spline flow as one module."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import (
    autocast_enabled,
    check_dtype,
    check_features,
    checked_choice,
    checked_dtype,
    checked_int,
    checked_number,
)
from .actnorm import MIN_SPREAD, ActNorm
from .coupling import SplineCoupling
from .distribution import Density
from .linear import LULinear
from .permutation import Permutation
from .residual import ResidualNet

__all__ = ["NeuralSplineFlow"]

MIXINGS = ("lu", "permutation")


class RawParameters(nn.Linear):
    """The last layer of a conditioner: raw widths and heights are divided by the square root of its input's width.

    As nflows does; what it changes on two tables is in docs/decisions.md. The division is done to the weights, which are
    fewer than what they make. It starts with equal bins and slope 1 at every knot: the spline is the identity.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        count: int,
        bins: int,
        min_derivative: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.count = count
        self.bins = bins
        self.min_derivative = min_derivative
        super().__init__(in_features, out_features, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the identity."""
        self.weight.zero_()
        raw = self.bias.zero_().unflatten(0, (-1, self.count))
        raw[:, 2 * self.bins :] = math.log(math.expm1(1 - self.min_derivative))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._divided(self.weight), self._divided(self.bias)
        return F.linear(x, weight, bias)

    def _divided(self, values: Tensor) -> Tensor:
        by_feature = values.unflatten(0, (-1, self.count))
        sizes, slopes = by_feature.split([2 * self.bins, self.count - 2 * self.bins], 1)
        return torch.cat([sizes * self.in_features**-0.5, slopes], 1).flatten(0, 1)


class NeuralSplineFlow(nn.Module, Density):
    """The density of data, given a context or not, as a stack of rational-quadratic spline couplings (RQ-NSF (C)).

    One block: ActNorm; a :class:`SplineCoupling` of each half of the features by the other; a random permutation, and
    with ``mixing="lu"`` an :class:`LULinear` after it. Every conditioner is a :class:`ResidualNet`. The splines start as
    the identity. The first call of ``forward`` or ``log_prob`` starts ActNorm from its batch, so that what the splines see
    lies in their box; beyond it they are the identity.

    See also :class:`iin_fast.nn.Flow`, the affine flow of the IIN.

    References:
        Durkan, Bekasov, Murray, Papamakarios: Neural spline flows, 2019, arXiv 1906.04032, Sec. 3.

    Args:
        dim: number of features, at least 2.
        context: number of features of the context; 0: none.
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
        >>> flow = NeuralSplineFlow(3, context=2, n_flows=2, hidden_dim=16)
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
        context: int = 0,
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
        dim = checked_int("NeuralSplineFlow", "dim", dim, least=2)
        context = checked_int("NeuralSplineFlow", "context", context, least=0)
        n_flows = checked_int("NeuralSplineFlow", "n_flows", n_flows)
        bins = checked_int("NeuralSplineFlow", "bins", bins)
        hidden_dim = checked_int("NeuralSplineFlow", "hidden_dim", hidden_dim)
        hidden_depth = checked_int("NeuralSplineFlow", "hidden_depth", hidden_depth, least=0)
        tail_bound = checked_number("NeuralSplineFlow", "tail_bound", tail_bound, above=0)
        dropout = checked_number("NeuralSplineFlow", "dropout", dropout, least=0, below=1)
        checked_choice("NeuralSplineFlow", "mixing", mixing, MIXINGS)
        checked_dtype("NeuralSplineFlow", dtype)
        self.dim = dim
        self.context = context
        self.n_flows = n_flows
        self.bins = bins
        self.hidden_dim = hidden_dim
        self.hidden_depth = hidden_depth
        self.tail_bound = tail_bound
        self.mixing = mixing
        self.min_spread = checked_number("NeuralSplineFlow", "min_spread", min_spread, least=0)

        def coupling(swap: bool) -> SplineCoupling:
            conditioner = ResidualNet(
                dim - dim // 2 + context,
                SplineCoupling.outputs(dim, bins=bins),
                hidden_dim,
                hidden_depth,
                dropout=dropout,
                generator=generator,
                device=device,
                dtype=dtype,
            )
            coupling = SplineCoupling(dim, conditioner, bins=bins, tail_bound=tail_bound, swap=swap)
            last: nn.Linear = conditioner.last  # type: ignore[assignment]
            conditioner.last = RawParameters(
                last.in_features,
                last.out_features,
                count=coupling.count,
                bins=bins,
                min_derivative=coupling.min_derivative,
                device=last.weight.device,
                dtype=dtype,
            )
            return coupling

        layers: list[nn.Module] = []
        for _ in range(n_flows):
            layers.append(ActNorm(dim, min_spread=min_spread, device=device, dtype=dtype))
            layers += [coupling(False), coupling(True)]
            layers.append(Permutation(dim, generator=generator, device=device))
            if mixing == "lu":
                layers.append(LULinear(dim, device=device, dtype=dtype))
        self.layers = nn.ModuleList(layers)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, context={self.context}, n_flows={self.n_flows}, bins={self.bins}, "
            f"hidden_dim={self.hidden_dim}, hidden_depth={self.hidden_depth}, tail_bound={self.tail_bound}, "
            f"mixing={self.mixing!r}"
        )

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters and permutations anew, and forget the start of ActNorm."""
        for layer in self.layers:
            if isinstance(layer, SplineCoupling):
                layer.conditioner.reset_parameters(generator)  # type: ignore[operator]
                layer.conditioner.last.reset_parameters()  # type: ignore[operator, union-attr]
            elif isinstance(layer, Permutation):
                layer.reset_parameters(generator)
            else:
                layer.reset_parameters()  # type: ignore[operator]

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Start ActNorm from a batch ``[batch, dim]``, as the first ``forward`` does by itself; layers that have had their
        start keep it. Of several processes, call it with one batch for all before wrapping the module."""
        for layer in self.layers:
            if isinstance(layer, ActNorm) and not layer.initialized:
                layer.initialize(x)
            x = layer(x, context)[0] if isinstance(layer, SplineCoupling) else layer(x)[0]

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map data ``[batch, dim]``, with a context ``[batch, context]`` where there is one, to latents.

        Returns:
            z ``[batch, dim]`` and log|det dz/dx| ``[batch]`` in nats.

        Raises:
            ValueError: another rank, feature count or batch; a context that is missing or not wanted.
            TypeError: an integer, boolean or complex tensor; without autocast, another dtype than that of the parameters.
        """
        return self._run("x", x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map latents to data, with log|det dx/dz|. Arguments and errors are those of ``forward``."""
        return self._run("z", z, context, inverse=True)

    def _run(self, name: str, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        check_features("NeuralSplineFlow", name, x, self.dim)
        wanted = [x.shape[0], self.context] if self.context else None
        got = None if context is None else list(context.shape)
        if got != wanted:
            raise ValueError(f"NeuralSplineFlow: context is {got}, expected {wanted}")
        like = next(self.parameters()).dtype
        for argument, value in ((name, x), ("context", context)):
            if value is not None and not autocast_enabled(value):
                check_dtype("NeuralSplineFlow", argument, value, like, "like the parameters; convert it with .to(…)")
        total = x.new_zeros(x.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        for layer in reversed(self.layers) if inverse else self.layers:
            run = layer.inverse if inverse else layer
            x, logdet = run(x, context) if isinstance(layer, SplineCoupling) else run(x)  # type: ignore[operator]
            total = total + logdet
        return x, total
