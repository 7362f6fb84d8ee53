"""The Invertible Interpretation Network: a flow between a latent and its factors."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Flow, NeuralSplineFlow
from . import checkpoint
from ._checks import check_latents, checked_int
from .factors import RESIDUAL, Factors, factor_sizes

__all__ = ["IIN"]

COUPLINGS = ("affine", "spline")


class IIN(nn.Module):
    r"""Creates an invertible network T that translates latents z into factors, and back without loss.

    .. math:: \tilde z = T(z) \sim \mathcal N(0, 1), \quad
              \log p(z) = -\tfrac12 \|T(z)\|^2 - \tfrac N2 \log 2\pi + \log |\det T'(z)|

    The factors are named slices of :math:`\tilde z`; what the named ones leave over is ``residual``. Without names the
    network is unsupervised: all of it is residual. Train it with :class:`FactorLoss` on pairs, or by maximising
    :meth:`log_prob`. The first batch that goes forward starts the ActNorm layers.

    Args:
        dim: features N of a latent.
        factors: name to size, in order; sizes are positive and sum to at most ``dim``.
        n_flows: blocks of ActNorm, double coupling and permutation.
        hidden_dim: width of the coupling networks.
        hidden_depth: hidden layers of the coupling networks beside the first; with splines, residual blocks.
        coupling: ``"affine"`` (published), or ``"spline"``: rational-quadratic splines in place of scale and shift, as in
            ``iin_fast.nn.NeuralSplineFlow``.
        bins: of each spline.
        tail_bound: half the width of the box in which splines bend.
        generator: draws the start weights and permutations; by default torch's global one.
        device: where the parameters are made.
        dtype: type of the parameters.
        memory: what an affine flow keeps for backward: ``"save"``, ``"invert"`` or ``"auto"``; see ``iin_fast.nn.Flow``.

    Raises:
        TypeError, ValueError: a size that is not a positive integer, factors that don't fit ``dim``, a ``dtype`` that
            is not real floating point. Methods raise them for latents of another rank, feature count, type or device.

    References:
        Esser, Rombach, Ommer, A Disentangling Invertible Interpretation Network, CVPR 2020, arXiv 2004.13166, Sec. 3.

    Example:
        >>> from iin_fast import IIN
        >>> model = IIN(64, {"digit": 22, "color": 11}, n_flows=2, hidden_dim=32)
        >>> z, donor = torch.randn(2, 8, 64).unbind()
        >>> model.encode(z)
        Factors(batch=8, digit=22, color=11, residual=31)
        >>> model.swap(z, donor, "digit").shape
        torch.Size([8, 64])
        >>> model.log_prob(z).shape
        torch.Size([8])
    """

    def __init__(
        self,
        dim: int,
        factors: Mapping[str, int] | None = None,
        n_flows: int = 12,
        hidden_dim: int = 512,
        hidden_depth: int = 2,
        *,
        coupling: str = "affine",
        bins: int = 8,
        tail_bound: float = 3.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        memory: str = "auto",
    ) -> None:
        super().__init__()
        self.dim = checked_int("IIN", "dim", dim)
        self._sizes = factor_sizes(self.dim, factors, where="IIN")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"IIN: dtype is {dtype}, expected a real floating-point type")
        n_flows = checked_int("IIN", "n_flows", n_flows)
        hidden_dim = checked_int("IIN", "hidden_dim", hidden_dim)
        hidden_depth = checked_int("IIN", "hidden_depth", hidden_depth, least=0)
        if coupling not in COUPLINGS:
            raise ValueError(f"IIN: coupling is {coupling!r}, expected one of {', '.join(map(repr, COUPLINGS))}")
        if coupling == "spline" and memory != "auto":
            raise ValueError(f"IIN: memory is {memory!r}, expected 'auto' with coupling 'spline'")
        self.coupling = coupling
        place = {"generator": generator, "device": device, "dtype": dtype}
        self.flow: Flow | NeuralSplineFlow
        if coupling == "affine":
            self.flow = Flow(self.dim, n_flows, hidden_dim, hidden_depth, memory=memory, **place)  # type: ignore[arg-type]
        else:
            self.flow = NeuralSplineFlow(
                self.dim,
                n_flows=n_flows,
                bins=checked_int("IIN", "bins", bins),
                hidden_dim=hidden_dim,
                hidden_depth=hidden_depth,
                tail_bound=tail_bound,
                mixing="permutation",
                **place,  # type: ignore[arg-type]
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Name to size of all factors, in order, the residual last."""
        return dict(self._sizes)

    @property
    def concepts(self) -> tuple[str, ...]:
        """Names of the factors that pairs can share: all but the residual."""
        return tuple(name for name in self._sizes if name != RESIDUAL)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.like.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return self.like.dtype

    @property
    def like(self) -> Tensor:
        """One of the parameters, for what has to be made or checked to fit them."""
        return next(self.flow.parameters())

    def extra_repr(self) -> str:
        return f"dim={self.dim}, factors={self._sizes}"

    def forward(self, z: Tensor) -> tuple[Factors, Tensor]:
        """Factors of latents ``[batch, dim]``, and log|det T'(z)| ``[batch]`` in nats."""
        check_latents("IIN", [("z", z)], self.dim, self.like)
        factors, logdet = self.flow(z)
        return Factors._wrap(factors, self._sizes), logdet

    def encode(self, z: Tensor) -> Factors:
        """Factors of latents ``[batch, dim]``."""
        factors: Factors = self(z)[0]
        return factors

    def decode(self, factors: Factors | Mapping[str, Tensor] | Tensor) -> Tensor:
        """Latents ``[batch, dim]`` of factors: the inverse of :meth:`encode`.

        Args:
            factors: Factors; or a mapping with a tensor ``[batch, size]`` for each name, in any order; or all of them
                side by side, ``[batch, dim]``.

        Raises:
            TypeError, ValueError: a name that is missing or unknown, or a tensor that doesn't fit.
        """
        tensor = self._join(factors)
        check_latents("IIN.decode", [("factors", tensor)], self.dim, self.like)
        z: Tensor = self.flow.inverse(tensor)[0]
        return z

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) of latents ``[batch, dim]``, normalised, ``[batch]`` in nats; in float32 at least."""
        factors, logdet = self(z)
        values = factors.tensor
        if values.dtype != torch.float64:
            values = values.float()
        log_prob: Tensor = logdet - 0.5 * (values * values).sum(1) - 0.5 * self.dim * math.log(2 * math.pi)
        return log_prob

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` latents ``[n, dim]`` of the model's distribution.

        Args:
            n: how many.
            generator: draws them, on its own device, so that a seed gives the same draw wherever the model is.
        """
        n = checked_int("IIN.sample", "n", n)
        if generator is not None and not isinstance(generator, torch.Generator):
            kind = type(generator).__name__
            raise TypeError(f"IIN.sample: generator is a {kind}, expected a torch.Generator")
        device = self.device if generator is None else generator.device
        noise = torch.randn(n, self.dim, generator=generator, device=device, dtype=self.dtype)
        return self.decode(noise.to(self.device))

    def swap(self, z: Tensor, donor: Tensor, factor: str | Sequence[str]) -> Tensor:
        """``z`` with one or more factors of ``donor``; everything else of ``z`` stays.

        Args:
            z: latents that keep the rest, ``[batch, dim]``.
            donor: latents that give the factor, ``[batch, dim]``.
            factor: a name, or several; ``"residual"`` is one of them.

        Returns:
            ``[batch, dim]``.

        Raises:
            TypeError, ValueError: an unknown or repeated factor, or latents that don't fit the model or each other.

        References:
            Esser, Rombach, Ommer, CVPR 2020, Sec. 4.1 and Fig. 2.
        """
        check_latents("IIN.swap", [("z", z), ("donor", donor)], self.dim, self.like)
        mask = self._select("IIN.swap", factor)
        both, n = self.encode(torch.cat([z, donor])).tensor, z.shape[0]
        return self.decode(torch.where(mask, both[n:], both[:n]))

    def interpolate(self, z_a: Tensor, z_b: Tensor, steps: int, factor: str | Sequence[str] | None = None) -> Tensor:
        """Latents on the straight line between the factors of ``z_a`` and ``z_b``.

        Args:
            z_a: latents where it starts, ``[batch, dim]``.
            z_b: latents where it ends, ``[batch, dim]``.
            steps: points on the line, both ends included; at least 2.
            factor: move only these factors, a name or several; by default all of them.

        Returns:
            ``[steps, batch, dim]``; the first is ``z_a``, the last is ``z_b``, or ``z_a`` with the factors of ``z_b``.

        Raises:
            TypeError, ValueError: as :meth:`swap`; ``steps`` below 2.
        """
        check_latents("IIN.interpolate", [("z_a", z_a), ("z_b", z_b)], self.dim, self.like)
        steps = checked_int("IIN.interpolate", "steps", steps)
        if steps < 2:
            raise ValueError(f"IIN.interpolate: steps is {steps}, expected at least 2, both ends included")
        both = self.encode(torch.cat([z_a, z_b])).tensor
        start, end = both[: z_a.shape[0]], both[z_a.shape[0] :]
        if factor is not None:
            end = torch.where(self._select("IIN.interpolate", factor), end, start)
        position = torch.linspace(0, 1, steps, device=end.device, dtype=end.dtype)[:, None, None]
        line = torch.lerp(start.expand(steps, -1, -1), end.expand(steps, -1, -1), position)
        return self.decode(line.flatten(0, 1)).reshape(line.shape)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``config.json`` into the folder ``path``, which is made if it is not there.

        Each file appears whole or not at all. Needs ``pip install 'iin-fast[io]'``.

        Raises:
            ValueError: NaN or Inf in a parameter.
            OSError: the folder can't be written.
        """
        checkpoint.save(path, self.state_dict(), self.config)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None, memory: str = "auto"
    ) -> "IIN":
        """The model that :meth:`save` wrote into the folder ``path``. Needs ``pip install 'iin-fast[io]'``.

        Args:
            path: the folder.
            device: where the model goes; by default the CPU.
            memory: as for :class:`IIN`.

        Raises:
            FileNotFoundError: no such folder, or one of its files is missing.
            ValueError: a file that is damaged or not of iin-fast; parameters that are missing, unknown, of another
                shape or type than the configuration says, NaN or Inf.
        """
        tensors, config = checkpoint.load(path)
        # Drawn from a generator of its own: loading a model leaves the global random state alone.
        generator = torch.Generator().manual_seed(0)
        try:
            dtype = checkpoint.DTYPES[config.pop("dtype")]
            model = cls(**config, dtype=dtype, device="cpu", generator=generator, memory=memory)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{checkpoint.config_file(path)}: no valid configuration of an IIN ({error!r})") from error
        checkpoint.check(path, tensors, model.state_dict())
        model.load_state_dict(tensors)
        return model.to(device)

    @property
    def config(self) -> dict[str, Any]:
        """What makes a model like this one, as plain values: ``dim``, ``factors``, the flow's sizes and couplings, ``dtype``."""
        config: dict[str, Any] = {
            "dim": self.dim,
            "factors": self.sizes,
            "n_flows": self.flow.n_flows,
            "hidden_dim": self.flow.hidden_dim,
            "hidden_depth": self.flow.hidden_depth,
            "coupling": self.coupling,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        if isinstance(self.flow, NeuralSplineFlow):
            config |= {"bins": self.flow.bins, "tail_bound": self.flow.tail_bound}
        return config

    def _join(self, factors: Factors | Mapping[str, Tensor] | Tensor) -> Tensor:
        if isinstance(factors, Tensor):
            return factors
        if not isinstance(factors, Mapping):
            kind = type(factors).__name__
            raise TypeError(
                f"IIN.decode: factors is a {kind}, expected Factors, a mapping of name to tensor, or a tensor"
            )
        unknown = [name for name in factors if name not in self._sizes]
        missing = [name for name in self._sizes if name not in factors]
        if unknown or missing:
            raise ValueError(f"IIN.decode: factors has the names {list(factors)}, expected {list(self._sizes)}")
        if not isinstance(factors, Factors):
            factors = Factors({name: factors[name] for name in self._sizes})
        if list(factors.sizes.items()) != list(self._sizes.items()):
            raise ValueError(f"IIN.decode: factors has sizes {factors.sizes}, expected {self._sizes}")
        return factors.tensor

    def _select(self, where: str, factor: str | Sequence[str]) -> Tensor:
        """A boolean mask ``[dim]`` of the features of the named factors."""
        if not isinstance(factor, Sequence):
            raise TypeError(f"{where}: factor is {factor!r}, expected a name or a sequence of names")
        names = [factor] if isinstance(factor, str) else list(factor)
        if not names:
            raise ValueError(f"{where}: factor is empty, expected one or more of {list(self._sizes)}")
        for name in names:
            if name not in self._sizes:
                raise ValueError(f"{where}: factor names {name!r}, expected one of {list(self._sizes)}")
        if len(set(names)) != len(names):
            raise ValueError(f"{where}: factor names one twice: {names}")
        mask = [name in names for name, size in self._sizes.items() for _ in range(size)]
        return torch.tensor(mask, device=self.device)
