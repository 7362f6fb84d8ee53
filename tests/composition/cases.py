"""The table of what must compose: every op and every module, one line each.

A case is a module (an op is wrapped in one), input of any batch size for it, and the tensors that it returns. To add a
module, add one line to ``MODULES``; all tests of this folder then run on it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iin_fast import IIN, FactorLoss, Factors
from iin_fast import functional as F
from iin_fast.compat import iin as published_iin
from iin_fast.compat import net2net
from iin_fast.flow import ProgramBuilder, Weights, affine, mlp, spline
from iin_fast.nn import (
    ActNorm,
    AffineCoupling,
    Compose,
    Flow,
    LULinear,
    MaskedAutoregressiveFlow,
    NeuralSplineFlow,
    Permutation,
    RealNVP,
    ResidualNet,
    SplineCoupling,
)
from iin_fast.ops.flow import flow as flow_op
from iin_fast.ops.flow_program import flow_program

__all__ = ["CASES", "DIM", "MODULES", "OPS", "Case", "same", "seeded", "tensors"]

DIM = 6
Inputs = tuple[Any, ...]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def rows(n: int) -> Inputs:
    return (normal(1, n, DIM),)


class Call(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *args: Any) -> Any:
        return self.function(*args, **self.options)


class Inverse(nn.Module):
    """The inverse of a module, as a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module.inverse(*args)


class PairLoss(nn.Module):
    """A training step's loss: the IIN and its FactorLoss."""

    def __init__(self, model: IIN) -> None:
        super().__init__()
        self.model, self.loss = model, FactorLoss()

    def forward(self, za: Tensor, zb: Tensor, shared: Tensor) -> Tensor:
        return self.loss(self.model, za, zb, shared)


def started(module: nn.Module, *context: Tensor) -> nn.Module:
    """After the data-dependent start of its ActNorm."""
    module(2 * normal(0, 16, DIM) + 1, *context)
    return module


def flow(**options: Any) -> nn.Module:
    options = dict(n_flows=2, hidden_dim=8, hidden_depth=1, generator=seeded()) | options
    context = [normal(4, 16, options["context_dim"])] if "context_dim" in options else []
    return started(Flow(DIM, **options), *context)


def spline_flow(context: int = 0) -> nn.Module:
    module = NeuralSplineFlow(DIM, context, n_flows=1, bins=4, hidden_dim=8, hidden_depth=1, generator=seeded())
    return started(module, *([normal(4, 16, context)] if context else []))


def mlp_flow(kind: type, context_dim: int = 0, **options: Any) -> nn.Module:
    """Away from the identity that it starts as."""
    module = kind(DIM, context_dim, n_flows=2, hidden_dim=8, hidden_depth=1, generator=seeded(), **options)
    with torch.no_grad():
        module.weight_out += 0.2 * normal(3, *module.weight_out.shape)
    return started(module, *([normal(4, 16, context_dim)] if context_dim else []))


def compose(context_dim: int = 0) -> nn.Module:
    layers = [ActNorm(DIM), LULinear(DIM), AffineCoupling(DIM, linear(3 + context_dim, 6))]
    layers += [Permutation(DIM, generator=seeded()), ActNorm(DIM)]
    net = ResidualNet(3 + context_dim, SplineCoupling.outputs(DIM, bins=4), 8, 1, generator=seeded())
    with torch.no_grad():  # no steep maps, whose rounding would show
        net.last.weight *= 0.3
        layers[2].conditioner.weight *= 0.3
    layers.append(SplineCoupling(DIM, net, bins=4, swap=True))
    return started(Compose(layers, context_dim), *([normal(4, 16, context_dim)] if context_dim else []))


def iin(n_flows: int = 2, **options: Any) -> nn.Module:
    options |= dict(n_flows=n_flows, hidden_dim=8, hidden_depth=1, generator=seeded())
    context = [normal(4, 16, options["context_dim"])] if "context_dim" in options else []
    return started(IIN(DIM, {"digit": 3, "color": 2}, **options), *context)


def linear(inputs: int, outputs: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs)


def spline_coupling() -> nn.Module:
    conditioner = linear(3, SplineCoupling.outputs(DIM, bins=4))
    with torch.no_grad():
        conditioner.weight *= 0.3  # knots that don't lie within bfloat16's rounding of one another
    return SplineCoupling(DIM, conditioner, bins=4)


def factor_transformer() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"in_channel": DIM, "n_flow": 2, "hidden_depth": 1, "hidden_dim": 8, "factor_config": [1, 3, 2]}
    return started(published_iin.FactorTransformer({"Transformer": sizes}))


