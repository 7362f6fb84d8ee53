"""Modules built without memory (meta device), given memory, and filled from a file; modules beside another default device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import iin_fast
from iin_fast import IIN, FactorLoss
from iin_fast import iin as method
from iin_fast.compat import iin as published_iin
from iin_fast.compat import net2net
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

from .cases import DIM, normal, same, seeded, tensors

CONFIG = {"in_channel": DIM, "n_flow": 2, "hidden_depth": 1, "hidden_dim": 8}
BLOCK = [published_iin.VectorActNorm, published_iin.DoubleVectorCouplingBlock, published_iin.Shuffle]
SIZES = dict(hidden_dim=8, hidden_depth=1)

Make = Callable[..., nn.Module]

# Each is called with device=…, where the module takes one.
OURS: dict[str, Make] = {
    "ActNorm": lambda **place: ActNorm(DIM, **place),
    "AffineCoupling": lambda **place: AffineCoupling(DIM, ResidualNet(3, 6, 8, **place)),
    "SplineCoupling": lambda **place: SplineCoupling(DIM, ResidualNet(3, 33, 8, **place), bins=4),
    "Permutation": lambda **place: Permutation(DIM, **place),
    "Permutation drawn": lambda **place: Permutation(DIM, generator=seeded(), **place),
    "Permutation given": lambda **place: Permutation(DIM, torch.arange(DIM).flip(0), **place),
    "LULinear": lambda **place: LULinear(DIM, **place),
    "ResidualNet": lambda **place: ResidualNet(DIM, 3, 8, generator=seeded(), **place),
    "Flow": lambda **place: Flow(DIM, 2, 8, 1, **place),
    "Flow, seeded": lambda **place: Flow(DIM, 2, 8, 1, generator=seeded(), **place),
    "Flow, no actnorm": lambda **place: Flow(DIM, 2, 8, 1, actnorm=False, **place),
    "Flow, no permutation": lambda **place: Flow(DIM, 2, 8, 1, permute=False, **place),
    "Flow, neither": lambda **place: Flow(DIM, 2, 8, 1, actnorm=False, permute=False, **place),
    "NeuralSplineFlow": lambda **place: NeuralSplineFlow(DIM, n_flows=2, bins=4, hidden_dim=8, **place),
    "NeuralSplineFlow, seeded": lambda **place: NeuralSplineFlow(DIM, n_flows=1, bins=4, hidden_dim=8, generator=seeded(), **place),
    "Compose": lambda **place: Compose([ActNorm(DIM, **place), AffineCoupling(DIM, ResidualNet(3, 6, 8, **place)), Permutation(DIM, **place)]),
    "RealNVP": lambda **place: RealNVP(DIM, n_flows=2, hidden_dim=8, **place),
    "RealNVP, no actnorm": lambda **place: RealNVP(DIM, n_flows=2, hidden_dim=8, actnorm=False, **place),
    "MaskedAutoregressiveFlow": lambda **place: MaskedAutoregressiveFlow(DIM, n_flows=2, hidden_dim=8, **place),
    "MaskedAutoregressiveFlow, random": lambda **place: MaskedAutoregressiveFlow(DIM, n_flows=3, hidden_dim=8, order="random", actnorm=False, **place),
    "IIN": lambda **place: IIN(DIM, {"a": 2}, 2, 8, 1, **place),
    "IIN spline": lambda **place: IIN(DIM, {"a": 2}, 1, 8, 1, coupling="spline", generator=seeded(), **place),
}  # fmt: skip
PUBLISHED: dict[str, Make] = {
    "iin BasicFullyConnectedNet": lambda: published_iin.BasicFullyConnectedNet(DIM, 1, 8, use_bn=True),
    "iin DoubleVectorCouplingBlock": lambda: published_iin.DoubleVectorCouplingBlock(DIM, 8, 1),
    "iin EfficientVRNVP": lambda: published_iin.EfficientVRNVP(BLOCK, DIM, 2, 8, 1),
    "iin EfficientVRNVP, composed": lambda: published_iin.EfficientVRNVP(BLOCK[:2], DIM, 2, 8, 1),
    "iin Flow": lambda: published_iin.Flow(BLOCK, DIM, 8, 1),
    "iin FactorTransformer": lambda: published_iin.FactorTransformer({"Transformer": CONFIG}),
    "iin VectorTransformer": lambda: published_iin.VectorTransformer({"Transformer": CONFIG}),
    "iin VectorActNorm": lambda: published_iin.VectorActNorm(DIM),
    "iin Shuffle": lambda: published_iin.Shuffle(DIM),
    "net2net ActNorm": lambda: net2net.ActNorm(DIM, logdet=True),
    "net2net BasicFullyConnectedNet": lambda: net2net.BasicFullyConnectedNet(DIM, 1, 8, use_an=True),
    "net2net ConditionalDoubleVectorCouplingBlock": lambda: net2net.ConditionalDoubleVectorCouplingBlock(DIM, DIM, 8),
    "net2net ConditionalFlatCouplingFlow": lambda: net2net.ConditionalFlatCouplingFlow(DIM, DIM, 3, n_flows=2, conditioning_option="parallel", **SIZES),
    "net2net ConditionalFlatDoubleCouplingFlowBlock": lambda: net2net.ConditionalFlatDoubleCouplingFlowBlock(DIM, DIM, **SIZES),
    "net2net ConditionalFlow": lambda: net2net.ConditionalFlow(DIM, DIM, n_flows=2, **SIZES),
    "net2net DoubleVectorCouplingBlock": lambda: net2net.DoubleVectorCouplingBlock(DIM, 8, 1),
    "net2net IgnoreLeakyRelu": net2net.IgnoreLeakyRelu,
    "net2net InvLeakyRelu": net2net.InvLeakyRelu,
    "net2net InvParametricRelu": net2net.InvParametricRelu,
    "net2net PureAffineDoubleCouplingFlowBlock": lambda: net2net.PureAffineDoubleCouplingFlowBlock(DIM, **SIZES),
    "net2net PureAffineFlatCouplingFlow": lambda: net2net.PureAffineFlatCouplingFlow(DIM, 2, **SIZES),
    "net2net Shuffle": lambda: net2net.Shuffle(DIM),
    "net2net UnconditionalFlatCouplingFlow": lambda: net2net.UnconditionalFlatCouplingFlow(DIM, 2, **SIZES),
    "net2net UnconditionalFlatDoubleCouplingFlowBlock": lambda: net2net.UnconditionalFlatDoubleCouplingFlowBlock(DIM, **SIZES),
}  # fmt: skip
PUBLISHED["Inputs"] = lambda: method.Inputs(DIM, 1)  # no device either
FROM_DATA = {iin_fast.LinearIIN}  # made by fit; a file brings its sizes
WITHOUT_STATE = {FactorLoss, published_iin.FactorLoss, published_iin.Loss, net2net.NLL, net2net.NormalizingFlow}

every = pytest.mark.parametrize("make", [*OURS.values(), *PUBLISHED.values()], ids=[*OURS, *PUBLISHED])
ours = pytest.mark.parametrize("make", OURS.values(), ids=OURS)


def run(module: nn.Module) -> list[Tensor]:
    inputs = (normal(1, 5, DIM), normal(2, 5, DIM))
    result = module(*inputs) if "Conditional" in type(module).__name__ else module(inputs[0])
    if isinstance(result, tuple):
        result = [part for part in result if not isinstance(part, int | float)]  # a published log-det of 0
    return tensors(result)


def used(make: Make) -> nn.Module:
    """After its start, with parameters that no new module has."""
    torch.manual_seed(3)
    module = make()
    run(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.1).add_(0.02)
    return module.eval()


def garbage(module: nn.Module) -> nn.Module:
    """What ``to_empty`` may find in its memory."""
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.fill_(77)
    return module


def test_every_module_is_tried() -> None:
    found = {type(make()) for make in [*OURS.values(), *PUBLISHED.values()]} | WITHOUT_STATE | FROM_DATA
    public = {
        value
        for home in (iin_fast, iin_fast.nn, method, published_iin, net2net)
        for name in home.__all__
        if isinstance(value := getattr(home, name), type) and issubclass(value, nn.Module)
    }
    assert public <= found
    for loss in (FactorLoss(), published_iin.FactorLoss({}), published_iin.Loss({}), net2net.NLL()):
        assert not [*loss.parameters(), *loss.buffers()]


@every
@pytest.mark.parametrize("assign", [False, True])
def test_meta_then_file(make: Make, assign: bool) -> None:
    """A model that is built on the meta device and filled from a file is the model that wrote the file."""
    module = used(make)
    with torch.device("meta"):
        twin = make().eval()
    assert all(t.is_meta for t in [*twin.parameters(), *twin.buffers()])
    if not assign:
        garbage(twin.to_empty(device="cpu"))
    twin.load_state_dict(module.state_dict(), strict=True, assign=assign)
    same(run(twin), run(module), rtol=0, atol=0)


@every
def test_meta_then_reset(make: Make) -> None:
    """Without a file, as sharded trainings start: every part that has tensors of its own can fill them."""
    with torch.device("meta"):
        twin = make()
    garbage(twin.to_empty(device="cpu"))
    for part in twin.modules():
        if [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
            part.reset_parameters()
    module = make()
    module.load_state_dict(twin.state_dict(), strict=True)
    assert not any((t == 77).any() for t in [*twin.parameters(), *twin.buffers()])
    same(run(twin), run(module), rtol=0, atol=0)


@ours
def test_another_default_device(make: Make) -> None:
    """A device that is asked for counts, whatever the default; without one the default counts for all tensors alike."""
    torch.manual_seed(0)
    wanted = make(device="cpu")
    torch.manual_seed(0)
    with torch.device("meta"):
        if make is OURS["Permutation given"]:
            pytest.skip("a tensor that is made here has no values")
        module = make(device="cpu")
        elsewhere = make()
    assert all(not t.is_meta for t in [*module.parameters(), *module.buffers()])
    assert all(t.is_meta for t in [*elsewhere.parameters(), *elsewhere.buffers()])
    same([*module.parameters(), *module.buffers()], [*wanted.parameters(), *wanted.buffers()], rtol=0, atol=0)
    x = normal(1, 5, DIM)
    wanted_result = module(x)
    with torch.device("meta"):
        found = module(x)
    same(found, wanted_result, rtol=0, atol=0)


def test_reset_parameters_is_a_new_draw() -> None:
    """The same seed gives what the constructor gives; nothing of the start stays."""
    for make in (
        lambda: NeuralSplineFlow(DIM, n_flows=2, bins=4, hidden_dim=8, generator=seeded()),
        lambda: MaskedAutoregressiveFlow(DIM, n_flows=2, order="random", generator=seeded()),
        lambda: Permutation(DIM, generator=seeded()),
        lambda: ResidualNet(DIM, 3, 8, generator=seeded()),
    ):
        module: Any = make()
        if not isinstance(module, ResidualNet):
            module(normal(1, 20, DIM) + 3)
        module.reset_parameters(seeded())
        same(list(module.state_dict().values()), list(make().state_dict().values()), rtol=0, atol=0)
    norm = ActNorm(DIM)
    norm(normal(1, 20, DIM) + 3)
    norm.reset_parameters()
    assert not norm.initialized and norm._started == (False,)
    norm(normal(1, 20, DIM))
    assert norm.initialized
