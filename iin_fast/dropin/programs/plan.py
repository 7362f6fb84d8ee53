"""Plans: which layers of a model run as programs, made once and kept until the model changes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from ...backends import chosen_compiled
from ...flow import ABSENT, FlowProgram, ProgramBuilder, Ref, Weights
from ...flow import layers as L
from ...ops.autograd import followed
from ...ops.flow_program import engine
from ...ops.flow_program.checks import KEEP, check_data, check_parameters
from ...ops.flow_program.walk import runs
from ...ops.types import FULL
from ..class_factory import original
from ..registry import qualified, unknown_functions
from .watch import GLOBAL_HOOKS, PLAIN, NoPlace, Unsupported, Watch

__all__ = ["Atom", "KEPT", "Maker", "Programs", "Summary", "hopeless", "kept", "run", "summary"]

CHEAP = (L.Affine, L.Permute, L.Activation)  # alone, an op costs more than torch's own few kernels

Atom = tuple[nn.Module, bool]  # a layer of the library, and whether its inverse stands in the forward direction


@dataclass(frozen=True)
class Programs:
    """How the modules of one library become programs.

    Args:
        flatten: the layers of a root in the order of its forward direction.
        layer: adds one layer of the library to a program, or raises ``Unsupported``.
        sizes: number of features and of the context that a root expects, as far as its layers tell.
        base: layers between a standard normal and what a root takes for its latent, where that is part of the base.
        step: runs a layer that is no part of a program: (layer, x, context, inverse) to the mapped x and its log-det.
        functions: for each class that a program stands for, the functions that say what it computes; a version of their
            source that is not known makes no program.
        copy: what stands before these names in a library that holds a copy of this one.
    """

    flatten: Callable[["Maker", nn.Module], Iterator[Atom]]
    layer: Callable[["Maker", nn.Module], None]
    sizes: Callable[[nn.Module], tuple[int, int]]
    step: Callable[[nn.Module, Tensor, Tensor | None, bool], tuple[Tensor, Tensor]]
    functions: Mapping[str, tuple[str, ...]]
    base: Callable[["Maker", nn.Module], Iterator[Atom]] | None = None
    copy: str = ""

    def name(self, cls: Any) -> str:
        """The name of a class, or of the one that it is a copy of."""
        return qualified(cls).removeprefix(self.copy)

    def named(self, cls: Any, functions: tuple[str, ...]) -> tuple[str, ...]:
        """The names of functions beside a class."""
        copied = self.copy and qualified(cls).startswith(self.copy)
        return tuple(self.copy + name if copied and "." in name else name for name in functions)


class Maker(ProgramBuilder):
    """A builder that notes where the tensors come from, and all that was read of the model."""

    def __init__(self, programs: Programs, watch: Watch, dim: int, context: int, dtype: torch.dtype) -> None:
        super().__init__(dim, context)
        self.programs, self.watch, self.dtype = programs, watch, dtype
        self.spaces: list[Any] = []  # tensor i is spaces[i][names[i]]
        self.names: list[str] = []
        self._constants: dict[str, Tensor] = {}
        self.computed: list[
            tuple[int, Callable[[Tensor], Tensor]]
        ] = []  # which tensors are made of those that are read

    def twin(self) -> "Maker":
        """An empty one for the same model."""
        return Maker(self.programs, self.watch, self.dim, self.context, self.dtype)

    def take(self, module: nn.Module) -> str:
        """The library's class of a module whose call the program stands for.

        Raises:
            Unsupported: it is of another class or version, was changed, or has hooks.
        """
        cls: Any = original(type(module)) or type(module)
        name = self.programs.name(cls)
        self.watch.module(module)
        functions = self.programs.functions.get(name)
        if functions is None:
            base = next((b for b in cls.__mro__[1:] if self.programs.name(b) in self.programs.functions), None)
            raise NoPlace(
                f"{cls.__name__} has no place in a program" if base is None else f"a subclass of {base.__name__}"
            )
        own = next((f for f in functions if f in vars(module)), None)
        if own is not None:
            raise Unsupported(f"the instance has its own {own}")
        self.expect_source(name, cls)
        return name

    def expect_source(self, name: str, cls: Any) -> None:
        """Refuse a class whose source is not known."""
        reason = unknown_functions(name, cls, self.programs.named(cls, self.programs.functions[name]))
        if reason is not None:
            raise Unsupported(f"{cls.__name__}: {reason}")

    def take_torch(self, module: nn.Module, cls: type[nn.Module]) -> None:
        """A module of torch whose call the program stands for: exactly of a class, and nothing changed on it."""
        self.watch.module(module)
        if type(module) is not cls:
            raise Unsupported(f"a {type(module).__name__}, expected {cls.__name__}")
        if "forward" in vars(module):
            raise Unsupported(f"a {cls.__name__} with its own forward")

    def get(self, module: nn.Module, name: str) -> Any:
        """An attribute or child."""
        return self.watch.get(module, name)

    def number(self, module: nn.Module, name: str) -> float:
        """An attribute that is a number."""
        value = self.get(module, name)
        if not isinstance(value, int | float):
            raise Unsupported(f"{name} is a {type(value).__name__}")
        return value

    def parameter(self, module: nn.Module, name: str, offset: int = 0) -> Ref:
        """A parameter or buffer from an element on, read where it is at every call; None is absent."""
        for kind in ("_parameters", "_buffers"):
            space = vars(module)[kind]
            if name in space:
                ref = self._place(space, name)
                self.watch.parameters(space)
                return ref._replace(offset=offset) if offset else ref
        raise Unsupported(f"{name} is no parameter")

    def _place(self, space: Any, name: str) -> Ref:
        tensor = space[name]
        if tensor is None:
            self.watch.read(space, name)
            return ABSENT
        if type(tensor) not in PLAIN:
            raise Unsupported(f"{name} is a {type(tensor).__name__}")
        ref = self.ref(tensor)
        if ref.tensor == len(self.names):
            self.spaces.append(space)
            self.names.append(name)
        else:  # a tensor with two names: the second must stay what it is, too
            self.watch.read(space, name)
        return ref

    def constant(self, value: Tensor) -> Ref:
        """A tensor made from buffers, whose values the watch looks after."""
        name = str(len(self._constants))
        self._constants[name] = value.detach().to(self.dtype).contiguous()
        return self._place(self._constants, name)

    def computed_from(self, module: nn.Module, name: str, function: Callable[[Tensor], Tensor]) -> Ref:
        """What a function of torch makes of a parameter or buffer, at every call."""
        space: Any = next(s for s in (vars(module)["_parameters"], vars(module)["_buffers"]) if name in s)
        self.watch.parameters(space)
        self.spaces.append(space)
        self.names.append(name)
        self.tensors.append(space[name])
        self.computed.append((len(self.tensors) - 1, function))
        return Ref(len(self.tensors) - 1)

    def fixed(self, matrix: Tensor) -> Weights:
        """A linear layer that nobody trains."""
        return Weights(matrix.shape[0], self.constant(matrix))

    def dense(self, module: nn.Module, mask: str | None = None) -> Weights:
        """A linear layer, under the mask of this name."""
        weight: Any = module._parameters.get("weight")
        if weight is None or weight.dim() != 2:
            raise Unsupported("a linear layer without weight")
        place = ABSENT if mask is None else self.parameter(module, mask)
        return Weights(weight.shape[0], self.parameter(module, "weight"), self.parameter(module, "bias"), place)

    def append(self, atom: Atom) -> None:
        """A layer of the library, or its inverse."""
        module, inverse = atom
        if inverse:
            self.invert(lambda: self.programs.layer(self, module))
        else:
            self.programs.layer(self, module)

    def invert(self, make: Callable[[], None]) -> None:
        """The inverse of the layers that ``make`` adds."""
        start = len(self.layers)
        make()
        made = self.layers[start:]
        del self.layers[start:]
        for layer in reversed(made):
            self.add(layer, inverse=True)

    def piece(self) -> "Piece":
        """What runs.

        Raises:
            TypeError, ValueError: it does not fit together.
            Unsupported: the device of its parameters can't run it.
        """
        made = Piece(self.build(), self.spaces, self.names, self.tensors, self.dtype, self.computed)
        if not made.has_room():
            raise Unsupported("too large for a block of this GPU")
        return made

    @property
    def worth(self) -> bool:
        """Whether it has more than one cheap layer."""
        return len(self.layers) > 1 or any(
            not isinstance(layer.layer if isinstance(layer, L.Inverse) else layer, CHEAP) for layer in self.layers
        )


class Piece:
    """A program and where its tensors lie."""

    def __init__(
        self,
        program: FlowProgram,
        spaces: list[Any],
        names: list[str],
        tensors: list[Tensor],
        dtype: torch.dtype,
        computed: list[tuple[int, Callable[[Tensor], Tensor]]],
    ) -> None:
        self.program, self.spaces, self.names, self.dtype, self.computed = program, spaces, names, dtype, computed
        offsets = [read.ref for reads in program.reads for read in reads if read.ref.offset]
        self.shared = {ref.tensor for ref in offsets}
        self.shapes = [tensor.shape for tensor in tensors]
        self.tensors: list[Any] = []
        self.moved = False  # a parameter may be another object than before
        self._check(tensors)

    def _check(self, tensors: list[Any]) -> None:
        if any(type(tensor) not in PLAIN for tensor in tensors):
            raise TypeError("a parameter is no plain tensor")
        if [tensor.shape for tensor in tensors] != self.shapes:
            raise ValueError("a parameter has another shape than before")
        device = tensors[0].device if tensors else None
        check_parameters(torch.empty(0, self.program.dim, dtype=self.dtype, device=device), tensors, self.program)
        for layer, reads in zip(self.program.layers, self.program.reads, strict=True):
            for read in reads:  # the op reads as many elements as it needs; a library's layer wants its very shape
                shape = tuple(tensors[read.ref.tensor].shape)
                if read.ref.tensor in self.shared:  # several parts of one tensor, whose shape its maker has seen
                    continue
                if shape != read.shape and (len(read.shape) > 1 or math.prod(shape) != read.shape[0]):
                    raise ValueError(
                        f"{L.kind(layer)}: {read.name} has shape {list(shape)}, expected {list(read.shape)}"
                    )
        check_data(self._compute(tensors), self.program)
        self.tensors = tensors

    def has_room(self) -> bool:
        """Whether the device of the parameters runs it, forward and, where a parameter learns, back."""
        x = self.tensors[0].new_empty(0, self.program.dim, dtype=self.dtype) if self.tensors else torch.empty(0)
        with torch.enable_grad():
            return runs(x, None, self.tensors, self.program, False)

    def _compute(self, tensors: list[Any]) -> list[Any]:
        if self.computed:
            tensors = tensors.copy()
            for place, function in self.computed:
                tensors[place] = function(tensors[place])
        return tensors

    def run(self, x: Tensor, context: Tensor | None, inverse: bool, base: bool) -> tuple[Tensor, Tensor] | None:
        """None: the parameters are not what they were, so the library's own code has to run.

        Raises:
            KeyError: a parameter is gone.
        """
        try:
            if self.moved:
                tensors = list(map(getitem, self.spaces, self.names))
                if _differ(tensors, self.tensors):
                    self._check(tensors)
                self.tensors, self.moved = tensors, False
            tensors = self._compute(self.tensors)
            context = context if self.program.context else None
            if not runs(x, context, tensors, self.program, inverse):
                return None
            return engine.call(x, context, tensors, self.program, inverse, base, KEEP["auto"])
        except (TypeError, ValueError, RuntimeError):
            return None


def _differ(now: list[Any], then: list[Any]) -> bool:
    """Lists of the same objects compare equal in no time; those that differ are tensors, whose comparison is no bool."""
    try:
        return now != then
    except Exception:
        return True


class Plan:
    """How a root runs on one kind of input: pieces, and layers of the library between them."""

    def __init__(self, programs: Programs, watch: Watch, parts: Sequence["Piece | Atom"], based: bool = True) -> None:
        self.watch, self.step, self.based = watch, programs.step, based
        self.parts = tuple(parts) if any(isinstance(part, Piece) for part in parts) else ()

    def run(self, x: Tensor, context: Tensor | None, inverse: bool, base: bool) -> tuple[Tensor, Tensor, bool] | None:
        """The mapped x, its log-det, and whether that has the log-density of the base; None: run the library's own code."""
        base = base and self.based
        if self.watch.moved():
            for part in self.parts:
                if isinstance(part, Piece):
                    part.moved = True
        if len(self.parts) == 1:
            found = self.parts[0].run(x, context, inverse, base)  # type: ignore[union-attr]
            return None if found is None else (*found, base)
        total: Any = 0.0
        with_base = False
        for number, part in enumerate(reversed(self.parts) if inverse else self.parts, 1):
            if isinstance(part, Piece):
                with_base = base and number == len(self.parts)
                found = part.run(x, context, inverse, with_base)
                if found is None:
                    return None
            else:
                found = self.step(part[0], x, context, part[1] != inverse)
            x, logdet = found
            total = total + logdet
        return (x, total, with_base) if self.parts else None


