"""zuko, and what sbi puts before it: autoregressive, coupling and element-wise transformations, flows and standard normal bases.

zuko's modules make transformations, and those map x. A composed transformation that may run as a program is an object that
knows its module and context, and makes what the library's own would hold only where it is asked for.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...flow import NetBuilder, Weights, affine, spline
from ...flow.builder import CONTEXT, FEATURES
from ...flow.layers import Net, Transformer
from ..class_factory import FastClass, generate, original
from ..registry import lookup, qualified
from . import nets
from .nflows import expect_shape
from .plan import Atom, Maker, Programs, hopeless, kept, run
from .watch import HOOKS, Unsupported, Watch

__all__ = ["COMPOSED", "FLOWS", "PROGRAMS", "composed_forward", "default_slope", "flow_forward"]

COMPOSED, INVERSE = "zuko.lazy.LazyComposedTransform", "zuko.lazy.LazyInverse"
UNCONDITIONAL, BASE = "zuko.lazy.UnconditionalTransform", "zuko.lazy.UnconditionalDistribution"
MASKED = "zuko.flows.autoregressive.MaskedAutoregressiveTransform"
COUPLING = "zuko.flows.coupling.GeneralCouplingTransform"
MASKED_NET, MASKED_LINEAR = "zuko.nn.MaskedMLP", "zuko.nn.MaskedLinear"
NET, LINEAR, RESIDUAL = "zuko.nn.MLP", "zuko.nn.Linear", "zuko.nn.Residual"
FLOWS = (
    "zuko.lazy.Flow",
    "zuko.flows.autoregressive.MAF",
    "zuko.flows.spline.NSF",
    "zuko.flows.coupling.NICE",
    "zuko.flows.coupling.RealNVP",
)
T = "zuko.transforms"
AFFINE, SPLINE, ADDITIVE, PERMUTATION, LU = (
    f"{T}.{name}Transform" for name in ("MonotonicAffine", "MonotonicRQS", "Additive", "Permutation", "LULinear")
)
CIRCULAR, SHIFT = "zuko.flows.spline.CircularRQSTransform", f"{T}.CircularShiftTransform"
TORCH_AFFINE = "torch.distributions.transforms.AffineTransform"
NORMALIZING, DIAG_NORMAL = "zuko.distributions.NormalizingFlow", "zuko.distributions.DiagNormal"

CALL = ("__init__", "_call", "_inverse", "log_abs_det_jacobian")


# ---------------------------------------------------------------- nets


def _linear(maker: Maker, layer: nn.Module) -> Weights:
    name = maker.take(layer)
    if name not in (LINEAR, MASKED_LINEAR):
        raise Unsupported(f"a {type(layer).__name__} in its net")
    return maker.dense(layer, "mask" if name == MASKED_LINEAR else None)


def _steps(maker: Maker, net: NetBuilder, value: int, module: nn.Module) -> int:
    for layer in maker.watch.children(module):
        cls = qualified(type(layer))
        if cls in (LINEAR, MASKED_LINEAR):
            value = net.dense(value, _linear(maker, layer))
        elif cls == RESIDUAL:
            maker.take(layer)
            value = net.add(value, _steps(maker, net, value, layer))
        else:
            value = net.act(value, *nets.activation(maker, layer))
    return value


def _net(maker: Maker, module: nn.Module) -> Net:
    """A net of the features and the context."""
    if maker.take(module) not in (MASKED_NET, NET):
        raise Unsupported(f"a {type(module).__name__} as its net")
    if type(module).forward is not nn.Sequential.forward or "forward" in vars(module):
        raise Unsupported("a net with its own forward")
    net = NetBuilder()
    value = net.concat(FEATURES, CONTEXT) if maker.context else FEATURES
    return net.build(_steps(maker, net, value, module))


# ---------------------------------------------------------------- layers


def default_slope(init: Any) -> float:
    """The least slope that a transformation takes where none is given: 1e-4 before zuko 1.5, 1e-3 since."""
    own = inspect.signature(init).parameters.get("slope")
    return default_slope(lookup(f"{SPLINE}.__init__")) if own is None else float(own.default)


def _univariate(maker: Maker, module: Any, features: int) -> Transformer:
    made = maker.get(module, "univariate")
    shapes = [tuple(shape) for shape in maker.get(module, "shapes")]
    if maker.get(module, "total") != sum(map(math.prod, shapes)):
        raise Unsupported("a total that does not fit its shapes")
    options: dict[str, Any] = {}
    if isinstance(made, partial):
        if made.args:
            raise Unsupported("univariate has arguments of its own")
        options, made = dict(made.keywords), made.func
    cls = original(made) or made
    name = qualified(cls) if hasattr(cls, "__qualname__") else str(cls)
    if name not in (AFFINE, SPLINE, ADDITIVE, CIRCULAR):
        raise Unsupported(f"univariate {name}")
    maker.expect_source(name, cls)
    wrap = name == CIRCULAR
    slope, bound = options.pop("slope", None), math.pi if wrap else options.pop("bound", 5.0)
    if slope is None and name != ADDITIVE:
        slope = default_slope(cls if wrap else vars(cls)["__init__"])
    if name == ADDITIVE and shapes == [()] and not options and slope is None:
        return affine(features, "none")
    numbers = isinstance(slope, float) and isinstance(bound, int | float)
    if options or not numbers or not 0 < slope < 1 or not bound > 0:
        raise Unsupported(f"univariate with {', '.join(options) or 'a slope or bound that is not known'}")
    if name == AFFINE and shapes == [(), ()]:
        return affine(features, "softclip", clamp=-math.log(slope), layout="interleaved_shift_first")
    if (
        name in (SPLINE, CIRCULAR)
        and len(shapes) == 3
        and shapes[0]
        and shapes == [(b := shapes[0][0],), (b,), (b - 1,)]
    ):
        return spline(b, tail_bound=float(bound), min_derivative=slope, parameterization="zuko", wrap=wrap)
    raise Unsupported(f"univariate {name} with shapes {shapes}")


def _masked(maker: Maker, module: Any) -> None:
    order = maker.get(module, "order")
    if order is not None and int(maker.watch.values(module, "order").max()) >= maker.number(module, "passes"):
        raise Unsupported("fewer passes than its order needs")
    net = _net(maker, maker.get(module, "hyper"))
    maker.autoregressive(net, _univariate(maker, module, maker.dim))


def _coupling(maker: Maker, module: Any) -> None:
    mask = maker.watch.values(module, "mask")
    if mask.numel() != maker.dim:
        raise Unsupported(f"a mask of {mask.numel()} features, expected {maker.dim}")
    kept, moved = (part.nonzero().flatten().tolist() for part in (mask, ~mask))
    net = _net(maker, maker.get(module, "hyper"))
    maker.coupling(kept, moved, net, _univariate(maker, module, len(moved)))


def _factors(matrix: Tensor) -> Tensor:
    """zuko's lower factor has the diagonal, and the op's upper one: L U = (L / d) (d U)."""
    d = matrix.diagonal()
    return matrix.tril(-1) / d + d[:, None] * matrix.triu(1) + d.diag()


def _unconditional(maker: Maker, module: Any) -> None:
    """A standardisation or a permutation of buffers, or a linear map by its factors."""
    f = maker.get(module, "f")
    cls = original(f) or f
    name = qualified(cls) if isinstance(cls, type) else str(cls)
    named, count = maker.get(module, "_keys"), maker.get(module, "_nargs")
    if name == PERMUTATION and (count, named) in ((1, []), (0, ["order"])):
        maker.expect_source(name, cls)
        maker.permute(maker.watch.values(module, "_0" if count else "order").tolist())
        return
    if name == LU and (count, named) in ((1, []), (0, ["LU"])):
        maker.expect_source(name, cls)
        matrix = "_0" if count else "LU"
        expect_shape(maker.get(module, matrix), maker.dim, maker.dim)
        maker.linear(maker.computed_from(module, matrix, _factors), storage="square", form="plain")
        return
    if name not in (AFFINE, TORCH_AFFINE):
        raise Unsupported(f"{name} has no place in a program")
    if name == AFFINE:
        maker.expect_source(name, cls)
    first = "shift" if name == AFFINE else "loc"
    names = [f"_{i}" for i in range(count)] if count else named
    if not (count == 2 and not named) and not (count == 0 and sorted(named) == sorted([first, "scale"])):
        raise Unsupported(f"{cls.__name__} with arguments of its own")
    shift, scale = (maker.watch.values(module, n) for n in (names if count else (first, "scale")))
    for value in (shift, scale):
        if value.dim() > 1 or value.numel() not in (1, maker.dim):
            raise Unsupported(f"a shift or scale of shape {list(value.shape)}")
    if name == AFFINE:
        scale = scale / (1 + abs(scale / math.log(default_slope(vars(cls)["__init__"]))))
    refs = (maker.constant(value.reshape(-1).expand(maker.dim)) for value in (shift, scale))
    maker.affine(*refs, form="exp" if name == AFFINE else "plain")


def layer(maker: Maker, module: nn.Module) -> None:
    """Add a transformation of zuko."""
    name = maker.take(module)
    makers = {MASKED: _masked, COUPLING: _coupling, UNCONDITIONAL: _unconditional}
    if name not in makers:
        raise Unsupported(f"{type(module).__name__} has no place in a program")
    makers[name](maker, module)


def flatten(maker: Maker, root: nn.Module, inverse: bool = False, top: bool = True) -> Iterator[Atom]:
    """The transformations of a root without the containers around them."""
    name = qualified(original(type(root)) or type(root))
    if name not in (COMPOSED, INVERSE):
        if not _waits(root):
            raise Unsupported(f"{type(root).__name__}, which may read its parameters and context before x comes")
        yield root, inverse
        return
    try:
        if not top:  # hooks of the root itself run around all this
            maker.take(root)
        if name == INVERSE:
            inner = [maker.get(root, "transform")]
        else:
            inner = list(maker.watch.children(maker.get(root, "transforms")))
    except Unsupported:
        yield root, inverse
        return
    for module in reversed(inner) if inverse else inner:
        yield from flatten(maker, module, inverse != (name == INVERSE), top=False)


def sizes(root: nn.Module) -> tuple[int, int]:
    """Number of features and of the context that the layers tell."""
    for module in root.modules():
        name = qualified(original(type(module)) or type(module))
        own: Any = module
        if name == MASKED:
            dim = own.hyper.out_features // own.total
            return dim, own.hyper.in_features - dim
        if name == COUPLING:
            return own.mask.numel(), own.hyper.in_features - int(own.mask.sum())
    return 1, 0


# ---------------------------------------------------------------- calls


def step(module: Any, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    """A transformation of zuko runs its own code."""
    made = module(context)
    y, ladj = (made.inv if inverse else made).call_and_ladj(x)
    return y, ladj.sum(-1) if ladj.dim() == x.dim() else ladj


RAW = "_iin_fast"


class LazyAttribute:
    """An attribute that ``compute`` gives an instance at its first use; what it already holds comes first."""

    def __init__(self, compute: Callable[[Any], None]) -> None:
        self.compute = compute

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None or RAW not in vars(instance):
            raise AttributeError(f"{owner.__name__ if owner else 'object'} has no attribute {self.name!r}")
        self.compute(instance)
        return vars(instance)[self.name]


def _own_attributes(self: Any) -> None:
    """Those of the library's own object."""
    for name, value in vars(vars(self)[RAW]()).items():
        vars(self).setdefault(name, value)


