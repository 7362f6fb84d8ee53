"""Gradients of parameters that backward adds to ``.grad`` itself, where the user asks for it.

torch's autograd treats each parameter as an input of the op: every step makes a node for it, queues it, and hands its gradient
over, some 3 us a parameter. A flow of five transforms has a hundred. With :func:`direct_gradients` the op alone is a node, and its
backward does what the hundred would have done.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock

import torch
from torch import Tensor

from ...checks import checked_flag

__all__ = ["ANCHOR", "add_to_grad", "allowed", "asked", "direct_gradients", "learning", "passed_on", "possible"]

_writes = Lock()  # of one thread at a time: each looks first whether there is a gradient
_asked: ContextVar[bool] = ContextVar("direct_gradients", default=False)

with torch.inference_mode(False):
    ANCHOR = torch.zeros((), device="cpu", requires_grad=True)
"""Stands for all parameters among the inputs of an op's node."""


@contextmanager
def direct_gradients(mode: bool = True) -> Iterator[None]:
    """Let flows called in this block add gradients to ``parameter.grad`` themselves, past torch's node for each parameter.

    For loops that call ``loss.backward()`` and read ``.grad``, as most do: the values in ``.grad`` are the same, bit for bit; only
    where ``.grad`` holds something and the loss calls a flow more than once are they added in another order. Gradients of data
    and of contexts come as ever, and so do second derivatives by ``create_graph=True``. What differs: the graph of the loss does
    not know the parameters. ``torch.autograd.grad(loss, parameters)`` raises torch's error about tensors that were not used in the
    graph. With ``allow_unused`` or ``materialize_grads`` it gives None or zeros, and ``loss.backward(inputs=parameters)`` and
    ``torch.autograd.functional`` find that nothing depends on them, without an error. Use no block around those. Nor let a
    thread within a block and one without share parameters: torch's nodes don't wait for a flow that writes.

    It counts for flows on the CPU that run as one program: those of :mod:`iin_fast.nn`, and models after
    :func:`iin_fast.accelerate` or :func:`iin_fast.patch`. Torch's way go all others, compiled and mapped calls, processes of
    ``torch.distributed``, ``torch.autograd.detect_anomaly``; parameters that are computed from others
    (``torch.nn.utils.parametrize``); and parameters with hooks, which run as ever. Hooks of a parameter's node in the graph
    (``torch.autograd.graph.get_gradient_edge``) are never called.

    Args:
        mode: False turns it off within a block that has it on.

    Raises:
        TypeError: ``mode`` is no bool.

    Example:
        >>> import torch, iin_fast
        >>> flow = iin_fast.nn.NeuralSplineFlow(3)
        >>> with iin_fast.direct_gradients():
        ...     loss = -flow.log_prob(torch.randn(8, 3)).mean()
        ...     loss.backward()
        >>> all(p.grad is not None for p in flow.parameters())
        True
    """
    before = _asked.get()
    _asked.set(checked_flag("direct_gradients", "mode", mode))
    try:
        yield
    finally:
        _asked.set(before)  # not by a token: a generator may be closed elsewhere


def asked() -> bool:
    """Whether this is a block of :func:`direct_gradients`."""
    return _asked.get()


def possible(x: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether there are parameters to learn, and backward may add their gradients itself."""
    return allowed(x) and any([p.is_leaf and p.requires_grad for p in parameters])


def allowed(x: Tensor) -> bool:
    """Whether nothing looks at the node of each parameter: DDP waits for them, and the search for anomalies looks at what they get."""
    if not x.is_cpu or torch.is_anomaly_enabled():
        return False
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def learning(parameters: Sequence[Tensor]) -> tuple[bool, ...]:
    return tuple([p.requires_grad for p in parameters])


def passed_on(parameters: Sequence[Tensor]) -> list[bool]:
    """Of each whether its gradient goes torch's way: those that are made from others, and those with hooks, which run once in a
    backward for all that comes to the parameter."""
    return [
        p.requires_grad and (not p.is_leaf or bool(p._backward_hooks or p._post_accumulate_grad_hooks))  # type: ignore[attr-defined]
        for p in parameters
    ]


def add_to_grad(parameters: Sequence[Tensor], grads: Sequence[Tensor | None], graph: bool) -> None:
    """Add to the ``.grad`` of each leaf, as its own node does. graph: the gradients have one (create_graph=True)."""
    have, more = [], []
    odd: list[tuple[Tensor, Tensor]] = []
    with _writes:
        for p, g in zip(parameters, grads, strict=True):
            if g is None or not (p.requires_grad and p.is_leaf):
                continue
            if p._backward_hooks or p._post_accumulate_grad_hooks or graph or not p.is_contiguous():
                odd.append((p, g))
                continue
            grad = p.grad
            if grad is None:
                try:
                    p.grad = g
                except RuntimeError:  # a user may want another type (p.grad_dtype)
                    odd.append((p, g))
            elif grad.requires_grad or grad.layout is not torch.strided:
                odd.append((p, g))
            else:
                have.append(grad)
                more.append(g)
        if have:
            torch._foreach_add_(have, more)
    if odd:  # a backward from the parameters: their nodes, and nothing else
        torch.autograd.backward([p for p, _ in odd], [g for _, g in odd], create_graph=graph)