def published_coupling() -> nn.Module:
    torch.manual_seed(0)
    return published_iin.DoubleVectorCouplingBlock(DIM, hidden_dim=8, depth=1)


def published_conditional() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(conditioning_dim=2, embedding_dim=3, hidden_dim=8, hidden_depth=1, n_flows=2)
    embedder = dict(conditioning_option="sequential", conditioning_hidden_dim=8, conditioning_depth=1)
    return started(net2net.ConditionalFlatCouplingFlow(DIM, **sizes, **embedder), normal(4, 16, 2))


def flow_parameters() -> list[Tensor]:
    module = flow()
    names = "loc scale weight_in bias_in weight_hidden bias_hidden weight_out bias_out permutation".split()
    return [getattr(module, name).detach() for name in names]


def program(inverse: bool = False, base: bool = False, context: int = 0) -> nn.Module:
    """A program of an affine layer, an autoregressive layer, an LU mixing and a spline coupling; its parameters are inputs."""
    builder = program_builder(context)
    built = builder.build()

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        given, parameters = (rest[0], rest[1:]) if context else (None, rest)
        return flow_program(x, given, parameters, built, inverse=inverse, base=base)

    return Call(run)


def program_builder(context: int) -> ProgramBuilder:
    builder, seeds = ProgramBuilder(DIM, context), iter(range(10, 100))

    def weights(inputs: int, out: int, mask: Tensor | None = None) -> Weights:
        return Weights(
            out,
            builder.ref(0.3 * normal(next(seeds), out, inputs)),
            builder.ref(0.3 * normal(next(seeds), out)),
            builder.ref(mask),
        )

    builder.affine(builder.ref(normal(next(seeds), DIM)), builder.ref(0.3 * normal(next(seeds), DIM)), form="exp")
    below = torch.ones(DIM, DIM).tril(-1)
    builder.autoregressive(mlp([weights(DIM, 2 * DIM, below.repeat(2, 1))]), affine(DIM, "tanh"))
    builder.linear(builder.ref(0.1 * normal(next(seeds), DIM, DIM)), storage="square")
    net = mlp([weights(3 + context, 8), weights(8, 3 * 11)], activation="silu", context=context > 0)
    builder.coupling(range(3), range(3, DIM), net, spline(4, tail_bound=3.0))
    return builder


def program_inputs(n: int, context: int = 0) -> Inputs:
    rows = (normal(1, n, DIM), normal(2, n, context)) if context else (normal(1, n, DIM),)
    return (*rows, *program_builder(context).tensors)


def pair(n: int) -> Inputs:
    shared = torch.rand(n, 3, generator=seeded(6)) < 0.5
    return normal(1, n, DIM), normal(2, n, DIM), normal(3, n), normal(4, n), shared


@dataclass(frozen=True)
class Case:
    """One op or module. ``module()`` is new at every call and always the same; so is ``inputs(batch)``."""

    name: str
    module: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs] = rows
    batched: int = 1  # how many of the inputs have the batch as their first dimension; the first ones
    mean: bool = False  # gives one number for the batch, not one result for each row

    def dynamic(self) -> tuple[dict[int, Any] | None, ...]:
        """Dynamic shapes for torch.export: the batch of every input that has one."""
        batch = torch.export.Dim("batch", min=2, max=512)
        return tuple({0: batch} if i < self.batched else None for i, _ in enumerate(self.inputs(2)))


OPS = [
    Case("affine_coupling", lambda: Call(F.affine_coupling), lambda n: tuple(normal(3, 3, n, DIM)), 3),
    Case("affine_coupling inverse", lambda: Call(F.affine_coupling, inverse=True), lambda n: tuple(normal(3, 3, n, DIM)), 3),
    Case("additive coupling", lambda: Call(lambda x, t: F.affine_coupling(x, None, t, squash="none")), lambda n: tuple(normal(3, 2, n, DIM)), 2),
    Case("spline_coupling", lambda: Call(F.spline_coupling, bins=4), lambda n: (normal(1, n, DIM), normal(2, n, DIM, 11)), 2),
    Case("spline_coupling inverse", lambda: Call(F.spline_coupling, bins=4, inverse=True), lambda n: (normal(1, n, DIM), normal(2, n, DIM * 11)), 2),
    Case("rational_quadratic_spline", lambda: Call(F.rational_quadratic_spline), lambda n: (normal(1, n, DIM), normal(2, n, DIM, 4), normal(3, n, DIM, 4), normal(4, n, DIM, 3)), 4),
    Case("pair_nll", lambda: Call(F.pair_nll, sizes=[3, 2, 1], rho=0.9), pair, 5),
    Case("flow", lambda: Call(lambda x, *p: flow_op(x, None, *p)), lambda n: (normal(1, n, DIM), *flow_parameters()), 1),
    Case("flow_program", program, program_inputs),
    Case("flow_program inverse", lambda: program(inverse=True), program_inputs),
    Case("flow_program context", lambda: program(base=True, context=3), lambda n: program_inputs(n, 3), 2),
    Case("flow invert", lambda: Call(lambda x, *p: flow_op(x, None, *p, memory="invert")), lambda n: (normal(1, n, DIM), *flow_parameters()), 1),
]  # fmt: skip