def state(self: Any) -> dict[str, Any]:
    """What pickle and deepcopy see: an object of the library's own class."""
    own = vars(vars(self)[RAW]()) if RAW in vars(self) else {}
    kept = {**own, **{name: value for name, value in vars(self).items() if name not in (RAW, WHERE)}}
    return kept | {"_inv": None} if "_inv" in kept else kept


def assign(self: Any, name: str, value: Any) -> None:
    """An object whose parts are replaced is the library's own."""
    if isinstance(vars(type(self)).get(name), LazyAttribute):
        vars(self).pop(WHERE, None)
    object.__setattr__(self, name, value)


WHERE = "_iin_fast_where"  # root, context, inverse

_made: dict[str, FastClass] = {}


def _class(name: str, namespace: dict[str, Any]) -> Any:
    """The class of objects that stand for the library's, made when it is first needed."""
    if name not in _made:
        _made[name] = generate(lookup(name), namespace | {"__getstate__": state, "__setattr__": assign})
    return _made[name]


def _rows(self: Any, x: Any, base: bool = False) -> tuple[Tensor, Tensor, bool] | None:
    """A composed transformation on ``x [..., dim]`` by its programs; None where the library's own code has to run."""
    where = vars(self).get(WHERE)
    if where is None or not isinstance(x, Tensor) or x.dim() == 0:
        return None
    root, context, inverse = where
    if x.dim() == 2 and (context is None or (context.dim() == 2 and context.shape[0] == x.shape[0])):
        return run(PROGRAMS, root, x, context, inverse, base)
    shape = x.shape[:-1]
    if context is not None:
        if context.dim() == 0 or context.dim() > x.dim():
            return None
        if any(a not in (1, b) for a, b in zip(context.shape[-2::-1], shape[::-1], strict=False)):
            return None
        context = context.expand(*shape, context.shape[-1]).reshape(-1, context.shape[-1])
    found = run(PROGRAMS, root, x.reshape(-1, x.shape[-1]), context, inverse, base)
    return None if found is None else (found[0].view(x.shape), found[1].view(shape), found[2])


