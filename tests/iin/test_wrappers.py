"""The IIN inside what training code wraps models in: the loss calls the wrapper, and knows the IIN within."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from iin_fast import IIN, FactorLoss
from iin_fast.iin.model import unwrapped


def fabric(model: IIN) -> Any:
    lightning = pytest.importorskip("lightning_fabric")
    before = dict(os.environ)
    try:
        return lightning.Fabric(accelerator="cpu", devices=1).setup(model)
    finally:
        os.environ.clear()
        os.environ.update(before)


WRAPPERS: dict[str, Callable[[IIN], Any]] = {
    "torch.compile": lambda model: torch.compile(model, backend="aot_eager"),
    "DistributedDataParallel": DistributedDataParallel,
    "AveragedModel": AveragedModel,
    "Fabric": fabric,
    "compiled, then distributed": lambda model: DistributedDataParallel(torch.compile(model, backend="aot_eager")),
    "distributed, then compiled": lambda model: torch.compile(DistributedDataParallel(model), backend="aot_eager"),
}


def model() -> IIN:
    made = IIN(8, {"digit": 3, "color": 2}, 2, 8, 1, generator=torch.Generator().manual_seed(0))
    made(torch.randn(20, 8, generator=torch.Generator().manual_seed(1)))
    return made


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_loss_takes_a_wrapped_model(wrap: Callable[[IIN], Any], group: None) -> None:
    torch._dynamo.reset()
    plain, inner = model(), model()
    wrapper, calls = wrap(inner), []
    za, zb = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2)).unbind()
    wrapper.register_forward_hook(lambda *_: calls.append(1))
    loss, wanted = (FactorLoss()(m, za, zb, "color") for m in (wrapper, plain))
    assert len(calls) == 1
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    inside = unwrapped("test", wrapper)
    for mine, other in zip(inside.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_other_models_are_sent_elsewhere() -> None:
    za = torch.randn(2, 5, 8)
    for other in (nn.Linear(8, 8), AveragedModel(nn.Linear(8, 8)), torch.compile(nn.Linear(8, 8)), "model", None):
        message = (
            "FactorLoss: model is a .*, expected an iin_fast.IIN, or one that torch.compile, .*FactorLoss.from_factors"
        )
        with pytest.raises(TypeError, match=message):
            FactorLoss()(other, *za, "color")
