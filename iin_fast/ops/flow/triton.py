"""flow in Triton: the walk over the blocks, forward, inverse and backward. The kernels are in triton_kernels.py.

Launches, for n blocks with nets of depth + 2 layers: forward 2 n (depth + 2) + 3 (a permutation table, the first stage, the
log-det), inverse one less; backward 2 n (depth + 2), plus 2 for the weights of all blocks together (of as many as fit PENDING_BYTES),
3 with hidden layers, one more for each step with a context, plus 2, of the inverse 3; with memory="invert" the nets again,
another 2 n (depth + 2), and weights of each step apart. Nets of at most 64 hidden units take 4 n in place of 2 n (depth + 2): all layers but the last
are one launch. Nothing waits for the device but the first call of sizes that were never tuned.

Bytes: forward reads every weight once and, for each layer, writes and reads the activations of a row; backward reads
every weight once, writes its gradient once, and reads activations twice. Stages, s and log-dets are float32 at least,
activations and their gradients of the type of x. Sums run in a fixed order: results repeat bit for bit.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..triton_common import (
    CompileCase,
    bucket,
    ceil_div,
    launch,
    on_device,
    power_of_two,
    recorded,
    strided,
    tl_dtype,
)
from ..types import accumulator_type
from . import triton_kernels as kernels
from .saved import piece_bytes, pieces_of, saved_bytes, views
from .triton_kernels import (
    DENORMALIZE,
    DENORMALIZE_GRAD,
    IDENTITY,
    KEEP,
    NORMALIZE,
    NORMALIZE_GRAD,
    SWAP,
    TABLE,
    UNSWAP,
)

__all__ = ["PENDING_BYTES", "compile_cases", "flow", "flow_backward"]

PENDING_BYTES = 64 * 2**20
"""Gradients of activations that backward holds until it computes weight gradients of several steps at once."""


def _precision(dtype: torch.dtype, tf32: bool) -> str:
    """How float32 products are computed: three TF32 products (about float32) unless the user allows one.

    Plain float32 on AMD GPUs: for most of them Triton compiles no TF32.
    """
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if tf32 else "tf32x3"


class _Walk:
    """Sizes, parameters and buffers of a call; ``saved`` holds every step, otherwise buffers hold one step."""

    def __init__(
        self, x: Tensor, context: Tensor | None, parameters: tuple[Tensor, ...], slopes: tuple[float, float],
        exact_logdet: bool, tf32: bool, saved: Tensor | None, inverse: bool, keep: bool,
    ) -> None:  # fmt: skip
        self.loc, self.scale, *weights, self.permutation = (p.contiguous() for p in parameters)
        self.weight_in, self.bias_in, self.weight_hidden, self.bias_hidden, self.weight_out, self.bias_out = weights
        self.x, self.context = x, None if context is None else context.contiguous()
        self.batch, self.dim = x.shape
        self.n, self.hidden, self.depth = self.loc.shape[0], self.bias_in.shape[3], self.bias_hidden.shape[3]
        self.steps, self.transformed = 2 * self.n, self.dim // 2
        self.conditioning = self.dim - self.transformed
        self.context_width = 0 if context is None else context.shape[2]
        self.leaky, self.slope = slopes
        self.log_slope = 0.0
        if exact_logdet and self.slope != 1:
            self.log_slope = torch.tensor(self.slope, dtype=torch.float64).log().item()
        self.wide = accumulator_type(x.dtype)
        self.constants = dict(WIDE=tl_dtype(x.dtype), PRECISION=_precision(x.dtype, tf32))
        # a tile of rows and of columns for the kernels that are not tuned, since their parts are counted by tiles
        self.block_m = 16 if self.batch <= 128 else 32 if x.dtype == torch.float64 else 64
        narrow = 16 if self.batch <= 128 else 32 if x.dtype == torch.float64 else 64
        self.block_n = min(max(16, power_of_two(self.conditioning)), narrow)
        self.row_tiles = ceil_div(self.batch, self.block_m)
        self.tiles = dict(BLOCK_M=self.block_m, BLOCK_N=self.block_n)
        self.dots = dict(**self.tiles, BLOCK_K=32, num_warps=4, num_stages=3)
        # a program holds a whole row of activations, and a hidden layer's weights are one panel
        self.narrow = self.hidden <= kernels.PANEL
        warps = 8 if x.element_size() > 2 and self.block_m > 16 else 4
        self.rows = dict(BLOCK_K=32, num_warps=warps, num_stages=2)
        self.rows |= dict(
            BLOCK_M=min(self.block_m, 128 // x.element_size()), BLOCK_N=max(16, power_of_two(self.hidden))
        )
        self.rows_grid = ceil_div(self.batch, self.rows["BLOCK_M"]), 2
        self._buffers(saved, inverse, keep)

    def _buffers(self, saved: Tensor | None, inverse: bool, keep: bool) -> None:
        """``keep``: s, what couplings put out, and all activations of a step, for backward."""
        every = saved is not None
        pieces = pieces_of(self.x, self.hidden, self.depth, self.n if every else 0, inverse or not every, keep)
        if saved is None:
            saved = torch.empty(sum(map(piece_bytes, pieces)), dtype=torch.uint8, device=self.x.device)
        self.stages, self.s, self.v, self.activations = views(saved, pieces)
        self.every, self.keep = every, keep

    def stage(self, step: int) -> Tensor:
        return self.stages[step if self.every else step % 2]

    def kept(self, buffer: Tensor, step: int) -> Tensor:
        return buffer[step if self.every else 0]

    def activation(self, step: int, layer: int) -> Tensor:
        """[2, batch, hidden], the output of layer ``layer`` of both nets."""
        return self.kept(self.activations, step)[:, layer if self.keep else layer % 2]

    def launch(self, kernel: Any, grid: Any, /, **arguments: Any) -> None:
        launch(kernel, grid, **self.constants, **arguments)

    def invert_permutations(self) -> None:
        self.table = torch.empty(self.n, self.dim, dtype=torch.int32, device=self.x.device)
        count = self.n * self.dim
        grid = (ceil_div(count, 256),)
        tables = dict(permutation=self.permutation, inverse=self.table)
        launch(kernels.invert_permutations, grid, **tables, count=count, dim=self.dim, BLOCK=256)

    # The way of a row from step to step: map, operation, table, and the block whose loc and scale apply.

    def onward(self, step: int) -> tuple[int, int, Tensor, int]:
        block = step // 2
        if step % 2 == 0:
            return SWAP, KEEP, self.permutation, 0
        if block == self.n - 1:
            return TABLE, KEEP, self.table[block], 0
        return TABLE, NORMALIZE, self.table[block], block + 1

    def back(self, step: int) -> tuple[int, int, Tensor, int]:
        block = step // 2
        if step % 2 == 1:
            return UNSWAP, KEEP, self.permutation, 0
        if block == 0:
            return IDENTITY, DENORMALIZE, self.permutation, 0
        return TABLE, DENORMALIZE, self.permutation[block - 1], block

    def enter(self, inverse: bool, source: Tensor, target: Tensor, parts: Tensor | None) -> None:
        """The first stage of the map from its input."""
        launch(
            kernels.enter,
            (self.row_tiles, ceil_div(self.dim, self.block_n)),
            **strided("row", source=source),
            values=source,
            target=target,
            grad_logdet=source,
            parts=source if parts is None else parts,
            loc=self.loc,
            scale=self.scale,
            loc_parts=source,
            scale_parts=source,
            table=self.permutation[self.n - 1],
            batch=self.batch,
            conditioning=self.conditioning,
            transformed=self.transformed,
            values_row=0,
            grad_logdet_row=0,
            SLOPE=self.slope,
            LOG_SLOPE=self.log_slope,
            COUNT=parts is not None,
            MAP=TABLE if inverse else IDENTITY,
            OP=KEEP if inverse else NORMALIZE,
            WIDE=self.constants["WIDE"],
            **self.tiles,
        )

    def conditioner(self, step: int) -> None:
        """The hidden activations of both nets of a step, from its stage."""
        block, half = divmod(step, 2)
        stage = self.stage(step)
        context = self.x if self.context is None else self.context_of(block)
        if self.narrow:
            return self.narrow_conditioner(step, stage, context)
        grid = lambda meta: (ceil_div(self.batch, meta["BLOCK_M"]), ceil_div(self.hidden, meta["BLOCK_N"]), 2)  # noqa: E731
        out = self.activation(step, 0)
        sizes = dict(batch=self.batch, outside=self.hidden, batch_bucket=bucket(self.batch), LEAKY=self.leaky)
        self.launch(
            kernels.layer,
            grid,
            a=stage,
            context=context,
            **strided("net", weight=self.weight_in[block, half], bias=self.bias_in[block, half], out=out),
            inside=self.conditioning,
            context_width=self.context_width,
            a_row=self.dim,
            a_net=0,
            context_row=self.context_width,
            CONTEXT=self.context_width > 0,
            **sizes,
        )
        for i in range(self.depth):
            a, out = out, self.activation(step, i + 1)
            weight, bias = self.weight_hidden[block, half, :, i], self.bias_hidden[block, half, :, i]
            self.launch(
                kernels.layer,
                grid,
                **strided("net", a=a, weight=weight, bias=bias, out=out),
                context=self.x,
                inside=self.hidden,
                context_width=0,
                a_row=self.hidden,
                context_row=0,
                CONTEXT=False,
                **sizes,
            )

    def narrow_conditioner(self, step: int, stage: Tensor, context: Tensor) -> None:
        block, half = divmod(step, 2)
        out = self.kept(self.activations, step) if self.keep else self.activation(step, self.depth)[:, None]
        self.launch(
            kernels.narrow_layers,
            self.rows_grid,
            a=stage,
            context=context,
            **strided("net", weight=self.weight_in[block, half], bias=self.bias_in[block, half]),
            **strided("net layer", weight_hidden=self.weight_hidden[block, half]),
            **strided("net layer", bias_hidden=self.bias_hidden[block, half]),
            **strided("net", out=out),
            out_layer=out.stride(1) if self.keep else 0,
            batch=self.batch,
            inside=self.conditioning,
            context_width=self.context_width,
            hidden=self.hidden,
            a_row=self.dim,
            context_row=self.context_width,
            LEAKY=self.leaky,
            CONTEXT=self.context_width > 0,
            KEEP=self.keep,
            DEPTH=self.depth,
            **self.rows,
        )

    def context_of(self, block: int) -> Tensor:
        assert self.context is not None
        return self.context[block if self.context.shape[0] > 1 else 0]

    def couple(
        self, step: int, inverse: bool, way: tuple[int, int, Tensor, int], target: Tensor, parts: Tensor | None
    ) -> None:
        """Last layers and coupling of a step, and the row's way on to ``target``."""
        mapping, operation, table, at = way
        block, half = divmod(step, 2)
        a = self.activation(step, self.depth)
        weight, bias = self.weight_out[block, half], self.bias_out[block, half]
        stage = self.stage(step)
        self.launch(
            kernels.last_layer,
            (self.row_tiles, ceil_div(self.conditioning, self.block_n)),
            **strided("net", a=a, weight=weight, bias=bias),
            stage=stage,
            target=target,
            s_out=self.kept(self.s, step) if self.keep else stage,
            v_out=self.kept(self.v, step) if len(self.v) else stage,
            parts=stage if parts is None else parts,
            loc=self.loc[at],
            scale=self.scale[at],
            table=table,
            batch=self.batch,
            hidden=self.hidden,
            conditioning=self.conditioning,
            transformed=self.transformed,
            SLOPE=self.slope,
            LOG_SLOPE=self.log_slope,
            INVERSE=inverse,
            MAP=mapping,
            OP=operation,
            KEEP_S=self.keep,
            KEEP_V=len(self.v) > 0,
            LOGDET=parts is not None,
            **self.dots,
        )


