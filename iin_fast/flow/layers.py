"""The layers of a flow program, the steps of their nets and their transformers: plain, immutable data.

A layer knows its sizes, what it reads from the parameters, and how to refuse what does not fit. What it computes is defined in
iin_fast/ops/flow_program/reference.py.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from ..ops.affine_coupling import SQUASHES
from ..ops.spline_coupling import PARAMETERIZATIONS, TAILS, check_options, parameter_count

__all__ = [
    "ABSENT",
    "ACTS",
    "FORMS",
    "MOST",
    "MOST_TENSORS",
    "ORDERS",
    "STORAGES",
    "Act",
    "Activation",
    "Add",
    "Affine",
    "AffineTransformer",
    "Autoregressive",
    "Concat",
    "Context",
    "Coupling",
    "Dense",
    "Glu",
    "Inverse",
    "Layer",
    "Linear",
    "Net",
    "Panels",
    "Permute",
    "Read",
    "Ref",
    "Shuffle",
    "SplineTransformer",
    "Step",
    "Transformer",
    "kind",
]

# The place of a name is its code in the text of a program.
ORDERS = ("scale_first", "shift_first")  # x * s + t, s * (x + t)
FORMS = ("plain", "exp", "softplus")  # s = raw, exp(raw), softplus(raw) + eps
STORAGES = ("packed", "square")
ACTS = ("none", "relu", "leaky_relu", "elu", "silu", "gelu", "tanh", "sigmoid", "atan")


class Ref(NamedTuple):
    """Where a parameter starts: the index of its tensor, and the element of that tensor's contiguous values."""

    tensor: int
    offset: int = 0


ABSENT = Ref(-1, 0)
"""No parameter."""

MOST = 2**24
"""The largest size in a program: products of two fit 64 bits."""

MOST_TENSORS = 2**16


class Read(NamedTuple):
    """A parameter as a layer reads it."""

    name: str
    ref: Ref
    shape: tuple[int, ...]
    mask: bool = False
    integer: bool = False  # int64

    @property
    def learned(self) -> bool:
        """Whether it can have a gradient."""
        return not (self.mask or self.integer)


def _expect(good: bool, message: str) -> None:
    if not good:
        raise ValueError(message)


def _expect_name(name: str, value: object, allowed: Sequence[str]) -> None:
    _expect(value in allowed, f"{name} is {value!r}, expected one of {', '.join(allowed)}")


def _expect_number(name: str, value: object, expected: str, good: bool) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    _expect(number and good, f"{name} is {value!r}, expected {expected}")


def _expect_index(name: str, index: Sequence[int], dim: int) -> None:
    for i in index:
        _expect(0 <= i < dim, f"{name} holds {i}, expected features of 0 … {dim - 1}")
    twice = next((i for i in index if index.count(i) > 1), None) if len(set(index)) < len(index) else None
    _expect(twice is None, f"{name} holds {twice} more than once")


def _present(*reads: Read) -> tuple[Read, ...]:
    return tuple(read for read in reads if read.ref != ABSENT)


# ---------------------------------------------------------------- nets


@dataclass(frozen=True)
class Dense:
    """value[source] weight^T + bias; weight and mask ``[out, size of source]`` as torch.nn.Linear keeps it."""

    source: int
    out: int
    weight: Ref
    bias: Ref = ABSENT
    mask: Ref = ABSENT

    @property
    def sources(self) -> tuple[int, ...]:
        return (self.source,)

    def size(self, sizes: Sequence[int]) -> int:
        _expect(self.out >= 1, f"out is {self.out}, expected at least 1")
        _expect(self.weight != ABSENT, "weight is absent, expected a parameter")
        return self.out

    def reads(self, sizes: Sequence[int]) -> tuple[Read, ...]:
        shape = (self.out, sizes[self.source])
        weight, bias = Read("weight", self.weight, shape), Read("bias", self.bias, shape[:1])
        return _present(weight, bias, Read("mask", self.mask, shape, mask=True))


@dataclass(frozen=True)
class Panels(Dense):
    """A dense layer whose weight lies in panels (iin_fast/ops/flow/layout.py); it takes no mask."""

    def size(self, sizes: Sequence[int]) -> int:
        _expect(self.mask == ABSENT, "mask is there, which a weight in panels does not take")
        return super().size(sizes)