MODULES = [
    Case("ActNorm", lambda: started(ActNorm(DIM))),
    Case("AffineCoupling", lambda: AffineCoupling(DIM, linear(3, 6))),
    Case("Permutation", lambda: Permutation(DIM, generator=seeded())),
    Case("Flow", flow),
    Case("Flow inverse", lambda: Inverse(flow())),
    Case("Flow context", lambda: flow(context_dim=2), lambda n: (normal(1, n, DIM), normal(2, n, 2)), 2),
    Case("SplineCoupling", spline_coupling),
    Case("LULinear", lambda: LULinear(DIM)),
    Case("NeuralSplineFlow", spline_flow),
    Case("NeuralSplineFlow inverse", lambda: Inverse(spline_flow())),
    Case("NeuralSplineFlow context", lambda: spline_flow(context=2), lambda n: (normal(1, n, DIM), normal(2, n, 2)), 2),
    Case("RealNVP", lambda: mlp_flow(RealNVP)),
    Case("RealNVP context", lambda: mlp_flow(RealNVP, 2), lambda n: (normal(1, n, DIM), normal(2, n, 2)), 2),
    Case("MaskedAutoregressiveFlow", lambda: mlp_flow(MaskedAutoregressiveFlow, order="random")),
    Case("MaskedAutoregressiveFlow inverse", lambda: Inverse(mlp_flow(MaskedAutoregressiveFlow))),
    Case("MaskedAutoregressiveFlow spline", lambda: mlp_flow(MaskedAutoregressiveFlow, 2, transformer="spline", bins=4, actnorm=False), lambda n: (normal(1, n, DIM), normal(2, n, 2)), 2),
    Case("Compose", compose),
    Case("Compose inverse", lambda: Inverse(compose())),
    Case("Compose context", lambda: compose(2), lambda n: (normal(1, n, DIM), normal(2, n, 2)), 2),
    Case("IIN", iin),
    Case("IIN context", lambda: iin(context_dim=2), lambda n: (normal(1, n, DIM), normal(2, n, 2)), 2),
    Case("IIN spline", lambda: iin(n_flows=1, coupling="spline")),
    Case("compat.iin FactorTransformer", factor_transformer),
    Case("compat.iin DoubleVectorCouplingBlock", published_coupling),
    Case("compat.net2net ConditionalFlatCouplingFlow", published_conditional, lambda n: (normal(1, n, DIM), normal(2, n, 2)), 2),
    Case("FactorLoss", lambda: PairLoss(iin()), lambda n: (normal(1, n, DIM), normal(2, n, DIM), torch.rand(n, 2, generator=seeded(6)) < 0.5), 3, True),
]  # fmt: skip

CASES = OPS + MODULES


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [result.tensor] if isinstance(result, Factors) else [t for part in result for t in tensors(part)]


def learned(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    """What gradients are taken for: parameters, and inputs that are floating; the inputs now require gradients."""
    given = [t.requires_grad_() for t in inputs if isinstance(t, Tensor) and t.is_floating_point()]
    return [*given, *module.parameters()]


def gradients(call: Callable[..., Any], module: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Results and gradients of one number that depends on all of them. ``call`` runs ``module``."""
    wanted = learned(module, inputs)
    results = tensors(call(*inputs))
    if not wanted:
        return results
    score = sum((t * torch.linspace(0.5, 1.5, t.numel()).reshape(t.shape)).sum() for t in results)
    found = torch.autograd.grad(score, wanted, allow_unused=True)
    return [*results, *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True))]


def same(got: Any, wanted: Any, **tolerance: float) -> None:
    torch.testing.assert_close(tensors(got), tensors(wanted), **tolerance)
