"""Builders of flow programs and of the nets in them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from .layers import (
    ABSENT,
    Act,
    Activation,
    Add,
    Affine,
    AffineTransformer,
    Autoregressive,
    Concat,
    Context,
    Coupling,
    Dense,
    Glu,
    Inverse,
    Layer,
    Linear,
    Net,
    Panels,
    Permute,
    Ref,
    Shuffle,
    SplineTransformer,
    Step,
    Transformer,
)
from .program import FlowProgram

__all__ = ["Block", "NetBuilder", "ProgramBuilder", "Weights", "affine", "mlp", "residual", "spline"]

FEATURES, CONTEXT = 0, 1


class ProgramBuilder:
    """Puts layers and parameter tensors together.

    Args:
        dim: number of features.
        context: number of features of the context; 0: none.

    Attributes:
        tensors: what :meth:`ref` was given, in the order that the program names them.
        layers: what was appended.

    Example:
        >>> import torch
        >>> builder = ProgramBuilder(2)
        >>> scale = torch.nn.Parameter(torch.ones(2))
        >>> builder.affine(scale=builder.ref(scale))
        >>> builder.permute([1, 0])
        >>> program = builder.build()
        >>> program.text, len(builder.tensors)
        ('flow 1 2 0 1 2 affine 0 0 0.0 -1 0 0 0 permute 1 0', 1)
    """

    def __init__(self, dim: int, context: int = 0) -> None:
        self.dim = dim
        self.context = context
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}
        self.layers: list[Layer] = []

    def ref(self, tensor: Tensor | None, offset: int = 0) -> Ref:
        """A parameter that starts at element ``offset`` of ``tensor``; None: absent. A tensor has one place, however often it comes."""
        if tensor is None:
            return ABSENT
        place = self._places.setdefault(id(tensor), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(tensor)
        return Ref(place, offset)

    def add(self, layer: Layer, inverse: bool = False) -> None:
        """Append a layer, or with ``inverse`` its inverse map."""
        if inverse:
            layer = layer.layer if isinstance(layer, Inverse) else Inverse(layer)
        self.layers.append(layer)

    def affine(
        self,
        shift: Ref = ABSENT,
        scale: Ref = ABSENT,
        *,
        order: str = "scale_first",
        form: str = "plain",
        eps: float = 0.0,
        inverse: bool = False,
    ) -> None:
        """x * s + t, or with order "shift_first" s * (x + t); s is the plain scale, exp of it, or softplus of it + eps."""
        self.add(Affine(order, form, float(eps), shift, scale), inverse)

    def permute(self, index: Iterable[int], *, inverse: bool = False) -> None:
        """y[j] = x[index[j]]."""
        self.add(Permute(tuple(map(int, index))), inverse)

    def shuffle(self, index: Ref, *, inverse: bool = False) -> None:
        """y[j] = x[index[j]], with an index that is a tensor."""
        self.add(Shuffle(index), inverse)

    def linear(
        self,
        lower: Ref,
        upper: Ref = ABSENT,
        diagonal: Ref = ABSENT,
        bias: Ref = ABSENT,
        *,
        storage: str = "packed",
        form: str = "softplus",
        eps: float = 1e-3,
        inverse: bool = False,
    ) -> None:
        """L (U x) + bias; storage "packed": strict triangles and a diagonal, "square": ``lower`` is one matrix with all of them."""
        self.add(Linear(storage, form, float(eps), lower, upper, diagonal, bias), inverse)

    def coupling(
        self,
        conditioning: Iterable[int],
        transformed: Iterable[int],
        net: Net,
        transformer: Transformer,
        *,
        inverse: bool = False,
    ) -> None:
        """Map features ``transformed`` by what ``net`` reads from features ``conditioning``."""
        index = tuple(map(int, conditioning)), tuple(map(int, transformed))
        self.add(Coupling(*index, net, transformer), inverse)

    def autoregressive(self, net: Net, transformer: Transformer, *, inverse: bool = False) -> None:
        """Map every feature by what the masks of ``net`` let it read from the others."""
        self.add(Autoregressive(net, transformer), inverse)

    def activation(self, slope: float, *, exact: bool = True, inverse: bool = False) -> None:
        """x from 0 on, slope * x below."""
        self.add(Activation(float(slope), bool(exact)), inverse)

    def build(self) -> FlowProgram:
        """The program.

        Raises:
            ValueError: something does not fit; the message names the layer.
        """
        return FlowProgram(self.dim, self.context, len(self.tensors), tuple(self.layers))


# ---------------------------------------------------------------- transformers


def affine(
    features: int, squash: str, *, clamp: float = 1.0, gain: float = 1.0, layout: str = "scale_shift"
) -> AffineTransformer:
    """An affine transformer whose raw values lie in a usual order.

    Args:
        features: number of transformed features.
        squash, clamp: as of :func:`iin_fast.functional.affine_coupling`; "none" has shifts alone.
        gain: multiplies all raw values.
        layout: "scale_shift" (all scales, then all shifts), "shift_scale", or "interleaved" (scale and shift of a feature side by side).
    """
    places = {
        "scale_shift": (0, 1, features, 1),
        "shift_scale": (features, 1, 0, 1),
        "interleaved": (0, 2, 1, 2),
        "interleaved_shift_first": (1, 2, 0, 2),
    }
    if layout not in places:
        raise ValueError(f"affine: layout is {layout!r}, expected one of {', '.join(places)}")
    at = (-1, 0, 0, 1) if squash == "none" else places[layout]
    return AffineTransformer(squash, float(clamp), float(gain), *at)


def spline(
    bins: int,
    *,
    tails: str | None = "linear",
    tail_bound: float = 1.0,
    box: tuple[float, float, float, float] | None = None,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    parameterization: str = "nflows",
    gain: float = 1.0,
    wrap: bool = False,
) -> SplineTransformer:
    """A spline transformer with the arguments of :func:`iin_fast.functional.spline_coupling`.

    ``gain`` multiplies raw widths and heights; with ``wrap`` x turns half around a circle before it, as zuko's NCSF has it.
    """
    left, right, bottom, top = map(float, box or (-tail_bound, tail_bound, -tail_bound, tail_bound))
    width, height, slope, factor = map(float, (min_bin_width, min_bin_height, min_derivative, gain))
    form = tails or "none", parameterization
    return SplineTransformer(int(bins), *form, left, right, bottom, top, width, height, slope, factor, bool(wrap))


# ---------------------------------------------------------------- nets


class Weights(NamedTuple):
    """A dense layer: its outputs and its parameters."""

    out: int
    weight: Ref
    bias: Ref = ABSENT
    mask: Ref = ABSENT


class NetBuilder:
    """Appends steps; each gives the number of the value that it makes. Value 0 is the features, value 1 the context."""

    def __init__(self) -> None:
        self._steps: list[Step] = []

    def _add(self, step: Step) -> int:
        self._steps.append(step)
        return len(self._steps) + 1

    def dense(self, source: int, weights: Weights) -> int:
        return self._add(Dense(source, *weights))

    def panels(self, source: int, weights: Weights) -> int:
        return self._add(Panels(source, *weights))

    def act(self, source: int, kind: str, slope: float = 0.0) -> int:
        return self._add(Act(kind, float(slope), source))

    def add(self, a: int, b: int) -> int:
        return self._add(Add(a, b))

    def glu(self, a: int, gate: int) -> int:
        return self._add(Glu(a, gate))

    def concat(self, a: int, b: int) -> int:
        return self._add(Concat(a, b))

    def context(self, first: int, count: int) -> int:
        return self._add(Context(first, count))

    def build(self, *outputs: int) -> Net:
        return Net(tuple(self._steps), outputs)


def mlp(
    layers: Sequence[Weights],
    *,
    activation: str = "relu",
    slope: float = 0.0,
    context: bool = False,
    last: str = "none",
) -> Net:
    """Dense layers with an activation between them.

    Args:
        layers: at least one.
        activation: its kind; ``slope``: that of leaky_relu, or alpha of elu.
        context: append the context to the features.
        last: activation behind the last layer.
    """
    net = NetBuilder()
    value = net.concat(FEATURES, CONTEXT) if context else FEATURES
    for number, layer in enumerate(layers):
        if number:
            value = net.act(value, activation, slope)
        value = net.dense(value, layer)
    return net.build(value if last == "none" else net.act(value, last, slope))


class Block(NamedTuple):
    """A residual block of two dense layers, and what it does to the context, if anything."""

    inner: Weights
    outer: Weights
    gate: Weights | None = None  # of the context: glu with the block's result (nflows ResidualNet)
    shift: Weights | None = None  # of the context: added behind the inner layer (nflows MADE)


def residual(
    first: Weights,
    blocks: Sequence[Block],
    last: Weights,
    *,
    activation: str = "relu",
    slope: float = 0.0,
    context: bool = False,
    shift: Weights | None = None,
    last_activation: bool = False,
) -> Net:
    """A dense layer, residual blocks, and a dense layer.

    Args:
        first, blocks, last: the layers.
        activation: its kind; ``slope``: that of leaky_relu, or alpha of elu.
        context: append the context to the features.
        shift: a layer of the context; its activation is added behind ``first`` (nflows MADE).
        last_activation: the activation stands before ``last``, too (iin_fast.nn.ResidualNet).
    """
    net = NetBuilder()
    h = net.dense(net.concat(FEATURES, CONTEXT) if context else FEATURES, first)
    if shift is not None:
        h = net.add(h, net.act(net.dense(CONTEXT, shift), activation, slope))
    for block in blocks:
        step = net.dense(net.act(h, activation, slope), block.inner)
        if block.shift is not None:
            step = net.add(step, net.dense(CONTEXT, block.shift))
        step = net.dense(net.act(step, activation, slope), block.outer)
        if block.gate is not None:
            step = net.glu(step, net.dense(CONTEXT, block.gate))
        h = net.add(h, step)
    return net.build(net.dense(net.act(h, activation, slope) if last_activation else h, last))
