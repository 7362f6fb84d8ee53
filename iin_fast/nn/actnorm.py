"""ActNorm: an affine map per feature whose start is set by the first batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_features, checked_dtype, checked_int

__all__ = ["ActNorm", "DataDependentStart", "start_values"]


def start_values(x: Tensor) -> tuple[Tensor, Tensor]:
    """The ``loc`` and ``scale`` that give every feature of a batch mean 0 and standard deviation 1.

    loc = -mean, scale = 1 / (std + 1e-6) with the unbiased std. One row has no spread, so there scale = 1.

    Args:
        x: ``[batch, dim]``, at least one row.

    Returns:
        loc and scale, ``[dim]`` each, without gradient.
    """
    x = x.detach()
    if x.shape[0] == 1:
        return -x[0], torch.ones_like(x[0])
    return -x.mean(dim=0), 1 / (x.std(dim=0) + 1e-6)


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
        if not torch.compiler.is_compiling() and not self.initialized.is_meta:
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
        if not self.initialized.is_meta:
            self._started = tuple(bool(flag) for flag in self.initialized.flatten().tolist())


class ActNorm(DataDependentStart):
    """An affine map per feature, started from the first batch so that its output has mean 0 and std 1.

    y = scale * (x + loc),  log|det| = sum log|scale|.

    The first call of ``forward`` sets loc = -mean and scale = 1 / (std + 1e-6) (unbiased std; a batch of one row gives
    scale = 1; an empty batch starts nothing), whether the module trains or not. Under DistributedDataParallel all processes
    take the start of the first one; before ``fully_shard``, call ``initialize`` with one batch for all.

    References:
        Kingma and Dhariwal 2018 (Glow), Sec. 3.1. Esser et al. 2020, Sec. 3.1.

    Args:
        dim: number of features.
        device, dtype: of the parameters.

    Example:
        >>> norm = ActNorm(3)
        >>> y, logdet = norm(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.5, 9.0]]))
        >>> y.mean(dim=0).abs().max().item() < 1e-6
        True
    """

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dim = checked_int("ActNorm", "dim", dim)
        checked_dtype("ActNorm", dtype)
        self.loc = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.scale = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self._register_start((), False, device)

    def extra_repr(self) -> str:
        return f"{self.dim}"

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start from a batch ``[batch, dim]``, whatever came before."""
        check_features("ActNorm", "x", x, self.dim)
        if x.shape[0] > 0:
            loc, scale = start_values(x)
            self.loc.copy_(loc)
            self.scale.copy_(scale)
            self._finish_start()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``x [batch, dim]``.

        Returns:
            y ``[batch, dim]`` and log|det| ``[batch]`` in nats.

        Raises:
            ValueError, TypeError: x has another rank, feature count or a type that is not floating.
        """
        check_features("ActNorm", "x", x, self.dim)
        if self._awaits_start():
            self.initialize(x)
        return self.scale * (x + self.loc), self.scale.abs().log().sum().expand(x.shape[0])

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``z [batch, dim]`` back; the log-det is that of the inverse map. Raises like ``forward``."""
        check_features("ActNorm", "z", z, self.dim)
        return z / self.scale - self.loc, -self.scale.abs().log().sum().expand(z.shape[0])
