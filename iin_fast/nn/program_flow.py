"""What the flows that are one program share: stacked parameters, one op each way, the start of ActNorm, density and samples."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import readable, version
from ..flow import ABSENT, FlowProgram, ProgramBuilder, Ref
from ..flow import layers as L
from ..ops.autograd import followed
from ..ops.flow_program import LAYER_BY_LAYER, engine, flow_program, reference
from .actnorm import DataDependentStart, start_values
from .net_steps import NotAProgram
from .row_flow import RowFlow, with_base
from .state_dict_layout import check_permutation

__all__ = ["Orders", "ProgramFlow", "Seen", "Stacked", "draw_linear", "empty", "identity_spline_"]

Stacked = Callable[
    ..., Ref
]  # (name, *index) -> where that part of the stacked parameter lies; ABSENT for one that is not there
Orders = tuple[tuple[int, ...], ...]  # the permutations, one after the other


def empty(*shape: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
    """A parameter that nothing has filled yet."""
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


@torch.no_grad()
def draw_linear(weight: Tensor, bias: Tensor, generator: torch.Generator | None = None) -> None:
    """Fill ``weight [out, in]`` and ``bias [out]`` as torch.nn.Linear draws them."""
    device = generator.device if generator else weight.device
    drawn = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    weight.copy_(nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator))
    bound = weight.shape[1] ** -0.5
    drawn = torch.empty(bias.shape, dtype=bias.dtype, device=device)
    bias.copy_(nn.init.uniform_(drawn, -bound, bound, generator=generator))


@torch.no_grad()
def identity_spline_(bias: Tensor, bins: int, count: int, min_derivative: float) -> None:
    """Fill the bias of a last layer ``[..., features * count]``: equal bins, and slope 1 at every knot."""
    raw = bias.zero_().unflatten(-1, (-1, count))
    raw[..., 2 * bins :] = math.log(math.expm1(1 - min_derivative))


class ProgramFlow(RowFlow, DataDependentStart):
    """A flow whose layers are one :class:`iin_fast.flow.FlowProgram`: a call is one op, whatever the depth.

    The parameters of all layers lie stacked in a few tensors, which the program cuts by offsets. The program is made from
    sizes and permutations, and made anew when the buffer ``permutation`` changes. A compiled call sees what a file or
    ``reset_parameters`` changes, and what is written into the buffer by hand from the next plain call on; on a GPU not what
    is written through ``.data``.

    A subclass sets ``dim`` and ``context_dim``, registers its parameters, and calls ``_finish``. Masks are buffers whose
    name begins with ``mask``. ActNorm, where there is one, is ``loc`` and ``scale [n, dim]``; each is an affine layer of
    the program, and the first one its first layer.
    """

    min_spread: float
    _program: FlowProgram

    # What subclasses define

    def _add_layers(self, builder: ProgramBuilder, stacked: Stacked, orders: Orders) -> None:
        """Append the layers; ``stacked(name, *index)`` is where a part of a parameter lies."""
        raise NotImplementedError

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters and permutations anew, and forget the start of ActNorm."""
        raise NotImplementedError

    def _masks(self) -> dict[str, Tensor]:
        """The buffers that no checkpoint holds, by name."""
        return {}

    def _dropout(self) -> float:
        """The rate of dropout in this call; with one, no program can run."""
        return 0.0

    # The program

    def _register_actnorm(self, n: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Add ``loc`` and ``scale [n, dim]``, or none of it for 0."""
        self._started = ()
        if n:
            self.loc = empty(n, self.dim, device=device, dtype=dtype)
            self.scale = empty(n, self.dim, device=device, dtype=dtype)
            self._register_start((n,), False, device)

    def _finish(self, generator: torch.Generator | None) -> None:
        """To be called once all tensors are registered."""
        self._parameter_names = tuple(name for name, value in self._parameters.items() if value is not None)
        self._mask_names = tuple(name for name in self._buffers if name.startswith("mask"))
        self._orders: Orders | None = None
        self._seen: Seen | None = None  # of the permutations
        self.reset_parameters(generator)
        self._refresh()

    def _tensors(self) -> list[Tensor]:
        """The program's parameters; without nn.Module's __getattr__ where they are plain parameters."""
        parameters, buffers = self._parameters, self._buffers
        try:
            found = [parameters[name] for name in self._parameter_names]
        except KeyError:  # parametrized
            found = [getattr(self, name) for name in self._parameter_names]
        return found + [buffers[name] for name in self._mask_names]  # type: ignore[misc, return-value, operator]

    def _like(self) -> Tensor:
        return self._tensors()[0]

    def _refresh(self) -> None:
        """Make the program of the permutations as they are now."""
        permutation = self._buffers.get("permutation")
        orders: Orders = ()
        seen = None
        if permutation is not None and readable(permutation):
            orders = tuple(map(tuple, permutation.tolist()))
            seen = Seen.of(permutation)
        elif permutation is not None:  # no values yet; a program of the right sizes will do
            orders = (tuple(range(self.dim)),) * permutation.shape[0]
        if orders != self._orders:
            self._build(orders)
            self._orders = orders
        self._seen = seen

    def _build(self, orders: Orders) -> None:
        builder = ProgramBuilder(self.dim, self.context_dim)
        tensors = self._named_tensors()
        for tensor in tensors.values():
            builder.ref(tensor)  # in this order
        self._add_layers(builder, partial(_stacked, builder, tensors), orders)
        self._program = self._of(builder.layers)
        starts = [i for i, layer in enumerate(builder.layers) if isinstance(layer, L.Affine)]
        self._parts = [self._of(builder.layers[a:b]) for a, b in pairwise([*starts, len(builder.layers)])]

    def _named_tensors(self) -> dict[str, Tensor]:
        return dict(zip(self._parameter_names + self._mask_names, self._tensors(), strict=True))

    def program_layers(self, builder: ProgramBuilder) -> None:
        """Append this flow's layers to the program of a larger one."""
        if self._dropout():
            raise NotAProgram(self, "drops values while it trains")
        permutation = self._buffers.get("permutation")
        if permutation is not None and not readable(permutation):
            raise NotAProgram(self, "has a permutation without values")
        self._refresh()
        self._add_layers(builder, partial(_stacked, builder, self._named_tensors()), self._orders or ())

    def _of(self, layers: Sequence[L.Layer]) -> FlowProgram:
        """A program of some layers, with the parameters of all."""
        count = len(self._parameter_names) + len(self._mask_names)
        return FlowProgram(self.dim, self.context_dim, count, tuple(layers))

    def _current(self) -> FlowProgram | None:
        """The program, or None where layers have to run one by one: for dropout, and for permutations that vmap maps."""
        if self._dropout():
            return None
        permutation = self._buffers.get("permutation")
        if permutation is None or torch.compiler.is_compiling():
            return self._program
        if self._seen is None or not self._seen.holds(permutation):
            if torch._C._functorch.is_functorch_wrapped_tensor(permutation):
                return None
            self._refresh()
        return self._program

    def program(self) -> FlowProgram:
        """The flow as data; ``print`` shows it as a table. Its tensors are the parameters, in the order of ``parameters()``, then masks."""
        if not torch.compiler.is_compiling():
            self._refresh()
        return self._program

    # Calls

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Start ActNorm from a batch ``[batch, dim]``, as the first ``forward`` does by itself; layers that have had their
        start keep it. Of several processes, call it with one batch for all before wrapping the module.

        Raises:
            ValueError: NaN or Inf in the batch, or where it has gone through some layers; then nothing has started.
        """
        tensors = self._tensors()
        self._check("x", x, context, tensors[0])
        if x.shape[0] == 0:
            return
        self._current()
        x = x.to(self.loc.dtype) if self._parts else x
        for number, part in enumerate(self._parts):
            if not self._started[number]:
                loc, scale = start_values(f"{type(self).__name__}, ActNorm {number}", x, self.min_spread)
                self.loc[number].copy_(loc)
                self.scale[number].copy_(scale)
            if number + 1 < len(self._parts):
                x, _ = flow_program(x, context, tensors, part)
        if self._parts:
            self._finish_start()

    def _prepared(
        self, name: str, x: Tensor, context: Tensor | None, inverse: bool
    ) -> tuple[list[Tensor], FlowProgram | None]:
        tensors = self._tensors()
        self._check(name, x, context, tensors[0])
        if not inverse and self._awaits_start():
            self.initialize(x, context)
        return tensors, self._current()

    def _layer_by_layer(
        self, x: Tensor, context: Tensor | None, tensors: Sequence[Tensor], inverse: bool, base: bool
    ) -> tuple[Tensor, Tensor]:
        """The program in plain torch, with dropout, and with permutations as the buffer has them."""
        dtype = x.dtype
        x, context, *tensors = map(engine.in_float32, (x, context, *tensors))
        read, maps = partial(reference._parameter, tensors), LAYER_BY_LAYER._replace(dropout=self._dropout())
        places = self._permutations()
        layers = list(zip(self._program.layers, places, strict=True))
        total = x.new_zeros(x.shape[0])
        with torch.autocast(x.device.type, enabled=False):
            for layer, place in reversed(layers) if inverse else layers:
                if place is not None:
                    index = self.permutation[place]  # type: ignore[index]
                    x = x[:, index.argsort() if inverse else index]
                    continue
                x, logdet = reference._layer(layer, x, context, read, maps, inverse)
                total = total + logdet
        return x.to(dtype), with_base(x, total) if base else total

    def _permutations(self) -> list[int | None]:
        """For each layer the row of the buffer ``permutation`` that it reads, if it does."""
        count, places = 0, []
        for layer in self._program.layers:
            drawn = isinstance(layer, L.Permute) and "permutation" in self._buffers
            places.append(count if drawn else None)
            count += drawn
        return places

    # State

    def _register_masks(self, device: torch.device | str | None) -> None:
        for name, mask in self._masks().items():
            self.register_buffer(name, torch.empty(mask.shape, dtype=torch.bool, device=device), persistent=False)

    @torch.no_grad()
    def _fill_masks(self) -> None:
        """As :meth:`_masks` has them; where a file has given the parameters another device, also there."""
        device = self._tensors()[0].device
        for name, mask in self._masks().items():
            if getattr(self, name).device != device:
                setattr(self, name, torch.empty(mask.shape, dtype=torch.bool, device=device))
            getattr(self, name).copy_(mask)

    def _forget_actnorm(self) -> None:
        if self._started:
            self._forget_start()

    def _draw_permutation(self, row: int, generator: torch.Generator | None) -> None:
        source = generator.device if generator else "cpu"
        self.permutation[row].copy_(torch.randperm(self.dim, generator=generator, device=source))  # type: ignore[operator, index]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        permutation = state_dict.get(prefix + "permutation")
        if permutation is not None and "permutation" in self._buffers and readable(permutation):
            check_permutation(prefix + "permutation", permutation)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._fill_masks()
        self._forget_program()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_program()  # a copied tensor counts its writes anew

    def _forget_program(self) -> None:
        """Look at the permutations again now, since a compiled call does not, or where they are none yet, at the next call."""
        self._seen = None
        with suppress(ValueError):
            self._refresh()


def _stacked(builder: ProgramBuilder, tensors: Mapping[str, Tensor], name: str, *index: int) -> Ref:
    """Where the part ``index`` of a stacked parameter lies; ABSENT for one that is not there."""
    tensor = tensors.get(name)
    if tensor is None:
        return ABSENT
    shape = tensor.shape
    return builder.ref(tensor, sum(i * math.prod(shape[axis + 1 :]) for axis, i in enumerate(index)))


class Seen(NamedTuple):
    """A tensor as it was when its values went into a program."""

    tensor: Tensor
    version: int
    values: (
        Tensor | None
    )  # on the CPU, where a look at them does not wait: writes through .data and numpy count nowhere

    @staticmethod
    def of(tensor: Tensor) -> "Seen":
        return Seen(tensor, version(tensor), tensor.detach().clone() if readable(tensor) and tensor.is_cpu else None)

    def holds(self, tensor: Tensor | None) -> bool:
        """Whether ``tensor`` is that one, with the same values."""
        if tensor is not self.tensor or not 0 <= self.version == version(tensor):
            return False
        return self.values is None or followed() or torch.equal(tensor, self.values)
