"""The flow's Triton kernels. triton.py next door walks the blocks with them.

A stage is what one half of a coupling sees: a row [conditioning | transformed] of ``dim`` numbers in float32 at least.
A step is (block, half), step = 2 block + half. Both nets (s, t) of a step lie side by side: programs differ in ``net``.
What happens to a row between steps (swap, permutation, ActNorm, activation) is a map of columns plus an operation on
single numbers, so it is done where a column is stored: see _move and _pass.

Weights are read as they lie, in panels [in][64 outputs] (layout.py): no tile of a weight crosses a panel.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ..triton_common import INTERPRETED, add_term, autotuned, compensated, tanh
from .layout import PANEL

__all__ = [
    "DENORMALIZE",
    "DENORMALIZE_GRAD",
    "IDENTITY",
    "KEEP",
    "NORMALIZE",
    "NORMALIZE_GRAD",
    "SWAP",
    "TABLE",
    "UNSWAP",
]

# Maps of columns to the next stage, and operations on the way.
IDENTITY, SWAP, UNSWAP, TABLE = 0, 1, 2, 3
KEEP, NORMALIZE, DENORMALIZE, NORMALIZE_GRAD, DENORMALIZE_GRAD = 0, 1, 2, 3, 4
# The same for kernels, which read no plain numbers from outside.
_SWAP, _UNSWAP, _TABLE = map(tl.constexpr, (SWAP, UNSWAP, TABLE))
_NORMALIZE, _DENORMALIZE = map(tl.constexpr, (NORMALIZE, DENORMALIZE))
_NORMALIZE_GRAD, _DENORMALIZE_GRAD = map(tl.constexpr, (NORMALIZE_GRAD, DENORMALIZE_GRAD))
_PANEL = tl.constexpr(PANEL)


def _fitting(
    configs: list[triton.Config],
    _: dict[str, Any],
    *,
    batch_bucket: int,
    weight: torch.Tensor,
    WIDE: Any,
    LAST: bool = False,
    **__: Any,
) -> list[triton.Config]:
    """Small row tiles for small batches, large ones for large; tiles of wide types small enough not to spill."""
    batch = batch_bucket
    most = 16 if batch <= 16 else 32 if batch <= 128 else 128
    least = 16 if batch <= 128 else 64
    if WIDE == tl.float64:
        least, most = 16, 32
    deepest = 64 if batch <= 128 or weight.element_size() == 2 else 32
    if LAST and weight.dtype == torch.float32:
        # the coupling's backward needs registers too
        most = 32 if batch <= 128 else 64
        return [c for c in configs if c.kwargs == {"BLOCK_M": most, "BLOCK_N": 32, "BLOCK_K": 32}]
    return [c for c in configs if least <= c.kwargs["BLOCK_M"] <= most and c.kwargs["BLOCK_K"] <= deepest]


# Three shapes for batches up to 128, where reading the weights is all that counts: narrow tiles spread one weight over
# more processors. Four for larger ones, where arithmetic counts. The interpreter takes the first.
_TILES = [
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 64}, num_warps=4, num_stages=4),
    triton.Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=4, num_stages=4),
]
_OUTER_TILES = [
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}, num_warps=4, num_stages=4),
    triton.Config({"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=3),
]


def _outer_fitting(configs: list[triton.Config], _: dict[str, Any], *, WIDE: Any, **__: Any) -> list[triton.Config]:
    return configs[2:] if WIDE == tl.float64 else configs


_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """acc + a b. (The interpreter multiplies the bits of bfloat16, not the numbers; widened, products are the same.)"""
    if _INTERPRETED:
        return tl.dot(a.to(WIDE), b.to(WIDE), acc, input_precision=PRECISION, out_dtype=WIDE)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=WIDE)


@triton.jit
def _panel(first, inside, outside):
    """The panel of output ``first``: where it begins in a weight, its first output, its width."""
    start = first // _PANEL * _PANEL
    return start * inside, start, tl.minimum(_PANEL, outside - start)


@triton.jit
def _move(column, table, conditioning, transformed, MAP: tl.constexpr):
    """Where a column of a stage goes. (swap: the halves change place; a table is clamped: it may hold anything.)"""
    if MAP == _SWAP:
        return tl.where(column < conditioning, column + transformed, column - conditioning)
    elif MAP == _UNSWAP:
        return tl.where(column < transformed, column + conditioning, column - transformed)
    elif MAP == _TABLE:
        dim = conditioning + transformed
        to = tl.load(table + column, mask=column < dim, other=0).to(tl.int32)
        return tl.minimum(tl.maximum(to, 0), dim - 1)
    else:
        return column


@triton.jit
def _pass(value, column, to, valid, loc, scale, dim, SLOPE: tl.constexpr, OP: tl.constexpr, WIDE: tl.constexpr):
    """ActNorm with activation, or its inverse, of a value on its way; and 1.0 where the activation scaled."""
    if OP == _NORMALIZE:
        lo = tl.load(loc + to, mask=column < dim, other=0.0).to(WIDE)
        sc = tl.load(scale + to, mask=column < dim, other=1.0).to(WIDE)
        value = sc * (value + lo)
        negative = value < 0
        value = tl.where(negative, value * SLOPE, value)
    elif OP == _DENORMALIZE:
        lo = tl.load(loc + column, mask=column < dim, other=0.0).to(WIDE)
        sc = tl.load(scale + column, mask=column < dim, other=1.0).to(WIDE)
        negative = value < 0
        value = tl.where(negative, value / SLOPE, value) / sc - lo
    else:
        negative = value < value  # nowhere
    return value, (negative & valid).to(WIDE)


@triton.jit
def _pass_gradient(
    g, value, gl, column, to, valid, loc, scale, loc_parts, scale_parts, dim,
    SLOPE: tl.constexpr, OP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Backward of _pass for gradient g [rows, columns]. ``value``: what ActNorm put out (NORMALIZE_GRAD) or its inverse (DENORMALIZE_GRAD).

    Stores the sums over this program's rows of the gradients of loc and scale.
    """
    if OP == _NORMALIZE_GRAD:
        at = column
        sc = tl.load(scale + at, mask=at < dim, other=1.0).to(WIDE)
        negative = value < 0
        before = tl.where(negative, value / SLOPE, value)
        g = tl.where(negative, g * SLOPE, g)
        grad_scale = (g * before + gl) / sc
        g = g * sc
        grad_loc = g
    elif OP == _DENORMALIZE_GRAD:
        at = to
        lo = tl.load(loc + at, mask=at < dim, other=0.0).to(WIDE)
        sc = tl.load(scale + at, mask=at < dim, other=1.0).to(WIDE)
        shifted = value + lo
        grad_scale = -(g * shifted + gl) / sc
        grad_loc = -g
        g = g / sc
        g = tl.where(sc * shifted < 0, g / SLOPE, g)
    if OP == _NORMALIZE_GRAD or OP == _DENORMALIZE_GRAD:
        part = tl.program_id(0) * dim + at
        inside = tl.max(valid.to(tl.int32), 0)[None, :] > 0
        tl.store(loc_parts + part, tl.sum(tl.where(valid, grad_loc, 0.0), 0)[None, :], mask=inside)
        tl.store(scale_parts + part, tl.sum(tl.where(valid, grad_scale, 0.0), 0)[None, :], mask=inside)
    return g