def flow(
    x: Tensor,
    context: Tensor | None,
    loc: Tensor,
    scale: Tensor,
    weight_in: Tensor,
    bias_in: Tensor,
    weight_hidden: Tensor,
    bias_hidden: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    permutation: Tensor,
    leaky_slope: float,
    activation_slope: float,
    exact_logdet: bool,
    inverse: bool,
    keep: int,
    tf32: bool = False,  # torch leaves an argument out that is the schema's default
) -> tuple[Tensor, Tensor, Tensor]:
    """As torch.ops.iin_fast.flow: y, logdet, and what is saved for backward."""
    parameters = (loc, scale, weight_in, bias_in, weight_hidden, bias_hidden, weight_out, bias_out, permutation)
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    logdet = torch.empty(x.shape[0], dtype=accumulator_type(x.dtype), device=x.device)
    size = saved_bytes(x, bias_in.shape[3], bias_hidden.shape[3], loc.shape[0], inverse) if keep else 0
    saved = torch.empty(size, dtype=torch.uint8, device=x.device)
    if x.shape[0] == 0:
        return y, logdet, saved
    with on_device(x):
        walk = _Walk(
            *(x, context, parameters, (leaky_slope, activation_slope), exact_logdet, tf32),
            *(saved if keep else None, inverse, keep > 0),
        )
        tiles, enter_tiles = ceil_div(walk.conditioning, walk.block_n), ceil_div(walk.dim, walk.block_n)
        first = 0 if inverse else enter_tiles  # the inverse map's first stage adds nothing to the log-det
        parts = torch.empty(first + walk.steps * tiles, walk.batch, dtype=walk.wide, device=x.device)
        order = range(walk.steps - 1, -1, -1) if inverse else range(walk.steps)
        if not inverse:
            walk.invert_permutations()
        walk.enter(inverse, x, walk.stage(order[0]), None if inverse else parts)
        for i, step in enumerate(order):
            walk.conditioner(step)
            target = y if i == walk.steps - 1 else walk.stage(order[i + 1])
            way = walk.back(step) if inverse else walk.onward(step)
            walk.couple(step, inverse, way, target, parts[first + i * tiles :])
        launch(
            kernels.finish_logdet,
            (ceil_div(walk.batch, 128),),
            parts=parts,
            scale=walk.scale,
            logdet=logdet,
            batch=walk.batch,
            count=len(parts),
            scales=walk.n * walk.dim,
            INVERSE=inverse,
            WIDE=walk.constants["WIDE"],
            BLOCK=128,
        )
    return y, logdet, saved


