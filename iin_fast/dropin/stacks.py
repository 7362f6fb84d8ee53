"""Whole published stacks (ActNorm, double coupling, shuffle) as one op on the modules' own Parameters.

The op reads its weights stacked and in panels, so they are laid out from the Parameters at every call: a change through
``.data`` leaves no trace that a cache could look for. Where gradients are wanted it is a copy that autograd knows the way
back of; else it goes into the same memory each time. ``freeze`` lets evaluation keep the copy of the call before.
"""

from collections.abc import Callable, Iterator, Sequence
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from ..checks import HOOKS
from ..ops.flow import flow
from ..ops.flow.layout import PANEL, pack, unpack
from .class_factory import original
from .programs import Unsupported
from .registry import eligible, qualified

__all__ = ["ROWS", "Block", "Stack", "Unsupported", "expect", "freeze", "own_class", "run", "stack_of"]

ROWS = 128
"""Smaller batches run block by block on the CPU unless frozen: laying out the weights costs more than the op saves
(benchmarks/dropin.py)."""


class Block:
    """The parts of one block.

    Args:
        norm: ActNorm with ``loc``, ``scale`` [1, channels, 1, 1] and ``initialized``, or None.
        coupling: with ``s`` and ``t``, two nets each.
        shuffle: with ``forward_shuffle_idx``, or None.
        net: the qualified class name of the coupling's nets.
        slope: of the activation after ActNorm below 0.
    """

    def __init__(self, norm: Any, coupling: Any, shuffle: Any, net: str, slope: float = 1.0) -> None:
        self.norm, self.coupling, self.shuffle, self.net, self.slope = norm, coupling, shuffle, net, slope


def own_class(module: nn.Module) -> str:
    """The qualified class name, of the library's own class where the module is sped up already."""
    return qualified(original(type(module)) or type(module))


def expect(module: Any, name: str) -> Any:
    """The module, if its class has this name."""
    if own_class(module) != name:
        raise Unsupported(f"it holds a {own_class(module)}")
    return module


def _changed(module: nn.Module) -> bool:
    """Whether somebody gave this one module a forward of its own."""
    return "forward" in vars(module)


def _linears(net: nn.Module, use_tanh: bool) -> list[nn.Linear]:
    """The linear layers of a published MLP whose layers stand in ``main``."""
    layers = list(net.main)  # type: ignore[arg-type]
    if use_tanh and (not layers or type(layers.pop()) is not nn.Tanh):
        raise Unsupported("a net for the scale does not end with tanh")
    found = []
    for i, layer in enumerate(layers):
        if type(layer) is not (nn.LeakyReLU if i % 2 else nn.Linear):
            raise Unsupported(f"a net with {type(layer).__name__}")
        if isinstance(layer, nn.Linear):
            if layer.bias is None:
                raise Unsupported("a linear layer without bias")
            found.append(layer)
        elif layer.negative_slope != 0.01:
            raise Unsupported(f"LeakyReLU with slope {layer.negative_slope}")
    if len(layers) % 2 == 0 or len(found) < 2:
        raise Unsupported("a net that does not end with a linear layer")
    return found


def pack_into(packed: Tensor, weights: Sequence[Tensor]) -> Tensor:  # [len(weights), out * in]
    rows, columns = weights[0].shape
    for row, weight in zip(packed, weights, strict=True):
        for start in range(0, rows, PANEL):
            panel = weight[start : start + PANEL]
            row[start * columns : start * columns + panel.numel()].view(columns, -1).copy_(panel.T)
    return packed


