"""Affine coupling: half of the features are scaled and shifted by what a network reads from the others."""

import torch
from torch import Tensor, nn

from ..functional import affine_coupling
from .checks import check_features

__all__ = ["AffineCoupling"]


class AffineCoupling(nn.Module):
    """Scales and shifts half of the features by what ``conditioner`` reads from the other half.

    x = (x1, x2), (raw, t) = conditioner(x1),  y1 = x1,  y2 = x2 * exp(squash(raw)) + t,  log|det| = sum squash(raw).

    x1 holds c = ceil(dim / 2) features, the first ones, or with ``swap`` the last ones.

    See also :func:`iin_fast.functional.affine_coupling`, and :class:`iin_fast.nn.Flow` for whole stacks.

    References:
        Dinh et al. 2017 (RealNVP), Eq. 4–8. Esser et al. 2020, Sec. 3.1 (tanh).

    Args:
        dim: number of features, at least 2.
        conditioner: maps ``[batch, c (+ context)]`` to ``[batch, 2 * (dim - c)]``, raw scales first, then shifts; for
            squash "none" to the shifts alone, ``[batch, dim - c]``.
        squash: bounds the log-scale: "tanh" (IIN), "atan" (FrEIA's soft clamp), "sigmoid" (nflows), "identity", or
            "none" for an additive coupling.
        clamp: bound of the log-scale for "tanh" and "atan".
        swap: transform the first features instead of the last.

    Raises:
        ValueError: dim below 2.

    Example:
        >>> coupling = AffineCoupling(5, nn.Linear(3, 4))
        >>> x = torch.randn(7, 5)
        >>> y, logdet = coupling(x)
        >>> torch.allclose(coupling.inverse(y)[0], x, atol=1e-5)
        True
    """

    def __init__(
        self, dim: int, conditioner: nn.Module, *, squash: str = "tanh", clamp: float | None = None, swap: bool = False
    ) -> None:
        super().__init__()
        if dim < 2:
            raise ValueError(f"AffineCoupling: dim is {dim}, expected at least 2, one feature for each half")
        self.dim = dim
        self.conditioner = conditioner
        self.squash = squash
        self.clamp = clamp
        self.swap = swap

    def extra_repr(self) -> str:
        return f"{self.dim}, squash={self.squash!r}, clamp={self.clamp}, swap={self.swap}"

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``x [batch, dim]``; ``context [batch, …]`` is appended to what the conditioner reads.

        Returns:
            y ``[batch, dim]`` and log|det| ``[batch]`` in nats.

        Raises:
            ValueError, TypeError: x has another rank, feature count or a type that is not floating; the conditioner
                returns another number of features.
        """
        return self._couple("x", x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``z [batch, dim]`` back; the log-det is that of the inverse map. Raises like ``forward``."""
        return self._couple("z", z, context, inverse=True)

    def _couple(self, name: str, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        check_features("AffineCoupling", name, x, self.dim)
        size = self.dim // 2  # of the transformed part
        if self.swap:
            part, kept = x[:, :size], x[:, size:]
        else:
            kept, part = x[:, : self.dim - size], x[:, self.dim - size :]
        out = self.conditioner(kept if context is None else torch.cat([kept, context], dim=1))
        wanted = (x.shape[0], size if self.squash == "none" else 2 * size)
        if tuple(out.shape) != wanted:
            raise ValueError(
                f"AffineCoupling: conditioner returned shape {list(out.shape)}, expected {list(wanted)} "
                f"({'a shift' if self.squash == 'none' else 'a raw scale and a shift'} for {size} features)"
            )
        raw, shift = (None, out) if self.squash == "none" else out.chunk(2, dim=1)
        part, logdet = affine_coupling(part, raw, shift, squash=self.squash, clamp=self.clamp, inverse=inverse)
        return torch.cat([part, kept] if self.swap else [kept, part], dim=1), logdet
