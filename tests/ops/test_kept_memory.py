"""Large results lie in memory that stays with the process, and nobody can tell but by its page faults."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import iin_fast
from iin_fast.allocator import keep_results, kept_results
from iin_fast.functional import affine_coupling

MIB = 2**20
needs_new_torch = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="torch 2.10 can't take memory of others"
)


@pytest.fixture(autouse=True)
def from_nothing() -> Iterator[None]:
    most = kept_results().most
    keep_results(0)
    keep_results()
    yield
    keep_results(most)


def result(mib: int = 4) -> Tensor:
    """y of the affine coupling, of that size."""
    x = torch.ones(mib * MIB // 4 // 1024, 1024)
    return affine_coupling(x, torch.zeros_like(x), torch.ones_like(x))[0]


@needs_new_torch
def test_a_freed_result_gives_its_memory_to_the_next() -> None:
    before = kept_results().in_use
    first = result()
    at = first.data_ptr()
    assert kept_results().in_use == before + 4 * MIB
    view = first[1:]
    del first
    second = result()
    assert second.data_ptr() != at  # a view holds it
    assert torch.equal(view, torch.full_like(view, 2.0))
    del view
    third = result()
    assert third.data_ptr() == at
    assert kept_results().kept == 0


@needs_new_torch
def test_what_is_kept_has_bounds() -> None:
    base = kept_results().in_use
    for mib in (1, 2, 3, 5, 8, 13, 21):
        result(mib)
        found = kept_results()
        assert found.in_use == base and 0 < found.kept <= found.most
    many = [result(9) for _ in range(5)]
    keep_results(20 * MIB)
    del many
    assert 9 * MIB <= kept_results().kept <= 20 * MIB
    keep_results(0)
    assert kept_results().kept == 0
    last = result()
    assert kept_results().in_use == base  # torch's own memory
    del last
    assert kept_results().kept == 0


REFUSED = """
import torch
from iin_fast.allocator import kept_results
from iin_fast.functional import affine_coupling

x = torch.ones(1024, 1024)
for _ in range(3):
    try:
        affine_coupling(x, torch.zeros_like(x), torch.ones_like(x))
    except RuntimeError:
        print(kept_results().in_use, kept_results().kept)
"""
# torch's function that makes a tensor of given memory, as one that fails.
NO_TENSOR = """
#include <stdint.h>
#include <stdlib.h>
int torch_from_blob(void *data, int64_t dim, const int64_t *sizes, const int64_t *strides, int64_t offset, int32_t dtype,
                    int32_t device, int32_t index, void **made, int32_t layout, const uint8_t *metadata, int64_t bytes,
                    void (*deleter)(void *, void *), void *context) {
  if (getenv("FREED"))
    deleter(data, context);
  return 1;
}
"""


@needs_new_torch
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="puts a function before torch's")
def test_memory_comes_back_where_torch_makes_no_tensor_of_it(tmp_path: Path) -> None:
    """Whether torch has freed it by then or not."""
    library = tmp_path / "no_tensor.so"
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=NO_TENSOR, text=True, check=True)
    for freed in ({}, {"FREED": "1"}):
        environment = os.environ | {"LD_PRELOAD": str(library)} | freed
        done = subprocess.run(
            [sys.executable, "-c", REFUSED], capture_output=True, text=True, check=True, env=environment
        )
        assert done.stdout == f"0 {4 * MIB}\n" * 3, done.stderr


@pytest.mark.parametrize("most", [-1, 0.5, True, "1"])
def test_a_wrong_bound_is_refused(most: object) -> None:
    with pytest.raises((TypeError, ValueError), match="keep_results: most is"):
        keep_results(most)  # type: ignore[arg-type]


def test_threads_get_memory_of_their_own() -> None:
    def work(seed: int) -> bool:
        x = torch.full((2**10, 2**9), float(seed))
        results = [affine_coupling(x, torch.zeros_like(x), torch.full_like(x, k))[0] for k in range(3)]
        return all(bool((y == seed + k).all()) for k, y in enumerate(results))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))


def steps(module: nn.Module, flow: iin_fast.nn.Flow, how: str) -> list[Tensor]:
    """Parameters and gradients after five steps of training."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    held = []
    for number in range(5):
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad(set_to_none=how != "zeros")
        for part in x.chunk(2) if how == "accumulate" else [x]:
            z, logdet = module(part)
            loss = (z.square().sum(1) / 2 - logdet).mean()
            loss.backward(retain_graph=how == "twice")
            if how == "twice":
                loss.backward()
        if how == "held":
            held += [p.grad for p in flow.parameters() if p.grad is not None]
        if how == "clipped":
            nn.utils.clip_grad_norm_(flow.parameters(), 0.5)
        optimizer.step()
    return [*(p.detach() for p in flow.parameters()), *held]


def wrapped(how: str, flow: iin_fast.nn.Flow) -> nn.Module:
    if how == "sharded":
        return fully_shard(flow)
    return DistributedDataParallel(flow, gradient_as_bucket_view=True) if how == "distributed" else flow


@pytest.mark.parametrize("how", ["plain", "zeros", "accumulate", "twice", "held", "clipped", "distributed", "sharded"])
def test_training_is_the_same_to_the_bit(how: str, group: None) -> None:
    start = iin_fast.nn.Flow(32, 2, 256, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        start(torch.randn(64, 32, generator=torch.Generator().manual_seed(9)))
    found = []
    for most in (0, 2**30):
        keep_results(most)
        flow = iin_fast.nn.Flow(32, 2, 256, 1)
        flow.load_state_dict(start.state_dict())
        found.append(steps(wrapped(how, flow), flow, how))
    for plain, kept in zip(*found, strict=True):
        assert torch.equal(plain, kept)


PAGES = """
import resource, torch, iin_fast
torch.set_num_threads(1)
flow = iin_fast.nn.Flow(32, 3, 512, 2)  # 27 MB in one parameter
optimizer = torch.optim.Adam(flow.parameters(), fused=True)
x, pages = torch.randn(16, 32), []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    optimizer.zero_grad()
    z, logdet = flow(x)
    (z.square().sum() / 2 - logdet.sum()).backward()
    optimizer.step()
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(pages[6:])[3])
"""


@needs_new_torch
@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults of Linux")
def test_a_plain_training_step_maps_no_new_memory() -> None:
    # The median: torch gives a buffer of 400 kB back to the system now and then.
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100  # else 6600 pages of 4 KiB, or 13 of 2 MiB and the rest