@triton.jit(do_not_specialize=["count", "dim"])
def invert_permutations(permutation, inverse, count, dim, BLOCK: tl.constexpr):
    """inverse[b, permutation[b, j]] = j for all blocks b; what is no index is left out."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    to = tl.load(permutation + at, mask=at < count, other=0)
    valid = (at < count) & (to >= 0) & (to < dim)
    tl.store(inverse + at // dim * dim + to, (at % dim).to(tl.int32), mask=valid)


@triton.jit(do_not_specialize=["batch"])
def enter(
    source,  # [batch, dim], rows source_row apart: values, or their gradients (OP 4)
    values,  # [batch, dim] for OP 4: what the gradients belong to
    target,  # [batch, dim] contiguous
    grad_logdet,  # [batch] for OP 4
    parts,  # [column tiles, batch] for COUNT
    loc,
    scale,
    loc_parts,
    scale_parts,
    table,
    batch,
    conditioning,
    transformed,
    source_row,
    values_row,
    grad_logdet_row,
    SLOPE: tl.constexpr,
    LOG_SLOPE: tl.constexpr,
    COUNT: tl.constexpr,
    MAP: tl.constexpr,
    OP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The first stage from the input of the flow, or from the gradient of its output."""
    dim = conditioning + transformed
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    long_row = row.to(tl.int64)[:, None]
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    valid = (row < batch)[:, None] & (column < dim)
    value = tl.load(source + long_row * source_row + column, mask=valid, other=0.0).to(WIDE)
    to = _move(column, table, conditioning, transformed, MAP)
    if OP == _DENORMALIZE_GRAD:
        x = tl.load(values + long_row * values_row + column, mask=valid, other=0.0).to(WIDE)
        gl = tl.load(grad_logdet + row.to(tl.int64) * grad_logdet_row, mask=row < batch, other=0.0).to(WIDE)[:, None]
        value = _pass_gradient(
            value, x, gl, column, to, valid, loc, scale, loc_parts, scale_parts, dim, SLOPE, OP, WIDE
        )
    else:
        value, negative = _pass(value, column, to, valid, loc, scale, dim, SLOPE, OP, WIDE)
        if COUNT:
            at = parts + tl.program_id(1).to(tl.int64) * batch + row
            tl.store(at, tl.sum(negative, 1) * LOG_SLOPE, mask=row < batch)
    tl.store(target + long_row * dim + to, value.to(target.dtype.element_ty), mask=valid)


