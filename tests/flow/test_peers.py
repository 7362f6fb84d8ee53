"""Programs equal the modules that they describe: ours, and those of nflows and zuko."""

import math

import pytest
import torch
from torch import Tensor, nn

import iin_fast.nn as ours
from iin_fast.flow import ABSENT, Block, ProgramBuilder, Ref, Weights, affine, mlp, residual, spline
from iin_fast.flow.layers import Net
from iin_fast.ops.affine_coupling import SQUASHES
from iin_fast.ops.flow_program import flow_program

transforms = pytest.importorskip("nflows.transforms")
nets = pytest.importorskip("nflows.nn.nets")
zuko = pytest.importorskip("zuko")

DIM, CONTEXT, BATCH = 5, 3, 7
TOLERANCE = dict(rtol=1e-9, atol=1e-9)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shaken(module: nn.Module) -> nn.Module:
    """Weights in float64 that no start has made small."""
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


def same(builder: ProgramBuilder, module: nn.Module, forward, backward, context: Tensor | None = None) -> None:
    """Both directions, and the gradients of x, the context and all parameters."""
    program = builder.build()
    x = torch.randn(BATCH, DIM, dtype=torch.float64, requires_grad=True)
    wanted = [x, *[p for p in module.parameters() if p.requires_grad], *([] if context is None else [context])]
    for inverse, call in ((False, forward), (True, backward)):
        results = []
        for y, logdet in (flow_program(x, context, builder.tensors, program, inverse=inverse), call(x)):
            grads = torch.autograd.grad((y.sin().sum() + logdet.sin().sum()), wanted, allow_unused=True)
            results.append(
                [y, logdet, *(torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True))]
            )
        torch.testing.assert_close(*results, **TOLERANCE)


def put(builder: ProgramBuilder, layer: nn.Module) -> Weights:
    """A dense layer of torch, nflows or zuko; the latter two keep the mask beside the weight."""
    mask = getattr(layer, "mask", None)
    place = ABSENT if mask is None else builder.ref(mask)
    return Weights(layer.weight.shape[0], builder.ref(layer.weight), builder.ref(layer.bias), place)


def our_residual(builder: ProgramBuilder, net: ours.ResidualNet) -> Net:
    blocks = [Block(*(put(builder, layer) for layer in block)) for block in net.blocks]
    return residual(put(builder, net.first), blocks, put(builder, net.last), last_activation=True)


def test_act_norm() -> None:
    norm = shaken(ours.ActNorm(DIM))
    norm.initialize(torch.randn(9, DIM, dtype=torch.float64))
    builder = ProgramBuilder(DIM)
    builder.affine(builder.ref(norm.loc), builder.ref(norm.scale), order="shift_first")
    same(builder, norm, norm, norm.inverse)


def test_lu_linear() -> None:
    linear = shaken(ours.LULinear(DIM))
    builder = ProgramBuilder(DIM)
    builder.linear(builder.ref(linear.weight), bias=builder.ref(linear.bias), storage="square", eps=linear.min_diagonal)
    same(builder, linear, linear, linear.inverse)


def test_permutation() -> None:
    permutation = ours.Permutation(DIM)
    builder = ProgramBuilder(DIM)
    builder.permute(permutation.permutation.tolist())
    same(builder, permutation, permutation, permutation.inverse)


@pytest.mark.parametrize("swap", [False, True])
def test_spline_coupling(swap: bool) -> None:
    net = ours.ResidualNet(3, ours.SplineCoupling.outputs(DIM, bins=4), hidden_dim=8)
    coupling = shaken(ours.SplineCoupling(DIM, net, bins=4, swap=swap))
    builder = ProgramBuilder(DIM)
    first, last = (range(2, 5), range(2)) if swap else (range(3), range(3, 5))
    builder.coupling(first, last, our_residual(builder, net), spline(4, tail_bound=3.0))
    same(builder, coupling, coupling, coupling.inverse)


@pytest.mark.parametrize("squash", SQUASHES)
def test_affine_coupling(squash: str) -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 2 if squash == "none" else 4))
    coupling = shaken(ours.AffineCoupling(DIM, net, squash=squash))
    builder = ProgramBuilder(DIM)
    conditioner = mlp([put(builder, net[0]), put(builder, net[2])], activation="silu")
    builder.coupling(range(3), range(3, 5), conditioner, affine(2, squash, clamp=SQUASHES[squash].clamp))
    same(builder, coupling, coupling, coupling.inverse)


