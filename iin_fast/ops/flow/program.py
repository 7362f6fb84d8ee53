"""The flow as a program: what the engine runs on a CPU."""

from functools import lru_cache

from ...flow import FlowProgram, NetBuilder, Ref, Weights, affine
from ...flow import layers as L

__all__ = ["TENSORS", "flow_as_program"]

TENSORS = (
    "loc",
    "scale",
    "weight_in",
    "bias_in",
    "weight_hidden",
    "bias_hidden",
    "weight_out",
    "bias_out",
    "permutation",
)
"""The tensors of the program, in its order."""


def flow_as_program(*sizes: float) -> FlowProgram:
    """The program of the map that reference.py defines; for the arguments see ``_program``."""
    return _program(*sizes)  # type: ignore[arg-type]


flow_as_program._dynamo_marked_constant = True  # type: ignore[attr-defined]  # no graph has to make it anew


@lru_cache(maxsize=128)
def _program(
    dim: int,
    n_flows: int,
    hidden: int,
    depth: int,
    context_dim: int,
    contexts: int,  # 1, or n_flows: a context for each block, one behind the other
    leaky_slope: float,
    activation_slope: float,
    exact_logdet: bool,
) -> FlowProgram:
    out = dim // 2
    kept = dim - out  # features that condition
    sizes = (
        ("in", kept + context_dim, hidden),
        *(("hidden", hidden, hidden) for _ in range(depth)),
        ("out", hidden, out),
    )

    def dense(net: int, layer: int) -> Weights:  # net: of all nets, s and t of each half of each block
        name, inputs, outputs = sizes[layer]
        place = net * depth + layer - 1 if name == "hidden" else net
        weight, bias = (Ref(TENSORS.index(f"{kind}_{name}"), 0) for kind in ("weight", "bias"))
        return Weights(outputs, weight._replace(offset=place * inputs * outputs), bias._replace(offset=place * outputs))

    def nets(block: int, half: int) -> L.Net:
        net = NetBuilder()
        u = 0
        if context_dim:
            part = 1 if contexts == 1 else net.context(block * context_dim, context_dim)
            u = net.concat(u, part)
        outputs = []
        for which in (0, 1):
            value = net.panels(u, dense(block * 4 + half * 2 + which, 0))
            for layer in range(1, depth + 2):
                value = net.panels(
                    net.act(value, "leaky_relu", leaky_slope), dense(block * 4 + half * 2 + which, layer)
                )
            outputs.append(value)
        return net.build(*outputs)

    conditioning, transformed = tuple(range(kept)), tuple(range(kept, dim))
    layers: list[L.Layer] = []
    for block in range(n_flows):
        shift, scale, index = (Ref(TENSORS.index(n), block * dim) for n in ("loc", "scale", "permutation"))
        layers.append(L.Affine("shift_first", "plain", 0.0, shift, scale))
        if activation_slope != 1:
            layers.append(L.Activation(activation_slope, exact_logdet))
        for half in (0, 1):
            if half:
                layers.append(L.Permute(transformed + conditioning))
            layers.append(L.Coupling(conditioning, transformed, nets(block, half), affine(out, "tanh")))
        layers.append(L.Shuffle(index))
    return FlowProgram(dim, context_dim * contexts, len(TENSORS), tuple(layers))
