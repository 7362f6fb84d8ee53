"""Batching rules of the ops for ``torch.vmap``: the mapped dimension goes into the batch, one call does all."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["fold_rows", "front", "mapped_by_autograd", "one_by_one"]

_BATCHED: Any = torch._C._parse_dispatch_key("Batched")

Rule = Callable[..., tuple[Any, Any]]


def front(value: Tensor, dim: int | None, size: int) -> Tensor:
    """``value`` with the mapped dimension first; expanded where it is not mapped."""
    return value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)


def fold_rows(op: Callable[..., Any]) -> Rule:
    """The rule of an op whose tensors all have the batch as their first dimension."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        folded = [
            front(arg, dim, size).flatten(0, 1) if isinstance(arg, Tensor) else arg
            for arg, dim in zip(args, in_dims, strict=True)
        ]
        results = op(*folded)
        several = isinstance(results, tuple)
        unfolded = [
            None if t is None else t.reshape(size, t.shape[0] // size if size else 0, *t.shape[1:])
            for t in (results if several else (results,))
        ]
        dims = tuple(None if t is None else 0 for t in unfolded)
        return (tuple(unfolded), dims) if several else (unfolded[0], 0)

    return rule


def one_by_one(op: Callable[..., tuple[Any, ...]]) -> Rule:
    """The rule of an op that takes one mapped index at a time, and gives several results."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        calls = [
            op(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        results = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*calls, strict=True))
        return results, tuple(None if t is None else 0 for t in results)

    return rule


def mapped_by_autograd(*grads: Tensor | None) -> bool:
    """Whether autograd itself maps this backward, as ``torch.autograd.functional.jacobian(vectorize=True)`` does.

    It has batching rules of its own, without a way to add to them, and none for ops with optional results.
    """
    return any(grad is not None and torch._C._dispatch_keys(grad).has(_BATCHED) for grad in grads)
