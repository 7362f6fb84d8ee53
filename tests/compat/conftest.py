"""The recorded numbers of the published code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden"


class Golden:
    """One file of recorded tensors. Tolerances: relative to the largest magnitude of each tensor."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
        self.tolerance = 1e-9 if name.endswith("f64") else 1e-5
        self.dtype = torch.float64 if name.endswith("f64") else torch.float32

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key].copy())

    def config(self) -> list[int]:
        return self.arrays["config"].tolist()

    def under(self, prefix: str) -> dict[str, Tensor]:
        """All tensors ``prefix/…``, in the recorded order."""
        return {key[len(prefix) + 1 :]: self[key] for key in self.arrays if key.startswith(prefix + "/")}

    def check(self, got: Tensor, key: str) -> None:
        self.close(got, self[key], key)

    def close(self, got: Tensor, want: Tensor, what: str) -> None:
        assert got.shape == want.shape and got.dtype == want.dtype, f"{what}: {got.shape} {got.dtype}"
        error = (got.detach() - want).abs().max().item()
        scale = want.abs().max().item()
        assert error <= self.tolerance * scale, f"{what}: off by {error:.2e} at magnitude {scale:.2e}"

    def check_grads(self, grads: dict[str, Tensor]) -> None:
        want = self.under("grad")
        assert list(grads) == list(want)
        for key, tensor in want.items():
            self.close(grads[key], tensor, f"grad/{key}")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)