class Pack(torch.autograd.Function):
    """[out, in] matrices to one row of panels each; the way back is differentiable, so second derivatives work."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> Tensor:  # [len(weights), out * in]
        ctx.shape = rows, columns = weights[0].shape
        return pack_into(weights[0].new_empty(len(weights), rows * columns), weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns = ctx.shape
        if torch.is_grad_enabled():
            return unpack(grads[0], rows, columns).unbind(0)
        found: list[Tensor | None] = []
        for packed, needed in zip(grads[0], ctx.needs_input_grad, strict=True):
            if not needed:
                found.append(None)
                continue
            weight = packed.new_empty(rows, columns)  # one tensor each, which autograd takes over as the gradient
            for start in range(0, rows, PANEL):
                panel = weight[start : start + PANEL]
                panel.copy_(packed[start * columns : start * columns + panel.numel()].view(columns, -1).T)
            found.append(weight)
        return tuple(found)


class Stack:
    """How the modules of one stack map to the op; made again when a module, a class or a hook of it changes."""

    def __init__(self, root: nn.Module, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        if not blocks:
            raise Unsupported("no blocks")
        if len({(b.norm is None, b.shuffle is None, b.slope) for b in blocks}) > 1:
            raise Unsupported("blocks that differ")
        self.slope = blocks[0].slope
        # [block, half, net (s, t)] in the order of the op, each a list of linear layers
        nets = []
        for block in blocks:
            s, t = list(block.coupling.s), list(block.coupling.t)
            if len(s) != 2 or len(t) != 2:
                raise Unsupported(f"{len(s)} couplings in a block")
            for half in (0, 1):
                nets += [_linears(expect(s[half], block.net), True), _linears(expect(t[half], block.net), False)]
        shapes = {tuple(tuple(layer.weight.shape) for layer in net) for net in nets}
        if len(shapes) > 1 or len({layer.weight.shape for net in nets for layer in net[1:-1]}) > 1:
            raise Unsupported("nets of different sizes")
        self.first = [net[0] for net in nets]
        self.hidden = [layer for net in nets for layer in net[1:-1]]
        self.last = [net[-1] for net in nets]
        self.depth = len(nets[0]) - 2
        self.kept = blocks[0].coupling.s[0].main[-2].out_features  # features that a half transforms
        self.modules = [(module, type(module)) for block in self._parts() for module in block.modules()]
        for module, cls in self.modules:
            if _changed(module):
                raise Unsupported(f"a {cls.__name__} with a forward of its own")
        self.edges = [
            (parent._modules, key, child) for parent, _ in self.modules for key, child in parent._modules.items()
        ]
        self.edges += [(root._modules, key, child) for key, child in root._modules.items()]
        self.hooks = [getattr(module, name) for module, _ in self.modules for name in HOOKS]
        self.memory: dict[str, Tensor] = {}
        self.frozen = root in _frozen
        self.packed: tuple[list[Any], list[int], tuple[Tensor, ...]] | None = None
        self.start: tuple[Any, ...] | None = None

    def _parts(self) -> Iterator[nn.Module]:
        for block in self.blocks:
            yield from (part for part in (block.norm, block.coupling, block.shuffle) if part is not None)

    def stale(self) -> bool:
        return any(type(module) is not cls or _changed(module) for module, cls in self.modules) or any(
            children.get(key) is not child for children, key, child in self.edges
        )

    def started(self) -> bool:
        """Whether ActNorm of every block has had its start; read from a GPU only after a change."""
        flags = [block.norm.initialized for block in self.blocks if block.norm is not None]
        if all(flag.device.type == "cpu" for flag in flags):
            return all(bool(flag) for flag in flags)
        if any(flag.is_inference() for flag in flags):
            return False
        now = tuple((id(flag), flag._version) for flag in flags)
        if self.start != now and all(bool(flag) for flag in flags):
            self.start = now
        return self.start == now

    def tensors(self) -> list[Any]:
        """All Parameters of the stack, as the modules hold them now."""
        norms = [block.norm for block in self.blocks if block.norm is not None]
        layers = [layer for group in (self.first, self.hidden, self.last) for layer in group]
        tensors = [layer._parameters[name] for name in ("weight", "bias") for layer in layers]
        return tensors + [norm._parameters[name] for name in ("loc", "scale") for norm in norms]

    def weights(self, x: Tensor, inverse: bool) -> tuple[Tensor, ...] | None:
        """The op's tensors after the context for ``x [batch, dim]``; None where the library's own code has to run."""
        if x.dim() != 2 or x.shape[0] < 2 or x.shape[1] // 2 != self.kept:
            return None
        if inverse and x.shape[1] % 2:  # net2net's inverse of odd sizes is not the inverse of its forward
            return None
        if torch.compiler.is_compiling() or any(self.hooks):
            return None
        tensors = self.tensors()
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if x.device.type == "cpu" and x.shape[0] < ROWS and (wanted or not self.frozen):
            return None
        if not eligible(x, *tensors) or not self.started():
            return None
        held = tensors + [block.shuffle.forward_shuffle_idx for block in self.blocks if block.shuffle is not None]
        if wanted:
            return self._layout(x, None)
        if not self.frozen or any(tensor.is_inference() for tensor in held):  # which have no version
            with torch.no_grad():
                return self._layout(x, self.memory)
        versions = [tensor._version for tensor in held]
        if self.packed is None or self.packed[1] != versions or not all(map(is_, held, self.packed[0])):
            with torch.inference_mode(False), torch.no_grad():
                self.packed = (held, versions, self._layout(x, {}))
        return self.packed[2]

    def _layout(self, x: Tensor, memory: dict[str, Tensor] | None) -> tuple[Tensor, ...]:
        """Without ``memory`` the result has gradients; with it, weights go into what it holds."""
        n, dim = len(self.blocks), x.shape[1]

        def weights(name: str, layers: list[nn.Linear], *shape: int) -> Tensor:
            matrices = [layer.weight for layer in layers]
            if x.device.type != "cpu":  # few kernels rather than few bytes
                packed = pack(torch.stack(matrices))
            elif memory is None:
                packed = Pack.apply(*matrices)
            else:
                space = memory.get(name)
                if space is None or space.dtype != x.dtype or space.device != x.device:
                    with torch.inference_mode(False):
                        memory[name] = space = x.new_empty(len(matrices), matrices[0].numel())
                packed = pack_into(space, matrices)
            return packed.view(n, 2, 2, *shape, -1)  # type: ignore[no-any-return]

        def biases(layers: list[nn.Linear], *shape: int) -> Tensor:
            return torch.stack([layer.bias for layer in layers]).view(n, 2, 2, *shape, -1)

        if self.blocks[0].norm is None:
            loc, scale = x.new_zeros(n, dim), x.new_ones(n, dim)
        else:
            loc, scale = (
                torch.stack([getattr(block.norm, name) for block in self.blocks]).view(n, dim)
                for name in ("loc", "scale")
            )
        if self.blocks[0].shuffle is None:
            permutation = torch.arange(dim, device=x.device).expand(n, dim).contiguous()
        else:
            permutation = torch.stack([block.shuffle.forward_shuffle_idx.detach() for block in self.blocks])
        hidden = self.first[0].out_features
        middle = (
            (weights("hidden", self.hidden, self.depth), biases(self.hidden, self.depth))
            if self.depth
            else (x.new_empty(n, 2, 2, 0, hidden * hidden), x.new_empty(n, 2, 2, 0, hidden))
        )
        return (
            loc,
            scale,
            weights("first", self.first),
            biases(self.first),
            *middle,
            weights("last", self.last),
            biases(self.last),
            permutation,
        )


_frozen: "WeakSet[nn.Module]" = WeakSet()
_stacks: "WeakKeyDictionary[nn.Module, Stack | str]" = WeakKeyDictionary()


def stack_of(root: nn.Module, blocks: Callable[[Any], list[Block]]) -> Stack | str:
    """The stack of a module, or why it has none."""
    found = _stacks.get(root)
    if isinstance(found, Stack) and not found.stale():
        return found
    try:
        found = Stack(root, blocks(root))
    except (Unsupported, AttributeError) as error:
        return str(error)
    _stacks[root] = found
    return found


def freeze(root: nn.Module, frozen: bool) -> None:
    """Let evaluation of this stack keep its laid-out weights until a Parameter is changed in a way that torch counts."""
    _frozen.discard(root)
    if frozen:
        _frozen.add(root)
    _stacks.pop(root, None)


def run(
    stack: Stack, weights: tuple[Tensor, ...], x: Tensor, context: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The stack on ``x [batch, dim]``, under ``context [1 or n_flows, batch, context_dim]``."""
    return flow(x, context, *weights, activation_slope=stack.slope, inverse=inverse)
