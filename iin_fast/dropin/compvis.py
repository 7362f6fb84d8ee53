"""CompVis/iin, net2net and invariances: whole stacks as one op, and their blocks where a stack is not one of these."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..functional import affine_coupling
from .base import Library
from .registry import Entry, eligible, worth_it
from .stacks import ROWS, Block, Unsupported, expect, own_class, run, stack_of

__all__ = ["LIBRARIES"]

IIN = "iin.models.iin"
BLOCKS = "net2net.modules.flow.blocks"
FLAT = "net2net.modules.flow.flatflow"
NET = "net2net.modules.autoencoder.basic"
INVARIANCES = "invariances.model.blocks"


# Blocks: one elementwise pass per coupling, no reading of the device in ActNorm, no scatter in Shuffle's backward.


def _couple(self: Any, x: Tensor, context: Tensor | None, reverse: bool) -> tuple[Tensor, Any]:
    logdet: Any = 0
    for i in reversed(range(len(self.s))) if reverse else range(len(self.s)):
        if i % 2 != 0 and not reverse or i % 2 == 0 and reverse:
            x = torch.cat(torch.chunk(x, 2, dim=1)[::-1], dim=1)
        kept, moved = torch.chunk(x, 2, dim=1)
        u = kept if context is None else torch.cat((kept, context), dim=1)
        if reverse:
            shift, s = self.t[i](u), self.s[i](u)
        else:
            s, shift = self.s[i](u), self.t[i](u)
        moved, logdet_i = affine_coupling(moved, s, shift, squash="identity", inverse=reverse)
        x = torch.cat((kept, moved), dim=1)
        logdet = logdet + logdet_i
    return x, logdet


def _even(x: Any, *others: Any) -> bool:
    return worth_it(x) and eligible(x, *others) and x.shape[1] % 2 == 0 and x.numel() == x.shape[0] * x.shape[1]


def coupling_flat(original: Any, self: Any, x: Tensor, reverse: bool = False) -> Any:
    if not _even(x) or x.dim() != 2:
        return original(self, x, reverse)
    y, logdet = _couple(self, x, None, reverse)
    return y if reverse else (y, logdet)


def coupling_four(original: Any, self: Any, x: Tensor, reverse: bool = False) -> Any:
    if not _even(x) or x.dim() != 4:
        return original(self, x, reverse)
    y, logdet = _couple(self, x.flatten(1), None, reverse)
    return y[:, :, None, None] if reverse else (y[:, :, None, None], logdet)


def coupling_conditional(original: Any, self: Any, x: Tensor, xc: Tensor, reverse: bool = False) -> Any:
    if not _even(x, xc) or x.dim() != 4 or xc.dim() != 4 or xc.shape[2:] != (1, 1):
        return original(self, x, xc, reverse)
    y, logdet = _couple(self, x.flatten(1), xc.flatten(1), reverse)
    return y[:, :, None, None] if reverse else (y[:, :, None, None], logdet)


_started: "WeakKeyDictionary[Any, tuple[Tensor, int]]" = WeakKeyDictionary()


def _has_started(self: Any) -> bool:
    """Whether ActNorm has had its start; read from a GPU only after the flag was written."""
    flag = self.initialized
    if torch.compiler.is_compiling():
        return False
    if flag.device.type == "cpu" or flag.is_inference():  # cheap to read, or without a version
        return bool(flag)
    seen = _started.get(self)
    if seen is None or seen[0] is not flag or seen[1] != flag._version:
        if not bool(flag):
            return False
        _started[self] = (flag, flag._version)
    return True


def _norm(squeezes_all: bool) -> Callable[..., Any]:
    def norm(original: Any, self: Any, input: Tensor, reverse: bool = False, **conditioning: Any) -> Any:
        if reverse or not worth_it(input) or not eligible(input, self.scale):
            return original(self, input, reverse, **conditioning)
        if input.dim() not in (2, 4) or not _has_started(self):
            return original(self, input, reverse, **conditioning)
        four = input[:, :, None, None] if input.dim() == 2 else input
        h = self.scale * (four + self.loc)
        if squeezes_all:
            h = h.squeeze()
        elif input.dim() == 2:
            h = h.squeeze(-1).squeeze(-1)
        if not self.logdet:
            return h
        logdet = four.shape[2] * four.shape[3] * self.scale.abs().log().sum()
        return h, logdet.repeat(four.shape[0])

    return norm


def shuffle(original: Any, self: Any, x: Tensor, reverse: bool = False, conditioning: Any = None) -> Any:
    if not isinstance(x, Tensor) or x.dim() < 2:
        return original(self, x, reverse, conditioning)
    index = self.backward_shuffle_idx if reverse else self.forward_shuffle_idx
    y = x.index_select(1, index)  # its gradient adds rows; that of x[:, index] scatters elements
    return y if reverse else (y, 0)


# Whole stacks.


def iin_blocks(root: Any) -> list[Block]:
    found = []
    for block in root.flow:
        if len(expect(block, f"{IIN}.Flow").flow) != 3:
            raise Unsupported("blocks that are not ActNorm, coupling and shuffle")
        norm, coupling, shuffle = block.flow
        found.append(
            Block(
                expect(norm, f"{IIN}.VectorActNorm"),
                expect(coupling, f"{IIN}.DoubleVectorCouplingBlock"),
                expect(shuffle, f"{IIN}.Shuffle"),
                f"{IIN}.BasicFullyConnectedNet",
            )
        )
        if not norm.logdet:
            raise Unsupported("ActNorm without log-det")
    return found


def iin_stack(original: Any, self: Any, x: Tensor, condition: Any = None, reverse: bool = False) -> Any:
    stack = stack_of(self, iin_blocks)
    weights = None if isinstance(stack, str) else stack.weights(x, reverse)
    if isinstance(stack, str) or weights is None:
        return original(self, x, condition, reverse)
    y, logdet = run(stack, weights, x, None, reverse)
    return y, None if reverse else logdet


def _flat_blocks(blocks: str, parts: str) -> Callable[[Any], list[Block]]:
    def find(root: Any) -> list[Block]:
        found = []
        for block in root.sub_layers:
            name, slope = own_class(block), 1.0
            if name not in (
                f"{blocks}.UnconditionalFlatDoubleCouplingFlowBlock",
                f"{blocks}.PureAffineDoubleCouplingFlowBlock",
                f"{blocks}.ConditionalFlatDoubleCouplingFlowBlock",
            ):
                raise Unsupported(f"it holds a {name}")
            if name == f"{blocks}.ConditionalFlatDoubleCouplingFlowBlock":
                expect(block.coupling, f"{blocks}.ConditionalDoubleVectorCouplingBlock")
                if own_class(block.activation) == f"{blocks}.InvLeakyRelu":
                    slope = float(block.activation.alpha)
                else:
                    expect(block.activation, f"{blocks}.IgnoreLeakyRelu")
            else:
                expect(block.coupling, f"{blocks}.DoubleVectorCouplingBlock")
            pure = name == f"{blocks}.PureAffineDoubleCouplingFlowBlock"
            found.append(
                Block(
                    None if pure else expect(block.norm_layer, f"{parts}.ActNorm"),
                    block.coupling,
                    None if pure else expect(block.shuffle, f"{blocks}.Shuffle"),
                    f"{parts}.BasicFullyConnectedNet",
                    slope,
                )
            )
        return found

    return find


net2net_blocks = _flat_blocks(BLOCKS, NET)
invariances_blocks = _flat_blocks(INVARIANCES, INVARIANCES)


def _refuse(blocks: Callable[[Any], list[Block]]) -> Callable[[Any], str | None]:
    def refuse(module: Any) -> str | None:
        found = stack_of(module, blocks)
        return found if isinstance(found, str) else None

    return refuse


def flat_stack(original: Any, self: Any, x: Tensor, reverse: bool = False) -> Any:
    stack = stack_of(self, net2net_blocks)
    weights = stack.weights(x.flatten(1), reverse) if x.dim() in (2, 4) and not isinstance(stack, str) else None
    if isinstance(stack, str) or weights is None:
        return original(self, x, reverse)
    self.last_outs, self.last_logdets = [], []
    y, logdet = run(stack, weights, x.flatten(1), None, reverse)
    y = y[:, :, None, None]
    return y if reverse else (y, logdet)


def _conditional(
    blocks: Callable[[Any], list[Block]],
    embed: Callable[[Any, Tensor], Tensor],
    flat: tuple[tuple[int, ...], ...],  # shapes of the condition after [batch, features]
) -> Callable[..., Any]:
    def conditional(original: Any, self: Any, x: Tensor, condition: Tensor, reverse: bool = False) -> Any:
        stack = stack_of(self, blocks)
        option = self.conditioning_option.lower()
        plain = x.dim() == 4 and option in ("none", "sequential") and condition.shape[2:] in flat
        weights = stack.weights(x.flatten(1), reverse) if plain and not isinstance(stack, str) else None
        if isinstance(stack, str) or weights is None:
            return original(self, x, condition, reverse)
        context = embed(self, condition)[:, :, None, None]
        contexts = [context]
        if option == "sequential":
            contexts = []
            for layer in self.conditioning_layers:
                context = layer(context)
                contexts.append(context)
        if blocks is invariances_blocks:
            self.last_outs, self.last_logdets = [], []
        y, logdet = run(stack, weights, x.flatten(1), torch.stack(contexts).flatten(2), reverse)
        y = y[:, :, None, None]
        return y if reverse else (y, logdet)

    return conditional


def _as_given(self: Any, embedding: Tensor) -> Tensor:
    return embedding


def _embedded(self: Any, condition: Tensor) -> Tensor:
    return self.embedder(condition.flatten(1).float())  # type: ignore[no-any-return]


AS_ONE = f"as one op, on a CPU from batches of {ROWS} on, frozen ones at every size"
NO_OUTPUTS = f"{AS_ONE}; last_outs and last_logdets stay empty"


def _flat_parts(blocks: str, norm: str) -> tuple[str, ...]:
    """What a flat stack of net2net or invariances runs."""
    return (
        f"{norm}.forward",
        f"{norm}.reverse",
        f"{blocks}.ConditionalFlatDoubleCouplingFlowBlock.forward",
        f"{blocks}.ConditionalDoubleVectorCouplingBlock.forward",
        f"{blocks}.InvLeakyRelu.forward",
        f"{blocks}.InvLeakyRelu.reverse",
        f"{blocks}.IgnoreLeakyRelu.forward",
        f"{blocks}.Shuffle.forward",
    )


_net2net_parts = (
    *_flat_parts(BLOCKS, f"{NET}.ActNorm"),
    f"{NET}.BasicFullyConnectedNet.forward",
    f"{BLOCKS}.UnconditionalFlatDoubleCouplingFlowBlock.forward",
    f"{BLOCKS}.PureAffineDoubleCouplingFlowBlock.forward",
    f"{BLOCKS}.DoubleVectorCouplingBlock.forward",
)
_invariances_parts = (
    *_flat_parts(INVARIANCES, f"{INVARIANCES}.ActNorm"),
    f"{INVARIANCES}.BasicFullyConnectedNet.forward",
)
_net2net_refuse, _invariances_refuse = _refuse(net2net_blocks), _refuse(invariances_blocks)

LIBRARIES = (
    Library(
        name="iin",
        versions=("its repository",),
        package="iin",
        modules=(IIN,),
        install="put CompVis/iin on the Python path",
        entries=(
            Entry(
                f"{IIN}.EfficientVRNVP",
                {"forward": iin_stack},
                relies_on=(
                    f"{IIN}.Flow.forward",
                    f"{IIN}.VectorActNorm.forward",
                    f"{IIN}.VectorActNorm.reverse",
                    f"{IIN}.DoubleVectorCouplingBlock.forward",
                    f"{IIN}.Shuffle.forward",
                    f"{IIN}.BasicFullyConnectedNet.forward",
                ),
                refuse=_refuse(iin_blocks),
                note=AS_ONE,
            ),
            Entry(f"{IIN}.DoubleVectorCouplingBlock", {"forward": coupling_flat}, affine=True),
            Entry(f"{IIN}.VectorActNorm", {"forward": _norm(squeezes_all=True)}, affine=True),
            Entry(f"{IIN}.Shuffle", {"forward": shuffle}),
        ),
    ),
    Library(
        name="net2net",
        versions=("its repository",),
        package="net2net",
        modules=(FLAT,),
        install="put CompVis/net2net on the Python path",
        entries=(
            *(
                Entry(
                    f"{FLAT}.{name}",
                    {"forward": flat_stack},
                    relies_on=_net2net_parts,
                    refuse=_net2net_refuse,
                    note=NO_OUTPUTS,
                )
                for name in ("UnconditionalFlatCouplingFlow", "PureAffineFlatCouplingFlow")
            ),
            Entry(
                f"{FLAT}.ConditionalFlatCouplingFlow",
                {"forward": _conditional(net2net_blocks, _embedded, ((), (1, 1)))},
                relies_on=_net2net_parts,
                refuse=_net2net_refuse,
                note=AS_ONE,
            ),
            Entry(
                f"{BLOCKS}.ConditionalFlow",
                {"forward": _conditional(net2net_blocks, _as_given, ((),))},
                relies_on=_net2net_parts,
                refuse=_net2net_refuse,
                note=AS_ONE,
            ),
            Entry(f"{BLOCKS}.DoubleVectorCouplingBlock", {"forward": coupling_four}, affine=True),
            Entry(f"{BLOCKS}.ConditionalDoubleVectorCouplingBlock", {"forward": coupling_conditional}, affine=True),
            Entry(f"{NET}.ActNorm", {"forward": _norm(squeezes_all=False)}, affine=True),
            Entry(f"{BLOCKS}.Shuffle", {"forward": shuffle}),
        ),
    ),
    Library(
        name="invariances",
        versions=("its repository",),
        package="invariances",
        modules=(INVARIANCES,),
        install="put CompVis/invariances on the Python path",
        entries=(
            Entry(
                f"{INVARIANCES}.ConditionalFlow",
                {"forward": _conditional(invariances_blocks, _as_given, ((),))},
                relies_on=_invariances_parts,
                refuse=_invariances_refuse,
                note=NO_OUTPUTS,
            ),
            Entry(
                f"{INVARIANCES}.ConditionalDoubleVectorCouplingBlock", {"forward": coupling_conditional}, affine=True
            ),
            Entry(f"{INVARIANCES}.ActNorm", {"forward": _norm(squeezes_all=False)}, affine=True),
            Entry(f"{INVARIANCES}.Shuffle", {"forward": shuffle}),
        ),
    ),
)
