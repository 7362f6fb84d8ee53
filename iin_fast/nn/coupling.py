"""Couplings: half of the features are transformed by what a network reads from the others."""

import torch
from torch import Tensor, nn

from ..checks import check_features, checked_choice, checked_flag, checked_int, checked_net
from ..flow import ProgramBuilder
from ..flow import affine as program_affine
from ..flow import spline as program_spline
from ..flow.layers import Transformer
from ..functional import affine_coupling, spline_coupling
from ..ops import affine_coupling as affine
from ..ops import spline_coupling as spline
from .net_steps import net_of

__all__ = ["AffineCoupling", "SplineCoupling"]


class Coupling(nn.Module):
    """What couplings share: how the features are halved and what the conditioner reads."""

    def __init__(self, dim: int, conditioner: nn.Module, swap: bool) -> None:
        super().__init__()
        where = type(self).__name__
        self.dim = checked_int(where, "dim", dim, least=2)  # one feature for each half
        self.conditioner = checked_net(where, "conditioner", conditioner)
        self.swap = checked_flag(where, "swap", swap)

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

    def program_layers(self, builder: ProgramBuilder) -> None:
        """Append this layer to a flow program.

        Raises:
            NotAProgram: the conditioner is no list of steps.
        """
        size = self.dim // 2
        first, last = range(size), range(self.dim - size, self.dim)
        conditioning = range(size, self.dim) if self.swap else range(self.dim - size)
        net = net_of(self.conditioner, builder)
        builder.coupling(conditioning, first if self.swap else last, net, self._transformer(size))

    def _transformer(self, size: int) -> Transformer:
        """How a program maps ``size`` features."""
        raise NotImplementedError

    def _wanted(self, size: int) -> tuple[int, str]:
        """How many values the conditioner returns for ``size`` features, and what they are, for an error message."""
        raise NotImplementedError

    def _map(self, part: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _couple(self, name: str, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        where = type(self).__name__
        check_features(where, name, x, self.dim)
        size = self.dim // 2  # of the transformed part
        if self.swap:
            part, kept = x[:, :size], x[:, size:]
        else:
            kept, part = x[:, : self.dim - size], x[:, self.dim - size :]
        raw = self.conditioner(kept if context is None else torch.cat([kept, context], dim=1))
        count, meaning = self._wanted(size)
        if tuple(raw.shape) != (x.shape[0], count):
            raise ValueError(
                f"{where}: conditioner returned shape {list(raw.shape)}, expected {[x.shape[0], count]} "
                f"({meaning} for {size} features)"
            )
        part, logdet = self._map(part, raw, inverse)
        return torch.cat([part, kept] if self.swap else [kept, part], dim=1), logdet


class AffineCoupling(Coupling):
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
        squash: makes the log-scale; :func:`iin_fast.functional.affine_coupling` has a table of them. "none" is an additive
            coupling.
        clamp: an option of the squash, see there.
        swap: transform the first features instead of the last.

    Raises:
        ValueError: dim below 2, an unknown squash, a clamp that is not above 0 or that the squash takes none of.
        TypeError: dim that is no integer, a clamp that is no number, a conditioner that cannot be called.

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
        super().__init__(dim, conditioner, swap)
        affine.check_options("AffineCoupling", squash, clamp)
        self.squash = squash
        self.clamp = clamp

    def extra_repr(self) -> str:
        return f"{self.dim}, squash={self.squash!r}, clamp={self.clamp}, swap={self.swap}"

    def _transformer(self, size: int) -> Transformer:
        return program_affine(
            size, self.squash, clamp=affine.check_options("AffineCoupling", self.squash, self.clamp)[1]
        )

    def _wanted(self, size: int) -> tuple[int, str]:
        if self.squash == "none":
            return size, "a shift"
        return 2 * size, "a raw scale and a shift"

    def _map(self, part: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        scale, shift = (None, raw) if self.squash == "none" else raw.chunk(2, dim=1)
        return affine_coupling(part, scale, shift, squash=self.squash, clamp=self.clamp, inverse=inverse)


class SplineCoupling(Coupling):
    """Maps half of the features by monotone rational-quadratic splines whose knots ``conditioner`` reads from the rest.

    x = (x1, x2),  y1 = x1,  y2 = spline(x2; conditioner(x1)),  log|det| = sum log dy2/dx2.

    x1 holds c = ceil(dim / 2) features, the first ones, or with ``swap`` the last ones.

    See also :func:`iin_fast.functional.spline_coupling`, and :class:`iin_fast.nn.NeuralSplineFlow` for whole stacks.

    References:
        Durkan, Bekasov, Murray, Papamakarios: Neural spline flows, 2019, Sec. 3.1 and 3.2.

    Args:
        dim: number of features, at least 2.
        conditioner: maps ``[batch, c (+ context)]`` to ``[batch, (dim - c) * P]``, for each feature ``bins`` raw widths,
            ``bins`` raw heights and the raw derivatives: P = 3 * bins - 1 for linear tails, 3 * bins for circular ones,
            3 * bins + 1 for None. :meth:`outputs` is that number.
        bins: K.
        tails: "linear", "circular" or None.
        tail_bound: half the width of the box in which the splines bend.
        min_bin_width, min_bin_height, min_derivative, parameterization: as for the function.
        swap: transform the first features instead of the last.

    Raises:
        ValueError: dim below 2, or an option that the function refuses.

    Example:
        >>> coupling = SplineCoupling(5, nn.Linear(3, SplineCoupling.outputs(5, bins=4)), bins=4)
        >>> x = torch.randn(7, 5)
        >>> y, logdet = coupling(x)
        >>> torch.allclose(coupling.inverse(y)[0], x, atol=1e-4)
        True
    """

    def __init__(
        self,
        dim: int,
        conditioner: nn.Module,
        *,
        bins: int = 8,
        tails: str | None = "linear",
        tail_bound: float = 3.0,
        min_bin_width: float = 1e-3,
        min_bin_height: float = 1e-3,
        min_derivative: float = 1e-3,
        parameterization: str = "nflows",
        swap: bool = False,
    ) -> None:
        super().__init__(dim, conditioner, swap)
        self.options = {
            "bins": bins,
            "tails": tails,
            "tail_bound": tail_bound,
            "min_bin_width": min_bin_width,
            "min_bin_height": min_bin_height,
            "min_derivative": min_derivative,
            "parameterization": parameterization,
        }
        spline.check_options("SplineCoupling", box=None, **self.options)  # type: ignore[arg-type]
        self.min_derivative = min_derivative
        self.count = spline.parameter_count(bins, tails)  # raw values of a feature

    @staticmethod
    def outputs(dim: int, *, bins: int = 8, tails: str | None = "linear") -> int:
        """The number of features that the conditioner of ``dim`` features returns."""
        where = "SplineCoupling.outputs"
        dim, bins = checked_int(where, "dim", dim, least=2), checked_int(where, "bins", bins)
        return (
            dim // 2 * spline.parameter_count(bins, checked_choice(where, "tails", tails, ("linear", "circular", None)))
        )

    def extra_repr(self) -> str:
        return f"{self.dim}, " + ", ".join(f"{k}={v!r}" for k, v in self.options.items()) + f", swap={self.swap}"

    def _transformer(self, size: int) -> Transformer:
        return program_spline(**self.options)  # type: ignore[arg-type]

    def _wanted(self, size: int) -> tuple[int, str]:
        return size * self.count, f"{self.count} raw widths, heights and derivatives"

    def _map(self, part: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return spline_coupling(part, raw, inverse=inverse, **self.options)  # type: ignore[arg-type]
