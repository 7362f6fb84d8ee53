"""The autograd and autocast of an op, and the short way from Python to it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled, _is_tracing
from torch._subclasses.fake_tensor import is_fake
from torch.compiler import is_compiling
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = [
    "autocast_to_float32",
    "by_definition",
    "differentiated",
    "saved_tensors",
    "short_call",
    "followed",
    "has_values",
]

_BATCHED: Any = torch._C._parse_dispatch_key("Batched")


def followed() -> bool:
    """Whether something looks at every op of this call, as the compiler does: only the registered op will do."""
    return is_compiling() or _are_functorch_transforms_active() or _is_tracing() or _is_any_autocast_enabled()


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


def has_values(x: Tensor) -> bool:
    """Whether the values of this call's tensors can be read: not while it is traced or mapped, nor on device meta."""
    return not (followed() or x.is_meta or is_fake(x))


def differentiated(*grads: Any) -> bool:
    """Whether autograd looks into this backward, for gradients of gradients (create_graph=True) or to map it.

    ``torch.autograd.functional.jacobian(vectorize=True)`` maps with batching rules of its own, without a way to add to them, and
    none for ops with optional results.
    """
    return torch.is_grad_enabled() or any(g is not None and torch._C._dispatch_keys(g).has(_BATCHED) for g in grads)


def _is_one(argument: Any) -> bool:
    """Whether an op's argument has one gradient, or none: all have but lists of tensors."""
    return not (isinstance(argument, list) and argument and isinstance(argument[0], Tensor))


def by_definition(definition: Callable[..., Any], arguments: Sequence[Any], grads: Sequence[Any]) -> list[Any]:
    """Gradients by plain torch, which autograd can differentiate again where it looks into this backward.

    Args:
        definition: ``(*arguments)`` -> the op's outputs that have gradients.
        arguments: tensors, lists of tensors, None, and others.
        grads: of the outputs; None for one that nothing depends on.

    Returns:
        as ``arguments``, None for what needs no gradient.
    """
    again = torch.is_grad_enabled()
    flat, spec = tree_flatten(list(arguments), is_leaf=_is_one)
    with torch.enable_grad():
        # aliases: what one input owes to another is the business of autograd beyond this op
        flat = [t.view_as(t) if isinstance(t, Tensor) else t for t in flat]
        outputs = definition(*tree_unflatten(flat, spec))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=False) if g is not None and o.requires_grad]
    wanted = [i for i, t in enumerate(flat) if isinstance(t, Tensor) and t.requires_grad]
    found: Sequence[Any] = ()
    if pairs and wanted:
        inputs = [flat[i] for i in wanted]
        found = torch.autograd.grad(
            [o for o, _ in pairs], inputs, [g for _, g in pairs], create_graph=again, allow_unused=True
        )
    by_place = dict(zip(wanted, found, strict=False))
    return tree_unflatten([by_place.get(i) for i in range(len(flat))], spec)  # type: ignore[no-any-return]


def short_call(
    name: str, overload: Any, setup: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """A function that calls an op with less Python than its registered autograd (benchmarks/overhead.py measures both).

    The op carries its autograd itself, for torch.compile, torch.export and whoever calls torch.ops. In plain eager mode the
    function goes around that, through an autograd.Function of its own.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            result = overload(*args)
        setup(ctx, args, result)
        return result

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), members)

    def call(*args: Any) -> Any:
        if followed():
            return overload(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    return call


def autocast_to_float32(name: str, lib: torch.library.Library) -> None:
    """Under ``torch.autocast``, on any device, the op ``name`` computes in float32."""
    for device in ("cpu", "cuda", "xpu"):
        try:
            torch.library.register_autocast(name, device, torch.float32, lib=lib)
        except ValueError:  # torch 2.10 registers none for xpu
            if device != "xpu":
                raise
