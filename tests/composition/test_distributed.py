"""Two processes (gloo): DistributedDataParallel and fully_shard against one process on the joined batch, and files.

The two processes start once and run every check in processes.py; the tests here compare what they found.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import iin_fast
from iin_fast.nn import ActNorm, Flow, NeuralSplineFlow

from .cases import DIM, MODULES, normal, same, seeded
from .processes import CHECKS, learning, renamed, wanted_step

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
cases = pytest.mark.parametrize("case", learning(), ids=lambda case: case.name)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(iin_fast.__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "composition.processes"]
    logs = [open(folder / f"{rank}.log", "w+") for rank in (0, 1)]
    processes = [
        subprocess.Popen([*command, str(rank), str(port), str(folder)], env=environment, stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        for process in processes:
            process.wait(timeout=120)
    finally:
        for process in processes:
            process.kill()
    for process, log in zip(processes, logs, strict=True):
        log.seek(0)
        assert process.returncode == 0, log.read()[-4000:]
        log.close()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def both(found: list[dict[str, Any]], check: str) -> list[Any]:
    """What either process found; the text of its error fails the test."""
    results = [process[check] for process in found]
    assert not any(isinstance(result, str) for result in results), results
    return results


def test_every_check_has_run(found):
    assert all(process.keys() == CHECKS.keys() for process in found)


@cases
@pytest.mark.parametrize("check", ["data_parallel", "fully_sharded"])
def test_a_step_is_that_of_one_process_on_the_joined_batch(found, check: str, case):
    wanted = wanted_step(case)
    for result in both(found, check):
        step = result[case.name]
        assert step.keys() == wanted.keys()
        same([step[key] for key in wanted], [wanted[key] for key in wanted], rtol=1e-4, atol=1e-5)


def test_shards_of_parts_of_a_model(found):
    wanted = wanted_step(next(case for case in MODULES if case.name == "FactorLoss"))
    for step in both(found, "fully_sharded_children"):
        assert step.keys() == wanted.keys()
        same([step[key] for key in wanted], [wanted[key] for key in wanted], rtol=1e-4, atol=1e-5)


def test_all_processes_start_alike(found):
    for module, *starts in zip(
        (
            Flow(DIM, n_flows=2, hidden_dim=8, generator=seeded()),
            ActNorm(DIM),
            NeuralSplineFlow(DIM, n_flows=2, hidden_dim=8, generator=seeded()),
        ),
        *both(found, "data_parallel_starts_alike"),
        strict=True,
    ):
        module.initialize(normal(0, 16, DIM))
        for start in starts:
            same(start, [module.loc, module.scale], rtol=0, atol=0)


def test_a_checkpoint_of_the_first_process_is_not_started_anew(found):
    flow = Flow(DIM, n_flows=2, hidden_dim=8, generator=seeded())
    flow.initialize(normal(1, 16, DIM))
    for start in both(found, "data_parallel_of_a_loaded_checkpoint"):
        same(start, [flow.loc, flow.scale], rtol=0, atol=0)


def test_inverse_of_a_sharded_flow(found):
    case = next(case for case in MODULES if case.name == "Flow")
    for message, result in both(found, "fully_sharded_inverse"):
        assert "register_fsdp_forward_method(module, 'inverse')" in message
        same(result, case.module().inverse(*case.inputs(4)))


def test_start_of_a_sharded_flow_is_refused(found):
    for alone, held, by_hand in both(found, "fully_sharded_start"):
        for message in (alone, held):
            assert "call initialize(x) with one batch for all processes before fully_shard" in message
        assert "call initialize before fully_shard" in by_hand


@cases
def test_state_of_a_sharded_model(found, case):
    wanted = case.module().state_dict()
    for result in both(found, "fully_sharded_published_files" if renamed(case) else "fully_sharded_files"):
        for state in result[case.name]:
            assert state.keys() == wanted.keys()
            same([state[key] for key in wanted], list(wanted.values()), rtol=0, atol=0)


def test_checkpoint_folder_of_a_sharded_model(found):
    wanted = next(case for case in MODULES if case.name == "IIN").module().state_dict()
    for state in both(found, "fully_sharded_folder"):
        same([state[key] for key in wanted], list(wanted.values()), rtol=0, atol=0)