def _composed(root: nn.Module, context: Tensor | None, inverse: bool, own: Any) -> Any:
    """The transformation of a root; ``own()`` makes the library's."""
    parent = lookup(f"{T}.ComposedTransform")

    def call(self: Any, x: Tensor) -> Any:
        found = _rows(self, x)
        return parent._call(self, x) if found is None else found[0]

    def back(self: Any, y: Tensor) -> Any:
        if WHERE not in vars(self):
            return parent._inverse(self, y)
        found = _rows(self.inv, y)
        return parent._inverse(self, y) if found is None else found[0]

    def call_and_ladj(self: Any, x: Tensor) -> Any:
        found = _rows(self, x)
        return parent.call_and_ladj(self, x) if found is None else found[:2]

    def inv(self: Any) -> Any:
        if WHERE not in vars(self):
            return parent.inv.fget(self)
        root, context, inverse = vars(self)[WHERE]
        twin: Any = object.__new__(type(self))
        vars(twin).update({WHERE: (root, context, not inverse), RAW: lambda: parent.inv.fget(self)})
        return twin

    cls = _class(
        f"{T}.ComposedTransform",
        {
            "_call": call,
            "_inverse": back,
            "call_and_ladj": call_and_ladj,
            "inv": property(inv),
            **{n: LazyAttribute(_own_attributes) for n in ("transforms", "domain_dim", "codomain_dim")},
            "_cache_size": 0,
            "_inv": None,
        },
    )
    made: Any = object.__new__(cls)
    vars(made).update({WHERE: (root, context, inverse), RAW: own})
    return made


