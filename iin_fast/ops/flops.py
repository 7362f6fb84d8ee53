"""Flop formulas of the ops, for ``torch.utils.flop_counter.FlopCounterMode``.

Only matrix products count, as with the operations of torch: flows have some, the other ops have none. torch's module
imports Triton, which ``import iin_fast`` must not, so the formulas are registered when it is imported by someone else.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from math import prod
from types import ModuleType
from typing import Any

import torch

from ..flow import FlowProgram
from ..flow import layers as L
from .flow_program.engine import KEEP

__all__ = ["register_formulas"]

_MODULE = "torch.utils.flop_counter"
Shape = Sequence[int]


def _products(batch: int, *weights: Shape) -> int:
    """Flops of the rows' products with all weights of all nets."""
    return 2 * batch * sum(map(prod, weights))


def _flow(
    x: Shape, context: Any, loc: Any, scale: Any, weight_in: Shape, bias_in: Any, weight_hidden: Shape,
    bias_hidden: Any, weight_out: Shape, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _products(x[0], weight_in, weight_hidden, weight_out)


def _flow_backward(
    grad_y: Shape, grad_logdet: Any, y: Any, saved: Shape, context: Any, loc: Any, scale: Any, weight_in: Shape,
    bias_in: Any, weight_hidden: Shape, bias_hidden: Any, weight_out: Shape, bias_out: Any, permutation: Any,
    leaky_slope: float, activation_slope: float, inverse: bool, context_grad: bool, weight_grads: bool,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Gradients of all activations, of the weights where they are wanted, and the map again where nothing was saved."""
    passes = 1 + weight_grads + (prod(saved) == 0)
    return passes * _products(grad_y[0], weight_in, weight_hidden, weight_out)


def _program_products(batch: int, text: str, inverse: bool) -> int:
    """Flops of one pass. A triangular solve counts nothing, as in torch."""
    program = FlowProgram.parse(text)
    total = 0
    for layer, reads in zip(program.layers, program.reads, strict=True):
        inverted = isinstance(layer, L.Inverse)
        kind = layer.layer if isinstance(layer, L.Inverse) else layer
        if isinstance(kind, (L.Coupling, L.Autoregressive)):
            total += _products(batch, *(read.shape for read in reads if not read.mask and len(read.shape) == 2))
        elif isinstance(kind, L.Linear) and inverted == inverse:
            total += 2 * _products(batch, (program.dim, program.dim))
    return total


def _program(x: Shape, context: Any, parameters: Any, program: str, inverse: bool, *_: Any, **__: Any) -> int:
    return _program_products(x[0], program, inverse)


def _program_backward(
    grad_y: Shape, grad_logdet: Any, x: Any, saved: Shape, context: Any, parameters: Any, program: str, inverse: bool,
    base: bool, keep: int, context_grad: bool, wanted: str, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Gradients of all activations, of the weights where they are wanted, and the map again where not all was kept."""
    kept = prod(saved) > 0 and keep != KEEP["checkpoint"]
    passes = 1 + ("1" in wanted) + (not kept)
    return passes * _program_products(grad_y[0], program, inverse)


def _none(*_: Any, **__: Any) -> int:
    return 0


def _register(module: ModuleType) -> None:
    formulas: dict[str, Callable[..., int]] = {"flow": _flow, "flow_backward": _flow_backward}
    for op in ("affine_coupling", "pair_nll", "spline_coupling"):
        formulas |= {op: _none, f"{op}_backward": _none}
    module.register_flop_formula(torch.ops.iin_fast.flow_program)(_program)
    module.register_flop_formula(torch.ops.iin_fast.flow_program_backward)(_program_backward)
    for name, formula in formulas.items():
        targets = [getattr(namespace, name) for namespace in (torch.ops.iin_fast, torch.ops.iin_fast_triton)]
        module.register_flop_formula(targets)(formula)


class _AtImport:
    """Registers the formulas once torch's module has been imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        loader: Any = spec.loader
        run = loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module)

        loader.exec_module = run_and_register
        return spec


def register_formulas() -> None:
    """Now, or when torch's flop counter is imported."""
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE])
    else:
        sys.meta_path.insert(0, _AtImport())  # type: ignore[arg-type]
