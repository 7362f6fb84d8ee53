"""The Triton kernels as torch ops, so that autograd, torch.compile and torch.export see them like the compiled ones.

Every compiled op ``iin_fast::name`` has a twin ``iin_fast_triton::name`` with the same schema, which runs
``iin_fast/ops/<op>/triton.py``. Triton itself is imported at the first call, never by ``import iin_fast``.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from .._library import registrations

__all__ = ["TWINS", "define_twin"]

TWINS = registrations("iin_fast_triton", "DEF")


def define_twin(op: str) -> None:
    """Define the twins of ``iin_fast::<op>`` and of its backward."""
    for name in (op, f"{op}_backward"):
        schema = str(getattr(torch.ops.iin_fast, name).default._schema)
        TWINS.define(schema.removeprefix("iin_fast::"))
        TWINS.impl(name, _kernel(op, name), "CompositeExplicitAutograd")


def _kernel(op: str, name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return getattr(import_module(f"iin_fast.ops.{op}.triton"), name)(*arguments)

    return call
