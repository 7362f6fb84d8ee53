"""ActNorm: an affine map per feature whose start is set by the first batch."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_features, checked_dtype, checked_int, checked_number, readable
from ..flow import ProgramBuilder
from ..ops.autograd import has_values

__all__ = ["MIN_SPREAD", "ActNorm", "DataDependentStart", "start_values"]

MIN_SPREAD = 1e-3
"""A feature with less than this share of the median standard deviation is taken as constant (docs/decisions.md)."""


def start_values(where: str, x: Tensor, min_spread: float = MIN_SPREAD) -> tuple[Tensor, Tensor]:
    """The ``loc`` and ``scale`` that give every feature of a batch mean 0 and standard deviation 1.

    loc = -mean, scale = 1 / (std + 1e-6) with the unbiased std. One row has no spread, so there scale = 1. A feature whose
    std is below ``min_spread`` times the median (of the features that vary beyond rounding) is taken as constant: it gets
    the median's scale, or 1 where no feature varies.

    Args:
        where: names the caller in errors and warnings.
        x: ``[batch, dim]``, at least one row.
        min_spread: 0 takes no feature as constant, as the published code does.

    Returns:
        loc and scale, ``[dim]`` each, without gradient. A warning names the features that (almost) don't vary.

    Raises:
        ValueError: NaN or Inf in the batch, or values whose spread overflows.
    """
    loc, scale = (_start_values if has_values(x) else _start_op)(x.detach(), min_spread, where)
    return loc, scale


def _start_values(x: Tensor, min_spread: float, where: str) -> tuple[Tensor, Tensor]:
    finite = x.isfinite()
    if not finite.all():
        rows, features = _numbers(~finite.all(1)), _numbers(~finite.all(0))
        raise ValueError(
            f"{where}: the first batch has NaN or Inf in {rows} of {x.shape[0]} rows, in {features} of {x.shape[1]} "
            f"features, expected finite numbers to start ActNorm from; leave these out, or call initialize(x) with a "
            f"finite batch"
        )
    if x.shape[0] == 1:
        return -x[0], torch.ones_like(x[0])
    mean, std = x.mean(dim=0), x.std(dim=0)
    if not (finite := mean.isfinite() & std.isfinite()).all():
        raise ValueError(
            f"{where}: the spread of the first batch overflows in {_numbers(~finite)} of {x.shape[1]} features; scale "
            f"the data down before the flow"
        )
    varies = std > 4 * torch.finfo(x.dtype).eps * mean.abs()  # beyond rounding
    median = std[varies].median() if varies.any() else std.new_zeros(())
    narrow = ~varies | (std < (min_spread or MIN_SPREAD) * median)
    if narrow.any():
        done = "scaled like the median one" if min_spread else "stretched to 1 all the same, as published"
        warnings.warn(
            f"{where}: {_numbers(narrow)} of {x.shape[1]} features (almost) don't vary in the first batch: standard "
            f"deviations up to {std[narrow].max().item():.2g}, the median one is {median.item():.2g}. They are {done} "
            f"(min_spread is {min_spread:g}). Leave constant features out, and standardise those of a small unit",
            stacklevel=2,
        )
    if min_spread:
        std = torch.where(narrow, median if varies.any() else 1.0, std)
    return -mean, 1 / (std + 1e-6)


# So that a compiled first call also raises and warns, and fake tensors pass. Its plain call would import the compiler, for a second.
_start_op = torch.library.custom_op("iin_fast::start_values", _start_values, mutates_args=())


@_start_op.register_fake
def _(x: Tensor, min_spread: float, where: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


def _numbers(chosen: Tensor) -> str:
    """How many are chosen, and the numbers of the first ones: ``3 (0, 4, 7)``."""
    numbers = chosen.nonzero().flatten().tolist()
    few = ", ".join(map(str, numbers[:10]))
    return f"{len(numbers)} ({few}{', …' if len(numbers) > 10 else ''})"


def active_ddp() -> Any:
    """The DistributedDataParallel whose forward is running, or None."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return nn.parallel.DistributedDataParallel._get_active_ddp_module()


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has been applied to the module, or to one that holds it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    roots = [root for root in list(_module_state_mapping) if isinstance(root, FSDPModule)]
    return any(part is module for root in roots for part in root.modules())


