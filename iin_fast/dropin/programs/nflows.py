"""nflows, its copy in glasflow, and the nets that sbi gives it: transforms, flows and standard normal bases."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...flow import Block, NetBuilder, Weights, affine, residual, spline
from ...flow.builder import CONTEXT, FEATURES
from ...flow.layers import Net, Transformer
from ..class_factory import original
from ..registry import lookup, made_in
from ..splines import net_scale
from . import nets
from .plan import Atom, Maker, Programs, run
from .watch import HOOKS, Unsupported

__all__ = [
    "COPY",
    "FLOWS",
    "GLASFLOWS",
    "PROGRAMS",
    "expect_shape",
    "flow_log_prob",
    "forward",
    "glasflow_log_prob",
    "inverse",
    "linear",
    "lu_linear",
    "masked",
    "no_batch_norm",
    "residual_net",
    "spline_cdf",
    "spline_of",
]

T = "nflows.transforms"
COMPOSITE, INVERSE = f"{T}.base.CompositeTransform", f"{T}.base.InverseTransform"
AFFINE, ADDITIVE, SPLINE = (
    f"{T}.coupling.{name}CouplingTransform" for name in ("Affine", "Additive", "PiecewiseRationalQuadratic")
)
MASKED_AFFINE, MASKED_SPLINE = (
    f"{T}.autoregressive.Masked{name}AutoregressiveTransform" for name in ("Affine", "PiecewiseRationalQuadratic")
)
CDF = f"{T}.nonlinearities.PiecewiseRationalQuadraticCDF"
LU = f"{T}.lu.LULinear"
PERMUTATIONS = tuple(f"{T}.permutations.{name}Permutation" for name in ("", "Random", "Reverse"))
ACT_NORM, BATCH_NORM = f"{T}.normalization.ActNorm", f"{T}.normalization.BatchNorm"
POINTWISE = (f"{T}.standard.PointwiseAffineTransform", f"{T}.standard.AffineTransform")
IDENTITY = f"{T}.standard.IdentityTransform"
MADE, MASKED_LINEAR = f"{T}.made.MADE", f"{T}.made.MaskedLinear"
MASKED_BLOCK, MASKED_RESIDUAL = f"{T}.made.MaskedFeedforwardBlock", f"{T}.made.MaskedResidualBlock"
RESIDUAL_NET, RESIDUAL_BLOCK = "nflows.nn.nets.resnet.ResidualNet", "nflows.nn.nets.resnet.ResidualBlock"
FLOWS = (
    "nflows.flows.base.Flow",
    "nflows.flows.autoregressive.MaskedAutoregressiveFlow",
    "nflows.flows.realnvp.SimpleRealNVP",
)
COPY = "glasflow."
GLASFLOW_AFFINE = "transforms.coupling.AffineCouplingTransform"  # of glasflow itself: without that word
AFFINES = (AFFINE, GLASFLOW_AFFINE)
GLASFLOWS = tuple(
    f"{COPY}flows.{name}"
    for name in (
        "base.Flow",
        "coupling.CouplingFlow",
        "realnvp.RealNVP",
        "nsf.CouplingNSF",
        "autoregressive.MaskedAutoregressiveFlow",
        "autoregressive.MaskedAffineAutoregressiveFlow",
        "autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveFlow",
    )
)
NORMAL = "nflows.distributions.normal.StandardNormal"
CONTEXT_NET = "sbi.neural_nets.net_builders.flow.ContextSplineMap"

BOTH = ("forward", "inverse")
COUPLING = (*BOTH, "_coupling_transform_forward", "_coupling_transform_inverse", "_transform_dim_multiplier")
ELEMENTWISE = (*BOTH, "_elementwise_forward", "_elementwise_inverse", "_output_dim_multiplier")
SPLINES = tuple(
    f"{T}.splines.rational_quadratic.{name}"
    for name in ("unconstrained_rational_quadratic_spline", "rational_quadratic_spline")
)
LINEAR = (*BOTH, "forward_no_cache", "inverse_no_cache", "_create_lower_upper", "upper_diag", "logabsdet")
PERMUTATION = (*BOTH, "_permute", "_inverse_permutation")


def expect_shape(value: Any, *shape: int) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        raise Unsupported(f"a tensor of shape {list(getattr(value, 'shape', []))}, expected {list(shape)}")


# ---------------------------------------------------------------- nets


def residual_net(maker: Maker, net: Any) -> Net:
    wide = maker.context > 0
    blocks = []
    acts = set()
    for block in maker.watch.children(maker.get(net, "blocks")):
        maker.take(block)
        no_batch_norm(maker, block)
        nets.no_dropout(maker, maker.get(block, "dropout"))
        acts.add(nets.activation(maker, maker.get(block, "activation")))
        inner, outer = (linear(maker, layer) for layer in maker.watch.children(maker.get(block, "linear_layers")))
        gate = linear(maker, maker.get(block, "context_layer")) if wide else None
        blocks.append(Block(inner, outer, gate=gate))
    first, last = (linear(maker, maker.get(net, name)) for name in ("initial_layer", "final_layer"))
    return residual(first, blocks, last, context=wide, **_same(acts))


def _same(acts: set[tuple[str, float]]) -> dict[str, Any]:
    """The one activation of all blocks."""
    if len(acts) > 1:
        raise Unsupported("activations that differ")
    return dict(zip(("activation", "slope"), act, strict=True)) if (act := next(iter(acts), None)) else {}


def linear(maker: Maker, layer: nn.Module) -> Weights:
    maker.take_torch(layer, nn.Linear)
    return maker.dense(layer)


def masked(maker: Maker, layer: nn.Module) -> Weights:
    maker.take(layer)
    return maker.dense(layer, "mask")


def no_batch_norm(maker: Maker, block: nn.Module) -> None:
    if maker.get(block, "use_batch_norm"):
        raise Unsupported("batch norm in its net")


def _context_net(maker: Maker, module: Any) -> Net:
    """sbi's net for one feature: the context alone."""
    if not maker.context:
        raise Unsupported("a net of the context, without context")
    net = NetBuilder()
    return net.build(nets.sequential(maker, net, CONTEXT, maker.get(module, "spline_predictor")))


