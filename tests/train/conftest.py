"""Small latents and settings that train in a second."""

import numpy as np
import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("tensorboard")
pytest.importorskip("safetensors")

from iin_fast.data import Latents, save_arrays
from iin_fast.train import Settings


@pytest.fixture(scope="session")
def latents():
    """Two concepts, each with features of its own, mixed by a rotation."""
    random = np.random.default_rng(0)
    labels = np.stack([random.integers(0, 4, 600), random.integers(0, 3, 600)], 1)
    z = 0.1 * random.standard_normal((600, 8))
    z[:, :3] += random.standard_normal((4, 3))[labels[:, 0]]
    z[:, 3:5] += random.standard_normal((3, 2))[labels[:, 1]]
    rotation = np.linalg.qr(random.standard_normal((8, 8)))[0]
    return Latents.of((z @ rotation).astype(np.float32), labels, ["digit", "color"])


@pytest.fixture(scope="module")
def file(latents, tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "latents.npz"
    return save_arrays(path, {"z": latents.z, "labels": latents.labels, "names": np.array(latents.names)})


@pytest.fixture
def settings():
    """A function: small settings, with what is given in their place."""

    def make(**given):
        small = {
            "preset": "paper",
            "factors": {"digit": 3, "color": 2},
            "steps": 40,
            "n_flows": 2,
            "hidden_dim": 16,
            "batch": 16,
        }
        small |= {"learning_rate": 3e-3, "log_every": 10, "held_out_every": 20, "save_every": 20}
        return Settings(**{**small, **given})

    return make