@dataclass(frozen=True)
class Act:
    """An activation; ``slope`` is that of leaky_relu below 0, and alpha of elu."""

    kind: str
    slope: float
    source: int

    @property
    def sources(self) -> tuple[int, ...]:
        return (self.source,)

    def size(self, sizes: Sequence[int]) -> int:
        _expect_name("kind", self.kind, ACTS)
        _expect_number("slope", self.slope, "a finite number", True)
        if self.kind in ("leaky_relu", "elu"):  # their derivatives are told from the sign of the result
            _expect_number("slope", self.slope, f"0 or more for {self.kind}", self.slope >= 0)
        return sizes[self.source]

    def reads(self, sizes: Sequence[int]) -> tuple[Read, ...]:
        return ()


@dataclass(frozen=True)
class _Pair:
    a: int
    b: int

    @property
    def sources(self) -> tuple[int, ...]:
        return self.a, self.b

    def size(self, sizes: Sequence[int]) -> int:
        a, b = sizes[self.a], sizes[self.b]
        _expect(a == b, f"value {self.a} has {a} features and value {self.b} has {b}, expected as many")
        return a

    def reads(self, sizes: Sequence[int]) -> tuple[Read, ...]:
        return ()


@dataclass(frozen=True)
class Add(_Pair):
    """a + b."""


@dataclass(frozen=True)
class Glu(_Pair):
    """a * sigmoid(b)."""


@dataclass(frozen=True)
class Concat(_Pair):
    """a, and b behind it."""

    def size(self, sizes: Sequence[int]) -> int:
        return sizes[self.a] + sizes[self.b]


@dataclass(frozen=True)
class Context:
    """Features ``first … first + count - 1`` of the context."""

    first: int
    count: int

    @property
    def sources(self) -> tuple[int, ...]:
        return (1,)

    def size(self, sizes: Sequence[int]) -> int:
        _expect(
            self.first >= 0 and self.count >= 1 and self.first + self.count <= sizes[1],
            f"first is {self.first} and count {self.count}, expected a part of {sizes[1]} features",
        )
        return self.count

    def reads(self, sizes: Sequence[int]) -> tuple[Read, ...]:
        return ()


Step = Dense | Panels | Act | Add | Glu | Concat | Context


@dataclass(frozen=True)
class Net:
    """Value 0 is the conditioning features, value 1 the context, step k makes value k + 2; ``outputs`` are values, one behind the other."""

    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def sizes(self, features: int, context: int) -> list[int]:
        """How many features each value has. Raises ValueError where steps don't fit each other."""
        sizes = [features, context]
        for number, step in enumerate(self.steps):
            try:
                for source in step.sources:
                    _defined(source, sizes)
                size = step.size(sizes)
                _expect(size <= MOST, f"{size} features, expected at most {MOST}")
                sizes.append(size)
            except ValueError as error:
                raise ValueError(f"step {number} ({kind(step)}): {error}") from None
        _expect(len(self.outputs) > 0, "the net has no outputs")
        for output in self.outputs:
            made = 2 <= output < len(sizes)
            _expect(made, f"the net gives out value {output}, expected one that a step makes: 2 … {len(sizes) - 1}")
        _expect(len(set(self.outputs)) == len(self.outputs), "the net gives out a value twice, expected each once")
        return sizes

    def reads(self, sizes: Sequence[int]) -> Iterator[Read]:
        for number, step in enumerate(self.steps):
            for read in step.reads(sizes):
                yield read._replace(name=f"step {number} {read.name}")


def _defined(value: int, sizes: Sequence[int]) -> None:
    """Refuse a value that no step before has made, or that is empty."""
    _expect(0 <= value < len(sizes), f"value {value} is not defined; values before are 0 … {len(sizes) - 1}")
    if sizes[value] == 0:
        raise ValueError(
            f"value {value} is empty: " + ("the program has no context" if value else "nothing conditions")
        )


# ---------------------------------------------------------------- transformers


