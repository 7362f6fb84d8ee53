"""The autograd and autocast of an op, and the short way from Python to it."""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["autocast_to_float32", "differentiable", "saved_tensors"]


def saved_tensors(ctx: Any, where: str) -> Any:
    """What an op has saved for backward; the error about an output that was changed in place says what to do."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{where}: backward needs a tensor that was changed in place since, such as the output (y += …); change a "
            f"copy (y = y + …). {error}"
        ) from error


def differentiable(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Attach autograd to the op ``name``, and give a function that calls it.

    The op carries its autograd itself, for torch.compile, torch.export and whoever calls torch.ops. In plain eager mode
    the function goes around that, through an autograd.Function of its own: the same values with less Python
    (benchmarks/overhead.py measures both ways).
    """
    torch.library.register_autograd(name, backward, setup_context=setup)
    namespace, op = name.split("::")
    overload = getattr(getattr(torch.ops, namespace), op).default

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            result = overload(*args)
        setup(ctx, args, result)
        return result

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"{namespace}_{op}", (torch.autograd.Function,), members)

    def call(*args: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or torch._C._is_tracing()
            or torch._C._is_any_autocast_enabled()
        ):
            return overload(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    return call


def autocast_to_float32(name: str) -> None:
    """Under ``torch.autocast``, on any device, the op ``name`` computes in float32."""
    for device in ("cpu", "cuda", "xpu"):
        try:
            torch.library.register_autocast(name, device, torch.float32)
        except ValueError:  # torch 2.10 registers none for xpu
            if device != "xpu":
                raise