class Cut(NamedTuple):
    """A layer that is no part of a program, and why."""

    module: nn.Module
    why: str
    forever: bool  # whatever the settings of the model


def _make(
    programs: Programs, root: nn.Module, dim: int, context: int, dtype: torch.dtype, base: bool = False
) -> tuple[Plan, list[nn.Module], list[Cut]]:
    watch = Watch()
    maker = Maker(programs, watch, dim, context, dtype)
    parts: list[Piece | Atom] = []
    inside: list[nn.Module] = []
    cuts: list[Cut] = []
    held: list[Atom] = []  # what the piece in the making stands for

    def close() -> None:
        nonlocal maker, held
        why = "alone it gains nothing"
        try:
            piece = maker.piece() if maker.worth else None
        except Unsupported as error:  # its layers have room one by one, not together
            piece, why = None, str(error)
        if piece is None:
            parts.extend(held)
            cuts.extend(Cut(module, why, not maker.worth) for module, _ in held)
        else:
            parts.append(piece)
            inside.extend(module for module, _ in held)
        maker, held = maker.twin(), []

    bases: list[Atom] = []
    try:
        atoms = list(programs.flatten(maker, root))
        if base and programs.base is not None:
            bases = list(programs.base(maker, root))
            atoms = [*bases, *atoms]
    except Unsupported as error:
        return Plan(programs, watch, []), [], [Cut(root, str(error), False)]
    for atom in atoms:
        try:
            trial = maker.twin()
            trial.append(atom)
            trial.piece()
        except (Unsupported, TypeError, ValueError) as error:
            close()
            parts.append(atom)
            cuts.append(Cut(atom[0], str(error), isinstance(error, NoPlace)))
        else:
            maker.append(atom)
            held.append(atom)
    close()
    based = not bases or (bool(parts) and isinstance(parts[0], Piece))
    if not based:  # the base alone is the library's business
        parts = [part for part in parts if isinstance(part, Piece) or part not in bases]
    return Plan(programs, watch, parts, based), inside, cuts


