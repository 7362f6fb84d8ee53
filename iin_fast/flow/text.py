"""A flow program as one string of tokens, and back.

The grammar, tokens set apart by spaces; ints are decimal, floats as repr() writes them::

    program     := "flow" "1" dim context n_tensors n_layers layer*
    ref         := tensor offset                              (-1 0: absent)
    layer       := "affine" order form eps shift:ref scale:ref
                 | "permute" i_0 … i_{dim-1} | "shuffle" index:ref
                 | "linear" storage form eps lower:ref upper:ref diagonal:ref bias:ref
                 | "coupling" n c_1 … c_n n t_1 … t_n net transformer
                 | "autoregressive" net transformer
                 | "activation" slope exact
                 | "inverse" layer
    net         := "net" n_steps step* n_outputs value*
    step        := ("dense" | "panels") source out weight:ref bias:ref mask:ref | "act" kind slope source
                 | "add" a b | "glu" a b | "concat" a b | "context" first count
    transformer := "affine" squash clamp gain scale_at scale_step shift_at shift_step
                 | "spline" bins tails form left right bottom top min_width min_height min_derivative gain
                 | "wrapped" "spline" …

Names (order, form, storage, kind, squash, tails) are written as their codes.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, fields, replace
from typing import Any

from ..ops.affine_coupling import SQUASHES
from ..ops.spline_coupling import PARAMETERIZATIONS, TAILS
from . import layers as L

__all__ = ["parse", "write"]

VERSION = "1"
_INT = re.compile(r"-?[0-9]{1,18}")  # within 64 bits


def write(dim: int, context: int, tensors: int, program: Sequence[L.Layer]) -> str:
    """The text of a program."""
    words: list[object] = ["flow", VERSION, dim, context, tensors, len(program)]
    for layer in program:
        words += _layer(layer)
    return " ".join(repr(float(word)) if isinstance(word, float) else str(word) for word in words)


def _codes(names: Sequence[str] | Mapping[str, int]) -> Mapping[str, int]:
    return names if isinstance(names, Mapping) else {name: code for code, name in enumerate(names)}


# How the fields of a class follow each other behind its word: a name's codes, or the type.
_NAMES: dict[tuple[type, str], Mapping[str, int]] = {
    (L.Affine, "order"): _codes(L.ORDERS),
    (L.Affine, "form"): _codes(L.FORMS),
    (L.Linear, "storage"): _codes(L.STORAGES),
    (L.Linear, "form"): _codes(L.FORMS),
    (L.Act, "kind"): _codes(L.ACTS),
    (L.AffineTransformer, "squash"): {name: squash.code for name, squash in SQUASHES.items()},
    (L.SplineTransformer, "tails"): TAILS,
    (L.SplineTransformer, "form"): PARAMETERIZATIONS,
}


def _fields(cls: type) -> Iterator[Field[Any]]:
    return (field for field in fields(cls) if field.name != "wrap")  # a word in front


def _flat(item: Any) -> Iterator[object]:
    """The word and the fields of an item whose fields are names, numbers and refs."""
    yield L.kind(item)
    for field in _fields(type(item)):
        value = getattr(item, field.name)
        codes = _NAMES.get((type(item), field.name))
        if codes is not None:
            yield codes[value]
        elif isinstance(value, L.Ref):
            yield from value
        elif field.type is float:
            yield float(value)
        else:
            yield int(value)


def _layer(layer: L.Layer) -> Iterator[object]:
    if isinstance(layer, L.Inverse):
        yield "inverse"
        yield from _layer(layer.layer)
    elif isinstance(layer, L.Permute):
        yield "permute"
        yield from layer.index
    elif isinstance(layer, L.Coupling):
        yield "coupling"
        for index in (layer.conditioning, layer.transformed):
            yield len(index)
            yield from index
        yield from _conditioner(layer)
    elif isinstance(layer, L.Autoregressive):
        yield "autoregressive"
        yield from _conditioner(layer)
    else:
        yield from _flat(layer)


def _conditioner(layer: L.Coupling | L.Autoregressive) -> Iterator[object]:
    yield "net"
    yield len(layer.net.steps)
    for step in layer.net.steps:
        yield from _flat(step)
    yield len(layer.net.outputs)
    yield from layer.net.outputs
    if isinstance(layer.transformer, L.SplineTransformer) and layer.transformer.wrap:
        yield "wrapped"
    yield from _flat(layer.transformer)


class _Reader:
    """Takes one token after the other; raises ValueError that says which came and what was expected."""

    def __init__(self, text: str) -> None:
        self.words = text.split()
        self.place = 0

    def word(self, expected: str) -> str:
        if self.place == len(self.words):
            raise ValueError(f"the text ends after {self.place} tokens, expected {expected}")
        self.place += 1
        return self.words[self.place - 1]

    def one_of(self, *allowed: str) -> str:
        word = self.word(" or ".join(allowed))
        if word not in allowed:
            raise ValueError(f"token {self.place} is {word[:40]!r}, expected {' or '.join(allowed)}")
        return word

    def integer(self, name: str) -> int:
        word = self.word(name)
        if not _INT.fullmatch(word):
            raise ValueError(f"token {self.place} is {word[:40]!r}, expected {name}, an integer")
        return int(word)

    def count(self, name: str) -> int:
        number = self.integer(name)
        if not 0 <= number <= len(self.words) - self.place:
            raise ValueError(f"{name} is {number}, but {len(self.words) - self.place} tokens follow")
        return number

    def integers(self, count: int, name: str) -> tuple[int, ...]:
        return tuple(self.integer(name) for _ in range(count))

    def number(self, name: str) -> float:
        word = self.word(name)
        try:
            number = float(word) if word.isascii() and "_" not in word else math.nan
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"token {self.place} is {word[:40]!r}, expected {name}, a finite number")
        return number

    def flat(self, cls: Any) -> Any:
        """The fields of an item behind its word."""
        values: list[object] = []
        for field in _fields(cls):
            codes = _NAMES.get((cls, field.name))
            if codes is not None:
                code = self.integer(field.name)
                names = [name for name, known in codes.items() if known == code]
                if not names:
                    raise ValueError(f"{field.name} is {code}, expected a code of {', '.join(codes)}")
                values.append(names[0])
            elif field.type is L.Ref:
                values.append(L.Ref(self.integer(f"tensor of {field.name}"), self.integer(f"offset of {field.name}")))
            elif field.type is float:
                values.append(self.number(field.name))
            elif field.type is bool:
                values.append(self.one_of("0", "1") == "1")
            else:
                values.append(self.integer(field.name))
        return cls(*values)


_STEPS = {cls.__name__.lower(): cls for cls in (L.Dense, L.Panels, L.Act, L.Add, L.Glu, L.Concat, L.Context)}
_TRANSFORMERS = {"affine": L.AffineTransformer, "spline": L.SplineTransformer}
_FLAT_LAYERS = {"affine": L.Affine, "shuffle": L.Shuffle, "linear": L.Linear, "activation": L.Activation}
_LAYERS = (*_FLAT_LAYERS, "permute", "coupling", "autoregressive")


def _read_net(read: _Reader) -> tuple[L.Net, L.Transformer]:
    read.one_of("net")
    steps = tuple(read.flat(_STEPS[read.one_of(*_STEPS)]) for _ in range(read.count("n_steps")))
    outputs = read.integers(read.count("n_outputs"), "an output of the net")
    net, word = L.Net(steps, outputs), read.one_of(*_TRANSFORMERS, "wrapped")
    if word != "wrapped":
        return net, read.flat(_TRANSFORMERS[word])
    read.one_of("spline")
    return net, replace(read.flat(L.SplineTransformer), wrap=True)


def _read_layer(read: _Reader, word: str, dim: int) -> Any:
    if word in _FLAT_LAYERS:
        return read.flat(_FLAT_LAYERS[word])
    if word == "permute":
        return L.Permute(read.integers(dim, "a feature"))
    if word == "coupling":
        conditioning, transformed = (
            read.integers(read.count(f"number of {n}"), "a feature") for n in ("conditioning", "transformed")
        )
        return L.Coupling(conditioning, transformed, *_read_net(read))
    return L.Autoregressive(*_read_net(read))


def parse(text: str, make: Callable[[int, int, int, tuple[L.Layer, ...]], Any]) -> Any:
    """Read a text; ``make`` takes dim, context, the number of tensors, and the layers."""
    read = _Reader(text)
    read.one_of("flow")
    read.one_of(VERSION)
    dim, context, tensors = read.integers(3, "dim, context and the number of tensors")
    found: list[L.Layer] = []
    for number in range(read.count("n_layers")):
        word = "layer"
        try:
            word = read.one_of(*_LAYERS, "inverse")
            if word == "inverse":
                found.append(L.Inverse(_read_layer(read, read.one_of(*_LAYERS), dim)))
            else:
                found.append(_read_layer(read, word, dim))
        except ValueError as error:
            raise ValueError(f"layer {number} ({word}): {error}") from None
    if read.place != len(read.words):
        raise ValueError(f"{len(read.words) - read.place} tokens are left behind the last layer")
    return make(dim, context, tensors, tuple(found))
