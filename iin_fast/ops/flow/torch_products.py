"""flow in products of torch's own (cuBLAS on NVIDIA GPUs): wide nets at large batches.

There our tiles lose to a library that is made for such sizes (docs/performance.md). So each layer is one ``addmm``: cuBLAS adds a
bias of one row as it writes the result. A batched product of S and T would first fill the result with the bias, and read it again.
The nets run one after the other, so that the L2 cache still has what LeakyReLU reads: the activations of one net, 33 MB in
float32 at 16384 rows of the published size. Couplings are our op. All of it is ops of torch, so a CPU can test it.

A pass reads or writes the activations of one layer of one net, ``batch × hidden`` elements. A net makes 4 (depth + 1) of them forward: a product
reads its input and writes its result, LeakyReLU reads and writes. Backward makes 8 (depth + 1): behind each LeakyReLU its derivative reads two and
writes one, the product that it follows writes one, the next product and the bias's gradient read one each, weight gradients two.
Ops are counted in tests/ops/test_flow_products.py.

Forward and inverse of nets of up to 512 outputs run in a kernel of ours where a GPU has the shared memory for it (``nets_fit``): one launch for
both nets of a half, whose activations stay there. Backward runs here.

Types: rows between halves, raw scales, shifts, couplings and log-dets are float32 at least. Activations, gradients of activations and
results of products are of the type of x.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..affine_coupling.reference import SQUASHES
from ..autograd import has_values
from ..types import accumulator_type
from .layout import matrices, pack
from .saved import pieces_of, saved_bytes, views

__all__ = ["flow", "flow_backward", "forced", "forward", "nets_fit", "takes_products"]

HIDDEN = 256
ROWS = 2048
"""Nets as wide and batches as large as this run here, where our own tiles are slower, backward above all (benchmarks/gpu.py)."""

NETS = 512
"""The most inputs and outputs that layers of the kernel of both nets have: nets_most in csrc/flow/flow_nets_kernels.cuh."""

NETS_TF32_ROWS = 8192
"""Rows up to which that kernel is faster in TF32: 2.5 ms for 3.0 at 4096 rows of the published size on an H100, 9.8 for 9.5 at 16,384."""

NETS_ROOM = 228 * 1024
"""Bytes of shared memory of a multiprocessor that this kernel needs, 1 KiB of them the system's."""

_TANH, _IDENTITY = SQUASHES["tanh"].code, SQUASHES["identity"].code
_forced: list[bool] = []


@contextmanager
def forced(products: bool) -> Iterator[None]:
    """All flows of this process run here, or none does, whatever their size: for tests and benchmarks."""
    _forced.append(products)
    try:
        yield
    finally:
        _forced.pop()


def takes_products(x: Tensor, hidden: int) -> bool:
    """Whether a flow on ``x [batch, dim]`` runs here."""
    if not (x.is_cuda or _forced) or not has_values(x):  # what traces or maps the call sees one op
        return False
    if _forced:
        return _forced[-1]
    large = hidden >= HIDDEN and x.shape[0] >= ROWS
    # with deterministic algorithms torch refuses products, unless an environment variable is set
    return large and not torch.are_deterministic_algorithms_enabled()


def nets_fit(x: Tensor, hidden: int, inside: int, transformed: int, tf32: bool) -> bool:
    """Whether a flow that runs here, with ``inside`` inputs of the nets, is one for the kernel of both nets (choose_way in
    csrc/flow/flow_ways.cuh)."""
    if _forced or not x.is_cuda or x.dtype == torch.float64:
        return False
    vector = 16 // x.element_size()
    if hidden > NETS or inside > NETS or hidden % vector or transformed % vector:
        return False
    if tf32 and x.dtype == torch.float32 and x.shape[0] > NETS_TF32_ROWS:
        return False
    return torch.cuda.get_device_properties(x.device).shared_memory_per_multiprocessor >= NETS_ROOM


Layer = tuple[Tensor, Tensor]  # weight [in, out], bias [out]


