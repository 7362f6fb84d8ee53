"""What stands before a flow: features that can't be learned from are set aside, the others standardised. It is reversible."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import check_floating, check_rank, checked_int

__all__ = ["Inputs", "LinearMap", "constant_features", "copied_features", "mostly", "usual_values"]

OUTLYING, USUAL, RANGE_ROWS = 10.0, 0.95, 10_000


def constant_features(z: Tensor) -> Tensor:
    """Which features of ``z`` ``[n, dim]`` have one value, up to rounding: bool ``[dim]``."""
    low, high = z.amin(0).double(), z.amax(0).double()
    return high - low <= 8 * torch.finfo(z.dtype).eps * torch.maximum(low.abs(), high.abs())


def copied_features(z: Tensor) -> Tensor:
    """For each feature of ``z`` ``[n, dim]`` the first one with the same values: int64 ``[dim]``."""
    kind = torch.unique(z.T, dim=0, return_inverse=True)[1]  # [dim]
    order = torch.arange(len(kind), device=z.device)
    first = torch.full_like(kind, len(kind)).scatter_reduce(0, kind, order, "amin")
    return first[kind]


def usual_values(z: Tensor) -> tuple[Tensor, Tensor]:
    """Latents ``[n, dim]`` with the farthest usual value in place of outliers, and which values are outliers, bool ``[n, dim]``.

    An outlier is ten times as far from the median as are 19 of 20 values that differ from it. So a feature that is mostly 0 keeps what is
    not. Where most rows have one, such values are how the latents are, and stay.
    """
    some = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))[:RANGE_ROWS].to(z.device)
    rows = z[some].double()
    middle = rows.median(0).values
    distance = (rows - middle).abs().sort(0).values
    same = (distance == 0).sum(0)
    place = (same + USUAL * (len(rows) - 1 - same)).long().clamp(max=len(rows) - 1)
    usual = distance.gather(0, place[None])[0]
    most = torch.where(usual > 0, OUTLYING * usual, torch.inf)
    found = torch.minimum(torch.maximum(z, (middle - most).to(z.dtype)), (middle + most).to(z.dtype))
    outliers = found != z
    return z if mostly(outliers) else found, outliers


def mostly(outliers: Tensor) -> bool:
    """Whether most rows have an outlier, of bool ``[n, dim]``."""
    return bool(outliers.any(1).double().mean() > 0.5)


class LinearMap(nn.Module):
    """x to ``x @ matrix`` and back. It computes in float64, so that the way back is exact."""

    matrix: Tensor  # [dim, dim]
    logdet: Tensor  # []

    def __init__(self, matrix: Tensor, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix.to(dtype))
        self.register_buffer("logdet", torch.linalg.slogdet(matrix).logabsdet.to(dtype))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (x.double() @ self.matrix.double()).to(x.dtype), self.logdet.expand(len(x))

    def inverse(self, factors: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = torch.linalg.solve(self.matrix.double(), factors.double(), left=False)
        return x.to(factors.dtype), -self.logdet.expand(len(factors))


class Inputs(nn.Module):
    r"""Creates the reversible map from latents to what a flow is good at, and back.

    .. math:: x_i = (z_i - \mu_i) / \sigma_i, \quad x_j = z_j - c_j

    for features i that a flow learns from, and then for those that it does not: of a constant one, c is its value; of
    one that is a copy of another, c is that other feature. There x is 0, and z comes back to the last bit. A latent in
    which they are something else loses nothing either. With :meth:`turned` a linear map of the standardised features follows.

    Made from latents by :meth:`of`. ``Inputs(dim, left_out)`` is what a state is loaded into, and changes nothing.

    Args:
        dim: features of a latent.
        left_out: how many of them are constant or copies.
        flat: with a linear map: how many directions of it, the last ones, don't vary. They bypass the flow too.

    Example:
        >>> z = torch.randn(100, 3) * torch.tensor([1.0, 1000.0, 0.0]) + 5
        >>> inputs = Inputs.of(torch.cat([z, z[:, :1]], 1))
        >>> inputs.live, inputs.left_out  # two to learn from; a constant one and a copy
        (2, 2)
    """

    mean: Tensor  # [dim]
    scale: Tensor  # [dim]
    keep: Tensor  # [live] int64, features that a flow learns from
    left: Tensor  # [left_out] int64, those that it does not
    source: Tensor  # [left_out] int64, what each of these is a copy of; itself, if it is constant

    def __init__(
        self, dim: int, left_out: int = 0, flat: int | None = None, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.dim = checked_int("Inputs", "dim", dim)
        self.left_out = checked_int("Inputs", "left_out", left_out, least=0)
        if self.left_out >= self.dim:
            raise ValueError(f"Inputs: left_out is {left_out}, expected less than dim = {dim}")
        kept = self.dim - self.left_out
        self.flat = None if flat is None else checked_int("Inputs", "flat", flat, least=0)
        if (self.flat or 0) >= kept:
            raise ValueError(f"Inputs: flat is {flat}, expected less than {kept}, the features that vary")
        self.linear = None if flat is None else LinearMap(torch.eye(kept, dtype=dtype), dtype)
        for name in ("mean", "scale"):
            self.register_buffer(name, torch.empty(dim, dtype=dtype))
        for name, count in (("keep", kept), ("left", self.left_out), ("source", self.left_out)):
            self.register_buffer(name, torch.empty(count, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the map that changes nothing."""
        self.mean.zero_()
        self.scale.fill_(1)
        places = torch.arange(self.dim, device=self.keep.device)
        self.keep.copy_(places[: len(self.keep)])
        self.left.copy_(places[len(self.keep) :])
        self.source.copy_(places[len(self.keep) :])
        if self.linear is not None:
            self.linear = LinearMap(torch.eye(len(self.keep), dtype=self.mean.dtype, device=self.mean.device))

    @property
    def live(self) -> int:
        """What a flow sees of ``dim``: all but what is left out, and the flat directions of the linear map."""
        return self.dim - self.left_out - (self.flat or 0)

    @classmethod
    def of(cls, z: Tensor) -> Inputs:
        """The map that latents ``[n, dim]`` ask for.

        Raises:
            TypeError, ValueError: latents that are not finite ``[n, dim]``, or none of whose features varies; a variance
                beyond float64.
        """
        where = "Inputs.of"
        check_floating(where, "z", z)
        check_rank(where, "z", z, "latents [n, dim]", 2)
        if z.numel() == 0 or not torch.isfinite(z).all():
            raise ValueError(f"{where}: z is empty or has NaN or Inf, expected finite numbers [n, dim]")
        z = z.detach()
        constant, first = constant_features(z), copied_features(z)
        own = torch.arange(z.shape[1], device=z.device)
        aside = constant | (first != own)
        if aside.all():
            raise ValueError(f"{where}: z has no feature that varies, expected one at least")
        made = cls(z.shape[1], int(aside.sum()), dtype=z.dtype)
        values = z.double()
        deviation = values.std(0, correction=0)
        beyond = ~constant & ~((deviation >= torch.finfo(torch.float64).tiny ** 0.5) & (deviation < torch.inf))
        if beyond.any():
            feature = int(beyond.nonzero()[0])
            raise ValueError(
                f"{where}: feature {feature} of z has values up to {values[:, feature].abs().max():g}, expected ones whose "
                "variance float64 can hold; multiply it by a constant"
            )
        made.mean = torch.where(constant, values[0], values.mean(0)).to(z.dtype)
        made.scale = torch.where(constant, 1.0, deviation).to(z.dtype)
        made.keep, made.left = own[~aside], own[aside]
        made.source = torch.where(constant, own, first)[aside]
        return made

    def turned(self, matrix: Tensor, flat: int = 0) -> Inputs:
        """These inputs with ``x @ matrix`` in place of x, ``[dim - left_out, dim - left_out]``.

        Args:
            matrix: what standardised features are multiplied by; invertible.
            flat: how many of its columns, the last ones, give values that don't vary.
        """
        made = Inputs(self.dim, self.left_out, flat, dtype=self.mean.dtype).to(self.mean.device)
        for name, values in self.named_buffers(recurse=False):
            getattr(made, name).copy_(values)
        made.linear = LinearMap(matrix, self.mean.dtype)
        return made

    def extra_repr(self) -> str:
        return f"dim={self.dim}, left_out={self.left_out}" + ("" if self.flat is None else f", flat={self.flat}")

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a flow sees of latents ``[batch, dim]``, ``[batch, live]``; the others ``[batch, dim - live]``; and the log-det."""
        x = (z[:, self.keep] - self.mean[self.keep]) / self.scale[self.keep]
        logdet = -self.scale[self.keep].log().sum()
        rest = z[:, self.left] - self._expected(z)
        if self.linear is not None:
            turned, own = self.linear(x)
            x, flat = turned.split([self.live, len(self.keep) - self.live], 1)
            rest, logdet = torch.cat([flat, rest.to(flat)], 1), logdet + own[:1].sum()
        return x, rest, logdet

    def inverse(self, x: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Latents ``[batch, dim]`` of both parts, and the log-det."""
        if self.linear is not None:
            flat, rest = rest.split([len(self.keep) - self.live, self.left_out], 1)
            x = self.linear.inverse(torch.cat([x, flat.to(x)], 1))[0]
        values = x * self.scale[self.keep] + self.mean[self.keep]
        z = values.new_empty(len(x), self.dim).index_copy(1, self.keep, values)
        # A constant needs nothing of z; what a copy is of is in place.
        z = z.index_copy(1, self.left, rest.to(z) + self._expected(z))
        logdet = self.scale[self.keep].log().sum()
        return z, logdet if self.linear is None else logdet - self.linear.logdet

    def _expected(self, z: Tensor) -> Tensor:
        """What the features that are left out have, as far as the others say it: ``[batch, left_out]``."""
        return torch.where(self.source == self.left, self.mean[self.left], z[:, self.source])
