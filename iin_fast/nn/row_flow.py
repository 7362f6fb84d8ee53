"""Calls and checks of flows that map rows."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import autocast_enabled, check_device, check_dtype, check_features, check_floating
from ..flow import FlowProgram
from ..ops.flow_program import flow_program, nll_backward
from ..ops.flow_program.direct import direct_gradients
from .distribution import Density, batch_shape, checked_shape, leading
from .state_dict_layout import is_sharded

__all__ = ["RowFlow", "with_base"]


class RowFlow(Density):
    """Forward, inverse, density and samples. A class has ``dim``, ``context_dim``, ``_prepared``, ``_layer_by_layer`` and
    ``_like``."""

    dim: int
    context_dim: int

    def _run(
        self, name: str, x: Tensor, context: Tensor | None, inverse: bool = False, base: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Check and map ``[batch, dim]``; with ``base`` the log-density of a standard normal at the result is added."""
        tensors, program = self._prepared(name, x, context, inverse)
        return self._mapped(x, context, tensors, program, inverse, base)

    def _mapped(
        self,
        x: Tensor,
        context: Tensor | None,
        tensors: list[Tensor],
        program: FlowProgram | None,
        inverse: bool,
        base: bool,
    ) -> tuple[Tensor, Tensor]:
        """What ``_prepared`` has checked."""
        if program is None:
            return self._layer_by_layer(x, context, tensors, inverse, base)
        return flow_program(x, context, tensors, program, inverse=inverse, base=base)

    def _layer_by_layer(
        self, x: Tensor, context: Tensor | None, tensors: Sequence[Tensor], inverse: bool, base: bool
    ) -> tuple[Tensor, Tensor]:
        """The flow where it is no one program."""
        raise NotImplementedError

    def _prepared(
        self, name: str, x: Tensor, context: Tensor | None, inverse: bool
    ) -> tuple[list[Tensor], FlowProgram | None]:
        """Check the rows, and start what awaits its start: the flow as one program with its tensors; None where it is none."""
        raise NotImplementedError

    def _like(self) -> Tensor:
        """A tensor where the latents are, of their type."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map data ``[batch, dim]``, with a context ``[batch, context_dim]`` where there is one, to latents.

        Returns:
            z ``[batch, dim]`` and log|det dz/dx| ``[batch]`` in nats.

        Raises:
            ValueError: another rank, feature count, batch or device; a context that is missing or not wanted; NaN or Inf
                in the first batch.
            RuntimeError: the start of ActNorm under torch.func, or after ``fully_shard``.
            TypeError: an integer, boolean or complex tensor; without autocast, another dtype than that of the parameters.
        """
        return self._run("x", x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map latents to data, with log|det dx/dz|. Arguments and errors are those of ``forward``."""
        return self._run("z", z, context, inverse=True)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) ``[...]`` in nats of data ``[..., dim]``, the latents standard normal.

        Args:
            x: ``[..., dim]``.
            context: ``[..., context_dim]``, broadcast against x.

        Raises as ``forward`` does.
        """
        if _are_rows(x, context):
            return self._run("x", x, context, base=True)[1]
        shape = batch_shape(type(self).__name__, x, context)
        return self._run("x", _rows(x, shape), _rows(context, shape), base=True)[1].reshape(shape)  # type: ignore[arg-type]

    def nll_backward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The mean negative log-likelihood of data, in nats, its gradients added to each parameter's ``.grad``.

        What ``(-flow.log_prob(x, context).mean()).backward()`` does: the same gradients, bit for bit, and hooks of parameters
        run as ever. Small flows on the CPU do both in one op, without a graph, in less time, and sum the loss in float64.

        Args:
            x: ``[..., dim]``, not empty.
            context: ``[..., context_dim]``, broadcast against x.

        Returns:
            The loss ``[]``, without a graph.

        Raises as ``forward`` does; also ValueError for no rows, and RuntimeError where no parameter has gradients, as under
        ``torch.no_grad``. Under DDP, FSDP and GradScaler call ``log_prob`` and ``backward``.

        Example:
            >>> from iin_fast.nn import NeuralSplineFlow
            >>> flow = NeuralSplineFlow(3)
            >>> optimizer = torch.optim.Adam(flow.parameters(), fused=True)
            >>> loss = flow.nll_backward(torch.randn(8, 3))
            >>> optimizer.step()
        """
        if isinstance(x, Tensor) and x.numel() == 0:
            raise ValueError(f"{type(self).__name__}: x has shape {list(x.shape)}, expected one row at least")
        if type(self).log_prob is not RowFlow.log_prob or "log_prob" in vars(self) or not _are_rows(x, context):
            with direct_gradients():
                return _backward(self.log_prob(x, context))
        tensors, program = self._prepared("x", x, context, False)
        loss = None if program is None else nll_backward(x, context, tensors, program)
        if loss is not None:
            return loss
        with direct_gradients():
            return _backward(self._mapped(x, context, tensors, program, False, True)[1])

    def rsample(self, sample_shape: Any = (), context: Tensor | None = None) -> Tensor:
        """As :meth:`sample`, differentiable by the parameters and the context."""
        like = self._like()
        shape = checked_shape(type(self).__name__, sample_shape)
        if context is not None:
            shape += leading(type(self).__name__, "context", context)
        noise = torch.randn(*shape, self.dim, dtype=like.dtype, device=like.device)
        x = self._run("noise", noise.reshape(-1, self.dim), _rows(context, shape), inverse=True)[0]
        return x.reshape(*shape, self.dim)

    def _check(self, name: str, x: Tensor, context: Tensor | None, like: Tensor) -> None:
        wide = self.context_dim
        good = (
            isinstance(x, Tensor)
            and x.dim() == 2
            and x.shape[1] == self.dim
            and x.dtype == like.dtype
            and x.device == like.device
            and (
                wide == 0
                if context is None
                else wide > 0
                and isinstance(context, Tensor)
                and context.shape == (x.shape[0], wide)
                and context.dtype == like.dtype
                and context.device == like.device
            )
        )
        if not good or is_sharded(like):
            self._check_closely(name, x, context, like)

    def _check_closely(self, name: str, x: Tensor, context: Tensor | None, like: Tensor) -> None:
        where = type(self).__name__
        check_features(where, name, x, self.dim)
        wanted = [x.shape[0], self.context_dim] if self.context_dim else None
        got = list(context.shape) if isinstance(context, Tensor) else context
        if got != wanted:
            raise ValueError(f"{where}: context is {got!r}, expected {wanted}")
        for argument, value in ((name, x), ("context", context)):
            if value is not None:
                check_floating(where, argument, value)
                check_device(where, argument, value, like, "the parameters")
                if not autocast_enabled(value):
                    check_dtype(where, argument, value, like.dtype, "like the parameters; convert it with .to(…)")
        if is_sharded(like):
            raise RuntimeError(
                f"{where}: the parameters are sharded, and not gathered here; call initialize before fully_shard, and name "
                f"methods other than forward with torch.distributed.fsdp.register_fsdp_forward_method(module, 'inverse')"
            )


def _backward(log_prob: Tensor) -> Tensor:
    """The mean of the negative, after its backward."""
    loss = -log_prob.mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def with_base(z: Tensor, logdet: Tensor) -> Tensor:
    """The log-det, and the log-density of a standard normal at z ``[batch, dim]``."""
    return logdet - 0.5 * z.to(logdet.dtype).square().sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi)


def _are_rows(x: Any, context: Any) -> bool:
    """Whether these are ``[batch, …]`` each."""
    if not isinstance(x, Tensor) or x.dim() != 2:
        return False
    return context is None or (isinstance(context, Tensor) and context.dim() == 2 and context.size(0) == x.size(0))


def _rows(value: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """``[..., n]`` for each of the batch dimensions ``shape``, as rows."""
    return None if value is None else value.expand(*shape, value.shape[-1]).reshape(math.prod(shape), value.shape[-1])