@dataclass(frozen=True)
class AffineTransformer:
    """Feature j becomes x exp(squash(raw scale)) + shift.

    raw scale = gain * raw[scale_at + j * scale_step], shift = gain * raw[shift_at + j * shift_step]; squash "none" has no scale, and scale_at -1.
    """

    squash: str
    clamp: float
    gain: float
    scale_at: int
    scale_step: int
    shift_at: int
    shift_step: int

    def check(self, features: int, raw: int) -> None:
        _expect_name("squash", self.squash, tuple(SQUASHES))
        _expect_number("gain", self.gain, "a finite number", True)
        if SQUASHES[self.squash].clamp_is == "least scale":
            _expect_number("clamp", self.clamp, "at least 0", self.clamp >= 0)
        else:
            _expect_number("clamp", self.clamp, "a number above 0", self.clamp > 0)
        additive = self.squash == "none"
        if additive:
            _expect(self.scale_at == -1, f"scale_at is {self.scale_at}, expected -1 for squash none")
        wanted = features * (1 if additive else 2)
        meaning = "a shift" if additive else "a raw scale and a shift"
        _expect(raw == wanted, f"the net has {raw} outputs, expected {wanted}: {meaning} for {features} features")
        parts = ("shift",) if additive else ("scale", "shift")
        for name in parts:
            step: int = getattr(self, f"{name}_step")
            _expect(1 <= step <= MOST, f"{name}_step is {step}, expected 1 … {MOST}")
            first: int = getattr(self, f"{name}_at")
            last = first + (features - 1) * step
            _expect(0 <= first and last < raw, f"the {name}s lie at {first} … {last}, expected within 0 … {raw - 1}")
        if not additive:  # in twice as many places, two that overlap do so at their start
            scales, shifts = self.places("scale", features), self.places("shift", features)
            overlap = any(i in shifts for i in scales[:2]) or any(i in scales for i in shifts[:2])
            _expect(not overlap, "a raw value is both scale and shift, expected places of their own")

    def places(self, name: str, features: int) -> range:
        """Where the raw scales or shifts of the features lie."""
        at, step = (self.scale_at, self.scale_step) if name == "scale" else (self.shift_at, self.shift_step)
        return range(at, at + features * step, step)


@dataclass(frozen=True)
class SplineTransformer:
    """A rational-quadratic spline of each feature, as op ``spline_coupling`` has it; ``gain`` multiplies raw widths and heights.

    ``wrap``: before it x turns half around the circle that the box is, ``x mod (right - left)`` less its middle.
    """

    bins: int
    tails: str
    form: str
    left: float
    right: float
    bottom: float
    top: float
    min_width: float
    min_height: float
    min_derivative: float
    gain: float = 1.0
    wrap: bool = False

    @property
    def count(self) -> int:
        """Raw values of a feature."""
        return parameter_count(self.bins, self.tails)

    @property
    def box(self) -> tuple[float, float, float, float]:
        return self.left, self.right, self.bottom, self.top

    def check(self, features: int, raw: int) -> None:
        _expect_name("tails", self.tails, tuple(TAILS))
        _expect_name("form", self.form, tuple(PARAMETERIZATIONS))
        _expect(1 <= self.bins <= MOST, f"bins is {self.bins}, expected 1 … {MOST}")
        for field in (field for field in fields(self) if field.type is float):
            _expect_number(field.name, getattr(self, field.name), "a finite number", True)
        if self.tails != "none":
            bounds = -self.right, self.right, -self.right, self.right
            _expect(
                self.box == bounds, f"box is {self.box}, expected the same bound on each side for tails {self.tails}"
            )
        tails, box = (None, self.box) if self.tails == "none" else (self.tails, None)
        _expect(not self.wrap or self.tails == "linear", f"wrap with tails {self.tails}, expected linear ones")
        try:
            bound = 1.0 if box else self.right
            check_options(
                "spline", self.bins, tails, bound, box, self.min_width, self.min_height, self.min_derivative, self.form
            )
        except TypeError as error:
            raise ValueError(str(error)) from None
        wanted = features * self.count
        parts = f"{self.bins} widths, {self.bins} heights and {self.count - 2 * self.bins} derivatives"
        _expect(raw == wanted, f"the net has {raw} outputs, expected {wanted}: {parts} for each of {features} features")


Transformer = AffineTransformer | SplineTransformer


# ---------------------------------------------------------------- layers


@dataclass(frozen=True)
class Affine:
    """A scale and a shift of every feature, ``[dim]`` each; logdet = sum log|s|."""

    order: str
    form: str
    eps: float
    shift: Ref = ABSENT
    scale: Ref = ABSENT

    def check(self, dim: int, context: int) -> None:
        _expect_name("order", self.order, ORDERS)
        _expect_name("form", self.form, FORMS)
        _expect_number("eps", self.eps, "at least 0", self.eps >= 0)

    def reads(self, dim: int, context: int) -> Iterator[Read]:
        yield from _present(Read("shift", self.shift, (dim,)), Read("scale", self.scale, (dim,)))


@dataclass(frozen=True)
class Permute:
    """y[j] = x[index[j]]."""

    index: tuple[int, ...]

    def check(self, dim: int, context: int) -> None:
        _expect(len(self.index) == dim, f"index holds {len(self.index)} features, expected {dim}")
        _expect_index("index", self.index, dim)

    def reads(self, dim: int, context: int) -> Iterator[Read]:
        yield from ()


@dataclass(frozen=True)
class Shuffle:
    """y[j] = x[index[j]], with an index that is a parameter: ``[dim]`` int64."""

    index: Ref

    def check(self, dim: int, context: int) -> None:
        _expect(self.index != ABSENT, "index is absent, expected a parameter")

    def reads(self, dim: int, context: int) -> Iterator[Read]:
        yield Read("index", self.index, (dim,), integer=True)