def _coupling_net(maker: Maker, net: nn.Module) -> tuple[Net, float | None]:
    """The net, and what scales widths and heights of a spline."""
    name = maker.take(net)
    if name not in (RESIDUAL_NET, CONTEXT_NET):
        raise Unsupported(f"a {type(net).__name__} as its net")
    maker.get(net, "hidden_features")
    scale = net_scale(net, "hidden_features")
    return (residual_net if name == RESIDUAL_NET else _context_net)(maker, net), scale


def _made(maker: Maker, made: Any) -> Net:
    maker.take(made)
    wide = maker.context > 0
    act = nets.activation(maker, maker.get(made, "activation"))
    first, last = (masked(maker, maker.get(made, name)) for name in ("initial_layer", "final_layer"))
    shift = linear(maker, maker.get(made, "context_layer")) if wide else None
    blocks = tuple(maker.watch.children(maker.get(made, "blocks")))
    net = NetBuilder()
    value = net.dense(FEATURES, first)
    if shift is not None:
        value = net.add(value, net.act(net.dense(CONTEXT, shift), *act))
    if not maker.get(made, "use_residual_blocks"):
        value = net.act(value, *act)
    for block in blocks:
        name = maker.take(block)
        nets.no_dropout(maker, maker.get(block, "dropout"))
        own = nets.activation(maker, maker.get(block, "activation"))
        if name == MASKED_BLOCK:
            if maker.get(block, "batch_norm") is not None:
                raise Unsupported("batch norm in its net")
            value = net.act(net.dense(value, masked(maker, maker.get(block, "linear"))), *own)
            continue
        if name != MASKED_RESIDUAL:
            raise Unsupported(f"a {type(block).__name__} in its net")
        no_batch_norm(maker, block)
        inner, outer = (masked(maker, layer) for layer in maker.watch.children(maker.get(block, "linear_layers")))
        step = net.dense(net.act(value, *own), inner)
        if wide:
            step = net.add(step, net.dense(CONTEXT, linear(maker, maker.get(block, "context_layer"))))
        value = net.add(value, net.dense(net.act(step, *own), outer))
    return net.build(net.dense(value, last))


