"""What a plan has read from a model, so that a change of the model is seen before the plan runs again."""

from collections.abc import Iterator
from operator import attrgetter, getitem
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from ...checks import HOOKS

__all__ = ["GLOBAL_HOOKS", "HOOKS", "PLAIN", "NoPlace", "Unsupported", "Watch"]

PLAIN = (Tensor, nn.Parameter)
VERSION = attrgetter("_version")
GLOBAL_HOOKS: list[Any] = [getattr(torch_module, f"_global{name}") for name in HOOKS]


class Unsupported(Exception):
    """Why a layer is no part of a program."""


class NoPlace(Unsupported):
    """It is of a class that no program knows, which no setting changes."""


class Watch:
    """Everything that was read, and what it was.

    All comparisons run in C over lists, as they are made at every call of a model with hundreds of modules.
    """

    def __init__(self) -> None:
        # attributes, buffers and absent parameters: spaces[i][names[i]] is values[i]
        self._spaces: list[Any] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._seen: set[tuple[int, str]] = set()
        self._held: list[Any] = []  # dictionaries to which nothing may be added, such as those of modules
        self._sizes: list[int] = []
        self._children: list[Any] = []  # dictionaries of children, and what they held
        self._children_then: list[Any] = []
        self._parameters: list[Any] = []  # dictionaries of parameters, and what they held; None: always read
        self._parameters_then: list[Any] | None = []
        self._hooks: list[Any] = []  # must be empty
        self._hooked: list[Any] = []  # of layers that hooks keep out of a program
        self._hooks_then: list[int] = []
        self._last_handle = RemovableHandle.next_id
        self._buffers: list[Tensor] = []  # whose values were read
        self._versions: list[int] = []
        self._false: list[Tensor] = []  # flags that are not set yet

    def read(self, space: Any, name: str) -> Any:
        """The entry of a dictionary."""
        value = space[name]
        if (id(space), name) not in self._seen:
            self._seen.add((id(space), name))
            self._spaces.append(space)
            self._names.append(name)
            self._values.append(value)
        return value

    def size(self, space: Any) -> None:
        """Nothing may be added to a dictionary, or leave it."""
        if (id(space), "") not in self._seen:
            self._seen.add((id(space), ""))
            self._held.append(space)
            self._sizes.append(len(space))

    def module(self, module: nn.Module) -> None:
        """A module whose call the program stands for: it must have no hooks, and no new attributes.

        Raises:
            Unsupported: it has hooks, or is no module.
        """
        if not isinstance(module, nn.Module):
            raise Unsupported(f"a {type(module).__name__}, expected a module")
        if (id(vars(module)), "") in self._seen:
            return
        self.size(vars(module))
        hooks = [vars(module)[name] for name in HOOKS]
        if any(hooks):
            self._seen.discard((id(vars(module)), ""))
            self._hooked += hooks
            self._hooks_then += map(len, hooks)
            raise Unsupported(f"a hook on its {type(module).__name__}")
        self._hooks += hooks

    def get(self, module: nn.Module, name: str) -> Any:
        """An attribute, parameter, buffer or child of a module.

        Raises:
            Unsupported: there is none of that name.
        """
        own = vars(module)
        for space in (own, own["_parameters"], own["_buffers"]):
            if name in space:
                return self.read(space, name)
        if name not in own["_modules"]:
            raise Unsupported(f"no attribute {name}")
        return self._hold(own["_modules"])[name]

    def children(self, module: nn.Module) -> Iterator[Any]:
        """The children of a container."""
        yield from tuple(self._hold(vars(module)["_modules"]).values())

    def _hold(self, space: Any) -> Any:
        """A dictionary of children must stay what it is."""
        if (id(space), "") not in self._seen:
            self._seen.add((id(space), ""))
            self._children.append(space)
            self._children_then.append(dict(space))
        return space

    def parameters(self, space: Any) -> None:
        """A dictionary whose parameters :meth:`moved` looks after."""
        if (id(space), "") in self._seen:
            return
        self._seen.add((id(space), ""))
        self._parameters.append(space)
        if any(type(value) not in PLAIN or value.numel() == 1 for value in space.values() if value is not None):
            self._parameters_then = None  # two of these may compare equal
        elif self._parameters_then is not None:
            self._parameters_then.append(dict(space))

    def moved(self) -> bool:
        """Whether a parameter is another object than before."""
        try:
            if self._parameters == self._parameters_then:
                return False
        except Exception:  # the comparison of two tensors is no bool
            pass
        if self._parameters_then is not None:
            self._parameters_then = list(map(dict, self._parameters))
        return True

    def values(self, module: nn.Module, name: str) -> Tensor:
        """A buffer, or a parameter that nobody trains, whose values become part of the program."""
        value: Any = self.get(module, name)
        if (
            not isinstance(value, Tensor)
            or value.requires_grad
            or value.is_inference()
            or value.is_meta
            or is_fake(value)
        ):
            raise Unsupported(f"{name} is not a plain buffer")
        if name not in vars(module)["_buffers"] and name not in vars(module)["_parameters"]:
            raise Unsupported(f"{name} is not a plain buffer")
        if not any(known is value for known in self._buffers):
            self._buffers.append(value)
            self._versions.append(value._version)
        return value

    def until(self, flag: Tensor) -> None:
        """A flag must not be set."""
        self._false.append(flag)

    def same(self) -> bool:
        """Whether nothing has changed."""
        if self._last_handle != RemovableHandle.next_id:  # a hook was registered somewhere
            if any(self._hooks):
                return False
            self._last_handle = RemovableHandle.next_id
        try:
            return (
                self._children == self._children_then
                and list(map(getitem, self._spaces, self._names)) == self._values
                and list(map(len, self._held)) == self._sizes
                and list(map(VERSION, self._buffers)) == self._versions
                and (not self._hooked or list(map(len, self._hooked)) == self._hooks_then)
                and not any(self._false)
            )
        except Exception:  # an entry is gone, or a comparison of tensors, which is no bool
            return False
