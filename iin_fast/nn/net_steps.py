"""Conditioners as steps of a flow program."""

from typing import Any

from torch import nn

from ..flow import NetBuilder, ProgramBuilder, Weights
from ..flow.layers import Net

__all__ = ["NotAProgram", "dense", "net_of", "own"]

CONTEXT = 1  # the value of a net that the context is


class NotAProgram(Exception):
    """A module has no place in a program; ``why`` says what it does."""

    def __init__(self, module: nn.Module, why: str) -> None:
        super().__init__(why)
        self.module = module
        self.why = why


def own(module: nn.Module, says: str, *runs: str) -> bool:
    """Whether the class that has the method ``says`` is also the last one that defines what it describes, the methods ``runs``."""
    if any(name in vars(module) for name in runs):
        return False
    for kind in type(module).__mro__:
        if says in vars(kind):
            return True
        if any(name in vars(kind) for name in runs):
            return False
    return False


def dense(layer: nn.Linear, builder: ProgramBuilder) -> Weights:
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        raise NotAProgram(layer, f"is a {type(layer).__name__}")
    return Weights(layer.out_features, builder.ref(layer.weight), builder.ref(layer.bias))


def net_of(module: nn.Module, builder: ProgramBuilder) -> Net:
    """A conditioner that reads the conditioning features, and the context of the program behind them.

    Raises:
        NotAProgram: it holds a module that is no step.
    """
    steps = NetBuilder()
    value = steps.concat(0, CONTEXT) if builder.context else 0
    return steps.build(add_steps(module, builder, steps, value))


def add_steps(module: nn.Module, builder: ProgramBuilder, steps: NetBuilder, value: int) -> int:
    """Append what a module does to a value; gives its result."""
    kind: Any = type(module)
    if "forward" in vars(module):
        raise NotAProgram(module, "has a forward of its own")
    if kind is nn.Sequential:
        for part in module.children():
            value = add_steps(part, builder, steps, value)
        return value
    if own(module, "program_steps", "forward"):
        result: int = module.program_steps(builder, steps, value)  # type: ignore[operator]
        return result
    if kind is nn.Linear:
        return steps.dense(value, dense(module, builder))  # type: ignore[arg-type]
    if kind is nn.Identity or (kind is nn.Dropout and not (module.training and module.p)):
        return value
    if kind is nn.Dropout:
        raise NotAProgram(module, "drops values while it trains")
    if value == 0 and getattr(module, "inplace", False):
        raise NotAProgram(module, "writes over what the coupling reads")
    found = _activation(module)
    if found is None:
        raise NotAProgram(module, f"is a {kind.__name__}")
    return steps.act(value, *found)


def _activation(module: nn.Module) -> tuple[str, float] | None:
    """The kind and slope of an activation of torch.nn that programs have."""
    kind: Any = type(module)
    plain = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
    if kind in plain:
        return plain[kind], 0.0
    if kind is nn.LeakyReLU and module.negative_slope >= 0:  # type: ignore[operator]
        return "leaky_relu", float(module.negative_slope)  # type: ignore[arg-type]
    if kind is nn.ELU and module.alpha >= 0:  # type: ignore[operator]
        return "elu", float(module.alpha)  # type: ignore[arg-type]
    if kind is nn.GELU and module.approximate == "none":
        return "gelu", 0.0
    return None