@triton.jit
def _add_products(
    acc, a, w, inside, width, rows, columns,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + a W over ``inside`` inputs. ``a``: pointers to the first one of each row; ``w``: of each column, a panel ``width`` wide.
    ``rows`` and ``columns`` say which there are."""
    TYPE: tl.constexpr = w.dtype.element_ty
    k = tl.arange(0, BLOCK_K)
    for i in range(0, inside, BLOCK_K):
        real = i + k < inside
        at = tl.load(a[:, None] + (i + k)[None, :], mask=rows[:, None] & real[None, :], other=0.0).to(TYPE)
        wt = tl.load(w[None, :] + (i + k)[:, None] * width, mask=real[:, None] & columns[None, :], other=0.0)
        acc = _dot(at, wt, acc, PRECISION, WIDE)
    return acc


@autotuned(_TILES, key=["inside", "outside", "batch_bucket", "PRECISION"], fitting=_fitting)
@triton.jit(do_not_specialize=["batch", "batch_bucket"])
def layer(
    a,  # [2 or 1 nets, batch, inside]
    context,  # [batch, context_width], joins the inputs
    weight,  # [2 nets, inside + context_width inputs, outside], panels
    bias,  # [2, outside]
    out,  # [2, batch, outside]
    batch,
    inside,
    context_width,
    outside,
    a_row,
    a_net,
    context_row,
    weight_net,
    bias_net,
    out_net,
    batch_bucket,
    LEAKY: tl.constexpr,
    CONTEXT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = LeakyReLU(a W + bias) for both nets."""
    net = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    rows, columns, long_row = row < batch, column < outside, row.to(tl.int64)
    all_inside = inside + context_width if CONTEXT else inside
    base, start, width = _panel(first, all_inside, outside)
    w = weight + net * weight_net + base + (column - start)
    acc = tl.zeros([BLOCK_M, BLOCK_N], WIDE)
    acc = _add_products(
        acc, a + net * a_net + long_row * a_row, w, inside, width, rows, columns, PRECISION, WIDE, BLOCK_K
    )
    if CONTEXT:
        w += inside * width
        acc = _add_products(
            acc, context + long_row * context_row, w, context_width, width, rows, columns, PRECISION, WIDE, BLOCK_K
        )
    acc += tl.load(bias + net * bias_net + column, mask=columns, other=0.0).to(WIDE)[None, :]
    acc = tl.where(acc > 0, acc, acc * LEAKY)
    at_out = out + net * out_net + long_row[:, None] * outside + column[None, :]
    tl.store(at_out, acc.to(out.dtype.element_ty), mask=rows[:, None] & columns[None, :])


@triton.jit(do_not_specialize=["batch"])
def narrow_layers(
    a,  # [batch, inside], rows a_row apart
    context,  # [batch, context_width], joins the inputs
    weight,  # [2 nets, inside + context_width inputs, hidden], hidden at most a panel
    bias,  # [2, hidden]
    weight_hidden,  # [2, DEPTH, hidden, hidden]
    bias_hidden,  # [2, DEPTH, hidden]
    out,  # [2, DEPTH + 1, batch, hidden], of which only the last are stored unless KEEP
    batch,
    inside,
    context_width,
    hidden,
    a_row,
    context_row,
    weight_net,
    bias_net,
    weight_hidden_net,
    weight_hidden_layer,
    bias_hidden_net,
    bias_hidden_layer,
    out_net,
    out_layer,
    LEAKY: tl.constexpr,
    CONTEXT: tl.constexpr,
    KEEP: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All layers of both nets but the last ones, where a row of activations fits a program: as :func:`layer`, one by one."""
    net = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    rows, columns, long_row = row < batch, column < hidden, row.to(tl.int64)
    valid = rows[:, None] & columns[None, :]
    TYPE: tl.constexpr = weight.dtype.element_ty
    w = weight + net * weight_net + column
    acc = tl.zeros([BLOCK_M, BLOCK_N], WIDE)
    acc = _add_products(acc, a + long_row * a_row, w, inside, hidden, rows, columns, PRECISION, WIDE, BLOCK_K)
    if CONTEXT:
        w += inside * hidden
        acc = _add_products(
            acc, context + long_row * context_row, w, context_width, hidden, rows, columns, PRECISION, WIDE, BLOCK_K
        )
    acc += tl.load(bias + net * bias_net + column, mask=columns, other=0.0).to(WIDE)[None, :]
    at_out = out + net * out_net + long_row[:, None] * hidden + column[None, :]
    for i in tl.static_range(DEPTH + 1):
        if i > 0:
            at = weight_hidden + net * weight_hidden_net + (i - 1) * weight_hidden_layer
            wt = tl.load(
                at + column[:, None] * hidden + column[None, :], mask=columns[:, None] & columns[None, :], other=0.0
            )
            acc = _dot(acc.to(TYPE), wt, tl.zeros([BLOCK_M, BLOCK_N], WIDE), PRECISION, WIDE)
            at = bias_hidden + net * bias_hidden_net + (i - 1) * bias_hidden_layer
            acc += tl.load(at + column, mask=columns, other=0.0).to(WIDE)[None, :]
        acc = tl.where(acc > 0, acc, acc * LEAKY)
        if KEEP or i == DEPTH:
            tl.store(at_out, acc.to(TYPE), mask=valid)
        at_out += out_layer


@triton.jit(do_not_specialize=["batch"])
def last_layer(
    a,  # [2, batch, hidden]
    stage,  # [batch, dim]
    target,  # [batch, dim]: the next stage, or the output
    s_out,  # [batch, transformed], for KEEP_S
    v_out,  # [batch, transformed], for KEEP_V: what the coupling put out
    parts,  # [tiles, batch], for LOGDET
    weight,  # [2, hidden, transformed], panels
    bias,  # [2, transformed]
    loc,
    scale,
    table,
    batch,
    hidden,
    conditioning,
    transformed,
    a_net,
    weight_net,
    bias_net,
    SLOPE: tl.constexpr,
    LOG_SLOPE: tl.constexpr,
    INVERSE: tl.constexpr,
    MAP: tl.constexpr,
    OP: tl.constexpr,
    KEEP_S: tl.constexpr,
    KEEP_V: tl.constexpr,
    LOGDET: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Last layers of both nets, coupling, log-det, and the way of the whole row to the next stage."""
    dim = conditioning + transformed
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_rows = (row < batch)[:, None]
    long_row = row.to(tl.int64)[:, None]
    first = tl.program_id(1) * BLOCK_N
    j = first + tl.arange(0, BLOCK_N)[None, :]
    k = tl.arange(0, BLOCK_K)
    valid = inside_rows & (j < transformed)
    raw = tl.zeros([BLOCK_M, BLOCK_N], WIDE)
    shift = tl.zeros([BLOCK_M, BLOCK_N], WIDE)
    base, start, width = _panel(first, hidden, transformed)
    w = weight + base + (j - start)
    for i in range(0, hidden, BLOCK_K):
        here = inside_rows & (i + k < hidden)[None, :]
        there = (i + k < hidden)[:, None] & (j < transformed)
        at = a + long_row * hidden + (i + k)[None, :]
        wt = w + (i + k)[:, None] * width
        raw = _dot(
            tl.load(at, mask=here, other=0.0),
            tl.load(wt, mask=there, other=0.0),
            raw,
            PRECISION,
            WIDE,
        )
        shift = _dot(
            tl.load(at + a_net, mask=here, other=0.0),
            tl.load(wt + weight_net, mask=there, other=0.0),
            shift,
            PRECISION,
            WIDE,
        )
    raw += tl.load(bias + j, mask=j < transformed, other=0.0).to(WIDE)
    shift += tl.load(bias + bias_net + j, mask=j < transformed, other=0.0).to(WIDE)
    s = tanh(raw)
    v = tl.load(stage + long_row * dim + conditioning + j, mask=valid, other=0.0)
    v = (v - shift) * tl.exp(-s) if INVERSE else v * tl.exp(s) + shift
    kept = long_row * transformed + j
    if KEEP_S:
        tl.store(s_out + kept, s, mask=valid)
    if KEEP_V:
        tl.store(v_out + kept, v, mask=valid)
    column = conditioning + j
    to = _move(column, table, conditioning, transformed, MAP)
    v, negative = _pass(v, column, to, valid, loc, scale, dim, SLOPE, OP, WIDE)
    tl.store(target + long_row * dim + to, v.to(target.dtype.element_ty), mask=valid)
    # the conditioning columns go along
    valid_u = inside_rows & (j < conditioning)
    u = tl.load(stage + long_row * dim + j, mask=valid_u, other=0.0)
    to_u = _move(j, table, conditioning, transformed, MAP)
    u, negative_u = _pass(u, j, to_u, valid_u, loc, scale, dim, SLOPE, OP, WIDE)
    tl.store(target + long_row * dim + to_u, u.to(target.dtype.element_ty), mask=valid_u)
    if LOGDET:
        gained = tl.where(valid, s, 0.0) + (negative + negative_u) * LOG_SLOPE
        tl.store(parts + tl.program_id(1).to(tl.int64) * batch + row, tl.sum(gained, 1), mask=row < batch)


@triton.jit(do_not_specialize=["batch", "count", "scales"])
def finish_logdet(
    parts,  # [count, batch]
    scale,  # [scales]
    logdet,  # [batch]
    batch,
    count,
    scales,
    INVERSE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """logdet = the parts in order + the sum of log|scale|, negated for the inverse map."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    logs = tl.zeros([BLOCK], WIDE)
    lost = tl.zeros([BLOCK], WIDE)
    for first in range(0, scales, BLOCK):
        at = first + tl.arange(0, BLOCK)
        log = tl.log(tl.abs(tl.load(scale + at, mask=at < scales, other=1.0).to(WIDE)))
        logs, lost = add_term(logs, lost, log)
    total = tl.zeros([BLOCK], WIDE) + tl.sum(compensated(logs, lost), 0)
    lost = tl.zeros([BLOCK], WIDE)
    at_part = parts + row
    for _ in range(count):
        total, lost = add_term(total, lost, tl.load(at_part, mask=row < batch, other=0.0))
        at_part += batch
    total = compensated(total, lost)
    tl.store(logdet + row, -total if INVERSE else total, mask=row < batch)


@triton.jit
def _output_gradient(
    g, v, s, gl, long_row, j, valid, dim, conditioning, transformed, v_row, net,
    INVERSE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient of what a net put out: of raw for net 0, of the shift for net 1."""
    gy = tl.load(g + long_row * dim + conditioning + j, mask=valid, other=0.0)
    st = tl.load(s + long_row * transformed + j, mask=valid, other=0.0)
    vt = tl.load(v + long_row * v_row + j, mask=valid, other=0.0)
    if INVERSE:
        d_shift = -gy * tl.exp(-st)
        d_s = -(gy * vt + gl)
    else:
        d_shift = gy
        d_s = gy * (tl.exp(st) * vt) + gl
    return tl.where(valid, tl.where(net == 0, d_s * (1 - st * st), d_shift), 0.0)


@autotuned(_TILES, key=["inside", "outside", "batch_bucket", "PRECISION", "LAST"], fitting=_fitting)
@triton.jit(do_not_specialize=["batch", "batch_bucket"])
def layer_backward(
    d,  # [2, batch, outside]: gradient of the layer's output; stored, not read, for LAST
    a,  # [2, batch, inside]: the layer's input
    weight,  # [2, inside, outside], panels
    out,  # [2, batch, inside]: gradient before the LeakyReLU that gave a
    g,  # [batch, dim], gradient of the coupling's output (LAST, as what follows)
    v,  # [batch, transformed], rows v_row apart: what multiplies ds
    s,  # [batch, transformed]
    grad_logdet,  # [batch]
    batch,
    inside,
    outside,
    conditioning,
    d_net,
    a_net,
    weight_net,
    out_net,
    v_row,
    grad_logdet_row,
    batch_bucket,
    LEAKY: tl.constexpr,
    LAST: tl.constexpr,
    INVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = (d Wᵀ) where a > 0, LEAKY times that elsewhere; for the last layer d comes from the coupling's backward."""
    net = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_rows = (row < batch)[:, None]
    long_row = row.to(tl.int64)[:, None]
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    TYPE: tl.constexpr = weight.dtype.element_ty
    if LAST:
        gl = tl.load(grad_logdet + row.to(tl.int64) * grad_logdet_row, mask=row < batch, other=0.0).to(WIDE)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], WIDE)
    for first in range(0, outside, BLOCK_K):
        base, start, width = _panel(first, inside, outside)
        j = first + k
        here = inside_rows & (j < outside)[None, :]
        d_at = d + net * d_net + long_row * outside + j[None, :]
        if LAST:
            dt = _output_gradient(
                g, v, s, gl, long_row, j[None, :], here, conditioning + outside, conditioning, outside, v_row, net,
                INVERSE, WIDE,
            ).to(TYPE)  # fmt: skip
            if tl.program_id(1) == 0:
                tl.store(d_at, dt, mask=here)
        else:
            dt = tl.load(d_at, mask=here, other=0.0)
        w_at = weight + net * weight_net + base + column[None, :] * width + (j - start)[:, None]
        wt = tl.load(w_at, mask=(j < outside)[:, None] & (column < inside)[None, :], other=0.0)
        acc = _dot(dt, wt, acc, PRECISION, WIDE)
    valid = inside_rows & (column < inside)[None, :]
    at = long_row * inside + column[None, :]
    positive = tl.load(a + net * a_net + at, mask=valid, other=0.0).to(WIDE) > 0
    acc = tl.where(positive, acc, acc * LEAKY)
    tl.store(out + net * out_net + at, acc.to(TYPE), mask=valid)


@triton.jit(do_not_specialize=["batch"])
def narrow_layers_backward(
    d_out,  # [2 nets, batch, transformed]: gradient of the last layers' output; stored
    d,  # [2, DEPTH + 1, batch, hidden]: gradients before the LeakyReLU that gave a; stored
    a,  # [2, DEPTH + 1, batch, hidden]: activations
    weight_out,  # [2, hidden, transformed], panels
    weight_hidden,  # [2, DEPTH, hidden, hidden], hidden at most a panel
    g,  # [batch, dim], gradient of the coupling's output
    v,  # [batch, transformed], rows v_row apart: what multiplies ds
    s,  # [batch, transformed]
    grad_logdet,  # [batch]
    batch,
    hidden,
    conditioning,
    transformed,
    d_out_net,
    d_net,
    d_layer,
    a_net,
    a_layer,
    weight_out_net,
    weight_hidden_net,
    weight_hidden_layer,
    v_row,
    grad_logdet_row,
    LEAKY: tl.constexpr,
    INVERSE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As :func:`layer_backward`, from the last layers of both nets to the first ones' outputs."""
    net = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_rows = (row < batch)[:, None]
    long_row = row.to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    valid = inside_rows & (column < hidden)[None, :]
    TYPE: tl.constexpr = weight_out.dtype.element_ty
    gl = tl.load(grad_logdet + row.to(tl.int64) * grad_logdet_row, mask=row < batch, other=0.0).to(WIDE)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], WIDE)
    for first in range(0, transformed, BLOCK_K):
        base, start, width = _panel(first, hidden, transformed)
        j = first + k
        here = inside_rows & (j < transformed)[None, :]
        dt = _output_gradient(
            g, v, s, gl, long_row, j[None, :], here, conditioning + transformed, conditioning, transformed, v_row, net,
            INVERSE, WIDE,
        ).to(TYPE)  # fmt: skip
        tl.store(d_out + net * d_out_net + long_row * transformed + j[None, :], dt, mask=here)
        w_at = weight_out + net * weight_out_net + base + column[None, :] * width + (j - start)[:, None]
        wt = tl.load(w_at, mask=(j < transformed)[:, None] & (column < hidden)[None, :], other=0.0)
        acc = _dot(dt, wt, acc, PRECISION, WIDE)
    at = long_row * hidden + column[None, :]
    for i in tl.static_range(DEPTH + 1):
        if i > 0:
            w_at = weight_hidden + net * weight_hidden_net + (DEPTH - i) * weight_hidden_layer
            w_at += column[None, :] * hidden + column[:, None]
            wt = tl.load(w_at, mask=(column < hidden)[:, None] & (column < hidden)[None, :], other=0.0)
            acc = _dot(acc.to(TYPE), wt, tl.zeros([BLOCK_M, BLOCK_N], WIDE), PRECISION, WIDE)
        a_at = a + net * a_net + (DEPTH - i) * a_layer + at
        positive = tl.load(a_at, mask=valid, other=0.0).to(WIDE) > 0
        acc = tl.where(positive, acc, acc * LEAKY)
        tl.store(d + net * d_net + (DEPTH - i) * d_layer + at, acc.to(TYPE), mask=valid)


@triton.jit(do_not_specialize=["batch"])
def first_layer_backward(
    d,  # [2, batch, hidden]: gradient of the first layer's output, before its LeakyReLU
    weight,  # [2, inside, hidden], panels
    g,  # [batch, dim]: gradient of the coupling's output
    s,  # [batch, transformed]
    stage,  # [batch, dim]: conditioning columns
    values,  # [batch, transformed], rows values_row apart: transformed columns of what the step got (OP 4) or gave (OP 3)
    target,  # [batch, dim]: gradient of what the previous step put out
    grad_context,  # [batch, context_width], added to
    grad_logdet,  # [batch]
    loc,
    scale,
    loc_parts,  # [row tiles, dim]
    scale_parts,
    table,
    batch,
    hidden,
    conditioning,
    transformed,
    context_width,
    d_net,
    weight_net,
    values_row,
    grad_logdet_row,
    SLOPE: tl.constexpr,
    INVERSE: tl.constexpr,
    MAP: tl.constexpr,
    OP: tl.constexpr,
    CONTEXT_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradient of a step's input: first layers of both nets, coupling, and the way back to the previous step."""
    dim = conditioning + transformed
    inside = conditioning + context_width
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_rows = (row < batch)[:, None]
    long_row = row.to(tl.int64)[:, None]
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    k = tl.arange(0, BLOCK_K)
    gl = tl.load(grad_logdet + row.to(tl.int64) * grad_logdet_row, mask=row < batch, other=0.0).to(WIDE)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], WIDE)
    for first in range(0, hidden, BLOCK_K):
        base, start, width = _panel(first, inside, hidden)
        i = first + k
        here = inside_rows & (i < hidden)[None, :]
        there = (i < hidden)[:, None] & (j < inside)
        d_at = d + long_row * hidden + i[None, :]
        w_at = weight + base + j * width + (i - start)[:, None]
        for net in tl.static_range(2):
            dt = tl.load(d_at + net * d_net, mask=here, other=0.0)
            wt = tl.load(w_at + net * weight_net, mask=there, other=0.0)
            acc = _dot(dt, wt, acc, PRECISION, WIDE)

    valid = inside_rows & (j < conditioning)
    gu = acc + tl.load(g + long_row * dim + j, mask=valid, other=0.0)
    u = tl.load(stage + long_row * dim + j, mask=valid, other=0.0)
    to = _move(j, table, conditioning, transformed, MAP)
    gu = _pass_gradient(gu, u, gl, j, to, valid, loc, scale, loc_parts, scale_parts, dim, SLOPE, OP, WIDE)
    tl.store(target + long_row * dim + to, gu.to(target.dtype.element_ty), mask=valid)

    valid = inside_rows & (j < transformed)
    column = conditioning + j
    st = tl.load(s + long_row * transformed + j, mask=valid, other=0.0)
    gv = tl.load(g + long_row * dim + column, mask=valid, other=0.0) * tl.exp(-st if INVERSE else st)
    v = tl.load(values + long_row * values_row + j, mask=valid, other=0.0)
    to = _move(column, table, conditioning, transformed, MAP)
    gv = _pass_gradient(gv, v, gl, column, to, valid, loc, scale, loc_parts, scale_parts, dim, SLOPE, OP, WIDE)
    tl.store(target + long_row * dim + to, gv.to(target.dtype.element_ty), mask=valid)

    if CONTEXT_GRAD:
        valid = inside_rows & (j >= conditioning) & (j < inside)
        at = grad_context + long_row * context_width + j - conditioning
        tl.store(at, tl.load(at, mask=valid, other=0.0) + acc, mask=valid)