# ---------------------------------------------------------------- layers


def spline_of(maker: Maker, module: nn.Module, bins: int, scale: float | None) -> Transformer:
    """The spline of a module with these options; ``scale`` is that of its raw widths and heights."""
    tails = maker.get(module, "tails")
    if tails is None:
        raise Unsupported("a spline without tails raises outside of its box")
    if tails not in ("linear", "circular"):
        raise Unsupported(f"tails={tails!r}")
    bound, width, height, slope = (
        maker.number(module, name) for name in ("tail_bound", "min_bin_width", "min_bin_height", "min_derivative")
    )
    return spline(
        bins,
        tails=tails,
        tail_bound=bound,
        min_bin_width=width,
        min_bin_height=height,
        min_derivative=slope,
        gain=1.0 if scale is None else scale,
    )


def spline_cdf(maker: Maker, module: Any, features: list[int], others: list[int]) -> None:
    """Splines whose raw values are parameters: the biases of a net that multiplies what it reads by 0."""
    bins = module.unnormalized_widths.shape[-1]
    transformer = spline_of(maker, module, bins, None)
    net = NetBuilder()
    outputs = []
    for j in range(len(features)):
        for name in ("widths", "heights", "derivatives"):
            values = module._parameters[f"unnormalized_{name}"]
            count = values.shape[-1]
            expect_shape(values, len(features), count)
            zero = maker.fixed(torch.zeros(count, len(others)))
            bias = maker.parameter(module, f"unnormalized_{name}", j * count)
            outputs.append(net.dense(FEATURES, zero._replace(bias=bias)))
    maker.coupling(others, features, net.build(*outputs), transformer)


def _coupling(maker: Maker, name: str, module: Any) -> None:
    if maker.number(module, "features") != maker.dim:
        raise Unsupported(f"features is {module.features}, expected {maker.dim}")
    kept, moved = (maker.watch.values(module, f"{part}_features").tolist() for part in ("identity", "transform"))
    net, scale = _coupling_net(maker, maker.get(module, "transform_net"))
    if name == SPLINE:
        transformer = spline_of(maker, module, int(maker.number(module, "num_bins")), scale)
    elif name in AFFINES:
        _expect_scale(maker, module)
        transformer = affine(len(moved), "sigmoid", layout="shift_scale")
    else:
        transformer = affine(len(moved), "none")
    maker.coupling(kept, moved, net, transformer)
    own = maker.get(module, "unconditional_transform")
    if own is not None:
        if maker.take(own) != CDF:
            raise Unsupported(f"a {type(own).__name__} for its other features")
        spline_cdf(maker, own, kept, moved)


def _expect_scale(maker: Maker, module: Any) -> None:
    """nflows has one form of its scales; the copy in glasflow takes others, too."""
    if "scale_activation" not in vars(module):
        return
    activation = maker.get(module, "scale_activation")
    known = lookup(f"{COPY}transforms.utils.SCALE_ACTIVATIONS") or {}
    if activation not in (type(module).DEFAULT_SCALE_ACTIVATION, known.get("nflows")):
        raise Unsupported("scale_activation is not nflows' own")


def _autoregressive(maker: Maker, name: str, module: Any) -> None:
    net = _made(maker, maker.get(module, "autoregressive_net"))
    if name == MASKED_SPLINE:
        maker.autoregressive(net, spline_of(maker, module, int(maker.number(module, "num_bins")), None))
        return
    if maker.number(module, "features") != maker.dim:
        raise Unsupported(f"features is {module.features}, expected {maker.dim}")
    owner = module
    if "scale_activation" in vars(module):  # of glasflow: a lambda that holds the module that made it
        made = maker.get(module, "scale_activation")
        if made_in(made, f"{COPY}{MASKED_AFFINE}.__init__") is None:
            raise Unsupported("scale_activation is not nflows' own")
        owner = made.__closure__[0].cell_contents
    clamp = maker.number(owner, "_epsilon")
    maker.autoregressive(net, affine(maker.dim, "softplus", clamp=clamp, layout="interleaved"))


