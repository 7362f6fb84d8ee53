"""convert_optimizer_state: training goes on from a published checkpoint as the published composition would."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iin_fast.compat import convert_optimizer_state, net2net
from iin_fast.compat.iin import DoubleVectorCouplingBlock, EfficientVRNVP, Shuffle, VectorActNorm

DIM = 5


class Composed(VectorActNorm):
    """Another class, so that the stack is composed of its modules, with parameters one by one as published."""


def model(norm: type[VectorActNorm]) -> nn.Module:
    """A flow between two layers of a user's own."""
    flow = EfficientVRNVP([norm, DoubleVectorCouplingBlock, Shuffle], DIM, 3, 8, 1)
    return nn.ModuleDict({"first": nn.Linear(DIM, DIM), "flow": flow, "last": nn.Linear(DIM, 2)}).double()


def step(module: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(16, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z, logdet = module["flow"](module["first"](x))
    optimizer.zero_grad()
    (z.square().sum() - logdet.sum() + module["last"](z).square().sum()).backward()
    optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, 1e-3, betas=(0.5, 0.9)),
    "AdamW, amsgrad": lambda parameters: torch.optim.AdamW(parameters, 1e-3, amsgrad=True, weight_decay=0.1),
    "SGD, momentum": lambda parameters: torch.optim.SGD(parameters, 1e-4, momentum=0.9),
}


def trained(make: Callable[[Any], torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = model(Composed)
    optimizer = make(module.parameters())
    for seed in range(3):
        step(module, optimizer, seed)
    return module, optimizer


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_goes_on_as_published(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    published, optimizer = trained(make)
    stacked = model(VectorActNorm)
    assert len(list(stacked.parameters())) < len(list(published.parameters()))
    stacked.load_state_dict(published.state_dict(), strict=True)
    ours = make(stacked.parameters())
    ours.load_state_dict(convert_optimizer_state(stacked, optimizer.state_dict()))
    for seed in range(3, 6):
        step(published, optimizer, seed)
        step(stacked, ours, seed)
    wanted = published.state_dict()
    for key, value in stacked.state_dict().items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-9, atol=1e-12)
    fresh = make(stacked.parameters())  # without the state it would not be equal
    stacked.load_state_dict(wanted)
    step(published, optimizer, 6)
    step(stacked, fresh, 6)
    assert not torch.allclose(stacked.state_dict()["flow.flow.0.flow.1.s.0.main.0.weight"], published.state_dict()["flow.flow.0.flow.1.s.0.main.0.weight"], rtol=1e-9, atol=1e-12)  # fmt: skip


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_there_and_back_is_the_same(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    _, optimizer = trained(make)
    stacked, state = model(VectorActNorm), optimizer.state_dict()
    again = convert_optimizer_state(stacked, convert_optimizer_state(stacked, state), to_published=True)
    assert again["param_groups"] == state["param_groups"] and again["state"].keys() == state["state"].keys()
    for number, values in state["state"].items():
        assert values.keys() == again["state"][number].keys()
        for key, value in values.items():
            assert not isinstance(value, Tensor) or torch.equal(value, again["state"][number][key])


def test_several_groups() -> None:
    """Groups stay groups where stacked parameters lie in one of them."""
    module = model(VectorActNorm)
    groups = [
        {"params": list(module[name].parameters()), "lr": lr}
        for name, lr in (("first", 0.1), ("flow", 0.2), ("last", 0.3))
    ]  # type: ignore[index]
    optimizer = torch.optim.Adam(groups)
    step(module, optimizer, 0)
    published = convert_optimizer_state(module, optimizer.state_dict(), to_published=True)
    assert [group["lr"] for group in published["param_groups"]] == [0.1, 0.2, 0.3]
    optimizer.load_state_dict(convert_optimizer_state(module, published))
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 8, 2]


def test_bad_states() -> None:
    _, optimizer = trained(OPTIMIZERS["Adam"])
    stacked, state = model(VectorActNorm), optimizer.state_dict()
    other = net2net.UnconditionalFlatCouplingFlow(DIM, 2, 8, 1)
    with pytest.raises(ValueError, match="state is of .* parameters, expected all .* of the published model"):
        convert_optimizer_state(other, state)
    with pytest.raises(ValueError, match="state is of .* parameters, expected all 12 of this model"):
        convert_optimizer_state(stacked, state, to_published=True)
    (group,) = state["param_groups"]
    halves = [{**group, "params": group["params"][:9]}, {**group, "params": group["params"][9:]}]
    with pytest.raises(ValueError, match="param_groups divide the parameters"):
        convert_optimizer_state(stacked, {**state, "param_groups": halves})
    some = {number: values for number, values in state["state"].items() if number != 5}
    with pytest.raises(ValueError, match=r"state has none for the parameters \[5\]"):
        convert_optimizer_state(stacked, {**state, "state": some})
    late = {**state["state"], 5: {**state["state"][5], "step": torch.tensor(9.0)}}
    with pytest.raises(ValueError, match="'step' differs among the parameters"):
        convert_optimizer_state(stacked, {**state, "state": late})
    wide = {**state["state"], 5: {**state["state"][5], "exp_avg": torch.zeros(3)}}
    with pytest.raises(ValueError, match="'exp_avg' is of another model"):
        convert_optimizer_state(stacked, {**state, "state": wide})