def _follows(c: Any) -> bool:
    """Whether an object of ours may stand for the library's."""
    return not torch.compiler.is_compiling() and (c is None or isinstance(c, Tensor))


def _waits(layer: Any) -> bool:
    """Whether a layer and those in it read parameters and context when x comes; others do so as they are called."""
    name = qualified(original(type(layer)) or type(layer))
    if name == COMPOSED:
        return all(map(_waits, layer.transforms))
    return _waits(layer.transform) if name == INVERSE else name in (MASKED, COUPLING, UNCONDITIONAL)


def _runs_own(root: nn.Module) -> bool:
    """Whether a root has to run the library's own code; its plans say so once there are some."""
    return hopeless(root) if kept(root).plans else not _waits(root)


def composed_forward(own: Any, self: Any, c: Any = None) -> Any:
    """``LazyComposedTransform.forward``."""
    if not _follows(c) or _runs_own(self):
        return own(self, c)
    return _composed(self, c, False, lambda: own(self, c))


def _standard(flow: Any) -> str | None:
    """The name of the buffer with the mean, where the base of a flow is a standard normal that nobody trains."""
    found: tuple[Watch, str | None] | None = kept(flow).base
    if found is None or not found[0].same():
        watch = Watch()
        found = kept(flow).base = watch, _mean_of_standard(Maker(PROGRAMS, watch, 1, 0, torch.float32), flow)
    return found[1]


