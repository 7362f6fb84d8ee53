"""normflows: flows, conditional flows and their diagonal Gaussian base.

The forward direction of normflows leads from the latent to the data, so densities run programs backwards.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...flow import NetBuilder, affine
from ...flow.builder import CONTEXT, FEATURES
from ...flow.layers import Net
from ..class_factory import original
from ..registry import qualified
from ..splines import net_scale
from . import nets
from .nflows import expect_shape, linear, lu_linear, masked, no_batch_norm, residual_net, spline_cdf, spline_of
from .plan import Atom, Maker, Programs, kept, run
from .watch import Unsupported, Watch

__all__ = ["METHODS", "PROGRAMS"]

FLOW, CONDITIONAL = "normflows.core.NormalizingFlow", "normflows.core.ConditionalNormalizingFlow"
REVERSE, COMPOSITE = "normflows.flows.base.Reverse", "normflows.flows.base.Composite"
A, S = "normflows.flows.affine", "normflows.flows.neural_spline"
BLOCK, COUPLING, MASKED_AFFINE, CONST = (
    f"{A}.coupling.{name}" for name in ("AffineCouplingBlock", "AffineCoupling", "MaskedAffineFlow", "AffineConstFlow")
)
ACT_NORM, AUTOREGRESSIVE = "normflows.flows.normalization.ActNorm", f"{A}.autoregressive.MaskedAffineAutoregressive"
COUPLED, AUTO = (f"{S}.wrapper.{name}RationalQuadraticSpline" for name in ("Coupled", "Autoregressive"))
COUPLED_SPLINE, CDF = f"{S}.coupling.PiecewiseRationalQuadraticCoupling", f"{S}.coupling.PiecewiseRationalQuadraticCDF"
AUTO_SPLINE = f"{S}.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive"
PERMUTE, LU_PERMUTE = "normflows.flows.mixing.Permute", "normflows.flows.mixing.LULinearPermute"
LU, PERMUTATION = "normflows.flows.mixing._LULinear", "normflows.flows.mixing._RandomPermutation"
SPLIT, MERGE = "normflows.flows.reshape.Split", "normflows.flows.reshape.Merge"
RESIDUAL_NET, RESIDUAL_BLOCK = "normflows.nets.resnet.ResidualNet", "normflows.nets.resnet.ResidualBlock"
MADE, MASKED_LINEAR, MASKED_BLOCK, MASKED_RESIDUAL = (
    f"normflows.nets.made.{name}" for name in ("MADE", "MaskedLinear", "MaskedFeedforwardBlock", "MaskedResidualBlock")
)
MLP = "normflows.nets.mlp.MLP"
GAUSSIAN = "normflows.distributions.base.DiagGaussian"

BOTH = ("forward", "inverse")
UTILS = "normflows.utils.splines"
SPLINES = tuple(
    f"{UTILS}.{name}"
    for name in ("searchsorted", "unconstrained_rational_quadratic_spline", "rational_quadratic_spline")
)
ELEMENTWISE = (*BOTH, "_elementwise_forward", "_elementwise_inverse", "_output_dim_multiplier")


# ---------------------------------------------------------------- nets


def _is_lambda(function: Any, like: Any) -> bool:
    """Whether it is a lambda that does the same: normflows 1.7.0 has some where a net is absent."""
    code, other = getattr(function, "__code__", None), like.__code__
    parts = ("co_code", "co_names", "co_consts", "co_freevars", "co_argcount")
    return all(getattr(code, part, None) == getattr(other, part) for part in parts)


def _plain_net(maker: Maker, net: NetBuilder, value: int, module: Any) -> int:
    """A map of features alone: normflows' MLP, or ``nn.Sequential``."""
    if type(module) is nn.Sequential:
        return nets.sequential(maker, net, value, module)
    if maker.take(module) != MLP:
        raise Unsupported(f"a {type(module).__name__} as its net")
    return nets.sequential(maker, net, value, maker.get(module, "net"))


def _residual(maker: Maker, module: Any) -> Net:
    maker.take(module)
    if maker.get(module, "preprocessing") is not None:
        raise Unsupported("a net with preprocessing")
    return residual_net(maker, module)