class DataDependentStart(nn.Module):
    """Remembers which parts of a module have had their data-dependent start.

    The checkpoint knows it by the buffer ``initialized``; ``self._started`` mirrors it in Python, so that no call after
    the start has to read the buffer from the device.
    """

    initialized: Tensor
    loc: Tensor
    scale: Tensor
    _started: tuple[bool, ...]

    def _register_start(self, shape: tuple[int, ...], done: bool, device: torch.device | str | None) -> None:
        """Add the buffer. ``done``: nothing is to be started, and the buffer stays out of checkpoints."""
        flags = torch.full(shape, int(done), dtype=torch.uint8, device=device)
        self.register_buffer("initialized", flags, persistent=not done)
        self._started = (done,) * flags.numel()

    @torch.no_grad()
    def _forget_start(self) -> None:
        """As before the first batch."""
        self.loc.zero_()
        self.scale.fill_(1)
        self.initialized.zero_()
        self._started = (False,) * len(self._started)

    def _awaits_start(self) -> bool:
        """Whether ``forward`` has to start something first.

        Raises:
            RuntimeError: it has, inside torch.func, or sharded over processes.
        """
        if all(self._started):
            return False
        name = type(self).__name__
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{name}: the first batch sets ActNorm's parameters, which torch.func cannot do; call initialize(x) before"
            )
        if not torch.compiler.is_compiling() and readable(self.initialized):
            self._started = tuple(self.initialized.flatten().bool().tolist())  # copied from a module that has started?
            if all(self._started):
                return False
        if is_sharded(self):
            raise RuntimeError(
                f"{name}: the first batch sets ActNorm's parameters, which are sharded now; call initialize(x) with one "
                f"batch for all processes before fully_shard"
            )
        return True

    def _finish_start(self) -> None:
        """Note the start; under DistributedDataParallel all processes take that of the first one."""
        wrapper = active_ddp()
        if wrapper is not None:
            for tensor in (self.loc, self.scale):
                torch.distributed.broadcast(tensor, group=wrapper.process_group, group_src=0)
        self.initialized.fill_(1)
        self._started = (True,) * len(self._started)

    def _replicate_for_data_parallel(self) -> "DataDependentStart":
        raise RuntimeError(
            f"{type(self).__name__}: torch.nn.DataParallel would lose the start of ActNorm with its replicas, and copies "
            f"all parameters at every call; use torch.nn.parallel.DistributedDataParallel, one process for each GPU"
        )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if "initialized" not in self._buffers:  # without ActNorm
            return
        if prefix + "initialized" not in state_dict and (
            prefix + "loc" in state_dict or prefix + "scale" in state_dict
        ):
            self.initialized.fill_(1)  # the next batch would overwrite what the file holds
        if readable(self.initialized):
            self._started = tuple(bool(flag) for flag in self.initialized.flatten().tolist())


class ActNorm(DataDependentStart):
    """An affine map per feature, started from the first batch so that its output has mean 0 and std 1.

    y = scale * (x + loc),  log|det| = sum log|scale|.

    The first call of ``forward`` sets loc = -mean and scale = 1 / (std + 1e-6) (unbiased std; a batch of one row gives
    scale = 1; an empty batch starts nothing), whether the module trains or not. A feature that (almost) does not vary is
    named in a warning, and gets the scale of the median feature. A batch with NaN or Inf is refused. Under DistributedDataParallel all processes
    take the start of the first one; before ``fully_shard``, call ``initialize`` with one batch for all.

    References:
        Kingma and Dhariwal 2018 (Glow), Sec. 3.1. Esser et al. 2020, Sec. 3.1.

    Args:
        dim: number of features.
        min_spread: at the start, a feature with less than this share of the median standard deviation is taken as
            constant. 0 is the published formula, in which a constant feature is scaled by 1e6.
        device, dtype: of the parameters.

    Raises:
        ValueError: dim below 1, min_spread below 0 or not finite.
        TypeError: dim that is no integer, min_spread that is no number.

    Example:
        >>> norm = ActNorm(3)
        >>> y, logdet = norm(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.5, 9.0]]))
        >>> y.mean(dim=0).abs().max().item() < 1e-6
        True
    """

    def __init__(
        self,
        dim: int,
        *,
        min_spread: float = MIN_SPREAD,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim = checked_int("ActNorm", "dim", dim)
        self.min_spread = checked_number("ActNorm", "min_spread", min_spread, least=0)
        checked_dtype("ActNorm", dtype)
        self.loc = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.scale = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self._register_start((), False, device)

    def extra_repr(self) -> str:
        return f"{self.dim}"

    def reset_parameters(self) -> None:
        """As before the first batch, which will start it anew."""
        self._forget_start()

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start from a batch ``[batch, dim]``, whatever came before.

        Raises:
            ValueError: NaN or Inf in the batch; then nothing has changed.
        """
        check_features("ActNorm", "x", x, self.dim)
        if x.shape[0] > 0:
            loc, scale = start_values("ActNorm", x, self.min_spread)
            self.loc.copy_(loc)
            self.scale.copy_(scale)
            self._finish_start()

    def program_layers(self, builder: ProgramBuilder) -> None:
        """Append this layer to a flow program."""
        builder.affine(builder.ref(self.loc), builder.ref(self.scale), order="shift_first")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``x [batch, dim]``.

        Returns:
            y ``[batch, dim]`` and log|det| ``[batch]`` in nats.

        Raises:
            ValueError, TypeError: x has another rank, feature count or a type that is not floating; the first batch
                has NaN or Inf.
        """
        check_features("ActNorm", "x", x, self.dim)
        if self._awaits_start():
            self.initialize(x)
        return self.scale * (x + self.loc), self.scale.abs().log().sum().repeat(x.shape[0])

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``z [batch, dim]`` back; the log-det is that of the inverse map. Raises like ``forward``."""
        check_features("ActNorm", "z", z, self.dim)
        return z / self.scale - self.loc, -self.scale.abs().log().sum().repeat(z.shape[0])