def flow_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    y: Tensor,
    saved: Tensor,
    context: Tensor | None,
    loc: Tensor,
    scale: Tensor,
    weight_in: Tensor,
    bias_in: Tensor,
    weight_hidden: Tensor,
    bias_hidden: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    permutation: Tensor,
    leaky_slope: float,
    activation_slope: float,
    inverse: bool,
    keep: int,
    context_grad: bool,
    weight_grads: bool,
    tf32: bool = False,  # torch leaves an argument out that is the schema's default
) -> tuple[Tensor | None, ...]:
    """As torch.ops.iin_fast.flow_backward. ``saved`` may be empty: then the map is walked back from ``y``."""
    parameters = (loc, scale, weight_in, bias_in, weight_hidden, bias_hidden, weight_out, bias_out, permutation)
    weights = parameters[2:8]
    device, batch = y.device, y.shape[0]
    make = torch.zeros if batch == 0 else torch.empty

    def like(t: Tensor) -> Tensor:
        return make(t.shape, dtype=t.dtype, device=device)

    grad_x, grad_loc, grad_scale = like(y), like(loc), like(scale)
    grads = [like(w) if weight_grads else None for w in weights]
    sums = None  # of the gradient of the context
    if context_grad and context is not None:
        sums = torch.zeros(context.shape, dtype=accumulator_type(y.dtype), device=device)
    if batch > 0:
        y = y if y.stride(1) == 1 else y.contiguous()
        grad_y = grad_y if grad_y.stride(1) == 1 else grad_y.contiguous()
        with on_device(y):
            walk = _Walk(
                *(y, context, parameters, (leaky_slope, activation_slope), False, tf32),
                *(saved if saved.numel() else None, inverse, True),
            )
            _Backward(walk, inverse, grad_y, grad_logdet, grad_x, sums, grads, grad_loc, grad_scale).run()
    grad_context = sums if sums is None or context is None else sums.to(context.dtype)
    return grad_x, grad_context, grad_loc, grad_scale, *grads