def test_nflows_lu_linear() -> None:
    linear = shaken(transforms.LULinear(DIM, identity_init=False))
    builder = ProgramBuilder(DIM)
    triangles = builder.ref(linear.lower_entries), builder.ref(linear.upper_entries)
    builder.linear(*triangles, builder.ref(linear.unconstrained_upper_diag), builder.ref(linear.bias), eps=linear.eps)
    same(builder, linear, linear, linear.inverse)


def test_nflows_maf() -> None:
    layer = shaken(transforms.MaskedAffineAutoregressiveTransform(DIM, 8, context_features=CONTEXT, num_blocks=2))
    made = layer.autoregressive_net
    context = torch.randn(BATCH, CONTEXT, dtype=torch.float64, requires_grad=True)
    builder = ProgramBuilder(DIM, CONTEXT)
    blocks = [
        Block(*(put(builder, linear) for linear in block.linear_layers), shift=put(builder, block.context_layer))
        for block in made.blocks
    ]
    first, last, shift = (put(builder, part) for part in (made.initial_layer, made.final_layer, made.context_layer))
    builder.autoregressive(
        residual(first, blocks, last, shift=shift), affine(DIM, "softplus", clamp=1e-3, layout="interleaved")
    )
    same(builder, layer, lambda x: layer(x, context), lambda y: layer.inverse(y, context), context)


def test_zuko_maf() -> None:
    flow = shaken(zuko.flows.MAF(DIM, CONTEXT, transforms=2, hidden_features=(8, 8)))
    context = torch.randn(BATCH, CONTEXT, dtype=torch.float64, requires_grad=True)
    builder = ProgramBuilder(DIM, CONTEXT)
    for layer in flow.transform.transforms:
        dense = [put(builder, part) for part in layer.hyper if isinstance(part, nn.Linear)]
        clipped = affine(DIM, "softclip", clamp=-math.log(1e-3), layout="interleaved_shift_first")
        builder.autoregressive(mlp(dense, context=True), clipped)
    transform = flow(context).transform
    same(builder, flow, transform.call_and_ladj, transform.inv.call_and_ladj, context)


def test_nflows_spline_coupling_with_context() -> None:
    made = []

    def net(inputs: int, outputs: int) -> nn.Module:
        made.append(nets.ResidualNet(inputs, outputs, hidden_features=8, context_features=CONTEXT))
        return made[0]

    mask = torch.tensor([1, -1, 1, -1, -1])
    layer = shaken(
        transforms.PiecewiseRationalQuadraticCouplingTransform(mask, net, num_bins=4, tails="linear", tail_bound=3.0)
    )
    context = torch.randn(BATCH, CONTEXT, dtype=torch.float64, requires_grad=True)
    builder = ProgramBuilder(DIM, CONTEXT)
    blocks = [
        Block(*(put(builder, linear) for linear in block.linear_layers), gate=put(builder, block.context_layer))
        for block in made[0].blocks
    ]
    conditioner = residual(put(builder, made[0].initial_layer), blocks, put(builder, made[0].final_layer), context=True)
    builder.coupling([1, 3, 4], [0, 2], conditioner, spline(4, tail_bound=3.0, gain=8**-0.5))
    same(builder, layer, lambda x: layer(x, context), lambda y: layer.inverse(y, context), context)


def test_stacked_parameters() -> None:
    """Two layers whose parameters lie in one tensor."""
    stacked = torch.randn(2, 2, DIM, dtype=torch.float64, requires_grad=True)
    builder = ProgramBuilder(DIM)
    for layer in range(2):
        place = builder.ref(stacked, layer * 2 * DIM)
        builder.affine(place, Ref(place.tensor, place.offset + DIM), form="exp")
    x = torch.randn(BATCH, DIM, dtype=torch.float64)
    y, logdet = flow_program(x, None, builder.tensors, builder.build())
    wanted = x
    for shift, scale in stacked:
        wanted = wanted * scale.exp() + shift
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(logdet, stacked[:, 1].sum().expand(BATCH))
    (grad,) = torch.autograd.grad(y.square().sum(), stacked)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted.square().sum(), stacked)[0])
