"""Flop formulas of the ops, for ``torch.utils.flop_counter.FlopCounterMode``.

Only matrix products count, as with the operations of torch: flows have some, the other ops have none. torch's module
imports Triton, which ``import iin_fast`` must not, so the formulas are registered when it is imported by someone else.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ..backends import ops
from .registry import OPS

__all__ = ["register_formulas"]

_MODULE = "torch.utils.flop_counter"


def _register(module: ModuleType) -> None:
    for op in OPS.values():
        for name, formula in ((op.name, op.flops), (f"{op.name}_backward", op.flops_backward)):
            targets = [getattr(ops(backend), name) for backend in op.backends]
            for target in targets:
                module.flop_registry.pop(target, None)  # of this package's earlier import
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
