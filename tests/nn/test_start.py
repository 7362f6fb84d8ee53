"""The data-dependent start of ActNorm, in every module that has one: constant features, non-finite batches, files without it."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from iin_fast import IIN
from iin_fast.compat import iin as published_iin
from iin_fast.compat import net2net
from iin_fast.nn import (
    ActNorm,
    AffineCoupling,
    Compose,
    Flow,
    MaskedAutoregressiveFlow,
    NeuralSplineFlow,
    RealNVP,
    ResidualNet,
)
from iin_fast.nn.actnorm import DataDependentStart

DIM = 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(n: int = 200, **columns: Tensor | float) -> Tensor:
    """Random rows, of which columns ``c0`` … are given."""
    x = torch.randn(n, DIM, generator=seeded(1)) * torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0]) + 4
    for name, values in columns.items():
        x[:, int(name[1:])] = values
    return x


def transformer() -> nn.Module:
    sizes = {"in_channel": DIM, "n_flow": 2, "hidden_depth": 1, "hidden_dim": 8}
    return published_iin.VectorTransformer({"Transformer": sizes})


OURS: dict[str, Callable[..., nn.Module]] = {
    "ActNorm": lambda **options: ActNorm(DIM, **options),
    "Flow": lambda **options: Flow(DIM, 2, 8, 1, generator=seeded(), **options),
    "NeuralSplineFlow": lambda **options: NeuralSplineFlow(DIM, n_flows=2, hidden_dim=8, generator=seeded(), **options),
    "Compose": lambda **options: Compose(
        [
            ActNorm(DIM, **options),
            AffineCoupling(DIM, ResidualNet(3, 4, 8, generator=seeded())),
            ActNorm(DIM, **options),
        ]
    ),
    "RealNVP": lambda **options: RealNVP(DIM, n_flows=2, hidden_dim=8, generator=seeded(), **options),
    "MaskedAutoregressiveFlow": lambda **options: MaskedAutoregressiveFlow(
        DIM, n_flows=2, hidden_dim=8, generator=seeded(), **options
    ),
    "IIN": lambda **options: IIN(DIM, {"a": 2}, 2, 8, 1, generator=seeded(), **options),
    "IIN, spline": lambda **options: IIN(DIM, None, 2, 8, 1, coupling="spline", generator=seeded(), **options),
}
PUBLISHED: dict[str, Callable[..., nn.Module]] = {
    "VectorActNorm": lambda: published_iin.VectorActNorm(DIM),
    "VectorTransformer": transformer,
    "net2net ActNorm": lambda: net2net.ActNorm(DIM, logdet=True),
    "UnconditionalFlatCouplingFlow": lambda: net2net.UnconditionalFlatCouplingFlow(DIM, 2, 8, 1),
}
every = pytest.mark.parametrize("make", [*OURS.values(), *PUBLISHED.values()], ids=[*OURS, *PUBLISHED])
ours = pytest.mark.parametrize("make", OURS.values(), ids=OURS)
published = pytest.mark.parametrize("make", PUBLISHED.values(), ids=PUBLISHED)


def starts(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, DataDependentStart)]


def first_scale(module: nn.Module) -> Tensor:
    """Of the ActNorm that sees the data, ``[dim]``."""
    return starts(module)[0].scale.detach().reshape(-1, DIM)[0]


def density_loss(module: nn.Module, x: Tensor) -> Tensor:
    z, logdet = module(x)[:2]
    z = getattr(z, "tensor", z).flatten(1)
    return (0.5 * z.square().sum(1) - logdet).mean()


def make_started(make: Callable[..., nn.Module], x: Tensor) -> nn.Module:
    module = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module(x)
    return module


# Features without spread


@ours
@pytest.mark.parametrize("column", [0.1, 1e-5 * torch.randn(200, generator=seeded(2)) + 4], ids=["constant", "almost"])
def test_training_survives_a_constant_feature(make, column):
    x = data(c2=column)
    module = make()
    with pytest.warns(UserWarning, match=r"1 \(2\) of 5 features \(almost\) don't vary"):
        before = density_loss(module, x)
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        loss = density_loss(module, x)
        loss.backward()
        optimizer.step()
    after = density_loss(module, x)
    assert after < before  # with the published formula it is in the thousands, or millions
    assert first_scale(make_started(make, x))[2] == pytest.approx(1 / x.std(0)[[0, 1, 3, 4]].median().item(), rel=1e-4)


@ours
def test_the_rule_can_be_switched_off(make):
    module = make(min_spread=0)
    with pytest.warns(UserWarning, match="stretched to 1 all the same, as published"):
        module(data(c2=4.0))
    assert first_scale(module)[2] == pytest.approx(1e6, rel=1e-3)


@published
def test_the_published_formula_stays(make):
    module = make()
    with pytest.warns(UserWarning, match="as published"):
        module(data(c2=4.0))
    assert first_scale(module)[2] == pytest.approx(1e6, rel=1e-3)


@every
def test_features_of_other_units_start_as_published(make):
    """Spreads are compared with one another: other units, and features that differ a hundredfold, start in silence."""
    for x in (data() * 1e-2, data() * 1e4, data() * torch.tensor([1e-2, 1, 1, 1, 1e2])):
        module = make()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module(x)
        torch.testing.assert_close(first_scale(module), 1 / (x.std(0) + 1e-6), rtol=1e-5, atol=0)


@ours
def test_no_feature_varies(make):
    module = make()
    with pytest.warns(UserWarning, match="5 .0, 1, 2, 3, 4. of 5 features"):
        module(torch.full((20, DIM), 0.1))
    torch.testing.assert_close(first_scale(module), torch.ones(DIM))


def test_most_features_are_constant():
    """The median is that of the features that vary."""
    norm = ActNorm(DIM)
    with pytest.warns(UserWarning, match=r"4 \(1, 2, 3, 4\) of 5 features"):
        norm(data(c1=0.1, c2=0.3, c3=-7.7, c4=1e5))
    torch.testing.assert_close(norm.scale, norm.scale[0].expand(DIM))


def test_min_spread_is_a_share_of_the_median():
    for share, as_constant in ((0.5, True), (0.01, False)):
        norm, x = ActNorm(DIM, min_spread=share), data() * torch.tensor([1, 1, 0.1, 1, 1])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            norm(x)
        assert len(caught) == as_constant
        wanted = x.std(0).median() if as_constant else x.std(0)[2]
        assert norm.scale[2].item() == pytest.approx(1 / wanted.item(), rel=1e-4)


# Batches that are not finite


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_batch_that_is_not_finite_starts_nothing(make, bad):
    module, x = make(), data(20)
    x[3, 1] = x[3, 4] = x[7, 4] = bad
    message = r"the first batch has NaN or Inf in 2 \(3, 7\) of 20 rows, in 2 \(1, 4\) of 5 features"
    with pytest.raises(ValueError, match=message):
        module(x)
    for part in starts(module):
        assert not part.initialized.any() and not any(part._started)
    twin = make()
    twin.load_state_dict(module.state_dict())
    module(data(20))
    twin(data(20))
    torch.testing.assert_close(first_scale(module), 1 / (data(20).std(0) + 1e-6))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))


@every
def test_a_spread_that_overflows_starts_nothing(make):
    module = make()
    with pytest.raises(ValueError, match=r"the spread of the first batch overflows in 1 \(2\) of 5 features; scale"):
        module(data(20, c2=torch.linspace(-1e38, 1e38, 20)))
    assert not any(part.initialized.any() for part in starts(module))


def test_a_compiled_first_call_refuses_and_warns_too():
    flow = OURS["Flow"]()
    compiled: Any = torch.compile(flow, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="NaN or Inf in 1"):
        compiled(data(20, c1=math.nan)[:1])
    assert not flow.initialized.any() and not any(flow._started)
    with pytest.warns(UserWarning, match="don't vary"):
        compiled(data(c2=0.1))
    assert flow.initialized.all() and all(flow._started)


def test_a_model_starts_from_fake_tensors():
    for make in OURS.values():
        with FakeTensorMode():
            module = make()
            module(torch.randn(4, DIM))
            result = module(torch.randn(4, DIM))
        assert result[1].shape == (4,)


# Files


@every
@pytest.mark.parametrize("whole", [False, True])
def test_a_file_without_the_flag_keeps_its_start(make, whole):
    """Files of other code hold loc and scale alone; the next batch must not overwrite them."""
    source, module = make(), make()
    source(data())
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("initialized")}
    if not whole:
        state = {k: v for k, v in state.items() if k.split(".")[-1] in ("loc", "scale")}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert missing and not unexpected
    kept = [(part.loc.clone(), part.scale.clone()) for part in starts(module)]
    module(3 * data() + 1)
    for part, (loc, scale), other in zip(starts(module), kept, starts(source), strict=True):
        assert torch.equal(part.loc, loc) and torch.equal(part.scale, scale) and torch.equal(scale, other.scale)
        assert part.initialized.all()


def test_blocks_that_a_file_lacks_start_from_data():
    source, module = transformer(), transformer()
    source(data())
    state = {k: v for k, v in source.state_dict().items() if k.startswith("realnvp.flow.0.") and "initialized" not in k}
    module.load_state_dict(state, strict=False)
    flow: Any = module.realnvp.flow
    assert flow.initialized.tolist() == [1, 0]
    module(data())
    assert flow.initialized.tolist() == [1, 1] and torch.equal(flow.scale[0], source.realnvp.flow.scale[0])  # type: ignore[union-attr, index]
