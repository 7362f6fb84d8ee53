"""FrEIA: sequences and chains of coupling blocks, all-in-one blocks and fixed maps, whose sub-nets are ``nn.Sequential``."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ...flow import NetBuilder, affine
from ...flow.builder import CONTEXT, FEATURES
from ...flow.layers import Net, Transformer
from ..class_factory import original
from ..registry import made_in, qualified
from . import nets
from .nflows import expect_shape
from .plan import Atom, Maker, Programs, run
from .watch import NoPlace, Unsupported

__all__ = ["GRAPH", "PROGRAMS", "REVERSIBLE", "SEQUENCE", "clamp_name", "graph_forward", "sequence_forward"]

SEQUENCE = "FrEIA.framework.sequence_inn.SequenceINN"
GRAPH, REVERSIBLE = "FrEIA.framework.graph_inn.GraphINN", "FrEIA.framework.reversible_graph_net.ReversibleGraphNet"
C = "FrEIA.modules.coupling_layers"
BASE = f"{C}._BaseCouplingBlock"
GLOW, RNVP, NICE, GIN, ONE_SIDED = (
    f"{C}.{name}"
    for name in (
        "GLOWCouplingBlock",
        "RNVPCouplingBlock",
        "NICECouplingBlock",
        "GINCouplingBlock",
        "AffineCouplingOneSided",
    )
)
ACT_NORM, FIXED = "FrEIA.modules.invertible_resnet.ActNorm", "FrEIA.modules.fixed_transforms.FixedLinearTransform"
ALL_IN_ONE, PERMUTE = "FrEIA.modules.all_in_one_block.AllInOneBlock", "FrEIA.modules.fixed_transforms.PermuteRandom"
NO_LOGDET = (NICE, GIN, PERMUTE)  # they give the float 0 as their log-det
CLAMPS = {"ATAN": ("atan", 0.636), "TANH": ("tanh", 1.0), "SIGMOID": ("sigmoid", 2.0)}  # up to a constant

GLOBAL_SCALES = ("SIGMOID", "SOFTPLUS", "EXP")


def clamp_name(f_clamp: Callable[[Tensor], Tensor]) -> str | None:
    """ "ATAN", "TANH" or "SIGMOID" for FrEIA's own clamp functions, None for a function of the user's."""
    if f_clamp is torch.tanh:
        return "TANH"
    names = getattr(made_in(f_clamp, f"{BASE}.__init__"), "co_names", ())
    return "ATAN" if "atan" in names else "SIGMOID" if "sigmoid" in names else None


def _global_affine(maker: Maker, block: Any) -> None:
    """x s + offset of an all-in-one block, with as little work on s outside of the op as can be."""
    names = getattr(made_in(maker.get(block, "global_scale_activation"), f"{ALL_IN_ONE}.__init__"), "co_names", ())
    kind = next((name for name in GLOBAL_SCALES if name.lower() in names), None)
    offset = maker.parameter(block, "global_offset")
    if kind == "EXP":
        maker.affine(offset, maker.parameter(block, "global_scale"), form="exp")
    elif kind == "SOFTPLUS":  # 0.1 softplus(a, beta=0.5) = 0.2 softplus(a / 2)
        maker.affine(scale=maker.constant(torch.full((maker.dim,), 0.2, dtype=torch.float64)))
        maker.affine(offset, maker.computed_from(block, "global_scale", lambda a: 0.5 * a), form="softplus")
    elif kind == "SIGMOID":
        scale = maker.computed_from(block, "global_scale", lambda a: 10 * torch.sigmoid(a - 2.0))
        maker.affine(offset, scale)
    else:
        raise Unsupported("a global scale of its own")


# ---------------------------------------------------------------- layers


def _subnets(maker: Maker, block: Any, net: NetBuilder, *names: str) -> list[int]:
    """The outputs of sub-nets of the passive half and the condition."""
    value = FEATURES
    if maker.get(block, "conditional"):
        if not maker.context:
            raise Unsupported("a condition is missing")
        value = net.concat(FEATURES, CONTEXT)
    parts = []
    for name in names:
        part = maker.get(block, name)
        if type(part) is not nn.Sequential:
            raise NoPlace(f"a {type(part).__name__} as its net")
        parts.append(nets.sequential(maker, net, value, part))
    return parts


def _net(maker: Maker, block: Any, *names: str, halved: int = 0) -> Net:
    """The outputs of sub-nets, one behind the other; the first ``halved`` of them are taken times 1/2."""
    net = NetBuilder()
    parts = _subnets(maker, block, net, *names)
    if halved:
        factors = torch.ones(2 * halved)
        factors[:halved] = 0.5
        parts = [net.dense(net.concat(*parts) if len(parts) > 1 else parts[0], maker.fixed(factors.diag()))]
    return net.build(*parts)


def _volume_preserving(
    maker: Maker, block: Any, features: int, subnet: str, name: str, gain: float = 1.0
) -> tuple[Net, Transformer]:
    """The net of a GIN coupling, whose clamped log-scales have their mean taken off, and what it does with them."""
    (kind, most), net = CLAMPS[name], NetBuilder()
    raw = _subnets(maker, block, net, subnet)[0]
    both, one = (torch.eye(size, dtype=torch.float64) for size in (2 * features, features))
    centred = maker.number(block, "clamp") * most * (one - 1 / features)
    scale = net.act(net.dense(raw, maker.fixed(gain * both[:features])), kind)
    parts = net.dense(scale, maker.fixed(centred)), net.dense(raw, maker.fixed(gain * both[features:]))
    return net.build(*parts), affine(features, "identity")


def _clamp_name(maker: Maker, block: Any) -> str:
    name = clamp_name(maker.get(block, "f_clamp"))
    if name is None:
        raise Unsupported("clamp_activation of its own")
    return name


def _clamped(maker: Maker, block: Any, features: int, *subnets: str) -> tuple[Net, Transformer]:
    """The net of an affine coupling, and what it does with the raw values."""
    name, clamp = _clamp_name(maker, block), maker.number(block, "clamp")
    if name == "SIGMOID":  # 2 (sigmoid(u) - 1/2) = tanh(u / 2)
        return _net(maker, block, *subnets, halved=features), affine(features, "tanh", clamp=clamp)
    return _net(maker, block, *subnets), affine(features, name.lower(), clamp=clamp)


def _halves(maker: Maker, block: Any, first: str, second: str) -> tuple[range, range]:
    one, two = int(maker.number(block, first)), int(maker.number(block, second))
    if one + two != maker.dim:
        raise Unsupported(f"{one + two} channels, expected {maker.dim}")
    return range(one), range(one, maker.dim)


def _two_sided(maker: Maker, name: str, block: Any) -> None:
    first, second = _halves(maker, block, "split_len1", "split_len2")
    names = {
        GLOW: (("subnet2",), ("subnet1",)),
        RNVP: (("subnet_s2", "subnet_t2"), ("subnet_s1", "subnet_t1")),
        NICE: (("F",), ("G",)),
        GIN: (("subnet2",), ("subnet1",)),
    }[name]
    for passive, active, subnets in ((second, first, names[0]), (first, second, names[1])):
        size = len(active)
        made: tuple[Net, Transformer]
        if name == NICE:
            made = _net(maker, block, *subnets), affine(size, "none")
        elif name == GIN:
            made = _volume_preserving(maker, block, size, subnets[0], _clamp_name(maker, block))
        else:
            made = _clamped(maker, block, size, *subnets)
        maker.coupling(passive, active, *made)


def _all_in_one(maker: Maker, block: Any) -> None:
    if maker.get(block, "householder"):
        raise Unsupported("householder")
    if maker.get(block, "input_rank") != 0:
        raise Unsupported("an image")
    one, two = maker.get(block, "splits")
    if one + two != maker.dim:
        raise Unsupported(f"{one + two} channels, expected {maker.dim}")
    matrix, back = maker.watch.values(block, "w_perm"), maker.watch.values(block, "w_perm_inv")
    expect_shape(matrix, maker.dim, maker.dim)
    if not torch.equal(matrix.T, back):
        raise Unsupported("w_perm_inv is not the transpose of w_perm")
    if maker.get(block, "reverse_pre_permute"):
        _rotation(maker, back)
    gin, clamp = maker.get(block, "GIN"), maker.number(block, "clamp")
    if gin:
        made = _volume_preserving(maker, block, two, "subnet", "TANH", gain=0.1)
    else:
        made = _net(maker, block, "subnet"), affine(two, "tanh", clamp=clamp, gain=0.1)
    maker.coupling(range(one), range(one, maker.dim), *made)
    for name in ("global_scale", "global_offset"):
        expect_shape(block._parameters[name], 1, maker.dim)
    if gin:
        maker.affine(maker.parameter(block, "global_offset"))
    else:
        _global_affine(maker, block)
    _rotation(maker, matrix)


def _rotation(maker: Maker, matrix: Tensor) -> None:
    """x matrix^T: a permutation, or a rotation by its factors.

    FrEIA rounds rotations to float32, takes the transpose for the inverse, and their log-det for 0.
    """
    index = matrix.argmax(1)
    if torch.equal(matrix, torch.eye(maker.dim, dtype=matrix.dtype)[index]):
        maker.permute(index.tolist())
        return
    if maker.dtype is not torch.float32:
        raise Unsupported("a soft permutation, which is a rotation to the precision of float32 only")
    _linear(maker, matrix)


def _linear(maker: Maker, matrix: Tensor) -> None:
    """x matrix^T by the factors of the matrix."""
    permutation, lower, upper = torch.linalg.lu(matrix.double())
    below, above = torch.tril_indices(maker.dim, maker.dim, -1), torch.triu_indices(maker.dim, maker.dim, 1)
    values = lower[tuple(below)], upper[tuple(above)], upper.diagonal()
    maker.linear(*(maker.constant(value) for value in values), form="plain")
    maker.permute(permutation.argmax(1).tolist())


def _fixed(maker: Maker, block: Any) -> None:
    """x M + b; the library keeps the inverse and the log-det beside M."""
    matrix, back, logdet = (maker.watch.values(block, name) for name in ("M", "M_inv", "logDetM"))
    expect_shape(matrix, maker.dim, maker.dim)
    wide, near = matrix.double(), 100 * torch.finfo(maker.dtype).eps * float(torch.linalg.cond(matrix.double()))
    if not torch.allclose(wide @ back.double(), torch.eye(maker.dim, dtype=torch.float64), atol=near, rtol=0):
        raise Unsupported(f"M_inv is not the inverse of M to the precision of {maker.dtype}")
    if abs(float(logdet) - float(torch.linalg.slogdet(wide)[1])) > near * maker.dim:
        raise Unsupported(f"logDetM is not that of M to the precision of {maker.dtype}")
    _linear(maker, matrix.T)
    if isinstance(maker.get(block, "b"), Tensor):
        maker.affine(maker.constant(maker.watch.values(block, "b").reshape(-1)))


def _act_norm(maker: Maker, block: Any) -> None:
    if maker.get(block, "init_on_next_batch"):
        raise Unsupported("an ActNorm that has not been started")
    for name in ("scale", "bias"):
        expect_shape(block._parameters[name], 1, maker.dim)
    maker.affine(maker.parameter(block, "bias"), maker.parameter(block, "scale"), form="exp")


def layer(maker: Maker, module: Any) -> None:
    """Add a block of FrEIA."""
    name = maker.take(module)
    if name in (GLOW, RNVP, NICE, GIN):
        _two_sided(maker, name, module)
    elif name == ONE_SIDED:
        first, second = _halves(maker, module, "split_len1", "split_len2")
        maker.coupling(first, second, *_clamped(maker, module, len(second), "subnet"))
    elif name == FIXED:
        _fixed(maker, module)
    elif name == ACT_NORM:
        _act_norm(maker, module)
    elif name == ALL_IN_ONE:
        _all_in_one(maker, module)
    elif name == PERMUTE:
        order = maker.watch.values(module, "perm")
        if not torch.equal(maker.watch.values(module, "perm_inv"), order.argsort()):
            raise Unsupported("perm_inv is not the inverse of perm")
        maker.permute(order.tolist())
    else:
        raise Unsupported(f"{type(module).__name__} has no place in a program")


def flatten(maker: Maker, root: nn.Module) -> Iterator[Atom]:
    """The blocks of a sequence, or of a graph that is a chain."""
    if _name(root) != SEQUENCE:
        for block in _chain(maker, root):
            yield block, False
        return
    blocks = list(maker.watch.children(maker.get(root, "module_list")))
    if _index(maker.get(root, "conditions")) is False:
        raise Unsupported("several conditions")
    if all(_name(block) in NO_LOGDET for block in blocks):
        raise Unsupported("a sequence without log-det")
    for block, condition in zip(blocks, maker.get(root, "conditions"), strict=True):
        if maker.context or condition is None:
            _expect_condition(maker, block, condition is not None)
        yield block, False


def _chain(maker: Maker, root: Any) -> Iterator[nn.Module]:
    """The modules of a graph between its one input and its one output."""
    inputs, outputs, conditions = (list(maker.get(root, f"{kind}_nodes")) for kind in ("in", "out", "condition"))
    if len(inputs) != 1 or len(outputs) != 1 or len(conditions) > 1:
        raise Unsupported("a graph with several inputs, outputs or conditions")
    before, nodes = inputs[0], maker.get(root, "node_list")
    maker.watch.size(nodes)
    for node in (node for node in nodes if node not in (*inputs, *outputs, *conditions)):
        names = ("module", "inputs", "outputs", "conditions")
        module, taken, given, under = (maker.watch.read(vars(node), name) for name in names)
        if list(taken) != [(before, 0)] or len(given) != 1 or list(under) not in ([], conditions):
            raise Unsupported("a graph that is no chain")
        _expect_condition(maker, module, bool(list(under)))
        before = node
        yield module
    if [node for node, _ in outputs[0].inputs] != [before]:
        raise Unsupported("a graph that is no chain")


def _expect_condition(maker: Maker, block: Any, given: bool) -> None:
    """A block that runs its own code is given the condition if it says that it has one."""
    if given and not maker.context:
        raise Unsupported("a condition is missing")
    if given != bool(getattr(block, "conditional", False)):
        raise Unsupported(f"{type(block).__name__}, which does not say whether it has a condition")


def _name(block: nn.Module) -> str:
    return qualified(original(type(block)) or type(block))


def _index(conditions: Sequence[Any]) -> Any:
    """The one condition of all blocks that have one; None: there is none, False: there are several."""
    found = set(conditions) - {None}
    return False if len(found) > 1 else next(iter(found), None)


def sizes(root: Any) -> tuple[int, int]:
    """Number of features and of the condition that the blocks tell."""
    condition = 0
    for block in root.module_list:
        condition = max(condition, getattr(block, "condition_channels", getattr(block, "condition_length", 0)))
    return int((root.shapes if _name(root) == SEQUENCE else root.dims_in)[0][0]), condition


# ---------------------------------------------------------------- calls


def step(module: Any, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    """A block of FrEIA runs its own code."""
    options = {"c": [context]} if context is not None and getattr(module, "conditional", False) else {}
    (y,), logdet = module((x,), rev=inverse, jac=True, **options)
    return y, logdet


def sequence_forward(own: Any, self: Any, x_or_z: Any, c: Any = None, rev: Any = False, jac: Any = True) -> Any:
    """``SequenceINN.forward``."""
    found = None
    if torch.compiler.is_compiling():
        return own(self, x_or_z, c, rev, jac)
    if isinstance(x_or_z, Tensor) and not self.force_tuple_output and (rev is False or rev is True) and jac is True:
        index = _index(self.conditions)
        if index is None:
            found = run(PROGRAMS, self, x_or_z, None, rev)
        elif index is not False and isinstance(c, list | tuple) and index < len(c):
            found = run(PROGRAMS, self, x_or_z, c[index], rev)
    return own(self, x_or_z, c, rev, jac) if found is None else found[:2]


def graph_forward(
    own: Any,
    self: Any,
    x_or_z: Any,
    c: Any = None,
    rev: Any = False,
    jac: Any = True,
    intermediate_outputs: Any = False,
    **more: Any,
) -> Any:
    """``GraphINN.forward``; a graph that is a chain has programs."""
    found = None
    plain = not (more or intermediate_outputs or self.force_tuple_output) and jac is True and isinstance(rev, bool)
    if plain and isinstance(x_or_z, Tensor) and not torch.compiler.is_compiling():
        given = [] if c is None else [c] if isinstance(c, Tensor) else c
        if isinstance(given, list | tuple) and len(given) == len(self.condition_nodes) < 2:
            with suppress(Exception):  # the graph's own code says which node it was
                found = run(PROGRAMS, self, x_or_z, given[0] if given else None, rev)
    return own(self, x_or_z, c, rev, jac, intermediate_outputs, **more) if found is None else found[:2]


TWO_SIDED = ("forward", "_coupling1", "_coupling2", f"{BASE}.__init__")

PROGRAMS = Programs(
    flatten,
    layer,
    sizes,
    step,
    functions={
        GLOW: TWO_SIDED,
        RNVP: TWO_SIDED,
        NICE: TWO_SIDED,
        GIN: TWO_SIDED,
        ONE_SIDED: ("forward", f"{BASE}.__init__"),
        ALL_IN_ONE: ("__init__", "forward", "_affine", "_permute", "_pre_permute"),
        PERMUTE: ("forward",),
        FIXED: ("forward",),
        ACT_NORM: ("forward",),
    },
)
