"""Activations and plain stacks of torch's layers as steps of a program's net."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...flow import NetBuilder
from .plan import Maker
from .watch import Unsupported

__all__ = ["activation", "no_dropout", "sequential"]

FUNCTIONS: dict[Any, tuple[str, float]] = {
    F.relu: ("relu", 0.0),
    torch.relu: ("relu", 0.0),
    F.leaky_relu: ("leaky_relu", 0.01),
    F.elu: ("elu", 1.0),
    F.silu: ("silu", 0.0),
    F.gelu: ("gelu", 0.0),
    F.tanh: ("tanh", 0.0),
    torch.tanh: ("tanh", 0.0),
    F.sigmoid: ("sigmoid", 0.0),
    torch.sigmoid: ("sigmoid", 0.0),
    torch.atan: ("atan", 0.0),
}
MODULES: dict[type[nn.Module], tuple[str, str | None]] = {  # kind, and the attribute that holds the slope
    nn.Identity: ("none", None),
    nn.ReLU: ("relu", None),
    nn.LeakyReLU: ("leaky_relu", "negative_slope"),
    nn.ELU: ("elu", "alpha"),
    nn.SiLU: ("silu", None),
    nn.GELU: ("gelu", None),
    nn.Tanh: ("tanh", None),
    nn.Sigmoid: ("sigmoid", None),
}


def activation(maker: Maker, value: Any) -> tuple[str, float]:
    """Kind and slope of an activation: a function of torch, or a module."""
    if not isinstance(value, nn.Module):
        try:
            return FUNCTIONS[value]
        except (KeyError, TypeError):
            raise Unsupported(f"activation {getattr(value, '__name__', value)}") from None
    cls = type(value)
    if cls not in MODULES:
        raise Unsupported(f"activation {cls.__name__}")
    maker.take_torch(value, cls)
    kind, slope = MODULES[cls]
    if "inplace" in vars(value) and maker.get(value, "inplace"):
        raise Unsupported(f"{cls.__name__}(inplace=True)")
    if cls is nn.GELU and maker.get(value, "approximate") != "none":
        raise Unsupported("GELU with approximate")
    found = 0.0 if slope is None else maker.number(value, slope)
    if found < 0:
        raise Unsupported(f"{cls.__name__} with {slope} {found}")
    return kind, found


def no_dropout(maker: Maker, module: Any) -> None:
    """Refuse a dropout that does something."""
    maker.take_torch(module, nn.Dropout)
    p = maker.number(module, "p")
    if p > 0 and maker.get(module, "training"):
        raise Unsupported(f"dropout {p} in training mode")


def sequential(maker: Maker, net: NetBuilder, value: int, module: nn.Module) -> int:
    """``nn.Sequential`` of linear layers, activations and dropout that does nothing."""
    maker.take_torch(module, nn.Sequential)
    for layer in maker.watch.children(module):
        if isinstance(layer, nn.Linear):
            maker.take_torch(layer, nn.Linear)
            value = net.dense(value, maker.dense(layer))
        elif isinstance(layer, nn.Dropout):
            no_dropout(maker, layer)
        else:
            value = net.act(value, *activation(maker, layer))
    return value
