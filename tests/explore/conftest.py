"""A run folder as a training leaves it, its file of latents, and a decoder."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

import iin_fast
from iin_fast.data import load_latents, save_arrays

NAMES = ("shape", "color")
HELD_OUT = np.arange(60, 100)

DECODER = """
import torch

def decode(z):  # 3 x 3 pixels, another one for each latent
    return torch.sigmoid(z @ torch.randn(8, 27, generator=torch.Generator().manual_seed(5))).reshape(-1, 3, 3, 3)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explore")
    generator = torch.Generator().manual_seed(0)
    labels = torch.stack([torch.arange(100) % 3, torch.randint(2, (100,), generator=generator)], 1)
    z = torch.randn(100, 8, generator=generator) + labels.float() @ torch.randn(2, 8, generator=generator)
    labels[:5, 0] = -1
    save_arrays(folder / "latents.npz", {"z": z, "labels": labels, "names": np.array(NAMES)})
    save_arrays(folder / "texts.npz", {"z": z, "images": np.array([f"text {i}" for i in range(100)])})
    (folder / "decoder.py").write_text(DECODER)
    for name, context_dim in (("run", 0), ("conditional", 2)):
        model = iin_fast.IIN(
            8, {"shape": 3, "color": 2}, n_flows=2, hidden_dim=8, context_dim=context_dim, generator=generator
        )
        context = torch.eye(2)[labels[:, 1]] if context_dim else None
        model(z, context)
        model.save(folder / name)
        data = load_latents(folder / "latents.npz")
        record = {"latents": {"path": str(data.path), "sha256": data.fingerprint()}, "settings": {"context": "color"}}
        if not context_dim:
            record["settings"] = {}
        (folder / name / "run.json").write_text(json.dumps(record))
        save_arrays(folder / name / "split.npz", {"train": np.arange(60), "held_out": HELD_OUT})
    return folder / "run"
