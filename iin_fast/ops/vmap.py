"""Batching rules of the ops for ``torch.vmap``: the mapped dimension goes into the batch, one call does all."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Rule", "fold_rows", "front", "one_by_one"]

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
    """The rule of an op that takes one mapped index at a time; arguments and results may be lists, results None."""

    def at(value: Any, dim: Any, i: int) -> Any:
        if isinstance(value, list):
            return [at(v, None if dim is None else dim[k], i) for k, v in enumerate(value)]
        return value if dim is None else value.select(dim, i)

    def stack(parts: Sequence[Any]) -> tuple[Any, Any]:
        if isinstance(parts[0], list):
            values, dims = zip(*map(stack, zip(*parts, strict=True)), strict=True)
            return list(values), list(dims)
        return (None, None) if parts[0] is None else (torch.stack(list(parts)), 0)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        calls = [op(*(at(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
        values, dims = zip(*map(stack, zip(*calls, strict=True)), strict=True)
        return values, dims

    return rule