def _nets(weights: Sequence[Tensor], biases: Sequence[Tensor], depth: int) -> list[list[Layer]]:
    """The layers of each net, S before T, half by half. ``unbind`` makes all views in one call, which indexing would not."""
    first, hidden, last = (
        [*zip(w.flatten(0, -3).unbind(), b.flatten(0, -2).unbind(), strict=True)]
        for w, b in zip(weights, biases, strict=True)
    )
    return [[first[i], *hidden[i * depth : (i + 1) * depth], last[i]] for i in range(len(first))]


def _add_product(target: Tensor, a: Tensor, b: Tensor) -> None:
    """target += a b; ``target`` may be of a type with more bits."""
    if target.dtype == a.dtype:
        torch.addmm(target, a, b, out=target)
    else:
        target.add_(a @ b)


class _Flow:
    """Sizes, parameters and buffers of a call; without ``saved``, memory of one step serves all."""

    def __init__(
        self,
        x: Tensor,
        context: Tensor | None,
        parameters: Sequence[Tensor],  # from loc to permutation, in the order of the op
        leaky_slope: float,
        inverse: bool,
        saved: Tensor | None,
    ) -> None:
        loc, scale, weight_in, bias_in, weight_hidden, bias_hidden, weight_out, bias_out, permutation = parameters
        self.context, self.leaky, self.inverse = context, leaky_slope, inverse
        (batch, self.dim), self.n, self.out = x.shape, loc.shape[0], x.shape[1] // 2
        self.conditioning = self.dim - self.out
        hidden, self.depth = bias_in.shape[3], bias_hidden.shape[3]
        inside = self.conditioning + (0 if context is None else context.shape[2])
        self.dtype, accumulator = x.dtype, accumulator_type(x.dtype)
        self.loc, self.scale = loc.to(accumulator), scale.to(accumulator)
        self.permutation = permutation.clamp(0, self.dim - 1)  # a wrong one must not read beyond a row
        self.inverted = self.permutation.argsort(1)
        self.weights = [
            matrices(weight_in, hidden, inside),
            matrices(weight_hidden, hidden, hidden),
            matrices(weight_out, self.out, hidden),
        ]
        self.biases = [bias_in, bias_hidden, bias_out]
        self.nets = _nets(self.weights, self.biases, self.depth)
        self.saves = saved is not None
        if saved is not None:
            pieces = pieces_of(x, hidden, self.depth, self.n, inverse, True)
            stages, raw, coupled, activations = views(saved, pieces)
            self.coupled = coupled.unbind()
        else:
            stages = x.new_empty(2, batch, self.dim, dtype=accumulator)
            raw = x.new_empty(1, batch, self.out, dtype=accumulator)
            activations = x.new_empty(1, 1, min(self.depth + 1, 2), batch, hidden)
        self.stages, self.raw = stages.unbind(), raw.unbind()
        self.activations = [[net.unbind() for net in step.unbind()] for step in activations.unbind()]

    def stage(self, step: int) -> Tensor:
        """What a half gets, [batch, dim]: columns that condition, then columns that are transformed."""
        return self.stages[step % len(self.stages)]

    def activation(self, step: int, net: int, layer: int) -> Tensor:
        nets = self.activations[step % len(self.activations)]
        layers = nets[net % len(nets)]
        return layers[layer % len(layers)]

    def input(self, step: int) -> Tensor:
        """What the nets of a half get, [batch, in]."""
        u = self.stage(step)[:, : self.conditioning].to(self.dtype)
        return u if self.context is None else torch.cat([u, self.of_block(self.context, step)], 1)

    def of_block(self, contexts: Tensor, step: int) -> Tensor:
        return contexts[step // 2 if len(contexts) > 1 else 0]

    def net(self, step: int, net: int, u: Tensor, result: Tensor) -> None:
        *layers, (weight, bias) = self.nets[2 * step + net]
        a = u
        for i, (w, b) in enumerate(layers):
            a = F.leaky_relu_(torch.addmm(b, a, w, out=self.activation(step, net, i)), self.leaky)
        if result.dtype == a.dtype:
            torch.addmm(bias, a, weight, out=result)
        else:
            result.copy_(torch.addmm(bias, a, weight))

    def half(self, step: int) -> tuple[Tensor, Tensor]:
        """What a half makes of its transformed columns, and its log-det."""
        u, raw = self.input(step), self.raw[step % len(self.raw)]
        shift = torch.empty_like(raw)
        self.net(step, 0, u, raw)
        self.net(step, 1, u, shift)
        values = self.stage(step)[:, self.conditioning :]
        coupling = torch.ops.iin_fast.affine_coupling.default
        squash = _TANH
        if self.saves:  # s, as our kernels do
            raw.tanh_()
            squash = _IDENTITY
        found, logdet = coupling(values, raw, shift, squash, 1.0, self.inverse)
        if self.inverse and self.saves:
            self.coupled[step].copy_(found)
        return found, logdet


def forward(x: Tensor, context: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """torch.ops.iin_fast.flow with its arguments, by the kernel of both nets where it can, else by ``flow``; saves for ``flow_backward``."""
    out, hidden, tf32 = x.shape[1] // 2, rest[3].shape[3], rest[14]
    inside = x.shape[1] - out + (0 if context is None else context.shape[2])
    if not nets_fit(x, hidden, inside, out, tf32):
        return flow(x, context, *rest)
    return torch.ops.iin_fast.flow(x, context, *rest)  # type: ignore[no-any-return]


def flow(x: Tensor, context: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """torch.ops.iin_fast.flow with its arguments: y, logdet, and what is saved for backward. torch's own switch decides about TF32."""
    parameters, (leaky_slope, activation_slope, exact_logdet, inverse, keep, *_) = rest[:9], rest[9:]
    loc, bias_in, bias_hidden = parameters[0], parameters[3], parameters[5]
    size = saved_bytes(x, bias_in.shape[3], bias_hidden.shape[3], loc.shape[0], inverse) if keep else 0
    saved = x.new_empty(size, dtype=torch.uint8)
    f = _Flow(x, context, parameters, leaky_slope, inverse, saved if keep else None)
    h = x.to(f.scale.dtype)
    c, out, logdets = f.conditioning, f.out, []

    def activate(h: Tensor, slope: float) -> None:
        if slope != 1:
            if exact_logdet:
                logdets.append((h < 0).sum(1, dtype=h.dtype) * math.log(slope))
            F.leaky_relu_(h, slope)

    for block in reversed(range(f.n)) if inverse else range(f.n):
        first, second = f.stage(2 * block), f.stage(2 * block + 1)
        if not inverse:
            torch.add(h, f.loc[block], out=first).mul_(f.scale[block])
            activate(first, activation_slope)
            values, logdet = f.half(2 * block)
            torch.cat([values, first[:, :c]], 1, out=second)
            values, second_logdet = f.half(2 * block + 1)
            h = torch.cat([second[:, :c], values], 1).index_select(1, f.permutation[block])
        else:
            torch.index_select(h, 1, f.inverted[block], out=second)
            values, second_logdet = f.half(2 * block + 1)
            torch.cat([second[:, out:c], values, second[:, :out]], 1, out=first)
            values, logdet = f.half(2 * block)
            h = torch.cat([first[:, :c], values], 1)
            activate(h, 1 / activation_slope)
            h.div_(f.scale[block]).sub_(f.loc[block])
        logdets += [logdet, second_logdet]
    logs = f.scale.abs().log().sum()
    return h.to(x.dtype), torch.stack(logdets).sum(0).add_(logs, alpha=-1 if inverse else 1), saved


def flow_backward(
    grad_y: Tensor, grad_logdet: Tensor, y: Tensor, saved: Tensor, context: Tensor | None, *rest: Any
) -> tuple[Tensor | None, ...]:
    """torch.ops.iin_fast.flow_backward with its arguments, from what ``flow`` saved."""
    parameters, (leaky_slope, activation_slope, inverse, _, context_grad, weight_grads, *_) = rest[:9], rest[9:]
    f = _Flow(y, context, parameters, leaky_slope, inverse, saved)
    back = _Backward(f, grad_logdet, context_grad, weight_grads)
    g = grad_y.to(f.scale.dtype)
    c, out, slope = f.conditioning, f.out, activation_slope
    grad_loc, grad_scale, sum_logdet = torch.empty_like(f.loc), torch.empty_like(f.scale), grad_logdet.sum()
    for block in range(f.n) if inverse else reversed(range(f.n)):
        first, scale = f.stage(2 * block), f.scale[block]
        if not inverse:  # h = scale (x + loc), activation, two halves, permutation
            g = back.half(2 * block + 1, g.index_select(1, f.inverted[block]))
            g = back.half(2 * block, torch.cat([g[:, out:], g[:, :out]], 1))
            z = first
            if slope != 1:
                g, z = torch.where(first < 0, slope * g, g), F.leaky_relu(first, 1 / slope)
            torch.add((g * z).sum(0), sum_logdet, out=grad_scale[block]).div_(scale)
            g.mul_(scale)
            torch.sum(g, 0, out=grad_loc[block])
        else:  # permutation, two halves, activation, x = h / scale - loc
            torch.sum(g, 0, out=grad_loc[block]).neg_()
            h = torch.cat([first[:, :c], f.coupled[2 * block]], 1)
            g = g / scale
            z = h if slope == 1 else F.leaky_relu(h, 1 / slope)
            torch.add((g * z).sum(0), sum_logdet, out=grad_scale[block]).div_(-scale)
            if slope != 1:
                g = torch.where(h < 0, g / slope, g)
            g = back.half(2 * block, g)
            g = back.half(2 * block + 1, torch.cat([g[:, c:], g[:, :c]], 1)).index_select(1, f.permutation[block])
    grad_context = None if back.grad_context is None else back.grad_context.to(y.dtype)
    grads = [g.to(y.dtype), grad_context, grad_loc.to(y.dtype), grad_scale.to(y.dtype)]
    for weight, bias in zip(back.weights, back.biases, strict=True):
        grads += [pack(weight.mT), bias] if weight_grads else [None, None]
    return tuple(grads)


class _Backward:
    """Gradients of contexts, weights and biases, which the halves fill in turn."""

    def __init__(self, f: _Flow, grad_logdet: Tensor, context_grad: bool, weight_grads: bool) -> None:
        self.f, self.grad_logdet = f, grad_logdet
        self.grad_context = None
        if context_grad and f.context is not None:
            self.grad_context = torch.zeros_like(f.context, dtype=f.scale.dtype)
        self.weights, self.biases = ([t.new_empty(t.shape) for t in ts] for ts in (f.weights, f.biases))
        self.nets = _nets(self.weights, self.biases, f.depth) if weight_grads else None
        self.d = [torch.empty_like(f.activation(0, 0, 0)) for _ in range(2)]  # gradients of activations, in turn

    def half(self, step: int, g: Tensor) -> Tensor:
        """``g [batch, dim]``, the gradient of what a half put out, becomes that of what it got."""
        f = self.f
        stage, conditioning, transformed = f.stage(step), g[:, : f.conditioning], g[:, f.conditioning :]
        values = f.coupled[step] if f.inverse else stage[:, f.conditioning :]
        kernel = torch.ops.iin_fast.affine_coupling_backward.default
        s = f.raw[step]
        found, of_s, of_shift = kernel(transformed, self.grad_logdet, values, s, _IDENTITY, 1.0, f.inverse)
        of_nets = torch.ops.aten.tanh_backward(of_s, s), of_shift
        transformed.copy_(found)
        u = f.input(step)
        for net, d in enumerate(of_nets):
            first = self.net(step, net, u, d.to(f.dtype))
            weight, _ = f.nets[2 * step + net][0]
            _add_product(conditioning, first, weight[: f.conditioning].t())
            if self.grad_context is not None:
                _add_product(f.of_block(self.grad_context, step), first, weight[f.conditioning :].t())
        return g

    def net(self, step: int, net: int, u: Tensor, d: Tensor) -> Tensor:
        """From the gradient of what a net put out to that of what its first layer put out, before the LeakyReLU."""
        f = self.f
        layers, grads = f.nets[2 * step + net], self.nets and self.nets[2 * step + net]
        for i in reversed(range(len(layers))):
            a = f.activation(step, net, i - 1) if i else u
            if grads:
                torch.mm(a.t(), d, out=grads[i][0])
                torch.sum(d, 0, out=grads[i][1])
            if i:
                d = torch.mm(d, layers[i][0].t(), out=self.d[i % 2])
                torch.ops.aten.leaky_relu_backward.grad_input(d, a, f.leaky, True, grad_input=d)
        return d
