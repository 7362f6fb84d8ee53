"""The Invertible Interpretation Network: a flow between a latent and its factors."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import (
    autocast_enabled,
    check_device,
    check_dtype,
    check_floating,
    check_latents,
    check_rank,
    check_shape,
    checked_choice,
    checked_dtype,
    checked_int,
    checked_number,
    readable,
)
from ..nn import Flow, NeuralSplineFlow
from ..nn.actnorm import MIN_SPREAD
from . import checkpoint
from .factors import RESIDUAL, Factors, factor_sizes
from .inputs import Inputs

__all__ = ["IIN"]

COUPLINGS = ("affine", "spline")


def outlier_share(where: str, own: Tensor, usual: Tensor) -> Tensor:
    """The outlier score of log-likelihoods ``[batch]`` among usual ones ``[m]``; see :meth:`IIN.outlier_score`."""
    unknown = usual.isnan().any()
    traced = torch.compiler.is_compiling() or not readable(usual)  # nothing can be raised then
    if not traced and unknown:
        raise ValueError(f"{where}: held_in has NaN among its log-likelihoods, expected numbers")
    usual = usual.to(own).sort().values
    own = torch.where(own.isnan(), -torch.inf, own)
    likelier = len(usual) - torch.searchsorted(usual, own, right=True)
    share = likelier.to(own.dtype) / (len(usual) + 1)
    return torch.where(unknown, torch.nan, share) if traced else share


def unwrapped(where: str, model: object, instead: str = "") -> "IIN":
    """The IIN itself, which torch.compile, DistributedDataParallel, AveragedModel or Fabric may have wrapped.

    Raises:
        TypeError: no IIN; ``instead`` says what to do with other models.
    """
    inner: Any = model
    while isinstance(inner, nn.Module) and not isinstance(inner, IIN):
        wrapped = (getattr(inner, name, None) for name in ("_orig_mod", "_original_module", "module"))
        inner = next((module for module in wrapped if isinstance(module, nn.Module)), None)
    if not isinstance(inner, IIN):
        raise TypeError(
            f"{where}: model is a {type(model).__name__}, expected an iin_fast.IIN, or one that torch.compile, "
            f"DistributedDataParallel, AveragedModel or Fabric wraps{instead}"
        )
    return inner


class IIN(nn.Module):
    r"""Creates an invertible network T that translates latents z into factors, and back without loss.

    .. math:: \tilde z = T(z) \sim \mathcal N(0, 1), \quad
              \log p(z) = -\tfrac12 \|T(z)\|^2 - \tfrac N2 \log 2\pi + \log |\det T'(z)|

    The factors are named slices of :math:`\tilde z`; what the named ones leave over is ``residual``. Without names the
    network is unsupervised: all of it is residual. Train it with :class:`FactorLoss` on pairs, or by maximising
    :meth:`log_prob`. The first batch that goes forward starts the ActNorm layers.

    With ``context_dim`` the network is conditional: T(z, c) and p(z | c), where c is a class (one-hot) or any other
    vector that comes with each latent. Every method then wants it; factors need not hold what c already says.

    Args:
        dim: features N of a latent.
        factors: name to size, in order; sizes are positive and sum to at most ``dim``.
        n_flows: blocks of ActNorm, double coupling and permutation.
        hidden_dim: width of the coupling networks.
        hidden_depth: hidden layers of the coupling networks beside the first; with splines, residual blocks.
        coupling: ``"affine"`` (published), or ``"spline"``: rational-quadratic splines in place of scale and shift, as in
            ``iin_fast.nn.NeuralSplineFlow``.
        bins: of each spline; 8 when left out. Only with ``coupling="spline"``.
        tail_bound: half the width of the box in which splines bend; 3 when left out. Only with ``coupling="spline"``.
        context_dim: features of the context; 0 for none.
        min_spread: at the start of ActNorm, a feature with less than this share of the median standard deviation is
            taken as constant; 0 is the published formula, in which a constant feature is scaled by 1e6.
        inputs: a reversible map before the flow, which standardises features and sets aside those that are constant or
            copies; see :class:`iin_fast.iin.Inputs`. What it sets aside stands at the end of the residual.
        generator: draws the start weights and permutations; by default torch's global one.
        device: where the parameters are made.
        dtype: type of the parameters.
        memory: what an affine flow keeps for backward: ``"save"``, ``"checkpoint"``, ``"invert"`` or ``"auto"``; see ``iin_fast.nn.Flow``.

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
        bins: int | None = None,
        tail_bound: float | None = None,
        context_dim: int = 0,
        min_spread: float = MIN_SPREAD,
        inputs: Inputs | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        memory: str = "auto",
    ) -> None:
        super().__init__()
        self.dim = checked_int("IIN", "dim", dim)
        self._sizes = factor_sizes(self.dim, factors, where="IIN")
        checked_dtype("IIN", dtype)
        live = self._set_inputs("IIN", inputs, device, dtype)
        n_flows = checked_int("IIN", "n_flows", n_flows)
        hidden_dim = checked_int("IIN", "hidden_dim", hidden_dim)
        hidden_depth = checked_int("IIN", "hidden_depth", hidden_depth, least=0)
        self.context_dim = checked_int("IIN", "context_dim", context_dim, least=0)
        checked_choice("IIN", "coupling", coupling, COUPLINGS)
        splines: dict[str, Any] = {}
        if bins is not None:
            splines["bins"] = checked_int("IIN", "bins", bins)
        if tail_bound is not None:
            splines["tail_bound"] = checked_number("IIN", "tail_bound", tail_bound, above=0)
        if coupling == "affine" and splines:
            name, value = splines.popitem()
            raise ValueError(f"IIN: {name} is {value}, expected None with coupling 'affine'; take coupling='spline'")
        if coupling == "spline" and memory != "auto":
            raise ValueError(f"IIN: memory is {memory!r}, expected 'auto' with coupling 'spline'")
        self.coupling = coupling
        min_spread = checked_number("IIN", "min_spread", min_spread, least=0)
        place: dict[str, Any] = {"min_spread": min_spread, "generator": generator, "device": device, "dtype": dtype}
        self.flow: Flow | NeuralSplineFlow
        if coupling == "affine":
            self.flow = Flow(
                live, n_flows, hidden_dim, hidden_depth, context_dim=self.context_dim, memory=memory, **place
            )
        else:
            self.flow = NeuralSplineFlow(
                live,
                self.context_dim,
                n_flows=n_flows,
                hidden_dim=hidden_dim,
                hidden_depth=hidden_depth,
                mixing="permutation",
                **splines,
                **place,
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
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"dim={self.dim}, factors={self._sizes}{context}"

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Factors, Tensor]:
        """Factors of latents ``[batch, dim]``, and log|det T'(z)| ``[batch]`` in nats.

        Args:
            z: latents, ``[batch, dim]``.
            context: what each latent comes with, ``[batch, context_dim]``; None without ``context_dim``.
        """
        check_latents("IIN", [("z", z)], self.dim, self.like)
        self._check_context("IIN", "context", context, z.shape[0])
        if self.inputs is None:
            factors, logdet = self.flow(z, context)
        else:
            x, rest, own = self.inputs(z)
            x, logdet = self.flow(x, context)
            factors, logdet = torch.cat([x, rest.to(x)], 1), logdet + own
        return Factors._wrap(factors, self._sizes), logdet

    @torch.no_grad()
    def initialize(self, z: Tensor, context: Tensor | None = None) -> None:
        """Start the ActNorm layers from latents ``[batch, dim]``; the first batch that goes forward does it otherwise."""
        self.flow.initialize(z if self.inputs is None else self.inputs(z)[0], context)

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Make the flow the identity: the factors are what ``inputs`` give, and training goes on from there."""
        flow: Any = self.flow
        if isinstance(flow, Flow):  # splines start so
            flow.weight_out.zero_()
            flow.bias_out.zero_()
        flow.loc.zero_()
        flow.scale.fill_(1)
        flow._finish_start()
        places = torch.arange(flow.dim, device=flow.permutation.device)
        flow.permutation[-1] = places
        probe = torch.linspace(-1, 1, flow.dim).to(self.like)[None]
        context = probe.new_zeros(1, self.context_dim) if self.context_dim else None
        # What the other permutations did, the last one undoes.
        flow.permutation[-1] = flow(probe, context)[0][0].argsort()

    def encode(self, z: Tensor, context: Tensor | None = None) -> Factors:
        """Factors of latents ``[batch, dim]``; ``context`` as for :meth:`forward`."""
        factors: Factors = self(z, context)[0]
        return factors

    def decode(self, factors: Factors | Mapping[str, Tensor] | Tensor, context: Tensor | None = None) -> Tensor:
        """Latents ``[batch, dim]`` of factors: the inverse of :meth:`encode`.

        Args:
            factors: Factors; or a mapping with a tensor ``[batch, size]`` for each name, in any order; or all of them
                side by side, ``[batch, dim]``.
            context: as for :meth:`forward`.

        Raises:
            TypeError, ValueError: a name that is missing or unknown, or a tensor that doesn't fit.
        """
        tensor = self._join(factors)
        check_latents("IIN.decode", [("factors", tensor)], self.dim, self.like)
        self._check_context("IIN.decode", "context", context, tensor.shape[0])
        if self.inputs is None:
            z: Tensor = self.flow.inverse(tensor, context)[0]
        else:
            x, rest = tensor.split([self.inputs.live, self.dim - self.inputs.live], 1)
            x = self.flow.inverse(x, context)[0]
            z = self.inputs.inverse(x, rest.to(x))[0]
        return z

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(z) of latents ``[batch, dim]``, or log p(z | context), normalised, ``[batch]`` in nats.

        The flow's density is exact, no bound and no estimate. In float32 at least; ``context`` as for :meth:`forward`.
        """
        factors, logdet = self(z, context)
        values = factors.tensor
        if values.dtype != torch.float64:
            values = values.float()
        log_prob: Tensor = logdet - 0.5 * (values * values).sum(1) - 0.5 * self.dim * math.log(2 * math.pi)
        return log_prob

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None, *, context: Tensor | None = None) -> Tensor:
        """``n`` latents ``[n, dim]`` of the model's distribution.

        Args:
            n: how many.
            generator: draws them, on its own device, so that a seed gives the same draw wherever the model is.
            context: as for :meth:`forward`, a row for each of the ``n``.
        """
        n = checked_int("IIN.sample", "n", n)
        if generator is not None and not isinstance(generator, torch.Generator):
            kind = type(generator).__name__
            raise TypeError(f"IIN.sample: generator is a {kind}, expected a torch.Generator")
        # Without a generator none is passed on: torch.compile can't follow a size that varies together with one.
        drawn: dict[str, Any] = {} if generator is None else {"generator": generator}
        device = self.device if generator is None else generator.device
        noise = torch.randn(n, self.dim, device=device, dtype=self.dtype, **drawn)
        return self.decode(noise.to(self.device), context)

    @torch.no_grad()
    def outlier_score(self, z: Tensor, held_in: Tensor, *, context: Tensor | None = None) -> Tensor:
        r"""How unlikely latents are among others of their kind: the share of ``held_in`` that is likelier.

        .. math:: s(z) = \frac{\#\{j : \log p(z_j) > \log p(z)\}}{m + 1}

        From 0 (as likely as the likeliest) up to m / (m + 1) (less likely than all of them); higher is more outlying.
        1 - s is a conformal p-value: of latents from the distribution of ``held_in``, at most a share α scores 1 - α or
        more, whatever the model. That holds if the model was not trained on ``held_in``. Where many latents score the
        maximum, ``-log_prob`` orders them.

        Args:
            z: latents, ``[batch, dim]``. One whose likelihood is not a number scores the maximum.
            held_in: m latents of the usual kind, ``[m, dim]``; or their log-likelihoods, ``[m]``, as
                :meth:`log_prob` gives them (computed once, or with a context of their own).
            context: of ``z``, as for :meth:`forward`.

        Returns:
            ``[batch]``, float32 at least.

        Raises:
            TypeError, ValueError: latents that don't fit the model, no ``held_in`` or NaN among its likelihoods (in a
                compiled call all scores are NaN then).

        References:
            Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World, 2005, Sec. 2.2 and 4.1.

        Example:
            >>> from iin_fast import IIN
            >>> model = IIN(4, n_flows=2, hidden_dim=8, generator=torch.Generator().manual_seed(0))
            >>> usual = torch.randn(99, 4, generator=torch.Generator().manual_seed(0))
            >>> model.outlier_score(torch.full((1, 4), 1e3), usual)
            tensor([0.9900])
        """
        where = "IIN.outlier_score"
        if not isinstance(held_in, Tensor):
            raise TypeError(f"{where}: held_in is a {type(held_in).__name__}, expected a torch.Tensor")
        if held_in.shape[:1].numel() == 0:
            raise ValueError(f"{where}: held_in has shape {list(held_in.shape)}, expected at least one latent")
        if held_in.dim() == 2 and self.context_dim:
            raise ValueError(
                f"{where}: held_in are latents, expected their log-likelihoods [m] for a model with a context: "
                f"model.log_prob(held_in, context)"
            )
        usual = self.log_prob(held_in) if held_in.dim() == 2 else held_in
        own = self.log_prob(z, context)
        check_floating(where, "held_in", usual)
        check_rank(where, "held_in", usual, f"latents [m, {self.dim}] or log-likelihoods [m]", 1)
        return outlier_share(where, own, usual)

    def swap(
        self,
        z: Tensor,
        donor: Tensor,
        factor: str | Sequence[str],
        *,
        context: Tensor | None = None,
        donor_context: Tensor | None = None,
    ) -> Tensor:
        """``z`` with one or more factors of ``donor``; everything else of ``z`` stays.

        Args:
            z: latents that keep the rest, ``[batch, dim]``.
            donor: latents that give the factor, ``[batch, dim]``.
            factor: a name, or several; ``"residual"`` is one of them.
            context: of ``z``, and of the result, as for :meth:`forward`.
            donor_context: of ``donor``; by default ``context``.

        Returns:
            ``[batch, dim]``.

        Raises:
            TypeError, ValueError: an unknown or repeated factor, or latents that don't fit the model or each other.

        References:
            Esser, Rombach, Ommer, CVPR 2020, Sec. 4.1 and Fig. 2.
        """
        check_latents("IIN.swap", [("z", z), ("donor", donor)], self.dim, self.like)
        mask = self._select("IIN.swap", factor)
        both = self._both("IIN.swap", context, "donor_context", donor_context, z.shape[0])
        joined, n = self.encode(torch.cat([z, donor]), both).tensor, z.shape[0]
        return self.decode(torch.where(mask, joined[n:], joined[:n]), context)

    def interpolate(
        self,
        z_a: Tensor,
        z_b: Tensor,
        steps: int,
        factor: str | Sequence[str] | None = None,
        *,
        context: Tensor | None = None,
        context_b: Tensor | None = None,
    ) -> Tensor:
        """Latents on the straight line between the factors of ``z_a`` and ``z_b``.

        Args:
            z_a: latents where it starts, ``[batch, dim]``.
            z_b: latents where it ends, ``[batch, dim]``.
            steps: points on the line, both ends included; at least 2.
            factor: move only these factors, a name or several; by default all of them.
            context: of ``z_a``, and of the whole line, as for :meth:`forward`.
            context_b: of ``z_b``; by default ``context``. Where it is another, the line does not end in ``z_b``.

        Returns:
            ``[steps, batch, dim]``; the first is ``z_a``, the last is ``z_b``, or ``z_a`` with the factors of ``z_b``.

        Raises:
            TypeError, ValueError: as :meth:`swap`; ``steps`` below 2.
        """
        check_latents("IIN.interpolate", [("z_a", z_a), ("z_b", z_b)], self.dim, self.like)
        steps = checked_int("IIN.interpolate", "steps", steps)
        if steps < 2:
            raise ValueError(f"IIN.interpolate: steps is {steps}, expected at least 2, both ends included")
        both = self._both("IIN.interpolate", context, "context_b", context_b, z_a.shape[0])
        joined = self.encode(torch.cat([z_a, z_b]), both).tensor
        start, end = joined[: z_a.shape[0]], joined[z_a.shape[0] :]
        if factor is not None:
            end = torch.where(self._select("IIN.interpolate", factor), end, start)
        position = torch.linspace(0, 1, steps, device=end.device, dtype=end.dtype)[:, None, None]
        line = torch.lerp(start.expand(steps, -1, -1), end.expand(steps, -1, -1), position)
        return self._decode_line(line, context)

    def axis(
        self,
        with_: Tensor,  # [m, dim]
        without: Tensor,  # [n, dim]
        factor: str | Sequence[str] | None = None,
        *,
        context: Tensor | None = None,
        without_context: Tensor | None = None,
    ) -> Tensor:
        r"""The direction in factor space from latents without something to latents with it.

        .. math:: v = \frac1m \sum_i T(z_i^\text{with}) - \frac1n \sum_i T(z_i^\text{without})

        One step of :meth:`traverse` along it leads from the mean of one group to the mean of the other.

        Args:
            with_: latents that have it, ``[m, dim]``.
            without: latents that don't, ``[n, dim]``.
            factor: keep the direction within these factors, a name or several; it is 0 in all others.
            context, without_context: of ``with_`` and ``without``, as for :meth:`forward`.

        Returns:
            ``[dim]``, all factors side by side.

        Raises:
            TypeError, ValueError: a group that is empty or doesn't fit the model, an unknown factor.

        References:
            Larsen, Sønderby, Larochelle, Winther, Autoencoding beyond Pixels, ICML 2016 (attribute vectors, there in z).

        Example:
            >>> from iin_fast import IIN
            >>> model = IIN(8, {"size": 3}, n_flows=2, hidden_dim=16)
            >>> large, small = torch.randn(5, 8) + 2, torch.randn(7, 8) - 2
            >>> axis = model.axis(large, small, "size")
            >>> model.traverse(small, axis, [0, 0.5, 1]).shape  # from as they are to large
            torch.Size([3, 7, 8])
        """
        where = "IIN.axis"
        means = []
        for name, z, c, c_name in (
            ("with_", with_, context, "context"),
            ("without", without, without_context, "without_context"),
        ):
            check_latents(where, [(name, z)], self.dim, self.like)
            if z.shape[0] == 0:
                raise ValueError(f"{where}: {name} is empty, expected at least one latent for a mean")
            self._check_context(where, c_name, c, z.shape[0])
            means.append(self.encode(z, c).tensor.mean(0))
        direction = means[0] - means[1]
        return direction if factor is None else direction * self._select(where, factor)

    def traverse(
        self, z: Tensor, axis: Tensor, positions: Sequence[float] | Tensor, *, context: Tensor | None = None
    ) -> Tensor:
        """Latents moved along a direction of factor space: ``T⁻¹(T(z) + position · axis)``.

        Args:
            z: where it starts, ``[batch, dim]``.
            axis: the direction, ``[dim]`` as :meth:`axis` gives it, or one for each latent, ``[batch, dim]``.
            positions: how far along it; 0 is ``z`` itself, 1 the whole axis, any other number in between or beyond.
            context: of ``z``, as for :meth:`forward`.

        Returns:
            ``[positions, batch, dim]``.

        Raises:
            TypeError, ValueError: latents or an axis that don't fit the model, positions that are not a list of numbers.
        """
        where = "IIN.traverse"
        check_latents(where, [("z", z)], self.dim, self.like)
        check_floating(where, "axis", axis)
        check_device(where, "axis", axis, z, "z")
        if axis.shape != (self.dim,) and axis.shape != z.shape:
            raise ValueError(
                f"{where}: axis has shape {list(axis.shape)}, expected [{self.dim}] or {list(z.shape)} like z"
            )
        try:
            places = torch.as_tensor(positions, dtype=axis.dtype, device=axis.device)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{where}: positions is {positions!r}, expected a list of numbers") from None
        if places.dim() != 1 or places.shape[0] == 0:
            raise ValueError(f"{where}: positions has shape {list(places.shape)}, expected a list of numbers")
        if not torch.isfinite(places).all():
            raise ValueError(f"{where}: positions is {places.tolist()}, expected finite numbers")
        start = self.encode(z, context).tensor
        return self._decode_line(start + (places[:, None, None] * axis).to(start), context)

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
        """The model that :meth:`save` wrote into the folder ``path``, a ``LinearIIN`` too. Needs ``pip install 'iin-fast[io]'``.

        Args:
            path: the folder.
            device: where the model goes; by default the CPU.
            memory: as for :class:`IIN`.

        Raises:
            FileNotFoundError: no such folder, or one of its files is missing.
            ValueError: a file that is damaged or not of iin-fast; parameters that are missing, unknown, of another
                shape or type than the configuration says, NaN or Inf.
        """
        from . import linear  # which is made of this module

        tensors, config = checkpoint.load(path)
        # Drawn from a generator of its own: loading a model leaves the global random state alone.
        generator = torch.Generator().manual_seed(0)
        try:
            checkpoint.check_sizes(config, sum(tensor.numel() for tensor in tensors.values()))
            dtype = checkpoint.DTYPES[config.pop("dtype")]
            left_out = config.pop("left_out", None)  # None: no map before the flow
            if left_out is not None:
                config["inputs"] = Inputs(config["dim"], left_out, config.pop("flat", None))
            if config["coupling"] == "linear":
                model: IIN = linear.LinearIIN._of_config(config, dtype)
            else:
                model = cls(**config, dtype=dtype, device="cpu", generator=generator, memory=memory)
        except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{checkpoint.config_file(path)}: no valid configuration of an IIN ({error!r})") from error
        checkpoint.check(path, tensors, model.state_dict())
        model.load_state_dict(tensors)
        try:
            return model.to(device)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"IIN.load: device is {str(device)!r}, which is not there: {error}") from error

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
            "context_dim": self.context_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        if self.inputs is not None:
            config["left_out"] = self.inputs.left_out
            if self.inputs.flat is not None:
                config["flat"] = self.inputs.flat
        if isinstance(self.flow, NeuralSplineFlow):
            config |= {"bins": self.flow.bins, "tail_bound": self.flow.tail_bound}
        if self.flow.min_spread != MIN_SPREAD:
            config["min_spread"] = self.flow.min_spread
        return config

    def _set_inputs(
        self, where: str, inputs: Inputs | None, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> int:
        """Take the map before the flow; how many features the flow gets."""
        self.inputs = inputs
        if inputs is None:
            return self.dim
        if not isinstance(inputs, Inputs):
            raise TypeError(f"{where}: inputs is a {type(inputs).__name__}, expected iin_fast.iin.Inputs or None")
        if inputs.dim != self.dim:
            raise ValueError(f"{where}: inputs are of {inputs.dim} features, expected {self.dim} like dim")
        aside = self.dim - inputs.live
        if self._sizes.get(RESIDUAL, 0) < aside:
            named = sum(size for name, size in self._sizes.items() if name != RESIDUAL)
            raise ValueError(
                f"{where}: factors take {named} dimensions, expected at most {inputs.live}: the other {aside} "
                "are constant, copies, or combinations of others, and go into the residual"
            )
        self.inputs = inputs.to(device, dtype or torch.get_default_dtype())
        return inputs.live

    def _check_context(self, where: str, name: str, context: Tensor | None, batch: int) -> None:
        """Refuse a context that is missing, not wanted, or of another shape, type or device than the model's."""
        if context is None and not self.context_dim:
            return
        if context is None:
            raise ValueError(
                f"{where}: {name} is missing, expected [{batch}, {self.context_dim}] (the model's context)"
            )
        if not self.context_dim:
            raise ValueError(f"{where}: {name} is given, expected none for a model without context_dim")
        check_floating(where, name, context)
        check_shape(where, name, context, (batch, self.context_dim), "([batch, context_dim])")
        check_device(where, name, context, self.like, "the model")
        if not autocast_enabled(context):
            check_dtype(where, name, context, self.dtype, "like the model; convert it with .to(…)")

    def _both(self, where: str, context: Tensor | None, name: str, second: Tensor | None, batch: int) -> Tensor | None:
        """The contexts of two batches, one after the other; the second is the first where it is not given."""
        self._check_context(where, "context", context, batch)
        if second is None:
            second = context
        self._check_context(where, name, second, batch)
        return None if context is None or second is None else torch.cat([context, second])

    def _decode_line(self, line: Tensor, context: Tensor | None) -> Tensor:
        """Latents of factors ``[steps, batch, dim]``, all steps with the same context."""
        if context is not None:
            context = context.repeat(line.shape[0], 1)
        return self.decode(line.flatten(0, 1), context).reshape(line.shape)

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