class _Backward:
    """Steps in the opposite order of the map's. g [batch, dim] is the gradient of what the step put out."""

    def __init__(
        self, walk: _Walk, inverse: bool, grad_y: Tensor, grad_logdet: Tensor, grad_x: Tensor,
        grad_context: Tensor | None, grads: list[Tensor | None], grad_loc: Tensor, grad_scale: Tensor,
    ) -> None:  # fmt: skip
        self.walk, self.inverse, self.grad_y, self.grad_logdet = walk, inverse, grad_y, grad_logdet
        self.grad_x, self.grad_context, self.grads = grad_x, grad_context, grads
        self.grad_loc, self.grad_scale = grad_loc, grad_scale
        w, x = walk, walk.x
        self.g = torch.empty(2, w.batch, w.dim, dtype=w.wide, device=x.device)
        self.loc_parts, self.scale_parts = (
            torch.empty(w.n, w.row_tiles, w.dim, dtype=w.wide, device=x.device) for _ in range(2)
        )
        row = 2 * w.batch * (w.transformed + (w.depth + 1) * w.hidden) * x.element_size()
        # steps whose gradients of activations wait for the weight gradients; one where activations are of one step
        self.group = max(1, min(w.steps, PENDING_BYTES // row)) if w.every and grads[0] is not None else 1
        self.d_out = torch.empty(self.group, 2, w.batch, w.transformed, dtype=x.dtype, device=x.device)
        self.d = torch.empty(self.group, 2, w.depth + 1, w.batch, w.hidden, dtype=x.dtype, device=x.device)

    def way(self, step: int) -> tuple[int, int, Tensor, int]:
        """The way of gradients: opposite to the map's."""
        mapping, operation, table, at = self.walk.onward(step) if self.inverse else self.walk.back(step)
        change = {NORMALIZE: DENORMALIZE_GRAD, DENORMALIZE: NORMALIZE_GRAD, KEEP: KEEP}
        return mapping, change[operation], table, at

    def run(self) -> None:
        w, inverse = self.walk, self.inverse
        order = range(w.steps) if inverse else range(w.steps - 1, -1, -1)
        if inverse:
            w.invert_permutations()
        self.enter()
        if not w.every:
            w.enter(not inverse, w.x, w.stage(order[0]), None)
        for i, step in enumerate(order):
            if not w.every:  # the map the other way round, a step at a time
                w.conditioner(step)
                way = w.onward(step) if inverse else w.back(step)
                w.couple(step, not inverse, way, w.stage(step + 1 if inverse else step - 1), None)
            slot = step % self.group
            g = self.g[i % 2]
            self.conditioner(step, slot, g)
            self.step(step, slot, g, self.grad_x if i == w.steps - 1 else self.g[1 - i % 2])
            if self.grads[0] is not None and (i == w.steps - 1 or order[i + 1] // self.group != step // self.group):
                first = step // self.group * self.group
                self.weights(first, min(self.group, w.steps - first))
        launch(
            kernels.finish_actnorm,
            (w.n, ceil_div(w.dim, 64)),
            loc_parts=self.loc_parts,
            scale_parts=self.scale_parts,
            grad_loc=self.grad_loc,
            grad_scale=self.grad_scale,
            tiles=w.row_tiles,
            dim=w.dim,
            WIDE=w.constants["WIDE"],
            BLOCK=64,
        )

    def enter(self) -> None:
        """g of the first step from the gradient of the output."""
        w = self.walk
        launch(
            kernels.enter,
            (w.row_tiles, ceil_div(w.dim, w.block_n)),
            **strided("row", source=self.grad_y, values=w.x, grad_logdet=self.grad_logdet),
            target=self.g[0],
            parts=self.g,
            loc=w.loc,
            scale=w.scale,
            loc_parts=self.loc_parts[0],
            scale_parts=self.scale_parts[0],
            table=w.permutation[w.n - 1],
            batch=w.batch,
            conditioning=w.conditioning,
            transformed=w.transformed,
            SLOPE=w.slope,
            LOG_SLOPE=0.0,
            COUNT=False,
            MAP=IDENTITY if self.inverse else TABLE,
            OP=DENORMALIZE_GRAD if self.inverse else KEEP,
            WIDE=w.constants["WIDE"],
            **w.tiles,
        )

    def coupled(self, step: int, given: bool) -> Tensor:
        """[batch, transformed], rows strided: the transformed columns that a forward step gets, or gives.

        The stage holds what the walk that filled it got, v what that walk gave.
        """
        w = self.walk
        walked_forward = self.inverse != w.every
        return w.stage(step)[:, w.conditioning :] if given == walked_forward else w.kept(w.v, step)

    def conditioner(self, step: int, slot: int, g: Tensor) -> None:
        w = self.walk
        block, half = divmod(step, 2)
        v, s, d, d_out = self.coupled(step, True), w.kept(w.s, step), self.d[slot], self.d_out[slot]
        if w.narrow:
            w.launch(
                kernels.narrow_layers_backward,
                w.rows_grid,
                **strided("net", d_out=d_out, weight_out=w.weight_out[block, half]),
                **strided("net layer", d=d, a=w.kept(w.activations, step), weight_hidden=w.weight_hidden[block, half]),
                **strided("row", v=v, grad_logdet=self.grad_logdet),
                g=g,
                s=s,
                batch=w.batch,
                hidden=w.hidden,
                conditioning=w.conditioning,
                transformed=w.transformed,
                LEAKY=w.leaky,
                INVERSE=self.inverse,
                DEPTH=w.depth,
                **w.rows,
            )
            return

        def grid(meta: dict[str, int]) -> tuple[int, ...]:
            return ceil_div(w.batch, meta["BLOCK_M"]), ceil_div(w.hidden, meta["BLOCK_N"]), 2

        for i in range(w.depth, -1, -1):
            last = i == w.depth
            weight = w.weight_out[block, half] if last else w.weight_hidden[block, half, :, i]
            source, a, out = d_out if last else d[:, i + 1], w.activation(step, i), d[:, i]
            w.launch(
                kernels.layer_backward,
                grid,
                **strided("net", d=source, a=a, weight=weight, out=out),
                **strided("row", v=v, grad_logdet=self.grad_logdet),
                g=g,
                s=s,
                batch=w.batch,
                inside=w.hidden,
                outside=w.transformed if last else w.hidden,
                conditioning=w.conditioning,
                batch_bucket=bucket(w.batch),
                LEAKY=w.leaky,
                LAST=last,
                INVERSE=self.inverse,
            )

    def step(self, step: int, slot: int, g: Tensor, target: Tensor) -> None:
        w = self.walk
        mapping, operation, table, at = self.way(step)
        block, half = divmod(step, 2)
        values = self.coupled(step, operation != DENORMALIZE_GRAD)
        weight, d = w.weight_in[block, half], self.d[slot, :, 0]
        context = self.grad_context
        if context is not None:
            context = context[block if context.shape[0] > 1 else 0]
        columns = w.conditioning + w.context_width
        w.launch(
            kernels.first_layer_backward,
            (w.row_tiles, ceil_div(columns, w.block_n)),
            **strided("net", d=d, weight=weight),
            **strided("row", values=values, grad_logdet=self.grad_logdet),
            g=g,
            s=w.kept(w.s, step),
            stage=w.stage(step),
            target=target,
            grad_context=g if context is None else context,
            loc=w.loc[at],
            scale=w.scale[at],
            loc_parts=self.loc_parts[at],
            scale_parts=self.scale_parts[at],
            table=table,
            batch=w.batch,
            hidden=w.hidden,
            conditioning=w.conditioning,
            transformed=w.transformed,
            context_width=w.context_width,
            SLOPE=w.slope,
            INVERSE=self.inverse,
            MAP=mapping,
            OP=operation,
            CONTEXT_GRAD=context is not None,
            **w.dots,
        )

    def weights(self, first: int, count: int) -> None:
        """Weight gradients of steps [first, first + count)."""
        w = self.walk
        stages = w.stages[first:] if w.every else w.stage(first)[None]
        activations = w.activations[first:] if w.every else w.activations
        d, d_out = self.d, self.d_out
        inside = w.conditioning + w.context_width
        grad_in, bias_in, grad_hidden, bias_hidden, grad_out, bias_out = (
            g.flatten(0, 1)[first:] for g in self.grads if g is not None
        )

        def run(
            d: Tensor, grad: Tensor, bias: Tensor | None, *, inputs: int, all_inputs: int | None = None,
            offset: int = 0, layers: int = 1, steps: int = count, **a: Any,
        ) -> None:  # fmt: skip
            """Weights from ``offset`` on by ``inputs`` of all inputs; ``a`` has the activations and their strides."""
            outside = d.shape[-1]
            w.launch(
                kernels.weight_gradient,
                lambda meta: (
                    ceil_div(inputs, meta["BLOCK_M"]),
                    ceil_div(outside, meta["BLOCK_N"]),
                    2 * layers * steps,
                ),
                **strided("step net layer", d=d),
                **strided("step net", grad_weight=grad, grad_bias=grad if bias is None else bias),
                batch=w.batch,
                inside=inputs,
                outside=outside,
                all_inside=inputs if all_inputs is None else all_inputs,
                offset=offset,
                layers=layers,
                batch_bucket=bucket(w.batch),
                BIAS=bias is not None,
                **a,
            )

        one_net, part = dict(a_net=0, a_layer=0), dict(inputs=w.conditioning, all_inputs=inside)
        run(d, grad_in, bias_in, a=stages, a_row=w.dim, a_step=stages.stride(0), **part, **one_net)
        if w.context is not None and w.context_width > 0:
            # a context of every block serves two steps; one step at a time keeps the kernel simple
            part = dict(inputs=w.context_width, all_inputs=inside, offset=w.conditioning)
            for i in range(count):
                context = w.context_of((first + i) // 2)
                run(d[i:], grad_in[i:], None, steps=1, a=context, a_row=w.context_width, a_step=0, **part, **one_net)
        hidden = dict(inputs=w.hidden, a_row=w.hidden)
        if w.depth > 0:
            layers = strided("step net layer", a=activations)
            run(d[:, :, 1:], grad_hidden, bias_hidden, layers=w.depth, **hidden, **layers)
        last = strided("step net layer", a=activations[:, :, w.depth :])
        run(d_out, grad_out, bias_out, **hidden, **last)


def compile_cases() -> list[CompileCase]:
    """The kernels of representative calls, for triton.compile: name, kernel, signature, constexprs, options."""
    calls: dict[str, Callable[[], Any]] = {}
    shapes = ((64, 2, 512, 2, 0), (64, 2, 64, 2, 0), (5, 2, 80, 1, 3), (5, 2, 17, 1, 3))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for dim, n, hidden, depth, width in shapes:
            if dtype != torch.float32 and width:
                continue
            for batch in (25,) if width or dtype == torch.float64 else (25, 16384):
                inside, out = dim - dim // 2 + width, dim // 2
                meta = partial(torch.empty, dtype=dtype, device="meta")
                x, context, logdet = meta(batch, dim), meta(1, batch, width) if width else None, meta(batch)
                parameters = (
                    *(meta(n, dim), meta(n, dim), meta(n, 2, 2, inside * hidden), meta(n, 2, 2, hidden)),
                    *(meta(n, 2, 2, depth, hidden * hidden), meta(n, 2, 2, depth, hidden)),
                    *(meta(n, 2, 2, hidden * out), meta(n, 2, 2, out)),
                    torch.empty(n, dim, dtype=torch.int64, device="meta"),
                )
                slopes = (0.01, 0.9 if width else 1.0)
                for inverse in (False, True) if dtype == torch.float32 and hidden == 512 else (False,):
                    direction = " inverse" if inverse else ""
                    label = f"flow {str(dtype).removeprefix('torch.')} [{batch}, {dim}] hidden {hidden}{direction}"
                    calls[label] = partial(flow, x, context, *parameters, *slopes, False, inverse, 2, False)
                    size = saved_bytes(x, hidden, depth, n, inverse)
                    saved = torch.empty(size, dtype=torch.uint8, device="meta")
                    grad_logdet = logdet.to(accumulator_type(dtype))
                    options = (*slopes, inverse, 2, width > 0, True, False)
                    calls[f"{label} backward"] = partial(
                        flow_backward, x, grad_logdet, x, saved, context, *parameters, *options
                    )
    return recorded(calls)
