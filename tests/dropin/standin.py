"""A small stand-in for the published IIN modules: the same names, shapes and calls, for machines without them."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iin_fast.dropin import registry, sources
from iin_fast.dropin.library import LIBRARIES

NAME = "iin.models.iin"


class BasicFullyConnectedNet(nn.Module):
    def __init__(self, dim: int, depth: int, hidden_dim: int, use_tanh: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(dim, hidden_dim), nn.LeakyReLU()]
        for _ in range(depth):
            layers += [nn.Linear(hidden_dim, hidden_dim), nn.LeakyReLU()]
        layers += [nn.Linear(hidden_dim, dim)] + [nn.Tanh()] * use_tanh
        self.main = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Any:
        return self.main(x)


class DoubleVectorCouplingBlock(nn.Module):
    def __init__(self, in_channels: int, hidden_dim: int, depth: int) -> None:
        super().__init__()
        self.s, self.t = (
            nn.ModuleList(BasicFullyConnectedNet(in_channels // 2, depth, hidden_dim, tanh) for _ in range(2))
            for tanh in (True, False)
        )

    def forward(self, x: Tensor, reverse: bool = False) -> Any:
        logdet: Any = 0
        first, second = x.chunk(2, 1)
        if not reverse:
            for s, t in zip(self.s, self.t, strict=True):
                log_scale = s(first)
                first, second = second * log_scale.exp() + t(first), first
                logdet = logdet + log_scale.sum(1)
            return torch.cat([second, first], 1), logdet
        second, first = first, second
        for s, t in zip(reversed(self.s), reversed(self.t), strict=True):
            first, second = second, (first - t(second)) * (-s(second)).exp()
        return torch.cat([first, second], 1)


class VectorActNorm(nn.Module):
    def __init__(self, in_channel: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, in_channel, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, in_channel, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        self.logdet = True

    def forward(self, input: Tensor, reverse: bool = False) -> Any:
        loc, scale = self.loc.flatten(), self.scale.flatten()
        if reverse:
            return self.reverse(input)
        if self.initialized.item() == 0:
            with torch.no_grad():
                self.loc.copy_(-input.mean(0)[None, :, None, None])
                self.scale.copy_(1 / (input.std(0)[None, :, None, None] + 1e-6))
                self.initialized.fill_(1)
            loc, scale = self.loc.flatten(), self.scale.flatten()
        return scale * (input + loc), scale.abs().log().sum() * torch.ones_like(input[:, 0])

    def reverse(self, output: Tensor) -> Tensor:
        return output / self.scale.flatten() - self.loc.flatten()


class Shuffle(nn.Module):
    def __init__(self, in_channels: int) -> None:
        super().__init__()
        index = torch.randperm(in_channels)
        self.register_buffer("forward_shuffle_idx", index)
        self.register_buffer("backward_shuffle_idx", index.argsort())

    def forward(self, x: Tensor, reverse: bool = False) -> Any:
        return x[:, self.backward_shuffle_idx] if reverse else (x[:, self.forward_shuffle_idx], 0)


class Flow(nn.Module):
    def __init__(self, in_channels: int, hidden_dim: int, depth: int) -> None:
        super().__init__()
        coupling = DoubleVectorCouplingBlock(in_channels, hidden_dim, depth)
        self.flow = nn.ModuleList([VectorActNorm(in_channels), coupling, Shuffle(in_channels)])

    def forward(self, x: Tensor, condition: Any = None, reverse: bool = False) -> Any:
        logdet: Any = 0
        if reverse:
            for module in reversed(self.flow):
                x = module(x, reverse=True)
            return x
        for module in self.flow:
            x, logdet_i = module(x)
            logdet = logdet + logdet_i
        return x, logdet


class EfficientVRNVP(nn.Module):
    def __init__(self, in_channels: int, n_flow: int, hidden_dim: int, depth: int) -> None:
        super().__init__()
        self.flow = nn.ModuleList(Flow(in_channels, hidden_dim, depth) for _ in range(n_flow))

    def forward(self, x: Tensor, condition: Any = None, reverse: bool = False) -> Any:
        logdet: Any = 0
        if reverse:
            for block in reversed(self.flow):
                x = block(x, reverse=True)
            return x, None
        for block in self.flow:
            x, logdet_i = block(x)
            logdet = logdet + logdet_i
        return x, logdet


CLASSES = (BasicFullyConnectedNet, DoubleVectorCouplingBlock, VectorActNorm, Shuffle, Flow, EfficientVRNVP)
for _cls in CLASSES:
    _cls.__module__ = NAME


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stand-ins pass for the published modules during a test."""
    module = ModuleType(NAME)
    for cls in CLASSES:
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, NAME, module)
    for name, entry in LIBRARIES["iin"].by_name.items():
        cls = getattr(module, name.rsplit(".", 1)[1])
        monkeypatch.setitem(sources.SOURCES, name, (registry.fingerprint(cls, entry),))
