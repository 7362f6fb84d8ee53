"""A flow as torch.distributions knows maps and densities: a Transform, and a TransformedDistribution."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, Transform, TransformedDistribution, constraints

from ..checks import broadcast_shapes, check_floating, checked_int, checked_ints

__all__ = ["Density", "FlowDistribution", "FlowTransform", "batch_shape", "checked_shape", "distribution_of"]


class FlowTransform(Transform):
    """A module of this package as a ``torch.distributions.Transform`` from data to latents; ``.inv`` goes back.

    ``transform(x)`` is ``module(x)[0]``, ``transform.inv(z)`` is ``module.inverse(z)[0]``, of one event dimension and
    any number of batch dimensions. Each call also keeps its log-det, so that ``log_abs_det_jacobian`` of the pair it
    was given and has returned runs nothing. The density of data takes the map from latents to data:
    ``TransformedDistribution(base, transform.inv)``.

    Args:
        module: ``forward`` and ``inverse`` give (y ``[batch, dim]``, log-det ``[batch]``) for ``[batch, dim]``.
        context: ``[..., context_dim]``, given to every call; its leading dimensions and those of the input are
            broadcast against each other. None: the module is called without one.
        cache_size: 1 also gives the input back for the output of the last call, and the output for its input, as
            torch.distributions does; then make the transform anew when the parameters change.

    Raises:
        TypeError: ``module`` is no torch.nn.Module with ``inverse``.
        ValueError: a ``cache_size`` that is not 0 or 1; a context without dimensions.

    Example:
        >>> from iin_fast.nn import Flow
        >>> flow = Flow(3, n_flows=2, hidden_dim=8)
        >>> base = Independent(Normal(torch.zeros(3), torch.ones(3)), 1)
        >>> density = TransformedDistribution(base, FlowTransform(flow).inv)
        >>> density.log_prob(torch.randn(5, 3)).shape, density.rsample((4, 2)).shape
        (torch.Size([5]), torch.Size([4, 2, 3]))
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, module: nn.Module, context: Tensor | None = None, *, cache_size: int = 0) -> None:
        if not isinstance(module, nn.Module) or not hasattr(module, "inverse"):
            kind = type(module).__name__
            raise TypeError(f"FlowTransform: module is a {kind}, expected a torch.nn.Module with inverse")
        if context is not None and check_floating("FlowTransform", "context", context).dim() < 1:
            raise ValueError("FlowTransform: context has shape [], expected [..., context_dim]")
        super().__init__(cache_size=cache_size)
        self.module = module
        self.context = context
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # x, y, log-det

    def with_cache(self, cache_size: int = 1) -> "FlowTransform":
        if self._cache_size == cache_size:
            return self
        return FlowTransform(self.module, self.context, cache_size=cache_size)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state["_last"] = None
        if self._cache_size:
            state["_cached_x_y"] = None, None
        return state

    def __repr__(self) -> str:
        return f"FlowTransform({type(self.module).__name__})"

    def forward_shape(self, shape: Any) -> torch.Size:
        dim = getattr(self.module, "dim", shape[-1])
        if shape[-1] != dim:
            raise ValueError(f"FlowTransform: a sample has shape {list(shape)}, expected [..., {dim}] like the module")
        return torch.Size((*self._batch_shape(shape), dim))

    inverse_shape = forward_shape

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det dy/dx| ``[...]`` in nats."""
        if self._last is None or self._last[0] is not x or self._last[1] is not y:
            return self._run(x, inverse=False)[1]
        return self._last[2]

    def _call(self, x: Tensor) -> Tensor:
        self._last = None  # frees what the last call kept, before this one runs
        y, logdet = self._run(x, inverse=False)
        self._last = x, y, logdet
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        self._last = None
        x, logdet = self._run(y, inverse=True)
        self._last = x, y, -logdet
        return x

    def _batch_shape(self, shape: Any) -> torch.Size:
        if self.context is None:
            return torch.Size(shape[:-1])
        return broadcast_shapes(shape[:-1], self.context.shape[:-1])

    def _run(self, x: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        shape = self.forward_shape(x.shape)
        rows = [x.expand(shape).reshape(shape[:-1].numel(), shape[-1])]
        if self.context is not None:
            width = self.context.shape[-1]
            rows.append(self.context.expand(*shape[:-1], width).reshape(shape[:-1].numel(), width))
        run: Any = self.module.inverse if inverse else self.module
        y, logdet = run(*rows)
        return y.reshape(shape), logdet.reshape(shape[:-1])


class FlowDistribution(TransformedDistribution):
    """The density of data under a flow: a TransformedDistribution that also draws and scores in one pass."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-densities ``[...]`` in nats of data ``[..., dim]``; the batch may be empty."""
        if 0 not in (*value.shape[:-1], *self.batch_shape):
            log_prob: Tensor = super().log_prob(value)  # type: ignore[no-untyped-call]
            return log_prob
        total = torch.zeros((), dtype=value.dtype, device=value.device)
        for transform in reversed(self.transforms):
            x = transform.inv(value)
            total = total - transform.log_abs_det_jacobian(x, value)
            value = x
        return total + self._base_log_prob(value)

    def _base_log_prob(self, z: Tensor) -> Tensor:
        """torch.distributions.Independent can't sum the features of no rows."""
        log_prob: Tensor = self.base_dist.log_prob(z) if z.numel() else z.sum(-1)
        return log_prob

    def rsample_and_log_prob(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Draws ``[*sample_shape, ..., dim]``, differentiable, and their log-densities, by one run of the inverse."""
        x = self.base_dist.rsample(torch.Size(sample_shape))
        log_prob = self._base_log_prob(x)
        for transform in self.transforms:
            y = transform(x)
            log_prob = log_prob - transform.log_abs_det_jacobian(x, y)
            x = y
        return x, log_prob


def distribution_of(
    module: nn.Module,
    context: Tensor | None = None,
    base: Distribution | None = None,
    *,
    validate_args: bool | None = None,
) -> FlowDistribution:
    """The density of data that ``module`` maps to latents with the density ``base``.

    ``log_prob`` runs the module forward once; ``sample``, ``rsample`` and ``rsample_and_log_prob`` run its inverse once.

    Args:
        module, context: as for :class:`FlowTransform`; the leading dimensions of the context are the batch shape.
        base: of event shape ``[dim]``; by default a standard normal where the module's parameters are.
        validate_args: check what ``log_prob`` is given for NaN, as torch.distributions does; this waits for the device.

    Raises:
        TypeError, ValueError: as :class:`FlowTransform`; a base of another event shape.
    """
    transform = FlowTransform(module, context)
    dim: Any = module.dim
    if base is None:
        like = next(chain(module.parameters(), module.buffers()))
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        loc = torch.zeros(dim, dtype=dtype, device=like.device)
        base = Independent(Normal(loc, torch.ones_like(loc), validate_args=validate_args), 1, validate_args)
    elif base.event_shape != (dim,):
        raise ValueError(
            f"distribution: base has event shape {list(base.event_shape)}, expected [{dim}]; wrap a batch of "
            f"independent features as torch.distributions.Independent(base, 1)"
        )
    return FlowDistribution(base, transform.inv, validate_args=validate_args)


def leading(where: str, name: str, value: Tensor) -> torch.Size:
    """The shape of floating-point ``value [..., features]`` without its last dimension."""
    shape = check_floating(where, name, value).shape
    if not shape:
        raise ValueError(f"{where}: {name} has shape [], expected [..., features]")
    return shape[:-1]


def batch_shape(where: str, x: Tensor, context: Tensor | None) -> torch.Size:
    """The shape ``[...]`` of densities of data ``[..., dim]`` under a context ``[..., context]``."""
    shape = leading(where, "x", x)
    if context is None:
        return shape
    try:
        return broadcast_shapes(shape, leading(where, "context", context))
    except RuntimeError:
        raise ValueError(
            f"{where}: context has shape {list(context.shape)}, expected one that broadcasts against x of shape {list(x.shape)}"
        ) from None


def checked_shape(where: str, sample_shape: Any) -> list[int]:
    """The shape that ``sample`` of a class ``where`` was given, or a number of samples as one."""
    if isinstance(sample_shape, int):
        return [checked_int(f"{where}.sample", "sample_shape", sample_shape, least=0)]
    return checked_ints(f"{where}.sample", "sample_shape", sample_shape, least=0)


class Density:
    """What a module with ``forward``, ``inverse`` and ``dim`` has for being the density of data."""

    def transform(self, context: Tensor | None = None) -> FlowTransform:
        """The flow as a ``torch.distributions.Transform`` from data to latents; ``.inv`` goes from latents to data.

        Args:
            context: ``[..., context]``, broadcast against the batch dimensions of what is transformed.
        """
        return FlowTransform(self, context)  # type: ignore[arg-type]

    def distribution(
        self, context: Tensor | None = None, base: Distribution | None = None, *, validate_args: bool | None = None
    ) -> FlowDistribution:
        """The density of data under the flow: ``log_prob``, ``sample``, ``rsample``, ``rsample_and_log_prob``.

        Args:
            context: ``[..., context]``; its leading dimensions are the batch shape.
            base: density of the latents, of event shape ``[dim]``; by default a standard normal.
            validate_args: check samples for NaN, as torch.distributions does by default; this waits for the device.

        Raises:
            ValueError: a base of another event shape.

        Example:
            >>> from iin_fast.nn import Flow
            >>> flow = Flow(6, n_flows=2, hidden_dim=16, context_dim=3)
            >>> density = flow.distribution(torch.randn(5, 3))
            >>> density.sample((10,)).shape, density.log_prob(torch.randn(6)).shape
            (torch.Size([10, 5, 6]), torch.Size([5]))
        """
        return distribution_of(self, context, base, validate_args=validate_args)  # type: ignore[arg-type]

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) ``[...]`` in nats of data ``[..., dim]``, the latents standard normal.

        Args:
            x: ``[..., dim]``.
            context: ``[..., context]``, broadcast against x.
        """
        batch_shape(type(self).__name__, x, context)
        log_prob: Tensor = self.distribution(context, validate_args=False).log_prob(x)
        return log_prob

    @torch.no_grad()
    def sample(self, sample_shape: Any = (), context: Tensor | None = None) -> Tensor:
        """Data ``[*sample_shape, dim]``, or ``[*sample_shape, ..., dim]`` with a context ``[..., context]``.

        Args:
            sample_shape: a shape, or a number of samples.
        """
        return self.rsample(sample_shape, context)

    def rsample(self, sample_shape: Any = (), context: Tensor | None = None) -> Tensor:
        """As :meth:`sample`, differentiable by the parameters and the context."""
        shape = checked_shape(type(self).__name__, sample_shape)
        sample: Tensor = self.distribution(context, validate_args=False).rsample(torch.Size(shape))
        return sample
