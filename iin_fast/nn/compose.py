"""A stack of layers as one flow, and as one program where every layer has a place in one."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import HOOKS, checked_int
from ..flow import FlowProgram, ProgramBuilder
from ..ops.types import accumulator_type
from .actnorm import DataDependentStart
from .net_steps import NotAProgram, own
from .program_flow import Seen
from .row_flow import RowFlow, with_base
from .state_dict_layout import is_sharded

__all__ = ["Compose"]

# What a program stands for; a layer may have its own.
METHODS = frozenset("forward inverse program_layers program_steps _run _couple _transformer _map _wanted".split())

# What a program takes from a module beside its tensors.
OPTIONS = (
    "alpha",
    "approximate",
    "clamp",
    "dropout",
    "min_diagonal",
    "negative_slope",
    "options",
    "p",
    "squash",
    "swap",
)


class _Part(NamedTuple):
    """A module of the stack as it was when the program was made."""

    module: nn.Module
    kind: type
    attributes: dict[str, Any]  # the module's own
    children: tuple[nn.Module, ...]
    own: frozenset[str]  # methods of the module itself, not of its class
    absent: tuple[str, ...]  # parameters that are None
    options: tuple[tuple[str, Any], ...]
    training: bool | None  # None: it does not matter

    def holds(self) -> bool:
        d = self.attributes
        return (
            self.module.__class__ is self.kind
            and METHODS & d.keys() == self.own
            and tuple(d["_modules"].values()) == self.children
            and not (d["_forward_pre_hooks"] or d["_forward_hooks"] or d["_backward_pre_hooks"] or d["_backward_hooks"])
            and (self.training is None or d["training"] is self.training)
            and all(d["_parameters"].get(name) is None for name in self.absent)
            and all(d.get(name) == value for name, value in self.options)
        )


class _Plan(NamedTuple):
    program: FlowProgram | None
    obstacle: str | None  # why there is no program
    tensors: tuple[tuple[dict[str, Any], str], ...]  # for each tensor the dictionary of its module, and its name there
    layers: nn.ModuleList
    parts: tuple[_Part, ...]
    permutations: tuple[tuple[dict[str, Any], Seen], ...]  # what the program was made of
    starts: tuple[DataDependentStart, ...]

    def holds(self, layers: nn.Module | None) -> bool:
        return (
            layers is self.layers
            and all(part.holds() for part in self.parts)
            and all(read.holds(buffers.get("permutation")) for buffers, read in self.permutations)
        )


class Compose(RowFlow, nn.Module):
    """Layers one after the other, as one flow with the density of data.

    y = f_n(… f_2(f_1(x))),  log|det| = sum of log|det f_i|.

    A stack of this package's layers runs as one op: :class:`ActNorm`, :class:`LULinear`, :class:`Permutation`,
    :class:`AffineCoupling` and :class:`SplineCoupling`, whole flows like :class:`NeuralSplineFlow`, and other stacks. The
    conditioners are :class:`ResidualNet`, ``torch.nn.Linear``, or ``torch.nn.Sequential`` of linear layers and
    activations. Any other layer makes the stack run layer by layer, and so do hooks of its parts, dropout while it trains,
    and torch.compile; :meth:`obstacle` says what it is. The results are the same. Parameters stay those of the layers.

    A layer of your own is a module with ``forward`` and ``inverse`` that return (y, log|det|), as those of this package; it
    gets the context if its ``forward`` has an argument ``context``.

    Args:
        layers: the first one sees the data.
        context_dim: number of features of the context, which every coupling gets; 0: none.

    Raises:
        TypeError: a layer without ``inverse``, a context_dim that is no integer.
        ValueError: no layers, or layers of different numbers of features.

    Example:
        >>> from iin_fast.nn import ActNorm, AffineCoupling, ResidualNet
        >>> layers = []
        >>> for swap in (False, True):
        ...     layers += [ActNorm(4), AffineCoupling(4, ResidualNet(2, 4, 16), swap=swap)]
        >>> flow = Compose(layers)
        >>> x = torch.randn(50, 4)
        >>> z, logdet = flow(x)
        >>> torch.allclose(flow.inverse(z)[0], x, atol=1e-5), flow.log_prob(x).shape
        (True, torch.Size([50]))
        >>> flow.obstacle() is None
        True
    """

    def __init__(self, layers: Iterable[nn.Module], context_dim: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.context_dim = checked_int("Compose", "context_dim", context_dim, least=0)
        dims = {}
        for number, layer in enumerate(self.layers):
            if not callable(getattr(layer, "inverse", None)):
                raise TypeError(
                    f"Compose: layers[{number}] is a {type(layer).__name__}, expected a module with forward and inverse"
                )
            if isinstance(getattr(layer, "dim", None), int):
                dims[number] = layer.dim
        if not dims:
            raise ValueError("Compose: layers holds none with a number of features (dim), expected at least one")
        self.dim: int = next(iter(dims.values()))  # type: ignore[assignment]
        for number, dim in dims.items():
            if dim != self.dim:
                raise ValueError(f"Compose: layers[{number}] has dim {dim}, expected {self.dim} like the ones before")
        self._plan: _Plan | None = None
        self._takes_context: dict[type, bool] = {}  # of each kind of layer
        self._look_at_layers()

    def extra_repr(self) -> str:
        obstacle = self.obstacle()
        return "one program" if obstacle is None else f"layer by layer: {obstacle}"

    def obstacle(self) -> str | None:
        """Why the stack runs layer by layer, and None where it runs as one program."""
        return self._planned().obstacle

    def program(self) -> FlowProgram | None:
        """The stack as data; None where it runs layer by layer."""
        return self._planned().program

    def program_layers(self, builder: ProgramBuilder) -> None:
        """Append the layers to the program of a larger stack."""
        if self.context_dim not in (0, builder.context):
            raise NotAProgram(self, f"has a context of {self.context_dim} features, not {builder.context}")
        if builder.context and not self.context_dim:
            raise NotAProgram(self, "takes no context")
        for layer in self.layers:
            maps = not hasattr(layer, "_transformer") or own(layer, "_transformer", "_map", "_wanted")
            if not (maps and own(layer, "program_layers", "forward", "inverse", "_run", "_couple")):
                raise NotAProgram(layer, f"is a {type(layer).__name__}, which has no place in a program")
            layer.program_layers(builder)  # type: ignore[operator]

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Start every ActNorm that has had no start from a batch ``[batch, dim]``, as the first ``forward`` does by itself.
        Of several processes, call it with one batch for all before wrapping the module."""
        self._check("x", x, context, self._like(x))
        if x.shape[0]:
            self._layer_by_layer(x, context, (), False, False)

    def _prepared(
        self, name: str, x: Tensor, context: Tensor | None, inverse: bool
    ) -> tuple[list[Tensor], FlowProgram | None]:
        self._check(name, x, context, self._like(x))
        if torch.compiler.is_compiling():
            return [], None
        plan = self._planned()
        if not inverse and plan.program and not all(all(start._started) for start in plan.starts):
            self.initialize(x, context)  # layer by layer
        tensors = self._tensors(plan)
        narrow = x.device.type == "cpu" and x.dtype.itemsize == 2 and not torch.is_autocast_enabled("cpu")
        if tensors is None or narrow:  # the op has no 16-bit types on the CPU, the layers have
            return [], None
        return tensors, plan.program

    def _layer_by_layer(
        self, x: Tensor, context: Tensor | None, tensors: Sequence[Tensor], inverse: bool, base: bool
    ) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0], dtype=accumulator_type(x.dtype))
        for layer in reversed(self.layers) if inverse else self.layers:
            run: Any = layer.inverse if inverse else layer
            x, logdet = run(x, context) if context is not None and self._takes_context.get(type(layer)) else run(x)
            total = total + logdet
        return x, with_base(x, total) if base else total

    def _like(self, x: Tensor | None = None) -> Tensor:
        """The first parameter; a stack without any has the type of its input."""
        found = next(self.parameters(), None)
        if found is not None:
            return found
        return torch.empty(0, device=next((b.device for b in self.buffers()), None)) if x is None else x

    # The plan

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plan": None}  # it refers to this stack's modules

    def _planned(self) -> _Plan:
        if self._plan is None or not self._plan.holds(self._modules["layers"]):
            self._plan = self._make_plan()
        return self._plan

    def _tensors(self, plan: _Plan) -> list[Tensor] | None:
        """The program's tensors as the modules hold them now; None where no program can run on them."""
        if plan.program is None:
            return None
        if any(torch._C._functorch.is_functorch_wrapped_tensor(read.tensor) for _, read in plan.permutations):
            return None
        found: list[Any] = [home.get(name) for home, name in plan.tensors]
        if any(tensor is None or is_sharded(tensor) for tensor in found):
            return None  # parametrized since
        return found

    def _look_at_layers(self) -> None:
        for layer in self.layers:
            kind = type(layer)
            if kind not in self._takes_context:
                self._takes_context[kind] = "context" in inspect.signature(kind.forward).parameters

    def _make_plan(self) -> _Plan:
        self._look_at_layers()
        builder = ProgramBuilder(self.dim, self.context_dim)
        program, obstacle, places = None, None, []
        modules = [module for module in self.modules() if module is not self]
        try:
            hooked = next((m for m in modules if any(vars(m)[name] for name in HOOKS)), None)
            if hooked is not None:
                raise NotAProgram(hooked, "has hooks")
            self.program_layers(builder)
            program = builder.build()
            places = self._places(builder)
        except NotAProgram as found:
            program, obstacle = None, f"{self._name(found.module)} {found.why}"
        except ValueError as error:
            program, obstacle = None, str(error)
        dropped = any(getattr(m, "dropout", 0) or isinstance(m, nn.Dropout) for m in modules)
        parts = tuple(
            _Part(
                module,
                module.__class__,
                vars(module),
                tuple(vars(module)["_modules"].values()),
                METHODS & vars(module).keys(),
                tuple(name for name, value in vars(module)["_parameters"].items() if value is None),
                tuple((name, _copied(vars(module)[name])) for name in OPTIONS if program and name in vars(module)),
                module.training if dropped else None,
            )
            for module in modules
        )
        held = [vars(module)["_buffers"] for module in modules]
        permutations = tuple((b, Seen.of(b["permutation"])) for b in held if "permutation" in b)
        starts = tuple(m for m in modules if isinstance(m, DataDependentStart))
        return _Plan(program, obstacle, tuple(places), self.layers, parts, permutations, starts)

    def _places(self, builder: ProgramBuilder) -> list[tuple[dict[str, Any], str]]:
        """Where the modules hold the program's tensors."""
        homes = {
            id(tensor): (home, name)
            for module in self.modules()
            for home in (vars(module)["_parameters"], vars(module)["_buffers"])
            for name, tensor in home.items()
        }
        if any(id(tensor) not in homes for tensor in builder.tensors):
            raise NotAProgram(self, "has a parametrized layer")
        return [homes[id(tensor)] for tensor in builder.tensors]

    def _name(self, wanted: nn.Module) -> str:
        name = next((name for name, module in self.named_modules() if module is wanted), "")
        return name or "the stack"


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value
