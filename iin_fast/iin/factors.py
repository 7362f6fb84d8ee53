"""Factors: a latent that is split into named parts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..checks import checked_int
from ..files import check_name

__all__ = ["RESIDUAL", "Factors", "factor_sizes"]

RESIDUAL = "residual"


def factor_sizes(dim: int, factors: Mapping[str, int] | None, *, where: str = "factor_sizes") -> dict[str, int]:
    """Sizes of all factors of a latent ``[batch, dim]``; what ``factors`` leaves over is the last one, ``residual``.

    An explicit ``"residual"`` is allowed as the last entry; the sizes then sum to ``dim``. Sizes that fill ``dim``
    without one leave no residual.

    Raises:
        TypeError, ValueError: a size that is not a positive integer, sizes that do not fit ``dim``, a bad name.

    Example:
        >>> factor_sizes(64, {"digit": 22, "color": 11})
        {'digit': 22, 'color': 11, 'residual': 31}
    """
    if factors is None:
        factors = {}
    if not isinstance(factors, Mapping):
        kind = type(factors).__name__
        raise TypeError(f"{where}: factors is a {kind}, expected a mapping of name to size, like {{'digit': 22}}")
    sizes: dict[str, int] = {}
    for name, size in factors.items():
        check_name(f"{where}: factors has the name", name)
        sizes[name] = checked_int(where, f"factors[{name!r}]", size)
    total = sum(sizes.values())
    if RESIDUAL in sizes:
        if list(sizes)[-1] != RESIDUAL:
            raise ValueError(f"{where}: factors lists {list(sizes)}, expected {RESIDUAL!r} last")
        if total != dim:
            raise ValueError(
                f"{where}: factors {sizes} sum to {total}, expected dim = {dim} with an explicit {RESIDUAL!r}"
            )
    elif total > dim:
        raise ValueError(f"{where}: factors {sizes} sum to {total}, expected at most dim = {dim}")
    elif total < dim:
        sizes[RESIDUAL] = dim - total
    return sizes


class Factors(Mapping[str, Tensor]):
    r"""Creates an immutable mapping of factor name to tensor ``[batch, size]``, in a fixed order.

    .. math:: \tilde z = (\tilde z_1, \dots, \tilde z_K, \tilde z_\text{residual})

    All factors lie side by side in one tensor ``[batch, dim]``, :attr:`tensor`; ``factors["digit"]`` is a view of it.
    Any index but a name picks samples: ``factors[:8]``, ``factors[mask]``, ``factors[3]`` (a batch of one).
    Factors is a pytree with that tensor as its one leaf: it passes through torch.compile, torch.export and tree_map.

    Args:
        parts: name to tensor ``[batch, size]``; all of one batch size, type and device. They are copied side by side.
            :meth:`split` makes Factors from one tensor without a copy.

    Raises:
        TypeError, ValueError: no parts, a part that is not a tensor ``[batch, size]``, or parts that don't match.
        KeyError: a name that is not there, when it is looked up.

    References:
        Esser, Rombach, Ommer, A Disentangling Invertible Interpretation Network, CVPR 2020, Sec. 3.1.

    Example:
        >>> from iin_fast import Factors
        >>> factors = Factors({"digit": torch.zeros(8, 2), "residual": torch.ones(8, 3)})
        >>> factors
        Factors(batch=8, digit=2, residual=3)
        >>> factors["digit"].shape, factors.tensor.shape
        (torch.Size([8, 2]), torch.Size([8, 5]))
        >>> factors.replace(digit=torch.ones(8, 2))[:4].sizes
        {'digit': 2, 'residual': 3}
    """

    __slots__ = ("_sizes", "_tensor")
    _sizes: dict[str, int]
    _tensor: Tensor  # [batch, dim]

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        if not isinstance(parts, Mapping):
            raise TypeError(f"Factors: parts is a {type(parts).__name__}, expected a mapping of name to tensor")
        if not parts:
            raise ValueError("Factors: parts is empty, expected at least one factor")
        first = None
        for name, part in parts.items():
            check_name("Factors: parts has the name", name)
            if not isinstance(part, Tensor):
                raise TypeError(f"Factors: {name!r} is a {type(part).__name__}, expected a torch.Tensor [batch, size]")
            if part.dim() != 2 or part.shape[1] == 0:
                raise ValueError(
                    f"Factors: {name!r} has shape {list(part.shape)}, expected [batch, size] with size >= 1"
                )
            if first is None:
                first, first_name = part, name
            for what, came, expected in (
                ("batch size", part.shape[0], first.shape[0]),
                ("type", part.dtype, first.dtype),
                ("device", part.device, first.device),
            ):
                if came != expected:
                    raise ValueError(f"Factors: {name!r} has {what} {came}, expected {expected} like {first_name!r}")
        self._tensor = torch.cat(list(parts.values()), dim=1)
        self._sizes = {name: part.shape[1] for name, part in parts.items()}

    @classmethod
    def split(cls, tensor: Tensor, sizes: Mapping[str, int]) -> "Factors":
        """Name the parts of ``tensor [batch, dim]`` without a copy; ``sizes`` (name to size) must sum to ``dim``."""
        if not isinstance(tensor, Tensor):
            raise TypeError(f"Factors.split: tensor is a {type(tensor).__name__}, expected a torch.Tensor [batch, dim]")
        if not isinstance(sizes, Mapping):
            raise TypeError(f"Factors.split: sizes is a {type(sizes).__name__}, expected a mapping of name to size")
        checked = {name: checked_int("Factors.split", f"sizes[{name!r}]", size) for name, size in sizes.items()}
        total = sum(checked.values())
        if tensor.dim() != 2 or tensor.shape[1] != total:
            raise ValueError(
                f"Factors.split: tensor has shape {list(tensor.shape)}, expected [batch, {total}], the sum of {checked}"
            )
        return cls._wrap(tensor, checked)

    @classmethod
    def _wrap(cls, tensor: Tensor, sizes: dict[str, int]) -> "Factors":
        """split() without checks: pytree gives leaves that are not tensors, the model what it has checked before."""
        factors = object.__new__(cls)
        factors._tensor = tensor
        factors._sizes = sizes
        return factors

    @property
    def tensor(self) -> Tensor:
        """All factors side by side, ``[batch, dim]``, in order."""
        return self._tensor

    @property
    def sizes(self) -> dict[str, int]:
        """Name to size, in order; a copy."""
        return dict(self._sizes)

    def replace(self, parts: Mapping[str, Tensor] | None = None, /, **named: Tensor) -> "Factors":
        """These factors with other values for some of them.

        Args:
            parts: name to tensor ``[batch, size]``, for names that are not Python identifiers; or as keywords.

        Raises:
            ValueError: an unknown name, or a tensor of another shape, type or device.
        """
        new = {**(parts or {}), **named}
        for name, part in new.items():
            if name not in self._sizes:
                raise ValueError(f"Factors.replace: no factor {name!r}, expected one of {list(self._sizes)}")
            if isinstance(part, Tensor) and part.shape != (len(self._tensor), self._sizes[name]):
                expected = [len(self._tensor), self._sizes[name]]
                raise ValueError(f"Factors.replace: {name!r} has shape {list(part.shape)}, expected {expected}")
        return Factors({name: new.get(name, part) for name, part in self.items()})

    @overload
    def __getitem__(self, index: str, /) -> Tensor: ...
    @overload
    def __getitem__(self, index: int | slice | Tensor | Sequence[int], /) -> "Factors": ...
    def __getitem__(self, index: str | int | slice | Tensor | Sequence[int], /) -> "Tensor | Factors":
        if isinstance(index, str):
            start = 0
            for name, size in self._sizes.items():
                if name == index:
                    return self._tensor[:, start : start + size]
                start += size
            raise KeyError(f"no factor {index!r}, expected one of {list(self._sizes)}")
        if isinstance(index, tuple):
            raise IndexError(
                f"Factors: index is {index!r}, expected one that picks samples; dimensions are factors[name][:, i]"
            )
        rows = self._tensor[index]
        if rows.dim() == 1:
            rows = rows[None]
        if rows.dim() != 2:
            raise IndexError(f"Factors: an index of shape {list(rows.shape[:-1])}, expected one that picks samples")
        return Factors._wrap(rows, self._sizes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    # Mapping compares values, which tensors do not allow.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        return Factors._wrap, (self._tensor, self._sizes)

    def __repr__(self) -> str:
        batch = self._tensor.shape[0] if isinstance(self._tensor, Tensor) else self._tensor
        return f"Factors(batch={batch}, {', '.join(f'{name}={size}' for name, size in self._sizes.items())})"


def _flatten(factors: Factors) -> tuple[list[Tensor], tuple[tuple[str, int], ...]]:
    return [factors._tensor], tuple(factors._sizes.items())


def _unflatten(leaves: Any, context: Any) -> Factors:
    (tensor,) = leaves
    return Factors._wrap(tensor, {name: size for name, size in context})


pytree.register_pytree_node(
    Factors,
    _flatten,
    _unflatten,
    serialized_type_name="iin_fast.Factors",
    to_dumpable_context=list,
    from_dumpable_context=lambda context: tuple((name, size) for name, size in context),
    flatten_with_keys_fn=lambda factors: (
        [(pytree.GetAttrKey("tensor"), factors._tensor)],
        tuple(factors._sizes.items()),
    ),
)