def _made(maker: Maker, made: Any) -> Net:
    maker.take(made)
    before = maker.get(made, "preprocessing")
    if not _is_lambda(before, lambda inputs: inputs):
        maker.take_torch(before, nn.Identity)
    wide = maker.context > 0
    net = NetBuilder()
    value = net.dense(FEATURES, masked(maker, maker.get(made, "initial_layer")))
    if wide:
        value = net.add(value, net.dense(CONTEXT, linear(maker, maker.get(made, "context_layer"))))
    for block in maker.watch.children(maker.get(made, "blocks")):
        name = maker.take(block)
        nets.no_dropout(maker, maker.get(block, "dropout"))
        act = nets.activation(maker, maker.get(block, "activation"))
        if name == MASKED_BLOCK:
            if wide or maker.get(block, "batch_norm") is not None:
                raise Unsupported("a feedforward block with context or batch norm")
            value = net.act(net.dense(value, masked(maker, maker.get(block, "linear"))), *act)
            continue
        if name != MASKED_RESIDUAL:
            raise Unsupported(f"a {type(block).__name__} in its net")
        no_batch_norm(maker, block)
        inner, outer = (masked(maker, layer) for layer in maker.watch.children(maker.get(block, "linear_layers")))
        step = net.dense(net.act(value, *act), inner)
        step = net.dense(net.act(step, *act), outer)
        if wide:
            step = net.glu(step, net.dense(CONTEXT, linear(maker, maker.get(block, "context_layer"))))
        value = net.add(value, step)
    return net.build(net.dense(value, masked(maker, maker.get(made, "final_layer"))))


# ---------------------------------------------------------------- layers


def _block(maker: Maker, module: Any) -> None:
    parts = tuple(maker.watch.children(maker.get(module, "flows")))
    if [maker.take(part) for part in parts] != [SPLIT, COUPLING, MERGE]:
        raise Unsupported("a block of other parts")
    mode = maker.get(parts[0], "mode")
    if mode not in ("channel", "channel_inv") or maker.get(parts[2], "mode") != mode:
        raise Unsupported(f"split_mode={mode!r}")
    half = (maker.dim + 1) // 2
    kept, moved = range(half), range(half, maker.dim)
    if mode == "channel_inv":
        kept, moved = moved, kept
    scale = maker.get(parts[1], "scale")
    if scale is not True and scale is not False:
        raise Unsupported(f"scale={scale!r}")
    if scale and maker.get(parts[1], "scale_map") != "exp":
        raise Unsupported(f"scale_map={parts[1].scale_map!r}")
    net = NetBuilder()
    built = net.build(_plain_net(maker, net, FEATURES, maker.get(parts[1], "param_map")))
    transformer = (
        affine(len(moved), "identity", layout="interleaved_shift_first") if scale else affine(len(moved), "none")
    )
    maker.coupling(kept, moved, built, transformer)


def _masked_affine(maker: Maker, module: Any) -> None:
    """Its nets read all features, of which the mask leaves some, and give values for all, of which the others count."""
    mask = maker.watch.values(module, "b")
    expect_shape(mask, 1, maker.dim)
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise Unsupported("a mask with values other than 0 and 1")
    every = torch.eye(maker.dim)
    kept, moved = (part.nonzero().flatten().tolist() for part in (mask[0] == 1, mask[0] == 0))
    net = NetBuilder()
    spread = net.dense(FEATURES, maker.fixed(every[:, kept]))

    def mapped(name: str) -> int | None:
        part = maker.get(module, name)
        if part is torch.zeros_like or _is_lambda(part, lambda x: torch.zeros_like(x)):
            return None
        return net.dense(_plain_net(maker, net, spread, part), maker.fixed(every[moved]))

    scale, shift = mapped("s"), mapped("t")
    if scale is None and shift is None:
        raise Unsupported("neither scale nor shift")
    if shift is None:
        shift = net.dense(spread, maker.fixed(torch.zeros(len(moved), maker.dim)))
    if scale is None:
        maker.coupling(kept, moved, net.build(shift), affine(len(moved), "none"))
    else:
        maker.coupling(kept, moved, net.build(scale, shift), affine(len(moved), "identity"))


