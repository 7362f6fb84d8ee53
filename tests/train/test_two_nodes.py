"""Two nodes: two agents of torchrun on this machine, each with one process."""

import os
import socket
import subprocess
import sys

import numpy as np
import torch
from run_folder import metrics, record

from iin_fast import IIN
from iin_fast.data import save_arrays
from iin_fast.train import train


def test_two_nodes_give_the_same_result(latents, settings, tmp_path):
    file = save_arrays(
        tmp_path / "latents.npz", {"z": latents.z, "labels": latents.labels, "names": np.array(latents.names)}
    )
    train(file, tmp_path / "one", settings(precision="64-true"), accelerator="cpu")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = f"-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --master-addr 127.0.0.1 --master-port {port}"
    options = (
        "--factors digit=3,color=2 --steps 40 --n-flows 2 --hidden-dim 16 --batch 16 --learning-rate 3e-3 --log-every 10 "
        "--preset paper --held-out-every 20 --save-every 20 --precision 64-true --accelerator cpu"
    )
    nodes = [
        subprocess.Popen(
            [sys.executable, *launch.split(), "--node-rank", str(rank), "-m", "iin_fast.cli"]
            + ["train", str(file), "--out", str(tmp_path / "two"), *options.split()],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [node.communicate(timeout=120) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    for node, (_, err) in zip(nodes, said, strict=True):
        assert node.returncode == 0, err
    assert ["written to" in out for out, _ in said] == [True, False]  # the first node speaks
    assert record(tmp_path / "two")["device"]["processes"] == 2
    one, two = (IIN.load(tmp_path / name).state_dict() for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-9, msg=name)
    assert [line["step"] for line in metrics(tmp_path / "two")] == [line["step"] for line in metrics(tmp_path / "one")]
