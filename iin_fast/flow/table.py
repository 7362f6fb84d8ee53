"""A flow program as a table for a person."""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from ..ops.affine_coupling import SQUASHES
from . import layers as L

if TYPE_CHECKING:
    from .program import FlowProgram

__all__ = ["table"]


def table(program: "FlowProgram") -> str:
    """Number, layer, sizes and parameters of each layer; the steps of a net stand below their layer."""
    context = f"context {program.context}" if program.context else "no context"
    head = f"flow of {_many(program.dim, 'feature')}, {context}, {_many(len(program.layers), 'layer')}, {_many(program.tensors, 'tensor')}"
    rows = [("#", "layer", "sizes", "parameters")]
    for number, (layer, reads) in enumerate(zip(program.layers, program.reads, strict=True)):
        inner = layer.layer if isinstance(layer, L.Inverse) else layer
        if isinstance(inner, (L.Coupling, L.Autoregressive)):
            rows.append((str(number), L.kind(layer), _features(inner, program.dim), ""))
            rows += _net(inner, program, reads)
        else:
            rows.append((str(number), L.kind(layer), _sizes(inner, program.dim), _parameters(reads)))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    return "\n".join([head, *(line.rstrip() for line in lines)])


def _many(count: int, name: str) -> str:
    return f"{count} {name}" + ("" if count == 1 else "s")


def _list(index: Sequence[int]) -> str:
    """``0 … 5`` for features that follow each other, else each of them."""
    if len(index) > 2 and list(index) == list(range(index[0], index[0] + len(index))):
        return f"{index[0]} … {index[-1]}"
    shown = [str(i) for i in index[:12]] + (["…"] if len(index) > 12 else [])
    return " ".join(shown) or "nothing"


def _scale(form: str, eps: float) -> str:
    return "plain" if form == "plain" else form if form == "exp" else f"softplus + {eps:g}"


def _sizes(layer: L.Layer, dim: int) -> str:
    if isinstance(layer, L.Affine):
        formula = "x * s + t" if layer.order == "scale_first" else "s * (x + t)"
        return f"{dim}: {formula}, s {_scale(layer.form, layer.eps)}"
    if isinstance(layer, L.Linear):
        return f"{dim} x {dim}: {layer.storage}, diagonal {_scale(layer.form, layer.eps)}"
    if isinstance(layer, L.Permute):
        return _list(layer.index)
    if isinstance(layer, L.Shuffle):
        return str(dim)
    assert isinstance(layer, L.Activation)
    return f"{dim}: slope {layer.slope:g}, " + ("log-det counted" if layer.exact else "log-det not counted")


def _features(layer: L.Coupling | L.Autoregressive, dim: int) -> str:
    if isinstance(layer, L.Autoregressive):
        return f"{dim}: each from those before it"
    return f"{_list(layer.transformed)} from {_list(layer.conditioning)}"


def _net(
    layer: L.Coupling | L.Autoregressive, program: "FlowProgram", reads: Sequence[L.Read]
) -> list[tuple[str, str, str, str]]:
    features = program.dim if isinstance(layer, L.Autoregressive) else len(layer.conditioning)
    transformed = program.dim if isinstance(layer, L.Autoregressive) else len(layer.transformed)
    sizes = layer.net.sizes(features, program.context)
    names = {0: "features", 1: "context"}

    def value(i: int) -> str:
        return names.get(i, f"v{i}")

    rows = []
    for number, step in enumerate(layer.net.steps):
        own = [r._replace(name=r.name.split()[-1]) for r in reads if r.name.startswith(f"step {number} ")]
        sources = ", ".join(f"{value(s)} {sizes[s]}" for s in step.sources)
        word = step.kind if isinstance(step, L.Act) else L.kind(step)
        if isinstance(step, L.Act) and step.kind in ("leaky_relu", "elu"):
            word += f" {step.slope:g}"
        rows.append(("", f"  {value(number + 2)} = {word}", f"{sources} -> {sizes[number + 2]}", _parameters(own)))
    raw = ", ".join(f"{value(i)} {sizes[i]}" for i in layer.net.outputs)
    t = layer.transformer
    if isinstance(t, L.SplineTransformer):
        tails = "no tails" if t.tails == "none" else f"{t.tails} tails"
        options = f"{t.bins} bins, {tails}, {t.form}, box {t.left:g} {t.right:g} {t.bottom:g} {t.top:g}"
        options += ", wrapped" if t.wrap else ""
    else:
        options = t.squash if SQUASHES[t.squash].clamp_is == "no option" else f"{t.squash} {t.clamp:g}"
    options += f", gain {t.gain:g}" if t.gain != 1 else ""
    return [*rows, ("", f"  {L.kind(t)}", f"{raw} -> {transformed}: {options}", "")]


def _parameters(reads: Sequence[L.Read]) -> str:
    return ", ".join(f"{r.name} {r.ref.tensor}[{r.ref.offset}:{r.ref.offset + prod(r.shape)}]" for r in reads)