@dataclass(frozen=True)
class Linear:
    """y = L (U x) + bias, L with a unit diagonal; logdet = sum log|diagonal of U|.

    "packed": the strict triangles row by row, and the raw diagonal; "square": all in one matrix ``[dim, dim]``, ``lower``.
    """

    storage: str
    form: str
    eps: float
    lower: Ref
    upper: Ref = ABSENT
    diagonal: Ref = ABSENT
    bias: Ref = ABSENT

    def check(self, dim: int, context: int) -> None:
        _expect_name("storage", self.storage, STORAGES)
        _expect_name("form", self.form, FORMS)
        _expect_number("eps", self.eps, "at least 0", self.eps >= 0)
        packed = self.storage == "packed"
        for name, wanted in (("lower", True), ("upper", packed), ("diagonal", packed)):
            present = getattr(self, name) != ABSENT
            _expect(
                present == wanted,
                f"{name} is {'there' if present else 'absent'}, which storage {self.storage} does not allow",
            )

    def reads(self, dim: int, context: int) -> Iterator[Read]:
        triangle = (dim * (dim - 1) // 2,)
        lower = (dim, dim) if self.storage == "square" else triangle
        yield from _present(
            Read("lower", self.lower, lower),
            Read("upper", self.upper, triangle),
            Read("diagonal", self.diagonal, (dim,)),
            Read("bias", self.bias, (dim,)),
        )


@dataclass(frozen=True)
class Coupling:
    """Features ``transformed`` are mapped by what the net reads from features ``conditioning``; the rest passes."""

    conditioning: tuple[int, ...]
    transformed: tuple[int, ...]
    net: Net
    transformer: Transformer

    def check(self, dim: int, context: int) -> None:
        _expect_index("conditioning", self.conditioning, dim)
        _expect_index("transformed", self.transformed, dim)
        both = set(self.conditioning) & set(self.transformed)
        _expect(not both, f"feature {min(both, default=0)} conditions and is transformed, expected one of both")
        _expect(len(self.transformed) > 0, "transformed is empty, expected at least one feature")
        _check_net(self.net, self.transformer, len(self.conditioning), context, len(self.transformed))

    def reads(self, dim: int, context: int) -> Iterator[Read]:
        yield from self.net.reads(self.net.sizes(len(self.conditioning), context))


@dataclass(frozen=True)
class Autoregressive:
    """All features are mapped by what the net reads from all; its masks let no feature depend on itself, in some order."""

    net: Net
    transformer: Transformer

    def check(self, dim: int, context: int) -> None:
        for number, step in enumerate(self.net.steps):
            if isinstance(step, (Panels, Context)):
                raise ValueError(f"step {number} ({kind(step)}): expected in couplings alone")
        _check_net(self.net, self.transformer, dim, context, dim)

    def reads(self, dim: int, context: int) -> Iterator[Read]:
        yield from self.net.reads(self.net.sizes(dim, context))


def _check_net(net: Net, transformer: Transformer, features: int, context: int, transformed: int) -> None:
    sizes = net.sizes(features, context)
    raw = sum(sizes[output] for output in net.outputs)
    try:
        transformer.check(transformed, raw)
    except ValueError as error:
        raise ValueError(f"{kind(transformer)} transformer: {error}") from None


@dataclass(frozen=True)
class Activation:
    """y = x from 0 on, slope * x below; its log-det counts if ``exact`` (the published net2net code does not count it)."""

    slope: float
    exact: bool

    def check(self, dim: int, context: int) -> None:
        _expect_number("slope", self.slope, "a number above 0", self.slope > 0)

    def reads(self, dim: int, context: int) -> Iterator[Read]:
        yield from ()


@dataclass(frozen=True)
class Inverse:
    """The inverse map of a layer in the forward direction."""

    layer: "Affine | Permute | Shuffle | Linear | Coupling | Autoregressive | Activation"

    def check(self, dim: int, context: int) -> None:
        _expect(not isinstance(self.layer, Inverse), "the inverse of an inverse, expected the layer itself")
        self.layer.check(dim, context)

    def reads(self, dim: int, context: int) -> Iterator[Read]:
        yield from self.layer.reads(dim, context)


Layer = Affine | Permute | Shuffle | Linear | Coupling | Autoregressive | Activation | Inverse


def kind(item: Layer | Step | Transformer) -> str:
    """The word that starts an item in the text of a program."""
    if isinstance(item, Inverse) and not isinstance(item.layer, Inverse):
        return f"inverse {kind(item.layer)}"
    return type(item).__name__.removesuffix("Transformer").lower()
