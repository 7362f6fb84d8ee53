"""Gradients that come with the results of a call, where training has shown which gradients backward will ask for.

A training step walks through a flow twice, and the second walk needs the values of the first: kept, or computed again. The op
``flow_program_ahead`` does both in one walk, while the values of a tile of rows are still in the cache. For that it has to know
the gradient of the log-det in advance. A loss such as ``-log_prob.mean()`` has the same one at every step, so each kind of call is
remembered with the gradient that its last backward was given. When two have been the same, the next call guesses it again.

Results and gradients are the same, bit for bit: the op adds the same numbers in the same order. A guess that was wrong costs time:
backward then runs as ever, and the next calls guess nothing. So does a call that no backward follows, as in a validation without
``torch.no_grad``.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...flow import FlowProgram

__all__ = ["Habit", "Needed", "gains", "habit", "watched"]

Needed = tuple[bool, bool, tuple[bool, ...]]
"""Whether the gradients of x, of the context and of each parameter are asked for."""

ENOUGH = 2
"""So many backwards with the same gradient, one after the other, before the next is guessed."""

MOST = 64


class Habit:
    """What backward of one kind of call has been given and asked for so far."""

    __slots__ = ("grad", "needed", "seen", "waits")

    def __init__(self) -> None:
        self.grad: Tensor | None = None  # of the log-det, in the last backward; nobody else has it
        self.needed: Needed = False, False, ()  # gradients, in that backward
        self.seen = 0  # so many times in a row
        self.waits = False  # for a backward

    def guess(self) -> Tensor | None:
        """The gradient to compute with, or None. To be asked once in each forward."""
        if self.waits:
            self.seen = 0
        self.waits = True
        return self.grad if self.seen >= ENOUGH else None

    def learn(self, grad_y: Tensor | None, grad_logdet: Tensor | None, needed: Needed) -> bool:
        """Whether backward was given and asked for what the last one was. To be told in each."""
        self.waits = False
        if grad_y is not None or grad_logdet is None:
            self.grad, self.seen = None, 0
            return False
        if self.grad is not None and needed == self.needed and torch.equal(self.grad, grad_logdet):
            self.seen += 1
            return True
        self.grad = grad_logdet.clone(memory_format=torch.contiguous_format)
        self.needed, self.seen = needed, 1
        return False


@lru_cache(maxsize=1024)
def gains(program: FlowProgram, batch: int, item: int, inverse: bool) -> bool:
    """Whether the library would compute gradients of ``batch`` rows of numbers of ``item`` bytes along with the results."""
    return batch > 0 and bool(torch.ops.iin_fast.flow_program_gains_ahead.default(program.text, batch, item, inverse))


def watched() -> bool:
    """Whether a dispatch mode or hooks of saved tensors are open: torch.utils.checkpoint compares what two forwards save."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


_habits: dict[tuple[object, ...], Habit | None] = {}


def habit(
    x: Tensor,
    parameters: Sequence[Tensor],
    program: FlowProgram,
    inverse: bool,
    base: bool,
    needed: tuple[bool, ...],
) -> Habit | None:
    """The habit of calls like this one, or None: where there is nothing to gain, or something looks at what is called or saved."""
    if not (x.is_cpu and parameters) or watched():
        return None
    batch = x.shape[0]
    key = (id(parameters[0]), batch, x.dtype, inverse, base, needed, program)
    try:
        return _habits[key]
    except KeyError:
        if len(_habits) >= MOST:
            _habits.clear()
        found = _habits[key] = Habit() if gains(program, batch, x.dtype.itemsize, inverse) else None
        return found
