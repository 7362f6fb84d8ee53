"""An invertible linear map of all features, in LU form."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_features, checked_dtype, checked_int, checked_number
from ..flow import ProgramBuilder

__all__ = ["LULinear"]


class LULinear(nn.Module):
    """Mixes all features by an invertible matrix that is learned as its LU factors.

    y = L U x + bias,  log|det| = sum log diag(U).

    L has a unit diagonal; the diagonal of U is positive, ``min_diagonal + softplus(raw)``. Both lie in one square
    parameter: below the diagonal L, above it U, on it the raw diagonal. It starts as the identity.

    References:
        Kingma and Dhariwal 2018 (Glow), Sec. 3.2. Durkan et al. 2019 (Neural spline flows), Sec. 3.2.

    Args:
        dim: number of features, at least 1.
        min_diagonal: least value on the diagonal of U; at least 0, below 1.
        device, dtype: of the parameters.

    Raises:
        ValueError: dim below 1, min_diagonal out of range.
        TypeError: dim that is no integer, min_diagonal that is no number.

    Example:
        >>> linear = LULinear(3)
        >>> x = torch.randn(5, 3)
        >>> y, logdet = linear(x)
        >>> torch.allclose(linear.inverse(y)[0], x, atol=1e-6)
        True
    """

    def __init__(
        self,
        dim: int,
        *,
        min_diagonal: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim = checked_int("LULinear", "dim", dim)
        self.min_diagonal = checked_number("LULinear", "min_diagonal", min_diagonal, least=0, below=1)
        checked_dtype("LULinear", dtype)
        self.weight = nn.Parameter(torch.empty(dim, dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.dim}"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the identity."""
        self.bias.zero_()
        self.weight.zero_()
        self.weight.diagonal().fill_(math.log(math.expm1(1 - self.min_diagonal)))

    def factors(self) -> tuple[Tensor, Tensor]:
        """L and U, ``[dim, dim]`` each."""
        diagonal = self.min_diagonal + F.softplus(self.weight.diagonal())
        identity = torch.eye(self.dim, device=self.weight.device, dtype=self.weight.dtype)
        return self.weight.tril(-1) + identity, self.weight.triu(1) + diagonal.diag()

    def program_layers(self, builder: ProgramBuilder) -> None:
        """Append this layer to a flow program."""
        weight, bias = builder.ref(self.weight), builder.ref(self.bias)
        builder.linear(weight, bias=bias, storage="square", eps=self.min_diagonal)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``x [batch, dim]``.

        Returns:
            y ``[batch, dim]`` and log|det| ``[batch]`` in nats.

        Raises:
            ValueError, TypeError: x has another rank, feature count or a type that is not floating.
        """
        check_features("LULinear", "x", x, self.dim)
        x, exact = self._exact(x)
        with exact:
            lower, upper = self.factors()
            return F.linear(x, lower @ upper, self.bias), self._logdet(upper).repeat(x.shape[0])

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``z [batch, dim]`` back by two triangular solves. Raises like ``forward``."""
        check_features("LULinear", "z", z, self.dim)
        z, exact = self._exact(z)
        with exact:
            lower, upper = self.factors()
            half = torch.linalg.solve_triangular(lower, (z - self.bias).T, upper=False, unitriangular=True)
            x = torch.linalg.solve_triangular(upper, half, upper=True).T
            return x, -self._logdet(upper).repeat(z.shape[0])

    def _exact(self, x: Tensor) -> tuple[Tensor, torch.autocast]:
        """The input, and a region without autocast: a density is no place for products of 8 bits of precision."""
        kind = x.device.type
        return x.to(self.weight.dtype) if torch.is_autocast_enabled(kind) else x, torch.autocast(kind, enabled=False)

    @staticmethod
    def _logdet(upper: Tensor) -> Tensor:
        return upper.diagonal().log().sum()
