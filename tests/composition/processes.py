"""What one of two processes does in test_distributed.py: all checks, one after the other; findings go into files.

Run as ``python -m composition.processes RANK PORT FOLDER``. Each check gets the rank and returns what the parent compares.
"""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from iin_fast.compat.state_dict_names import PublishedFlow
from iin_fast.nn import ActNorm, Flow, NeuralSplineFlow

from .cases import DIM, MODULES, Case, normal, seeded, tensors

__all__ = ["CHECKS", "learning", "renamed", "wanted_step"]

BATCH = 8  # of both processes together
CHECKS: dict[str, Callable[[int], Any]] = {}
FOLDER = ""  # where both processes write; the third argument


def check(function: Callable[[int], Any]) -> Callable[[int], Any]:
    CHECKS[function.__name__] = function
    return function


def of_rank(case: Case, rank: int) -> list[Any]:
    """One half of the joined batch."""
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    return [t[half] if i < case.batched else t for i, t in enumerate(case.inputs(BATCH))]


def loss(results: Any) -> Tensor:
    """A mean over the batch, so that two halves average to the whole."""
    return torch.stack([t.square().mean() if t.dim() else t for t in tensors(results)]).sum()


def trained(module: nn.Module, inputs: list[Any]) -> dict[str, Tensor]:
    """Gradients of one step, by name, and the parameters after it."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    loss(module(*inputs)).backward()
    found = {f"grad {name}": p.grad for name, p in module.named_parameters()}
    optimizer.step()
    found |= {name: p.detach() for name, p in module.named_parameters()}
    return {key.replace("module.", ""): t for key, t in found.items() if t is not None}


def wanted_step(case: Case) -> dict[str, Tensor]:
    """What one process finds on the joined batch."""
    return {key: t.clone() for key, t in trained(case.module(), list(case.inputs(BATCH))).items()}


def learning() -> list[Case]:
    return [case for case in MODULES if list(case.module().parameters())]


def renamed(case: Case) -> bool:
    """Whether its files have names that no attribute has, which torch.distributed.checkpoint looks for."""
    return any(isinstance(part, PublishedFlow) for part in case.module().modules())


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, dist.tensor.DTensor) else tensor


def caught(call: Callable[[], Any]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "nothing raised"


@check
def data_parallel(rank: int) -> Any:
    return {c.name: trained(DistributedDataParallel(c.module()), of_rank(c, rank)) for c in learning()}


@check
def data_parallel_starts_alike(rank: int) -> Any:
    """The first batch of each process is its own; all take the start of the first process."""
    found = []
    spline = NeuralSplineFlow(
        DIM, n_flows=2, hidden_dim=8, generator=seeded(rank)
    )  # whose permutations are of each process
    for module in (Flow(DIM, n_flows=2, hidden_dim=8, generator=seeded()), ActNorm(DIM), spline):
        DistributedDataParallel(module)(normal(rank, 16, DIM) + rank)
        found.append([module.loc.detach(), module.scale.detach()])
    return found


@check
def data_parallel_of_a_loaded_checkpoint(rank: int) -> Any:
    """Only the first process has the checkpoint: DDP hands on its parameters and buffers, and nothing starts anew."""
    flow = Flow(DIM, n_flows=2, hidden_dim=8, generator=seeded(rank))
    if rank == 0:
        started = Flow(DIM, n_flows=2, hidden_dim=8, generator=seeded())
        started.initialize(normal(1, 16, DIM))
        flow.load_state_dict(started.state_dict())
    wrapped = DistributedDataParallel(flow)
    wrapped(normal(rank, 16, DIM) + rank)
    return [flow.loc.detach(), flow.scale.detach()]


@check
def fully_sharded(rank: int) -> Any:
    return {
        c.name: {key: whole(t) for key, t in trained(fully_shard(c.module()), of_rank(c, rank)).items()}
        for c in learning()
    }


@check
def fully_sharded_children(rank: int) -> Any:
    """An IIN inside a model of the user's own, each sharded."""
    case = next(case for case in MODULES if case.name == "FactorLoss")
    module = case.module()
    fully_shard(module.model.flow)
    fully_shard(module)
    return {key: whole(t) for key, t in trained(module, of_rank(case, rank)).items()}


@check
def fully_sharded_inverse(rank: int) -> Any:
    """``inverse`` is no forward: it needs its parameters gathered, or says so."""
    case = next(case for case in MODULES if case.name == "Flow")
    flow, x = fully_shard(case.module()), case.inputs(4)[0]
    message = caught(lambda: flow.inverse(x))
    register_fsdp_forward_method(flow, "inverse")
    return message, [t.detach() for t in flow.inverse(x)]


@check
def fully_sharded_start(rank: int) -> Any:
    def fresh() -> Flow:
        return Flow(DIM, n_flows=2, hidden_dim=8, generator=seeded())

    alone, held, by_hand, x = fresh(), fresh(), fresh(), normal(0, 16, DIM)
    fully_shard(alone), fully_shard(by_hand)
    holder = fully_shard(nn.Sequential(held))
    return [caught(lambda: alone(x)), caught(lambda: holder(x)), caught(lambda: by_hand.initialize(x))]


@check
def fully_sharded_files(rank: int) -> Any:
    """A whole state_dict out of a sharded model; into another one, whole and in shards."""
    found = {}
    for case in (case for case in learning() if not renamed(case)):
        module, shards, full = fully_shard(case.module()), fully_shard(zeroed(case)), fully_shard(zeroed(case))
        state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
        set_model_state_dict(shards, get_model_state_dict(module))
        owners = [part for part in case.module().modules() if part._parameters]
        loads_whole = all(isinstance(part, Flow) for part in owners)  # torch's own modules load shards alone
        if loads_whole:
            full.load_state_dict(state)
        found[case.name] = [state] + [
            get_model_state_dict(other, options=StateDictOptions(full_state_dict=True))
            for other in ([shards, full] if loads_whole else [shards])
        ]
    return found


@check
def fully_sharded_published_files(rank: int) -> Any:
    """The published names, written from shards and read into others."""
    found = {}
    for case in (case for case in learning() if renamed(case)):
        module, other = fully_shard(case.module()), fully_shard(zeroed(case))
        other.load_state_dict(module.state_dict())
        found[case.name] = [{k: whole(t) for k, t in m.state_dict().items()} for m in (module, other)]
    return found


def zeroed(case: Case) -> nn.Module:
    module = case.module()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


@check
def fully_sharded_folder(rank: int) -> Any:
    """torch.distributed.checkpoint: each process writes its shards, and reads them into another model."""
    case = next(case for case in MODULES if case.name == "IIN")
    path = f"{FOLDER}/dcp"
    checkpoint.save(get_model_state_dict(fully_shard(case.module())), checkpoint_id=path)
    other = fully_shard(zeroed(case))
    state = get_model_state_dict(other)
    checkpoint.load(state, checkpoint_id=path)
    set_model_state_dict(other, state)
    return get_model_state_dict(other, options=StateDictOptions(full_state_dict=True))


def main(rank: int, port: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name, function in CHECKS.items():
        try:
            found[name] = function(rank)
        except Exception:
            found[name] = traceback.format_exc()
    torch.save(found, f"{FOLDER}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    FOLDER = sys.argv[3]
    main(int(sys.argv[1]), sys.argv[2])