@autotuned(_OUTER_TILES, key=["inside", "outside", "batch_bucket", "PRECISION"], fitting=_outer_fitting)
@triton.jit(do_not_specialize=["batch", "batch_bucket"])
def weight_gradient(
    a,  # [steps, 2 nets, layers, batch, inside], by strides
    d,  # [steps, 2, layers, batch, outside]
    grad_weight,  # [steps, 2, layers, all_inside, outside], panels, from input ``offset`` on
    grad_bias,  # [steps, 2, layers, outside]
    batch,
    inside,
    outside,
    all_inside,
    offset,
    layers,
    a_row,
    a_step,
    a_net,
    a_layer,
    d_step,
    d_net,
    d_layer,
    grad_weight_step,
    grad_weight_net,
    grad_bias_step,
    grad_bias_net,
    batch_bucket,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grad_weight = aᵀ d and grad_bias = the sum of d over rows, for all layers of a shape at once."""
    problem = tl.program_id(2).to(tl.int64)
    net = problem % 2
    at_layer = problem // 2 % layers
    step = problem // 2 // layers
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    j = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_tile = a + step * a_step + net * a_net + at_layer * a_layer + i[:, None]
    d_tile = d + step * d_step + net * d_net + at_layer * d_layer + j[None, :]
    TYPE: tl.constexpr = d.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], WIDE)
    total = tl.zeros([BLOCK_N], WIDE)
    for row in range(0, batch, BLOCK_K):
        r = (row + k).to(tl.int64)
        at = tl.load(a_tile + r[None, :] * a_row, mask=(i < inside)[:, None] & (r < batch)[None, :], other=0.0)
        dt = tl.load(d_tile + r[:, None] * outside, mask=(r < batch)[:, None] & (j < outside)[None, :], other=0.0)
        acc = _dot(at.to(TYPE), dt, acc, PRECISION, WIDE)
        if BIAS:
            total += tl.sum(dt.to(WIDE), 0)
    base, start, width = _panel(first, all_inside, outside)
    w = grad_weight + step * grad_weight_step + net * grad_weight_net + at_layer * (all_inside * outside)
    w += base + (offset + i)[:, None] * width + (j - start)[None, :]
    tl.store(w, acc.to(w.dtype.element_ty), mask=(i < inside)[:, None] & (j < outside)[None, :])
    if BIAS:
        if tl.program_id(0) == 0:
            at_bias = grad_bias + step * grad_bias_step + net * grad_bias_net + at_layer * outside + j
            tl.store(at_bias, total.to(grad_bias.dtype.element_ty), mask=j < outside)


@triton.jit
def finish_actnorm(
    loc_parts,  # [n_flows, tiles, dim]
    scale_parts,
    grad_loc,  # [n_flows, dim]
    grad_scale,
    tiles,
    dim,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of the parts over row tiles, in order."""
    block = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    of_loc = tl.zeros([BLOCK], WIDE)
    of_scale = tl.zeros([BLOCK], WIDE)
    at_loc = loc_parts + block * tiles * dim + j
    at_scale = scale_parts + block * tiles * dim + j
    for _ in range(tiles):
        of_loc += tl.load(at_loc, mask=j < dim, other=0.0)
        of_scale += tl.load(at_scale, mask=j < dim, other=0.0)
        at_loc += dim
        at_scale += dim
    tl.store(grad_loc + block * dim + j, of_loc.to(grad_loc.dtype.element_ty), mask=j < dim)
    tl.store(grad_scale + block * dim + j, of_scale.to(grad_scale.dtype.element_ty), mask=j < dim)
