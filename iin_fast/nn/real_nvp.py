"""RealNVP as one module."""

import torch

from ..flow import ProgramBuilder, affine
from ..ops import affine_coupling
from .actnorm import MIN_SPREAD
from .mlp_flow import MlpFlow
from .program_flow import Orders, Stacked

__all__ = ["RealNVP"]


class RealNVP(MlpFlow):
    """The density of data, given a context or not, as a stack of affine couplings (RealNVP).

    One layer: ActNorm, and an affine coupling: with c = ceil(dim / 2) features x1 that condition, and the others x2,

        (raw, t) = MLP(x1, context),  y1 = x1,  y2 = x2 * exp(squash(raw)) + t,  log|det| = sum squash(raw).

    For an even ``dim`` the two halves take turns; for an odd one the transformed features move on in a circle. The
    couplings start with raw scales and shifts of 0: as the identity, if the squash maps 0 to 0. The first call of
    ``forward`` or ``log_prob`` starts ActNorm from its batch.

    All layers run as one op. Their parameters lie stacked in a few tensors, each with ``n_flows`` as its first dimension.

    See also :class:`iin_fast.nn.Flow`, the flow of the IIN: double couplings, with nets of their own for scales and shifts.

    References:
        Dinh, Sohl-Dickstein, Bengio: Density estimation using Real NVP, 2017, arXiv 1605.08803, Eq. 4–8.
        Kingma and Dhariwal 2018 (Glow), Sec. 3.1 (ActNorm).

    Args:
        dim: number of features, at least 2.
        context_dim: number of features of the context; 0: none.
        n_flows: number of couplings.
        hidden_dim: width of the MLPs.
        hidden_depth: number of hidden-to-hidden layers of each MLP.
        squash, clamp: map the raw scale to the log-scale, as for :class:`AffineCoupling`.
        activation: of the MLPs: "relu", "leaky_relu", "elu", "silu", "gelu", "tanh" or "sigmoid".
        actnorm: False leaves ActNorm out.
        min_spread: of :class:`ActNorm`, what is taken as constant at the start.
        generator: draws the weights, as torch.nn.Linear does; by default torch's global one.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size or an option out of range.
        TypeError: a size that is no integer, a clamp that is no number, an ``actnorm`` that is not True or False.

    Example:
        >>> flow = RealNVP(3, context_dim=2, n_flows=4, hidden_dim=16)
        >>> x, context = torch.randn(5, 3), torch.randn(5, 2)
        >>> flow.log_prob(x, context).shape, flow.sample((10,), context).shape
        (torch.Size([5]), torch.Size([10, 5, 3]))
        >>> z, logdet = flow(x, context)
        >>> torch.allclose(flow.inverse(z, context)[0], x, atol=1e-5)
        True
    """

    def __init__(
        self,
        dim: int,
        context_dim: int = 0,
        n_flows: int = 8,
        hidden_dim: int = 64,
        hidden_depth: int = 2,
        *,
        squash: str = "tanh",
        clamp: float | None = None,
        activation: str = "relu",
        actnorm: bool = True,
        min_spread: float = MIN_SPREAD,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = context_dim, n_flows, hidden_dim, hidden_depth
        self._set_sizes(dim, 2, *sizes, activation, actnorm, min_spread, dtype)
        affine_coupling.check_options("RealNVP", squash, clamp)
        self.squash = squash
        self.clamp = clamp
        transformed = self.dim // 2
        outputs = transformed * (1 if squash == "none" else 2)
        self._register(self.dim - transformed + self.context_dim, outputs, device, dtype)
        self._finish(generator)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", squash={self.squash!r}, clamp={self.clamp}"

    def _add_layers(self, builder: ProgramBuilder, stacked: Stacked, orders: Orders) -> None:
        dim, size = self.dim, self.dim // 2
        _, clamp = affine_coupling.check_options("RealNVP", self.squash, self.clamp)
        for flow in range(self.n_flows):
            if self.actnorm:
                builder.affine(stacked("loc", flow), stacked("scale", flow), order="shift_first")
            first = dim - size + flow * size
            transformed = sorted((first + j) % dim for j in range(size))
            conditioning = [j for j in range(dim) if j not in transformed]
            transformer = affine(size, self.squash, clamp=clamp)
            builder.coupling(conditioning, transformed, self._mlp(stacked, flow), transformer)
