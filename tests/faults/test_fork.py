"""A process that is forked from one whose threads have worked: docs/reliability.md gives the ways out, and they work."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys
import torch
from iin_fast import nn

if __name__ == "__main__":
    torch.set_num_threads(2)
    flow, x = nn.Flow(64, 2, 64), torch.randn(4096, 64)

    def work(*_):
        with torch.no_grad():
            return flow(x)[1].sum().item()

    expected = work()
    if sys.argv[1] == "threads":
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            torch.set_num_threads(1)
            os._exit(0 if abs(work() - expected) < 1 else 1)
        sys.exit(os.waitpid(child, 0)[1])
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        assert abs(pool.apply(torch.Tensor.sum, (torch.ones(3),)).item() - 3) < 1e-6
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("way", ["threads", "spawn"])
def test_the_ways_out_work(way: str, tmp_path) -> None:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(file), way], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
