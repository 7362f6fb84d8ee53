"""What the tests of the method share."""

from collections.abc import Mapping

import pytest
import torch

from iin_fast.iin import IIN

SIZES = {"digit": 3, "color": 2}


def make_model(
    dim: int = 8, factors: Mapping[str, int] | None = SIZES, dtype=torch.float64, seed: int = 0, **options
) -> IIN:
    generator = torch.Generator().manual_seed(seed)
    options = {"n_flows": 3, "hidden_dim": 16, "hidden_depth": 1, **options}
    model = IIN(dim, factors, generator=generator, dtype=dtype, **options)
    with torch.no_grad():
        model(3 * torch.randn(64, dim, generator=generator, dtype=dtype) + 1)  # starts the ActNorm layers
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model


@pytest.fixture
def make():
    """A small IIN that is neither fresh nor trivial: ``make(dim, factors, dtype, seed, **options)``."""
    return make_model