def _coupled(maker: Maker, module: Any) -> None:
    maker.take(module)
    if maker.number(module, "features") != maker.dim:
        raise Unsupported(f"features is {module.features}, expected {maker.dim}")
    kept, moved = (maker.watch.values(module, f"{part}_features").tolist() for part in ("identity", "transform"))
    inner = maker.get(module, "transform_net")
    net = _residual(maker, inner)
    maker.get(inner, "hidden_features")
    bins = int(maker.number(module, "num_bins"))
    maker.coupling(kept, moved, net, spline_of(maker, module, bins, net_scale(inner, "hidden_features")))
    own = maker.get(module, "unconditional_transform")
    if own is not None:
        maker.take(own)
        spline_cdf(maker, own, kept, moved)


def _auto(maker: Maker, module: Any) -> None:
    maker.take(module)
    bins = int(maker.number(module, "num_bins"))
    maker.autoregressive(_made(maker, maker.get(module, "autoregressive_net")), spline_of(maker, module, bins, None))


def _affine(maker: Maker, module: Any, started: bool) -> None:
    if started:
        flag = maker.get(module, "data_dep_init_done")
        if not flag > 0:
            maker.watch.until(flag)
            raise Unsupported("an ActNorm that has not been started")
        maker.watch.values(module, "data_dep_init_done")
    for name in ("s", "t"):
        expect_shape(getattr(module, name), 1, maker.dim)
    if maker.dim == 1:
        raise Unsupported("one feature, which it takes for a batch")
    maker.affine(maker.parameter(module, "t"), maker.parameter(module, "s"), form="exp")


def _permute(maker: Maker, module: Any) -> None:
    mode, channels = maker.get(module, "mode"), maker.number(module, "num_channels")
    if mode == "shuffle":
        order = maker.watch.values(module, "perm")
        if not torch.equal(maker.watch.values(module, "inv_perm"), order.argsort()):
            raise Unsupported("inv_perm is not the inverse of perm")
        maker.permute(order.tolist())
    elif mode == "swap" and channels == maker.dim:
        half = maker.dim // 2
        maker.permute([*range(half, maker.dim), *range(half)])
    else:
        raise Unsupported(f"mode={mode!r}")


def _lu_permute(maker: Maker, module: Any) -> None:
    permutation, lu = maker.get(module, "permutation"), maker.get(module, "linear")
    if (maker.take(permutation), maker.take(lu)) != (PERMUTATION, LU) or maker.get(permutation, "_dim") != 1:
        raise Unsupported("other parts")
    maker.permute(maker.watch.values(permutation, "_permutation").tolist())
    lu_linear(maker, lu)


def _autoregressive(maker: Maker, module: Any) -> None:
    if maker.number(module, "features") != maker.dim:
        raise Unsupported(f"features is {module.features}, expected {maker.dim}")
    net = _made(maker, maker.get(module, "autoregressive_net"))
    maker.autoregressive(net, affine(maker.dim, "sigmoid", layout="interleaved"))


def _gaussian(maker: Maker, module: Any) -> None:
    if maker.get(module, "temperature") is not None:
        raise Unsupported("a base with a temperature")
    for name in ("loc", "log_scale"):
        expect_shape(getattr(module, name), 1, maker.dim)
    maker.affine(maker.parameter(module, "loc"), maker.parameter(module, "log_scale"), form="exp")


def layer(maker: Maker, module: Any) -> None:
    """Add a flow of normflows, or what its base does to a standard normal."""
    name = maker.take(module)
    if name == COUPLED:
        maker.invert(lambda: _coupled(maker, maker.get(module, "prqct")))
    elif name == AUTO:
        maker.invert(lambda: _auto(maker, maker.get(module, "mprqat")))
    elif name == LU_PERMUTE:
        maker.invert(lambda: _lu_permute(maker, module))
    elif name in (CONST, ACT_NORM):
        _affine(maker, module, name == ACT_NORM)
    else:
        makers: dict[str, Callable[[Maker, Any], None]] = {
            BLOCK: _block,
            MASKED_AFFINE: _masked_affine,
            PERMUTE: _permute,
            AUTOREGRESSIVE: _autoregressive,
            GAUSSIAN: _gaussian,
        }
        if name not in makers:
            raise Unsupported(f"{type(module).__name__} has no place in a program")
        makers[name](maker, module)


