"""A fixed permutation of the features."""

import torch
from torch import Tensor, nn

from ..checks import check_features, checked_int, readable
from ..flow import ProgramBuilder
from .net_steps import NotAProgram

__all__ = ["Permutation"]


class Permutation(nn.Module):
    """A fixed permutation of the features: y[:, j] = x[:, permutation[j]], log|det| = 0.

    References:
        Esser et al. 2020, Sec. 3.1 ("shuffling"). Dinh et al. 2017, Sec. 3.5.

    Args:
        dim: number of features.
        permutation: ``[dim]`` int64, each of 0 … dim - 1 once; drawn at random when left out.
        generator: draws the permutation.
        device: of the index.

    Raises:
        ValueError: ``permutation`` is not a permutation of 0 … dim - 1.
        TypeError: dim that is no integer, a ``permutation`` that is no tensor of integers.

    Example:
        >>> flip = Permutation(3, torch.tensor([2, 1, 0]))
        >>> flip(torch.tensor([[1.0, 2.0, 3.0]]))[0]
        tensor([[3., 2., 1.]])
    """

    permutation: Tensor

    def __init__(
        self,
        dim: int,
        permutation: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim = checked_int("Permutation", "dim", dim)
        self.given: list[int] | None = None
        if permutation is None:
            pass
        elif not isinstance(permutation, Tensor) or permutation.is_floating_point():
            kind = permutation.dtype if isinstance(permutation, Tensor) else type(permutation).__name__
            raise TypeError(f"Permutation: permutation is {kind}, expected an int64 tensor [{dim}]")
        elif permutation.is_meta:
            self.given = list(range(dim))  # it has no values yet; a file will bring them
        else:
            self.given = permutation.tolist()
            if permutation.shape != (dim,) or sorted(self.given) != list(range(dim)):
                raise ValueError(
                    f"Permutation: permutation is {self.given}, expected each of 0 … {dim - 1} exactly once"
                )
        if device is None and permutation is not None:
            device = permutation.device
        self.register_buffer("permutation", torch.empty(dim, dtype=torch.int64, device=device))
        self.reset_parameters(generator)

    def extra_repr(self) -> str:
        return f"{self.dim}"

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the permutation anew; one that the constructor was given is put back."""
        if self.given is None:
            source = generator.device if generator else "cpu"
            self.permutation.copy_(torch.randperm(self.dim, generator=generator, device=source))
        else:
            self.permutation.copy_(torch.tensor(self.given, device="cpu"))

    def program_layers(self, builder: ProgramBuilder) -> None:
        """Append this layer to a flow program."""
        if not readable(self.permutation):
            raise NotAProgram(self, "has a permutation without values")
        builder.permute(self.permutation.tolist())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Permute ``x [batch, dim]``; returns y ``[batch, dim]`` and zeros ``[batch]``."""
        check_features("Permutation", "x", x, self.dim)
        return x[:, self.permutation], x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Undo the permutation of ``z [batch, dim]``."""
        check_features("Permutation", "z", z, self.dim)
        return z[:, self.permutation.argsort()], z.new_zeros(z.shape[0])