def lu_linear(maker: Maker, module: Any) -> None:
    if maker.get(module, "using_cache") and not maker.get(module, "training"):
        raise Unsupported("using_cache")
    expect_shape(module.bias, maker.dim)
    refs = (maker.parameter(module, n) for n in ("lower_entries", "upper_entries", "unconstrained_upper_diag", "bias"))
    maker.linear(*refs, eps=maker.number(module, "eps"))


def _permutation(maker: Maker, module: Any) -> None:
    if maker.get(module, "_dim") != 1:
        raise Unsupported(f"a permutation along dimension {module._dim}")
    maker.permute(maker.watch.values(module, "_permutation").tolist())


def _act_norm(maker: Maker, module: Any) -> None:
    expect_shape(module.shift, maker.dim)
    if maker.get(module, "training"):
        started = maker.get(module, "initialized")
        if not started:
            maker.watch.until(started)
            raise Unsupported("an ActNorm that has not been started")
        maker.watch.values(module, "initialized")
    maker.affine(maker.parameter(module, "shift"), maker.parameter(module, "log_scale"), form="exp")


def _batch_norm(maker: Maker, module: Any) -> None:
    if maker.get(module, "training"):
        raise Unsupported("batch norm in training mode")
    expect_shape(module.bias, maker.dim)
    mean, variance = (maker.watch.values(module, name) for name in ("running_mean", "running_var"))
    eps = maker.number(module, "eps")
    maker.affine(maker.constant(mean), maker.constant(torch.sqrt(variance + eps)), inverse=True)
    weight = maker.parameter(module, "unconstrained_weight")
    maker.affine(maker.parameter(module, "bias"), weight, form="softplus", eps=eps)


def _pointwise(maker: Maker, module: Any) -> None:
    shift, scale = (maker.watch.values(module, name) for name in ("_shift", "_scale"))
    for value in (shift, scale):
        if value.numel() != 1:
            expect_shape(value, *(1,) * (value.dim() - 1), maker.dim)
        if value.dim() > 2 or value.dtype not in (torch.float32, maker.dtype):
            raise Unsupported("a shift or scale of another type")
    maker.affine(*(maker.constant(value.reshape(-1).expand(maker.dim)) for value in (shift, scale)))


def layer(maker: Maker, module: nn.Module) -> None:
    """Add a transform of nflows."""
    name = maker.take(module)
    if name in (*AFFINES, ADDITIVE, SPLINE):
        _coupling(maker, name, module)
    elif name in (MASKED_AFFINE, MASKED_SPLINE):
        _autoregressive(maker, name, module)
    elif name == LU:
        lu_linear(maker, module)
    elif name in PERMUTATIONS:
        _permutation(maker, module)
    elif name == ACT_NORM:
        _act_norm(maker, module)
    elif name == BATCH_NORM:
        _batch_norm(maker, module)
    elif name in POINTWISE:
        _pointwise(maker, module)
    elif name != IDENTITY:
        raise Unsupported(f"{type(module).__name__} has no place in a program")


def flatten(maker: Maker, root: nn.Module, inverse: bool = False, top: bool = True) -> Iterator[Atom]:
    """The transforms of a root without the containers around them."""
    name = _name(root)
    if name not in (COMPOSITE, INVERSE):
        yield root, inverse
        return
    try:
        if not top:  # hooks of the root itself run around all this
            maker.take(root)
        inner = [maker.get(root, "_transform")] if name == INVERSE else None
        if inner is None:
            inner = list(maker.watch.children(maker.get(root, "_transforms")))
    except Unsupported:
        yield root, inverse
        return
    swap = inverse != (name == INVERSE)
    for module in reversed(inner) if inverse else inner:
        yield from flatten(maker, module, swap, top=False)


def _name(module: nn.Module) -> str:
    """The name of its class in nflows."""
    return PROGRAMS.name(original(type(module)) or type(module))


def sizes(root: nn.Module) -> tuple[int, int]:
    """Number of features and of the context that the layers tell."""
    dim = context = 0
    for module in root.modules():
        name = _name(module)
        own: Any = module
        if name in (*AFFINES, ADDITIVE, SPLINE, LU):
            dim = own.features
        elif name == MADE:
            dim = own.initial_layer.in_features
        elif name in PERMUTATIONS:
            dim = len(own._permutation)
        elif name in (ACT_NORM, BATCH_NORM):
            dim = (own.shift if name == ACT_NORM else own.bias).numel()
        if name in (RESIDUAL_BLOCK, MADE) and hasattr(own, "context_layer"):
            context = own.context_layer.in_features
        elif name == CONTEXT_NET:
            context = own.spline_predictor[0].in_features
    return dim or 1, context


