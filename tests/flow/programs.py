"""Flow programs for tests: drawn by hypothesis, with parameters, input and context for them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from iin_fast.flow import (
    ABSENT,
    Block,
    FlowProgram,
    NetBuilder,
    ProgramBuilder,
    Ref,
    Weights,
    affine,
    mlp,
    residual,
    spline,
)
from iin_fast.flow.layers import ACTS, FORMS, ORDERS, Net, SplineTransformer, Transformer
from iin_fast.ops.affine_coupling import SQUASHES

__all__ = ["KINDS", "Drawn", "masks", "programs", "tame"]

KINDS = ("affine", "permute", "shuffle", "linear", "coupling", "autoregressive", "activation")
# From the tables of the library: what is added there is drawn here.
SPLINES = (
    ("linear", "nflows"),
    ("linear", "zuko"),
    ("circular", "nflows"),
    ("circular", "zuko"),
    (None, "nflows"),
    (None, "zuko"),
)


@dataclass
class Drawn:
    """A program with all that the op takes, in float64; parameters other than masks and data require gradients."""

    program: FlowProgram
    parameters: list[Tensor]
    x: Tensor
    context: Tensor | None

    def to(self, dtype: torch.dtype) -> "Drawn":
        """A copy in another type, rounded once."""

        def copy(t: Tensor) -> Tensor:
            return t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t

        context = None if self.context is None else copy(self.context)
        return Drawn(self.program, [copy(p) for p in self.parameters], copy(self.x), context)

    def nudged(self) -> "Drawn":
        """A copy whose values differ in the fourteenth digit: what it changes in a result, no backend can know better."""
        random = torch.Generator().manual_seed(0)

        def nudge(t: Tensor) -> Tensor:
            if not t.requires_grad:
                return t
            return (t.detach() * (1 + 1e-14 * torch.randn(t.shape, generator=random, dtype=t.dtype))).requires_grad_()

        context = None if self.context is None else nudge(self.context)
        return Drawn(self.program, [nudge(p) for p in self.parameters], nudge(self.x), context)

    def inputs(self) -> list[Tensor]:
        """All that gradients are taken for."""
        tensors = [self.x, *self.parameters] + ([] if self.context is None else [self.context])
        return [t for t in tensors if t.requires_grad]


def tame(*tensors: Tensor, most: float = 1e4) -> bool:
    """Whether all values are moderate. Deep stacks of exponentials overflow, and then nothing can be compared."""
    return all(bool((t.abs() < most).all()) for t in tensors)  # False for NaN


def masks(order: list[int], hidden: list[int], outputs: list[int]) -> list[Tensor]:
    """The masks of dense layers over ``hidden``: ``order`` is the place of each feature, ``outputs`` the feature of each raw value.

    A hidden unit of degree d reads features of places below d.
    """
    top = max(len(order) - 1, 1)
    degrees = [torch.tensor(order) + 1, *(torch.arange(size) % top + 1 for size in hidden)]
    found = [after[:, None] >= before for before, after in zip(degrees, degrees[1:], strict=False)]
    last = torch.tensor([order[j] + 1 for j in outputs])
    return [*found, last[:, None] > degrees[-1]]


class _Draw:
    """Draws one program; parameters are stacked in one tensor with offsets, or tensors of their own."""

    def __init__(
        self,
        draw: Callable[[st.SearchStrategy], object],
        dim: int,
        context: int,
        seed: int,
        wraps: bool,
        hidden: tuple[int, int],
    ) -> None:
        self.draw, self.dim, self.context, self.wraps, self.hidden = draw, dim, context, wraps, hidden
        self.builder = ProgramBuilder(dim, context)
        self.random = torch.Generator().manual_seed(seed)
        self.stacked: list[Tensor] = []
        self.stack = torch.empty(0)  # takes the place of the stacked parameters until all are known
        self.shared: dict[tuple[int, ...], Ref] = {}

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def one_of(self, *choices):
        return self.draw(st.sampled_from(choices))

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=self.random, dtype=torch.float64)

    def put(self, value: Tensor) -> Ref:
        """A parameter: one of its own, one in the stack, or one of the same shape that is there already."""
        shape = tuple(value.shape)
        where = self.draw(st.integers(0, 3))
        if where == 0 and shape in self.shared:
            return self.shared[shape]
        if where == 1:
            offset = sum(t.numel() for t in self.stacked) + 1  # one unused element in front of each
            self.stacked += [torch.zeros(1, dtype=torch.float64), value.flatten()]
            place = self.builder.ref(self.stack, offset)
        else:
            place = self.builder.ref(value.clone().requires_grad_())
        self.shared[shape] = place
        return place

    def weights(self, inputs: int, out: int, mask: Tensor | None = None) -> Weights:
        weight = self.put(self.normal(out, inputs, scale=1 / math.sqrt(inputs)))
        bias = self.put(self.normal(out, scale=0.3)) if self.flag() else ABSENT
        if mask is None:
            return Weights(out, weight, bias)
        return Weights(out, weight, bias, self.builder.ref(mask if self.flag() else mask.double()))

    def activation(self) -> tuple[str, float]:
        kind = self.one_of(*ACTS)
        return kind, self.draw(st.sampled_from((0.01, 0.3, 1.0))) if kind in ("leaky_relu", "elu") else 0.0

    def transformer(self, features: int) -> tuple[Transformer, int]:
        """A transformer, and how many raw values it takes."""
        gain = self.one_of(1.0, 0.5)
        if self.flag():
            tails, form = self.one_of(*SPLINES)
            bins = self.draw(st.integers(1, 6))
            box = self.one_of(None, (-2.0, 3.0, -1.0, 4.0)) if tails is None else None
            wrap = self.wraps and tails == "linear" and self.flag()
            t = spline(
                bins,
                tails=tails,
                tail_bound=self.one_of(1.0, 3.0),
                box=box,
                parameterization=form,
                gain=gain,
                wrap=wrap,
            )
            return t, features * t.count
        squash = self.one_of(*SQUASHES)
        clamp = {"softplus": self.one_of(1e-3, 0.1), "softclip": self.one_of(2.0, 6.9)}.get(
            squash, self.one_of(1.0, 1.5)
        )
        layout = self.one_of("scale_shift", "shift_scale", "interleaved", "interleaved_shift_first")
        return affine(features, squash, clamp=clamp, gain=gain, layout=layout), features * (
            1 if squash == "none" else 2
        )

    def net(self, features: int, outputs: int) -> Net:
        """A net of any steps: an MLP, a residual net with context by concatenation, sum or gate, or free steps."""
        activation, slope = self.activation()
        hidden = self.draw(st.integers(*self.hidden))
        context = self.context > 0 and (features == 0 or self.flag())
        inputs = features + (self.context if context else 0)
        if features == 0:  # the context alone conditions
            net = NetBuilder()
            value = net.act(net.dense(1, self.weights(self.context, hidden)), activation, slope)
            return net.build(net.dense(value, self.weights(hidden, outputs)))
        shape = self.one_of("mlp", "residual", "free", "chains")
        if shape == "chains":
            return self.chains(features, outputs, hidden)
        if shape == "mlp":
            widths = [inputs, *[hidden] * self.draw(st.integers(0, 2)), outputs]
            layers = [self.weights(a, b) for a, b in zip(widths, widths[1:], strict=False)]
            return mlp(layers, activation=activation, slope=slope, context=context, last=self.one_of("none", "tanh"))
        if shape == "residual":
            gated, shifted = (self.context > 0 and self.flag() for _ in range(2))
            from_context = self.weights(self.context, hidden) if self.context else None
            blocks = [
                Block(
                    self.weights(hidden, hidden),
                    self.weights(hidden, hidden),
                    from_context if gated else None,
                    from_context if shifted else None,
                )
                for _ in range(self.draw(st.integers(0, 2)))
            ]
            return residual(
                self.weights(inputs, hidden),
                blocks,
                self.weights(hidden, outputs),
                activation=activation,
                slope=slope,
                context=context,
                shift=from_context if shifted else None,
                last_activation=self.flag(),
            )
        net = NetBuilder()
        value = net.concat(0, 1) if context else 0
        size, sizes = inputs, {0: features, value: inputs}
        for _ in range(self.draw(st.integers(1, 5))):
            step = self.one_of("dense", "act", "add", "glu", "concat")
            other = self.draw(st.sampled_from([v for v, s in sizes.items() if s == size]))
            if step == "dense":
                value, size = net.dense(value, self.weights(size, hidden)), hidden
            elif step == "act":
                value = net.act(value, *self.activation())
            elif step == "concat":
                value, size = net.concat(value, other), size + sizes[other]
            else:
                value = net.add(value, other) if step == "add" else net.glu(value, other)
            sizes[value] = size
        if outputs > 1 and self.flag():  # two nets, one for each part of the raw values
            first = outputs // 2
            ends = [net.dense(v, self.weights(sizes[v], n)) for v, n in ((value, first), (0, outputs - first))]
            return net.build(*ends)
        return net.build(net.dense(value, self.weights(size, outputs)))

    def chains(self, features: int, outputs: int, hidden: int) -> Net:
        """One or two nets of panels, which may read a part of the context."""
        net = NetBuilder()
        value, inputs = 0, features
        if self.context and self.flag():
            first = self.draw(st.integers(0, self.context - 1))
            count = self.draw(st.integers(1, self.context - first))
            value, inputs = net.concat(0, net.context(first, count)), features + count
        ends = []
        for part in (outputs,) if outputs % 2 or self.flag() else (outputs // 2,) * 2:
            inner = net.act(net.panels(value, self.weights(inputs, hidden)), "leaky_relu", 0.3)
            ends.append(net.panels(inner, self.weights(hidden, part)))
        return net.build(*ends)

    def masked_net(self, transformer: Transformer, outputs: int) -> Net:
        """Dense layers with masks, as MADE has them; the context comes by concatenation or by a sum."""
        order = self.draw(st.permutations(range(self.dim)))
        hidden = [self.draw(st.integers(*self.hidden)) for _ in range(self.draw(st.integers(0, 2)))]
        if isinstance(transformer, SplineTransformer):
            owners = [j for j in range(self.dim) for _ in range(transformer.count)]
        else:
            owners = [0] * outputs
            for name in ("shift",) if transformer.squash == "none" else ("shift", "scale"):
                for j, place in enumerate(transformer.places(name, self.dim)):
                    owners[place] = j
        found = masks(order, hidden, owners)
        context = self.context > 0 and self.flag()
        if context:  # read by every unit
            found[0] = torch.cat([found[0], torch.ones(found[0].shape[0], self.context, dtype=torch.bool)], 1)
        layers = [self.weights(mask.shape[1], mask.shape[0], mask) for mask in found]
        activation, slope = self.activation()
        if self.context == 0 or context or not hidden:
            return mlp(layers, activation=activation, slope=slope, context=context)
        blocks = []
        if self.flag():
            inside = torch.arange(hidden[-1]) % max(self.dim - 1, 1) + 1
            mask = inside[:, None] >= inside
            blocks = [
                Block(
                    *(self.weights(hidden[-1], hidden[-1], mask) for _ in range(2)),
                    shift=self.weights(self.context, hidden[-1]),
                )
            ]
        if len(layers) != 2:
            return mlp(layers, activation=activation, slope=slope)
        shift = self.weights(self.context, hidden[0])
        return residual(layers[0], blocks, layers[-1], activation=activation, slope=slope, shift=shift)

    def layer(self, kind: str) -> None:
        build, dim, inverse = self.builder, self.dim, self.draw(st.integers(0, 3)) == 0
        form, eps = self.one_of(*FORMS), self.one_of(1e-3, 0.1)
        if kind == "affine":
            # away from 0, which no scale may be, and not shared, for the same reason
            scale = (
                self.normal(dim).sign() * (0.5 + self.normal(dim).abs())
                if form == "plain"
                else self.normal(dim, scale=0.5)
            )
            parts = self.one_of("both", "shift", "scale")
            shift = ABSENT if parts == "scale" else self.put(self.normal(dim))
            scale = ABSENT if parts == "shift" else build.ref(scale.requires_grad_())
            build.affine(shift, scale, order=self.one_of(*ORDERS), form=form, eps=eps, inverse=inverse)
        elif kind == "permute":
            build.permute(self.draw(st.permutations(range(dim))), inverse=inverse)
        elif kind == "shuffle":
            index = torch.randperm(dim, generator=self.random)
            build.shuffle(build.ref(index), inverse=inverse)
        elif kind == "linear":
            diagonal = 0.5 + self.normal(dim).abs() if form == "plain" else self.normal(dim, scale=0.3)
            bias = self.put(self.normal(dim)) if self.flag() else ABSENT
            options = dict(bias=bias, form=form, eps=eps, inverse=inverse)
            if self.flag():
                square = self.normal(dim, dim, scale=0.5 / dim)
                square.diagonal().copy_(diagonal)
                build.linear(build.ref(square.requires_grad_()), storage="square", **options)
            else:
                triangle = dim * (dim - 1) // 2
                lower, upper = (build.ref(self.normal(triangle, scale=0.5 / dim).requires_grad_()) for _ in range(2))
                build.linear(lower, upper, build.ref(diagonal.requires_grad_()), **options)
        elif kind == "activation":
            build.activation(self.one_of(0.1, 0.5, 2.0), exact=True, inverse=inverse)
        elif kind == "coupling":
            # a third part of the features neither conditions nor is transformed
            order = self.draw(st.permutations(range(dim)))
            least = 0 if self.context else 1
            n_conditioning = self.draw(st.integers(least, max(dim - 1, least)))
            n_transformed = self.draw(st.integers(1, max(dim - n_conditioning, 1)))
            if n_conditioning + n_transformed > dim:  # one feature, and no context
                return self.layer("affine")
            conditioning, transformed = order[:n_conditioning], order[n_conditioning : n_conditioning + n_transformed]
            transformer, outputs = self.transformer(n_transformed)
            build.coupling(conditioning, transformed, self.net(n_conditioning, outputs), transformer, inverse=inverse)
        else:
            transformer, outputs = self.transformer(dim)
            build.autoregressive(self.masked_net(transformer, outputs), transformer, inverse=inverse)
        return None

    def finish(self, batch: int) -> Drawn:
        program = self.builder.build()
        parameters = list(self.builder.tensors)
        for place, tensor in enumerate(parameters):
            if tensor is self.stack:
                parameters[place] = torch.cat(self.stacked).requires_grad_()
        x = self.normal(batch, self.dim).requires_grad_()
        context = self.normal(batch, self.context).requires_grad_() if self.context else None
        return Drawn(program, parameters, x, context)


@st.composite
def programs(
    draw,
    *,
    kinds: tuple[str, ...] = KINDS,
    dims: tuple[int, int] = (1, 17),
    batches: tuple[int, int] = (0, 70),
    layers: tuple[int, int] = (1, 6),
    wraps: bool = True,
    hidden: tuple[int, int] = (1, 9),
) -> Drawn:
    """Programs of 1 to 6 layers, with or without a context; without ``wraps`` all have an inverse everywhere."""
    context, seed = draw(st.sampled_from((0, 0, 1, 3, 20))), draw(st.integers(0, 2**20))
    random = _Draw(draw, draw(st.integers(*dims)), context, seed, wraps, hidden)
    for _ in range(draw(st.integers(*layers))):
        random.layer(draw(st.sampled_from(kinds)))
    return random.finish(draw(st.integers(*batches)))