KEPT = "_iin_fast"


class Kept:
    """What was found out about a root, which holds it itself: a plan may hold its root, and so both are freed together."""

    def __init__(self, root: nn.Module) -> None:
        self.root = ref(root)
        self.plans: dict[Any, Plan] = {}
        self.base: Any = None  # a watch, and what a library found out about the base

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the root, or its pickle, starts anew."""
        return dict, ()


def kept(root: nn.Module) -> Kept:
    """That of this very root, and not of one whose attributes it took."""
    found = vars(root).get(KEPT)
    if type(found) is not Kept or found.root() is not root:
        found = vars(root)[KEPT] = Kept(root)
    return found


def _kind(x: Any, context: Any) -> tuple[int, int, torch.dtype, torch.device | None] | None:
    """Features, context, type and GPU of an input that programs take; what they don't, the library's own code takes or refuses."""
    if followed() or type(x) not in PLAIN:
        return None
    shape, dtype, device, wide = x.shape, x.dtype, None if x.is_cpu else x.device, 0
    if len(shape) != 2 or shape[0] == 0 or dtype not in FULL:
        return None
    if context is not None:
        if type(context) not in PLAIN or context.dtype is not dtype:
            return None
        if not context.is_cpu if device is None else context.device != device:
            return None
        given = context.shape
        if len(given) != 2 or given[0] != shape[0] or given[1] == 0:
            return None
        wide = given[1]
    if any(GLOBAL_HOOKS) or not chosen_compiled("flow_program", x):
        return None
    return shape[1], wide, dtype, device


def run(
    programs: Programs, root: nn.Module, x: Any, context: Any, inverse: bool, base: bool = False
) -> tuple[Tensor, Tensor, bool] | None:
    """A root on ``x [batch, dim]`` and ``context [batch, context]`` through its programs.

    Returns:
        The mapped ``[batch, dim]``, the log-det ``[batch]``, and whether that has the log-density of a standard normal at the
        mapped; or None where the library's own code has to run.
    """
    kind = _kind(x, context)
    if kind is None:
        return None
    key = *kind, base and programs.base is not None
    plans = kept(root).plans
    plan = plans.get(key)
    if plan is not None and plan.watch.same():
        if not plan.parts:
            return None
        try:
            return plan.run(x, context, inverse, base)
        except KeyError:  # a parameter is gone, as where a parametrization computes it
            pass
    with torch.device(x.device):  # that of the constants which a program has beside the parameters
        plan = plans[key] = _make(programs, root, *kind[:3], key[-1])[0]
    return plan.run(x, context, inverse, base) if plan.parts else None


def hopeless(root: nn.Module) -> bool:
    """Whether a root has been called, has no programs, and is what it was."""
    plans = kept(root).plans
    return len(plans) > 0 and all(not plan.parts and plan.watch.same() for plan in plans.values())


class Summary(NamedTuple):
    """How much of a root runs in programs, and what does not."""

    inside: list[nn.Module]
    cuts: list[Cut]
    layers: tuple[int, int]  # in programs, all
    parameters: tuple[int, int]

    def __str__(self) -> str:
        (some, layers), (few, parameters) = self.layers, self.parameters
        text = (
            f"{some} of {layers} layers run in programs, with {few:,} of {parameters:,} parameters, at every batch size"
        )
        names = {f"{type(module).__name__} ({why})": None for module, why, _ in self.cuts}
        return text + "".join(f"; cut by {name}" for name in names)


def summary(programs: Programs, root: nn.Module) -> Summary:
    """What a call of a root with the sizes that its layers tell will do."""
    first = next((p for p in root.parameters() if p.is_floating_point()), torch.empty(0))
    dtype, device = first.dtype, first.device
    try:
        if device.type not in ("cpu", "cuda") or dtype not in FULL:
            raise Unsupported(
                f"programs run on the CPU and on NVIDIA GPUs in float32 and float64; this is {dtype} on {device.type}"
            )
        if not chosen_compiled("flow_program", first):
            raise Unsupported(f"the compiled library does not run on {device.type} here")
        with torch.device(device):
            _, inside, cuts = _make(programs, root, *programs.sizes(root), dtype)
    except (AttributeError, KeyError, Unsupported) as error:  # a module that was never started
        inside, cuts = [], [Cut(root, str(error), False)]

    def count(modules: Sequence[nn.Module]) -> int:
        return sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())

    layers = len(inside), len(inside) + len(cuts)
    return Summary(inside, cuts, layers, (count(inside), count([root])))
