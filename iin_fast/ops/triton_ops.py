"""The Triton kernels as torch ops, so that autograd, torch.compile and torch.export see them like the compiled ones.

Every compiled op ``iin_fast::name`` has a twin ``iin_fast_triton::name`` with the same schema, which runs
``iin_fast/ops/<op>/triton.py``. Triton itself is imported at the first call, never by ``import iin_fast``.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from .. import _library  # noqa: F401  (loads the compiled ops, whose schemas the twins take)

__all__ = ["define_twin"]

_ops = torch.library.Library("iin_fast_triton", "DEF")


def define_twin(op: str) -> None:
    """Define the twins of ``iin_fast::<op>`` and of its backward."""
    for name in (op, f"{op}_backward"):
        schema = str(getattr(torch.ops.iin_fast, name).default._schema)
        _ops.define(schema.removeprefix("iin_fast::"))
        _ops.impl(name, _kernel(op, name), "CompositeExplicitAutograd")


def _kernel(op: str, name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return getattr(import_module(f"iin_fast.ops.{op}.triton"), name)(*arguments)

    return call