def flatten(maker: Maker, root: nn.Module, inverse: bool = False, top: bool = True) -> Iterator[Atom]:
    """The flows of a root without the containers around them."""
    name = qualified(original(type(root)) or type(root))
    if top and name in (FLOW, CONDITIONAL):
        inner = list(maker.watch.children(maker.get(root, "flows")))
        if name == CONDITIONAL:
            for part in inner:
                if "context" not in inspect.signature(type(part).forward).parameters:
                    raise Unsupported(f"{type(part).__name__} takes no context")
        for part in inner:
            yield from flatten(maker, part, top=False)
        return
    if name not in (REVERSE, COMPOSITE):
        yield root, inverse
        return
    try:
        maker.take(root)
        inner = [maker.get(root, "flow")] if name == REVERSE else list(maker.watch.children(maker.get(root, "_flows")))
    except Unsupported:
        yield root, inverse
        return
    for part in reversed(inner) if inverse else inner:
        yield from flatten(maker, part, inverse != (name == REVERSE), top=False)


def base(maker: Maker, root: nn.Module) -> Iterator[Atom]:
    """The base: between a standard normal and the latent."""
    yield maker.get(root, "q0"), False


def sizes(root: nn.Module) -> tuple[int, int]:
    """Number of features and of the context that the layers tell."""
    dim = context = 0
    for module in root.modules():
        name, own = qualified(original(type(module)) or type(module)), module
        made: Any = own
        if name in (LU, COUPLED_SPLINE, AUTOREGRESSIVE):
            dim = made.features
        elif name == MADE:
            dim = made.initial_layer.in_features
        elif name == PERMUTE:
            dim = made.num_channels
        elif name in (CONST, ACT_NORM):
            dim = made.s.numel()
        elif name == MASKED_AFFINE:
            dim = made.b.numel()
        elif name == GAUSSIAN and not dim:
            dim = made.loc.numel()
        if name in (RESIDUAL_BLOCK, MADE) and hasattr(made, "context_layer"):
            context = made.context_layer.in_features
    return dim or 1, context


# ---------------------------------------------------------------- calls