# ---------------------------------------------------------------- calls


def step(module: Any, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    """A transform of nflows runs its own code."""
    found: tuple[Tensor, Tensor] = module.inverse(x, context) if inverse else module(x, context)
    return found


def _run(original: Any, self: Any, inputs: Any, context: Any, inverse: bool) -> Any:
    found = run(PROGRAMS, self, inputs, context, inverse)
    return original(self, inputs, context) if found is None else found[:2]


def forward(original: Any, self: Any, inputs: Any, context: Any = None) -> Any:
    return _run(original, self, inputs, context, False)


def inverse(original: Any, self: Any, inputs: Any, context: Any = None) -> Any:
    return _run(original, self, inputs, context, True)


def flow_log_prob(original: Any, self: Any, inputs: Any, context: Any) -> Any:
    """``Flow._log_prob``: the log-density of a standard normal base is part of the program."""
    if torch.compiler.is_compiling():
        return original(self, inputs, context)
    embedded = self._embedding_net(context)
    found = _density(self, inputs, embedded)
    if found is not None and found[2]:
        return found[1]
    noise, logabsdet = self._transform(inputs, context=embedded) if found is None else found[:2]
    return self._distribution.log_prob(noise, context=embedded) + logabsdet


def glasflow_log_prob(original: Any, self: Any, inputs: Any, conditional: Any = None) -> Any:
    """``log_prob`` of glasflow's own flows."""
    found = None
    if isinstance(inputs, Tensor) and not torch.compiler.is_compiling():
        found = _density(self, inputs, conditional)
    if found is None:
        return original(self, inputs, conditional)
    return found[1] if found[2] else self._distribution.log_prob(found[0]) + found[1]


def _density(flow: Any, inputs: Tensor, context: Any) -> tuple[Tensor, Tensor, bool] | None:
    """The transform of a flow with a standard normal base, as ``run`` gives it."""
    transform, base = flow._transform, flow._distribution
    normal = PROGRAMS.name(type(base)) == NORMAL and not ("log_prob" in vars(base) or "_log_prob" in vars(base))
    own = "forward" in vars(transform) or any(vars(transform)[name] for name in HOOKS)
    if not normal or own or base._shape != inputs.shape[1:]:
        return None
    return run(PROGRAMS, transform, inputs, context, False, base=True)


PROGRAMS = Programs(
    flatten,
    layer,
    sizes,
    step,
    functions={
        COMPOSITE: (*BOTH, "_cascade"),
        INVERSE: BOTH,
        **dict.fromkeys(AFFINES, (*COUPLING, "_scale_and_shift")),
        ADDITIVE: (*COUPLING, "_scale_and_shift"),
        SPLINE: (*COUPLING, "_coupling_transform", "_piecewise_cdf", *SPLINES),
        MASKED_AFFINE: (*ELEMENTWISE, "_unconstrained_scale_and_shift"),
        MASKED_SPLINE: (*ELEMENTWISE, "_elementwise", *SPLINES),
        CDF: (*BOTH, "_spline", *SPLINES),
        LU: LINEAR,
        **dict.fromkeys(PERMUTATIONS, PERMUTATION),
        ACT_NORM: (*BOTH, "scale", "_broadcastable_scale_shift", "_initialize"),
        BATCH_NORM: (*BOTH, "weight"),
        **dict.fromkeys(POINTWISE, (*BOTH, "_log_scale", "_batch_logabsdet")),
        IDENTITY: BOTH,
        MADE: ("forward",),
        MASKED_LINEAR: ("forward",),
        MASKED_BLOCK: ("forward",),
        MASKED_RESIDUAL: ("forward",),
        RESIDUAL_NET: ("forward",),
        RESIDUAL_BLOCK: ("forward",),
        CONTEXT_NET: ("__call__",),
    },
    copy=COPY,
)
