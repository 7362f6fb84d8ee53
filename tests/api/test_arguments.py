"""Wrong arguments of every public constructor and function: an error that names the caller and the argument."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from iin_fast import IIN, FactorLoss, PairSampler, concept_pairs, estimate_factor_dims
from iin_fast import functional as F
from iin_fast import nn as flows
from iin_fast.compat import iin as published_iin
from iin_fast.compat import net2net
from iin_fast.ops.flow import flow as flow_op

NAN, INF = math.nan, math.inf
NO_NUMBER = ["2", None, True, 2j, [2], torch.tensor(2.0), np.ones(2)]

BAD: dict[str, list[Any]] = {
    "positive integer": [0, -1, 2.0, 2.5, NAN, INF, "2", None, True, [2], torch.tensor(2.5)],
    "integer": [-1, 2.0, 2.5, NAN, INF, "2", None, True, [2], torch.tensor(2.5)],
    "at least 2": [1, 0, -1, 2.0, NAN, INF, "2", None, True, [2]],
    "above 0": [0, 0.0, -1.0, NAN, INF, -INF, *NO_NUMBER],
    "from 0": [-1, -1e-9, NAN, INF, *NO_NUMBER],
    "from 0 below 1": [-0.1, 1, 1.5, NAN, INF, *NO_NUMBER],
    "between 0 and 1": [0, 1, -0.1, 1.5, NAN, INF, *NO_NUMBER],
    "flag": [None, "no", 0, 1, 0.0, NAN],
    "choice": ["", "something else", 3, True, [1]],
    "type": [torch.int64, torch.complex64, "float32", float, 3],
    "shape": [-1, 2.0, NAN, "2", None, True, [2.5], [-1], [True], "23"],
    "context": [3, "c", [1.0], torch.ones(2, dtype=torch.int64), torch.tensor(1.0)],
    "module": [None, 3, "net"],
    "factor sizes": [[2.7, 3], [-1, 9], "24", 6, None, [True, 5], [[2], 4]],
}


@dataclass(frozen=True)
class Function:
    """A callable, arguments that it takes, and what kind each argument to be tried is."""

    name: str
    call: Callable[..., Any]
    valid: dict[str, Any]
    kinds: dict[str, str] = field(default_factory=dict)


def started(module: Any, dim: int = 6) -> Any:
    module(torch.randn(20, dim))
    return module


def transformer(**changed: Any) -> Any:
    sizes = {"in_channel": 6, "n_flow": 2, "hidden_depth": 1, "hidden_dim": 8, "factor_config": [2, 4]} | changed
    return published_iin.FactorTransformer({"Transformer": sizes})


def flow_call(**options: Any) -> Any:
    flow = flows.Flow(6, 1, 8, 1)
    names = "loc scale weight_in bias_in weight_hidden bias_hidden weight_out bias_out permutation".split()
    return flow_op(torch.randn(3, 6), None, *(getattr(flow, name).detach() for name in names), **options)


SIZES = {"n_flows": "positive integer", "hidden_dim": "positive integer", "hidden_depth": "integer"}
SPLINE = {"bins": "positive integer", "tail_bound": "above 0", "min_bin_width": "from 0", "min_bin_height": "from 0", "min_derivative": "from 0", "parameterization": "choice", "tails": "choice"}  # fmt: skip
NET = {"dim": "positive integer", "depth": "integer", "hidden_dim": "positive integer"}
STACK = {"in_channels": "at least 2", "n_flows": "positive integer", "hidden_dim": "positive integer", "hidden_depth": "integer"}  # fmt: skip
X = torch.randn(4, 6)
PAIR = dict(za=X, zb=X, logdet_a=X[:, 0], logdet_b=X[:, 0], shared=torch.ones(4, 2, dtype=torch.bool))
LABELS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])

FUNCTIONS = [
    Function("ActNorm", flows.ActNorm, dict(dim=6), {"dim": "positive integer", "min_spread": "from 0", "dtype": "type"}),
    Function("AffineCoupling", flows.AffineCoupling, dict(dim=6, conditioner=nn.Linear(3, 6)), {"dim": "at least 2", "conditioner": "module", "squash": "choice", "clamp": "above 0", "swap": "flag"}),
    Function("SplineCoupling", flows.SplineCoupling, dict(dim=6, conditioner=nn.Linear(3, 69)), {"dim": "at least 2", "conditioner": "module", "swap": "flag"} | SPLINE),
    Function("SplineCoupling.outputs", flows.SplineCoupling.outputs, dict(dim=6), {"dim": "at least 2", "bins": "positive integer", "tails": "choice"}),
    Function("Permutation", flows.Permutation, dict(dim=6), {"dim": "positive integer"}),
    Function("LULinear", flows.LULinear, dict(dim=6), {"dim": "positive integer", "min_diagonal": "from 0 below 1", "dtype": "type"}),
    Function("ResidualNet", flows.ResidualNet, dict(in_features=3, out_features=4, hidden_dim=8), {"in_features": "positive integer", "out_features": "positive integer", "hidden_dim": "positive integer", "hidden_depth": "integer", "dropout": "from 0 below 1", "dtype": "type"}),
    Function("Flow", flows.Flow, dict(dim=6, n_flows=1, hidden_dim=8), SIZES | {"dim": "at least 2", "context_dim": "integer", "leaky_slope": "from 0", "activation_slope": "above 0", "exact_logdet": "flag", "actnorm": "flag", "permute": "flag", "min_spread": "from 0", "memory": "choice", "dtype": "type"}),
    Function("NeuralSplineFlow", flows.NeuralSplineFlow, dict(dim=6, n_flows=1, hidden_dim=8), SIZES | {"dim": "at least 2", "context_dim": "integer", "bins": "positive integer", "tail_bound": "above 0", "mixing": "choice", "min_spread": "from 0", "dropout": "from 0 below 1", "dtype": "type"}),
    Function("Compose", flows.Compose, dict(layers=[flows.ActNorm(6)]), {"context_dim": "integer"}),
    Function("RealNVP", flows.RealNVP, dict(dim=6, n_flows=1, hidden_dim=8), SIZES | {"dim": "at least 2", "context_dim": "integer", "squash": "choice", "clamp": "above 0", "activation": "choice", "actnorm": "flag", "min_spread": "from 0", "dtype": "type"}),
    Function("MaskedAutoregressiveFlow", flows.MaskedAutoregressiveFlow, dict(dim=6, n_flows=1, hidden_dim=8), SIZES | {"dim": "positive integer", "context_dim": "integer", "transformer": "choice", "clamp": "above 0", "bins": "positive integer", "tail_bound": "above 0", "order": "choice", "activation": "choice", "actnorm": "flag", "min_spread": "from 0", "dtype": "type"}),
    Function("IIN", IIN, dict(dim=6, n_flows=1, hidden_dim=8), SIZES | {"dim": "positive integer", "context_dim": "integer", "coupling": "choice", "min_spread": "from 0", "dtype": "type"}),
    Function("IIN", IIN, dict(dim=6, n_flows=1, hidden_dim=8, coupling="spline"), {"bins": "positive integer", "tail_bound": "above 0"}),
    Function("Flow.sample", started(flows.Flow(6, 1, 8)).sample, dict(sample_shape=(2, 3)), {"sample_shape": "shape"}),
    Function("NeuralSplineFlow.sample", started(flows.NeuralSplineFlow(6, n_flows=1, hidden_dim=8)).rsample, dict(sample_shape=3), {"sample_shape": "shape"}),
    Function("FlowTransform", flows.FlowTransform, dict(module=flows.Flow(6, 1, 8)), {"context": "context"}),
    Function("IIN.sample", IIN(6, n_flows=1, hidden_dim=8).sample, dict(n=3), {"n": "positive integer"}),
    Function("IIN.interpolate", started(IIN(6, n_flows=1, hidden_dim=8)).interpolate, dict(z_a=X, z_b=X, steps=2), {"steps": "at least 2"}),
    Function("FactorLoss", FactorLoss, {}, {"rho": "between 0 and 1", "normalized": "flag"}),
    Function("PairSampler", PairSampler, dict(labels=LABELS), {"seed": "integer", "others": "choice"}),
    Function("PairSampler.sample", PairSampler(LABELS).sample, dict(batch_size=3), {"batch_size": "positive integer"}),
    Function("concept_pairs", concept_pairs, dict(with_=X, without=X), {"n": "positive integer", "background_share": "from 0 below 1", "noise": "from 0", "seed": "integer"}),
    Function("estimate_factor_dims", estimate_factor_dims, dict(za=X, zb=X, factor=np.array([0, 1, 0, 1])), {"method": "choice"}),
    Function("affine_coupling", F.affine_coupling, dict(x=X, raw_scale=X, shift=X), {"squash": "choice", "clamp": "above 0", "inverse": "flag"}),
    Function("spline_coupling", F.spline_coupling, dict(x=X, parameters=torch.randn(4, 6, 23), bins=8), SPLINE),
    Function("pair_nll", F.pair_nll, dict(PAIR, sizes=[2, 4], rho=0.9), {"sizes": "factor sizes", "rho": "between 0 and 1", "normalized": "flag"}),
    Function("flow", flow_call, {}, {"leaky_slope": "from 0", "activation_slope": "above 0", "exact_logdet": "flag", "inverse": "flag", "memory": "choice"}),
    Function("FactorTransformer", transformer, {}, {"in_channel": "at least 2", "n_flow": "positive integer", "hidden_depth": "integer", "hidden_dim": "positive integer"}),
    Function("FactorTransformer", lambda **c: transformer(factor_config=[], **c), {}, {"n_factors": "positive integer"}),
    Function("FactorLoss", lambda rho: published_iin.FactorLoss({"Loss": {"rho": rho}}), dict(rho=0.9), {"rho": "between 0 and 1"}),
    Function("BasicFullyConnectedNet", published_iin.BasicFullyConnectedNet, dict(dim=3, depth=1, hidden_dim=8), NET),
    Function("VectorActNorm", published_iin.VectorActNorm, dict(in_channel=6), {"in_channel": "positive integer"}),
    Function("Shuffle", published_iin.Shuffle, dict(in_channels=6), {"in_channels": "positive integer"}),
    Function("DoubleVectorCouplingBlock", published_iin.DoubleVectorCouplingBlock, dict(in_channels=6, hidden_dim=8), {"in_channels": "positive integer", "n_blocks": "positive integer"}),
    Function("ActNorm", net2net.ActNorm, dict(num_features=6), {"num_features": "positive integer"}),
    Function("BasicFullyConnectedNet", net2net.BasicFullyConnectedNet, dict(dim=3, depth=1, hidden_dim=8), NET),
    Function("InvLeakyRelu", net2net.InvLeakyRelu, {}, {"alpha": "above 0"}),
    Function("InvParametricRelu", net2net.InvParametricRelu, {}, {"alpha": "above 0"}),
    Function("UnconditionalFlatCouplingFlow", net2net.UnconditionalFlatCouplingFlow, dict(in_channels=6, n_flows=1, hidden_dim=8, hidden_depth=1), STACK),
    Function("PureAffineFlatCouplingFlow", net2net.PureAffineFlatCouplingFlow, dict(in_channels=6, n_flows=1, hidden_dim=8, hidden_depth=1), STACK),
    Function("ConditionalFlow", net2net.ConditionalFlow, dict(in_channels=6, embedding_dim=2, n_flows=1, hidden_dim=8, hidden_depth=1), STACK | {"embedding_dim": "positive integer", "conditioning_option": "choice", "activation": "choice"}),
    Function("ConditionalFlatCouplingFlow", net2net.ConditionalFlatCouplingFlow, dict(in_channels=6, conditioning_dim=3, embedding_dim=2, n_flows=1, hidden_dim=8, hidden_depth=1), STACK | {"conditioning_dim": "positive integer"}),
]  # fmt: skip

CASES = [
    (function, name, value) for function in FUNCTIONS for name, kind in function.kinds.items() for value in BAD[kind]
]


def optional(function: Function, name: str) -> bool:
    return name in ("clamp", "dtype", "tails") or (function.name == "IIN" and name in ("bins", "tail_bound"))


@pytest.mark.parametrize("function", FUNCTIONS, ids=[f"{f.name} {' '.join(f.kinds)}" for f in FUNCTIONS])
def test_valid_arguments_are_taken(function: Function) -> None:
    """So that the test below sees its own wrong argument refused, not another one."""
    assert function.call(**function.valid) is not None


@pytest.mark.parametrize(
    ("function", "name", "value"),
    CASES,
    ids=[f"{f.name} {name} {value!r}".replace("\n", "") for f, name, value in CASES],
)
def test_the_error_names_the_argument(function: Function, name: str, value: Any) -> None:
    if value is None and optional(function, name):
        pytest.skip("may be left out")
    published = {"in_channel": "number of channels"} if function.name == "VectorActNorm" else {}
    published |= {"num_features": "number of channels"}
    with pytest.raises((TypeError, ValueError)) as caught:
        function.call(**{**function.valid, name: value})
    message = str(caught.value)
    assert message.startswith(f"{function.name}: "), message
    assert f"{published.get(name, name)}" in message.split(", expected")[0], message


@pytest.mark.parametrize("option", [dict(bins=3), dict(tail_bound=2.0)])
def test_options_of_splines_are_refused_where_they_mean_nothing(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=f"IIN: {name} is .*, expected None with coupling 'affine'"):
        IIN(6, n_flows=1, hidden_dim=8, **option)


def test_a_permutation_is_a_tensor_of_integers() -> None:
    for wrong in ([1, 0], torch.tensor([1.0, 0.0]), "ba"):
        with pytest.raises(TypeError, match=r"Permutation: permutation is .*, expected an int64 tensor \[2\]"):
            flows.Permutation(2, wrong)  # type: ignore[arg-type]


def test_integers_of_other_types_are_integers() -> None:
    """What numpy and torch give for a size is taken."""
    flow = flows.Flow(np.int64(6), torch.tensor(2), np.int32(8))  # type: ignore[arg-type]
    assert (flow.dim, flow.n_flows, flow.hidden_dim) == (6, 2, 8) and type(flow.n_flows) is int
    F.pair_nll(**PAIR, sizes=np.array([2, 4]), rho=np.float32(0.5))  # type: ignore[arg-type]
