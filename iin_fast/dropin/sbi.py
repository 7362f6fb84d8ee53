"""sbi: how its trainings load their batches and clip their gradients. Its models are those of nflows and zuko."""

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torch.utils.data._utils.fetch import _MapDatasetFetcher

from .base import Library
from .class_factory import generate
from .registry import Entry

__all__ = ["LIBRARY", "FastLoader"]


class _Rows:
    """Takes a batch by one index of each tensor, where torch makes a tuple of each row and stacks them."""

    def __init__(self, own: Any) -> None:
        self.own, self.tensors = own, own.dataset.tensors

    def fetch(self, index: Any) -> Any:
        if type(index) is list and set(map(type, index)) == {int}:
            rows = torch.tensor(index)
            try:
                return [tensor[rows] for tensor in self.tensors]
            except IndexError:  # its own code says which
                pass
        return self.own.fetch(index)


def _iterator(self: Any) -> Any:
    made: Any = DataLoader._get_iterator(self)
    own = getattr(made, "_dataset_fetcher", None)  # None where workers load
    if (
        type(own) is _MapDatasetFetcher
        and own.auto_collation
        and own.collate_fn is default_collate
        and type(own.dataset) is TensorDataset
        and all(type(t) is Tensor and t.layout is torch.strided and not t.requires_grad for t in own.dataset.tensors)
    ):
        made._dataset_fetcher = _Rows(own)
    return made


FastLoader: Any = generate(DataLoader, {"_get_iterator": _iterator})


def loaders(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """``NeuralInference.get_dataloaders``: the same batches in the same order."""
    found = original(self, *args, **kwargs)
    for loader in found:
        if type(loader) is DataLoader:
            loader.__class__ = FastLoader
    return found


@wraps(clip_grad_norm_)
@torch.no_grad()
def clip(parameters: Any, max_norm: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The same numbers with less Python around them, and no product with 1."""
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [g for p in given if (g := p.grad) is not None]
    plain = not (args or kwargs or torch.compiler.is_compiling()) and len(grads) > 0
    if not plain or not all(
        type(g) is Tensor and g.is_cpu and g.dtype is grads[0].dtype and g.layout is torch.strided for g in grads
    ):
        return clip_grad_norm_(given, max_norm, *args, **kwargs)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2.0)), 2.0)
    factor = (float(max_norm) / (norm + 1e-6)).clamp(max=1.0)
    if factor.item() != 1:
        torch._foreach_mul_(grads, factor)
    return norm


CLIPPED = (
    "base",
    "marginal.marginal_base",
    "npe.npe_base",
    "nle.nle_base",
    "nre.nre_base",
    "fmpe.fmpe",
    "npse.npse",
    "vfpe.base_vf_inference",
)
"""The modules with training loops: the first two since sbi 0.26, the others before."""

LIBRARY = Library(
    name="sbi",
    package="sbi",
    modules=("sbi.inference.trainers.base",),
    install="pip install sbi",
    entries=(
        Entry(
            "sbi.inference.trainers.base.NeuralInference",
            {"get_dataloaders": loaders},
            inherited=True,
            note="its trainings load each batch at once",
        ),
    ),
    versions=("0.23", "0.24", "0.25", "0.26", "0.27"),
    functions={f"sbi.inference.trainers.{name}.clip_grad_norm_": clip for name in CLIPPED},
)
