"""The examples run, and show what they say."""

import importlib.util
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_latent_factors() -> None:
    spec = importlib.util.spec_from_file_location("latent_factors", EXAMPLES / "latent_factors.py")
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nets this small gain nothing from a second one
    try:
        found = example.main()
    finally:
        torch.set_num_threads(threads)
    assert found["judge reads the donor's digit after the swap"] > 0.8
    assert found["judge still reads the old digit"] < 0.2