def _mean_of_standard(maker: Maker, flow: Any) -> str | None:
    with suppress(Unsupported):
        base = maker.get(flow, "base")
        if maker.take(base) != BASE or maker.get(base, "f") is not lookup(DIAG_NORMAL):
            return None
        maker.expect_source(DIAG_NORMAL, lookup(DIAG_NORMAL))
        given = maker.get(base, "_nargs"), tuple(sorted(maker.get(base, "_keys")))
        names = {(0, ("loc", "scale")): ("loc", "scale"), (2, ()): ("_0", "_1")}.get(given)
        if names is not None:
            loc, scale = (maker.watch.values(base, name) for name in names)
            if loc.dim() == scale.dim() == 1 and bool((loc == 0).all()) and bool((scale == 1).all()):
                return names[0]
    return None


def flow_forward(own: Any, self: Any, c: Any = None) -> Any:
    """``Flow.forward``: the log-density of a standard normal base is part of the program."""
    transform = self.transform
    composed = qualified(original(type(transform)) or type(transform)) == COMPOSED
    if not composed or not _follows(c) or any(vars(transform)[name] for name in HOOKS) or _runs_own(transform):
        return own(self, c)
    mean = None if "forward" in vars(transform) else _standard(self)
    if mean is None:
        return own(self, c)
    parent = lookup(NORMALIZING)

    def log_prob(self: Any, x: Tensor) -> Any:
        where = vars(self).get(WHERE)
        if where is None or "base" in vars(self) or "transform" in vars(self):  # they may have been changed
            return parent.log_prob(self, x)
        flow, transform, mean = where
        base = getattr(flow.base, mean)
        fits = (
            isinstance(x, Tensor) and x.dtype is base.dtype and x.device == base.device and x.shape[-1:] == base.shape
        )
        found = _rows(transform, x, base=True) if fits else None
        if found is None:
            return parent.log_prob(self, x)
        z, ladj, complete = found
        return ladj if complete else self.base.log_prob(z) + ladj

    cls = _class(
        NORMALIZING,
        {
            "log_prob": log_prob,
            **{
                n: LazyAttribute(_own_attributes)
                for n in ("transform", "base", "reinterpreted", "_batch_shape", "_event_shape")
            },
        },
    )
    made: Any = object.__new__(cls)
    lazy: Any = original(type(transform)) or type(transform)
    plain = getattr(lazy.forward, "_iin_fast_own", lazy.forward)
    vars(made).update(
        {
            WHERE: (self, _composed(transform, c, False, lambda: plain(transform, c)), mean),
            RAW: lambda: own(self, c),
        }
    )
    return made


PROGRAMS = Programs(
    flatten,
    layer,
    sizes,
    step,
    functions={
        COMPOSED: ("forward",),
        INVERSE: ("forward",),
        UNCONDITIONAL: ("forward", "args", "kwargs", "zuko.utils.Partial.forward"),
        BASE: ("forward", "args", "kwargs", "zuko.utils.Partial.forward"),
        MASKED: ("forward", "meta", "zuko.utils.unpack", *(f"{T}.AutoregressiveTransform.{n}" for n in CALL)),
        COUPLING: ("forward", "meta", "zuko.utils.unpack", *(f"{T}.CouplingTransform.{n}" for n in CALL)),
        MASKED_LINEAR: ("forward",),
        LINEAR: ("forward", "zuko.nn.linear"),
        RESIDUAL: ("forward",),
        MASKED_NET: (),
        NET: (),
        AFFINE: CALL,
        SPLINE: (*CALL, "bins", "bin", "searchsorted"),
        CIRCULAR: (
            CIRCULAR,
            *(f"{SHIFT}.{n}" for n in CALL),
            *(f"{SPLINE}.{n}" for n in (*CALL, "bins", "bin", "searchsorted")),
        ),
        ADDITIVE: CALL,
        PERMUTATION: CALL,
        LU: CALL,
        DIAG_NORMAL: ("__init__",),
    },
)