def step(module: Any, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    """A flow of normflows runs its own code."""
    options = {} if context is None else {"context": context}
    found: tuple[Tensor, Tensor] = module.inverse(x, **options) if inverse else module(x, **options)
    return found


def _usual(x: Any) -> bool:
    """Whether log-dets, which start as zeros of the usual type, are of the type of x."""
    return isinstance(x, Tensor) and x.dtype is torch.get_default_dtype()


def forward(own: Any, self: Any, z: Any, context: Any = None) -> Any:
    found = run(PROGRAMS, self, z, context, False)
    return _own(own, self, z, context) if found is None else found[0]


def forward_and_log_det(own: Any, self: Any, z: Any, context: Any = None) -> Any:
    found = run(PROGRAMS, self, z, context, False) if _usual(z) else None
    return _own(own, self, z, context) if found is None else found[:2]


def inverse(own: Any, self: Any, x: Any, context: Any = None) -> Any:
    found = run(PROGRAMS, self, x, context, True)
    return _own(own, self, x, context) if found is None else found[0]


def inverse_and_log_det(own: Any, self: Any, x: Any, context: Any = None) -> Any:
    found = run(PROGRAMS, self, x, context, True) if _usual(x) else None
    return _own(own, self, x, context) if found is None else found[:2]


def _own(own: Any, self: Any, x: Any, context: Any) -> Any:
    return own(self, x) if context is None else own(self, x, context)


def _is_gaussian(self: Any) -> bool:
    """Whether the base becomes a part of the program."""
    found = kept(self).base
    if found is None or not found[0].same():
        watch = Watch()
        maker = Maker(PROGRAMS, watch, 1, 0, torch.float32)
        try:
            q0 = maker.get(self, "q0")
            good = maker.take(q0) == GAUSSIAN and maker.get(q0, "temperature") is None and len(q0.shape) == 1
        except Unsupported:
            good = False
        found = kept(self).base = watch, good
    return bool(found[1])


def _density(self: Any, x: Any, context: Any) -> Tensor | None:
    if torch.compiler.is_compiling():
        return None
    found = run(PROGRAMS, self, x, context, True, base=_is_gaussian(self))
    if found is None:
        return None
    z, log_q, complete = found
    if complete:
        return log_q
    density: Tensor = self.q0.log_prob(z) if context is None else self.q0.log_prob(z, context=context)
    return log_q + density


def log_prob(own: Any, self: Any, x: Any, context: Any = None) -> Any:
    found = _density(self, x, context)
    return _own(own, self, x, context) if found is None else found


def forward_kld(own: Any, self: Any, x: Any, context: Any = None) -> Any:
    found = _density(self, x, context) if _usual(x) else None
    return _own(own, self, x, context) if found is None else -torch.mean(found)


def sample(own: Any, self: Any, num_samples: int = 1, context: Any = None) -> Any:
    """The base draws first, so its draws are used whatever runs then."""
    z, log_q = self.q0(num_samples) if context is None else self.q0(num_samples, context=context)
    found = run(PROGRAMS, self, z, context, False)
    if found is not None:
        return found[0], log_q - found[1]
    for flow in self.flows:
        z, log_det = step(flow, z, context, False)
        log_q -= log_det
    return z, log_q


CONDITIONAL_METHODS = {
    "forward": forward,
    "forward_and_log_det": forward_and_log_det,
    "inverse": inverse,
    "inverse_and_log_det": inverse_and_log_det,
    "log_prob": log_prob,
    "forward_kld": forward_kld,
    "sample": sample,
}


def _without_context(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a flow that takes one argument; the library's own code refuses more."""

    def one(own: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        fits = len(args) < 2 and "context" not in kwargs
        return method(own, self, *args, **kwargs) if fits else own(self, *args, **kwargs)

    return one


METHODS = {
    FLOW: {name: _without_context(method) for name, method in CONDITIONAL_METHODS.items()},
    CONDITIONAL: CONDITIONAL_METHODS,
}

PROGRAMS = Programs(
    flatten,
    layer,
    sizes,
    step,
    base=base,
    functions={
        REVERSE: BOTH,
        COMPOSITE: (*BOTH, "_cascade"),
        BLOCK: BOTH,
        COUPLING: BOTH,
        SPLIT: BOTH,
        MERGE: BOTH,
        MASKED_AFFINE: BOTH,
        CONST: BOTH,
        ACT_NORM: (*BOTH, f"{CONST}.forward", f"{CONST}.inverse"),
        AUTOREGRESSIVE: (*ELEMENTWISE, "_unconstrained_scale_and_shift"),
        COUPLED: BOTH,
        AUTO: BOTH,
        COUPLED_SPLINE: (
            *BOTH,
            "_coupling_transform_forward",
            "_coupling_transform_inverse",
            "_coupling_transform",
            "_piecewise_cdf",
            "_transform_dim_multiplier",
            *SPLINES,
        ),
        CDF: (*BOTH, "_spline", "_share_across_batch", *SPLINES),
        AUTO_SPLINE: (*ELEMENTWISE, "_elementwise", *SPLINES),
        PERMUTE: BOTH,
        LU_PERMUTE: BOTH,
        LU: (*BOTH, "forward_no_cache", "inverse_no_cache", "_create_lower_upper", "upper_diag", "logabsdet"),
        PERMUTATION: (*BOTH, "_permute", "_inverse_permutation"),
        RESIDUAL_NET: ("forward",),
        RESIDUAL_BLOCK: ("forward",),
        MADE: ("forward",),
        MASKED_LINEAR: ("forward",),
        MASKED_BLOCK: ("forward",),
        MASKED_RESIDUAL: ("forward",),
        MLP: ("forward",),
        GAUSSIAN: ("forward", "log_prob"),
    },
)
