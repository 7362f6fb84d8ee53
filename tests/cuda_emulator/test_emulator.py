"""The host emulation of CUDA: it computes what a GPU would, and it reports what a GPU may let pass."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from cuda_emulator import ROOT, call, load, sanitizer_environment
from iin_fast.ops.affine_coupling import SQUASHES
from iin_fast.ops.registry import OPS


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def test_shuffles_shared_memory_and_atomics() -> None:
    values = np.random.default_rng(0).standard_normal(1000)
    total, warps = np.zeros(1), np.zeros(1, np.uint32)
    call(load("self_test").sum, pointer(values), len(values), pointer(total), pointer(warps), 96)
    np.testing.assert_allclose(total[0], values.sum(), rtol=1e-12)
    assert warps[0] == 11 * 3


def test_dynamic_shared_memory() -> None:
    values = np.arange(160, dtype=np.int32)
    out = np.zeros_like(values)
    call(load("self_test").reverse, pointer(values), pointer(out), 4, 40)
    np.testing.assert_array_equal(out.reshape(4, 40), values.reshape(4, 40)[:, ::-1])


def test_grid_barrier() -> None:
    blocks, rounds = 7, 5
    cells = np.zeros(blocks, np.int32)
    call(load("self_test").ring, pointer(cells), blocks, 33, rounds, False)
    np.testing.assert_array_equal(cells, (np.arange(blocks) + rounds) % blocks + rounds)


def test_a_barrier_made_of_an_atomic() -> None:
    arrived, seen = np.zeros(1, np.uint32), np.zeros(3 * 32, np.uint32)
    call(load("self_test").counting_barrier, pointer(arrived), pointer(seen), 3, 32)
    assert (seen == 96).all()


def test_warp_functions() -> None:
    out = np.zeros(32 * 8 + 1, np.uint32)
    call(load("self_test").warp, pointer(out))
    lane = np.arange(32)
    table = out[:-1].reshape(32, 8)
    assert (table[:, 0] == sum(1 << i for i in range(0, 32, 3))).all()
    assert (table[:, 1] == 3).all()
    np.testing.assert_array_equal(table[:, 2], lane // 8 * 8 + 5)
    np.testing.assert_array_equal(table[:, 3], np.where(lane % 16 >= 3, lane - 3, lane))
    np.testing.assert_array_equal(table[:, 4], np.where(lane % 16 < 13, lane + 3, lane))
    np.testing.assert_array_equal(table[:, 5], lane ^ 9)
    np.testing.assert_array_equal(table[:16, 6], lane[:16] ^ 1)
    assert out[-1] == 31


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """To this many bits after the point, to nearest, ties away from 0 (no value here lies in the middle)."""
    unit = np.exp2(np.floor(np.log2(np.abs(values))) - bits)
    return np.round(values / unit) * unit


@pytest.mark.parametrize("kind, depth, bits", [(0, 8, 10), (1, 16, 7), (2, 16, 10), (3, 16, 7), (4, 16, 7)])
def test_tensor_cores_and_their_fragments(kind: int, depth: int, bits: int) -> None:
    generator = np.random.default_rng(kind)
    a, b = (generator.standard_normal(shape).astype(np.float32) for shape in ((16, depth), (depth, 8)))
    c = np.full((16, 8), np.nan, np.float32)
    call(load("self_test").multiply, kind, pointer(a), pointer(b), pointer(c))
    np.testing.assert_allclose(c, rounded(a, bits) @ rounded(b, bits), rtol=1e-5, atol=1e-5)
    assert np.abs(c - a @ b).max() > 1e-4  # rounded it is


@pytest.fixture
def cut() -> Iterator[None]:
    load("self_test").cut_products(True)
    yield
    load("self_test").cut_products(False)


def test_tensor_cores_cut_what_they_add(cut: None) -> None:
    """Seven terms of 3/4 of the bit below the last one of 1 are lost, each by itself."""
    a, b = np.zeros((16, 8), np.float32), np.ones((8, 8), np.float32)
    a[:, 0], a[:, 1:] = 1, 0.75 * 2.0**-24
    c = np.full((16, 8), np.nan, np.float32)
    call(load("self_test").multiply, 0, pointer(a), pointer(b), pointer(c))
    assert (c == 1).all()
    a[:, 1:] = -a[:, 1:]
    call(load("self_test").multiply, 0, pointer(a), pointer(b), pointer(c))
    assert (c == 1).all()
    a[:, 1:] = 2.0**-24  # the last of the seven is half a bit of float32
    call(load("self_test").multiply, 0, pointer(a), pointer(b), pointer(c))
    assert (c == 1 + 3 * 2.0**-23).all()


def product(large: bool, a: np.ndarray, w: np.ndarray) -> np.ndarray:
    c = np.full((len(a), w.shape[1]), np.nan, np.float32)
    call(load("self_test").product, large, pointer(a), pointer(w), pointer(c), len(w))
    return c


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("positive", [False, True])
def test_float32_on_tensor_cores_that_cut(positive: bool, large: bool, cut: None) -> None:
    """No more than a few times what float32 loses itself, however long the sums are."""
    generator = np.random.default_rng(0)
    rows, columns = (64, 64) if large else (32, 16)
    for depth in (20, 64, 512):
        a, w = (generator.standard_normal(shape).astype(np.float32) for shape in ((rows, depth), (depth, columns)))
        if positive:
            a, w = np.abs(a), np.abs(w)
        exact = a.astype(np.float64) @ w
        assert np.linalg.norm(product(large, a, w) - exact) < 8e-7 * np.linalg.norm(exact)


@pytest.mark.parametrize("large", [False, True])
def test_what_is_not_finite_in_float32_on_tensor_cores(large: bool) -> None:
    """Infinity times a number is infinity, as for float32, though it has no rest to split off."""
    generator = np.random.default_rng(1)
    rows, columns = (64, 64) if large else (32, 16)
    a, w = (generator.standard_normal(shape).astype(np.float32) for shape in ((rows, 40), (40, columns)))
    a[3, 7], a[4, 8], a[5, 1], a[6, 2:4], a[10, 9] = np.inf, -np.inf, np.nan, (np.inf, -np.inf), -np.inf
    w[9, 4], w[8, 6] = np.inf, 0
    a[7, 0] = 2.0**120  # of which the rest is as large, but not infinite
    with np.errstate(invalid="ignore"):
        exact = a.astype(np.float64) @ w.astype(np.float64)
    found = product(large, a, w).astype(np.float64)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(exact))
    at = np.isfinite(exact)
    np.testing.assert_array_equal(found[~at], exact[~at])
    np.testing.assert_allclose(found[at], exact[at], rtol=1e-3, atol=1e-4)


def test_asynchronous_copies_arrive_when_waited_for() -> None:
    values = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    sums = np.zeros(64, np.float32)
    for count in range(5):
        call(load("self_test").copy, pointer(values), pointer(sums), 4 * count, False)
        np.testing.assert_allclose(sums, values[:, :count].sum(1), atol=1e-6)
    call(load("self_test").copy, pointer(values), pointer(sums), 16, True)
    assert np.isnan(sums).all()


# in the order of the enum in self_test.cpp
FAULTS = {
    "barrier_left_out": r"divergent barrier in block \(0, 0, 0\): 16 threads \(the first is 0\) wait in __syncthreads at "
    r"self_test.cpp:\d+, 16 threads \(the first is 16\) left the kernel",
    "barrier_elsewhere": r"divergent barrier: thread 0 at __syncthreads at .*, thread 16 at __syncthreads at ",
    "lane_left_out": r"deadlock in block .* 31 threads .* wait in __shfl_xor_sync .*, 1 threads \(the first is 3\) left",
    "lane_outside_mask": "__shfl_sync .* lane 0 reads lane 20, which takes no part",
    "own_lane_not_in_mask": "thread 16 calls __shfl_sync .* with a mask that doesn't name it",
    "other_function": "divergent warp: thread 16 at __syncwarp .*, thread 0 at __ballot_sync",
    "misaligned": "misaligned __ldg of 16 bytes",
    "global_overrun": "heap-buffer-overflow",
    "dynamic_shared_overrun": "AddressSanitizer: use-after-poison",
    "static_shared_overrun": "index 8 out of bounds for type 'int \\[8\\]'",
    "grid_barrier_without_cooperation": "a barrier over the grid needs a cooperative launch",
    "copy_unfinished": r"thread \d+ ended before its asynchronous copies",
    "copy_misaligned": "misaligned copy_async_16",
    "copy_overrun": "heap-buffer-overflow",
    "lane_without_mma": r"31 threads .* wait in mma_tf32 .*, 1 threads \(the first is 9\) left",
    "copy_of_what_changes": r"the source changed under an asynchronous copy, copy_async_16 at self_test.cpp:\d+",
}
SANITIZED = ("global_overrun", "dynamic_shared_overrun", "static_shared_overrun", "copy_overrun")


@pytest.mark.parametrize("fault", [name for name in FAULTS if name not in SANITIZED])
def test_faults_are_reported(fault: str) -> None:
    data = np.zeros(64, np.int32)
    with pytest.raises(RuntimeError, match=FAULTS[fault]):
        call(load("self_test").faulty, list(FAULTS).index(fault), pointer(data), len(data))
    test_warp_functions()  # and the next launch works


def test_a_grid_barrier_that_a_block_leaves_out_is_reported() -> None:
    cells = np.zeros(4, np.int32)
    with pytest.raises(RuntimeError, match="divergent grid barrier: 1 blocks left the kernel, 3 wait"):
        call(load("self_test").ring, pointer(cells), 4, 32, 2, True)


def test_launches_that_no_gpu_would_take_are_reported() -> None:
    with pytest.raises(RuntimeError, match="invalid block: 1025 threads"):
        call(load("self_test").launch_of, 1, 1025)
    with pytest.raises(RuntimeError, match="invalid grid"):
        call(load("self_test").launch_of, 65536, 32)
    with pytest.raises(RuntimeError, match="invalid grid"):
        call(load("self_test").launch_of, 0, 32)


# in the order of the enum in self_test.cpp: what is said without the barrier
THREAD = r"thread \d+ of block \d (writes|reads|reads by __ldg) at (\S+ in )*self_test\.cpp:\d+"
RACES = {
    "write_read": "shared",
    "read_write": "shared",
    "write_write": "shared",
    "across_blocks": "global",
    "block_barrier_across_blocks": "global",
    "across_clusters_of_blocks": "global",
    "constant": "global",
    "copy": "shared",
    "matrix": "shared",
}


@pytest.mark.parametrize("race", RACES)
def test_races_are_reported(race: str) -> None:
    data = np.zeros(256, np.int32)
    blocks = 4 if "clusters" in race else 3 if "blocks" in race else 1
    arguments = list(RACES).index(race), pointer(data), blocks
    call(load("self_test", races=True).race, arguments[0], True, *arguments[1:])  # with the barrier all is well
    with pytest.raises(RuntimeError, match=f"race in {RACES[race]} memory: {THREAD}, {THREAD}, and no barrier"):
        call(load("self_test", races=True).race, arguments[0], False, *arguments[1:])
    call(load("self_test").race, arguments[0], False, *arguments[1:])  # which nothing else notices


PROBE = """
import ctypes, sys
import numpy as np
from cuda_emulator import call, load
data = np.zeros(64, np.int32)
call(load("self_test").faulty, int(sys.argv[1]), ctypes.c_void_p(data.ctypes.data), 64)
"""


@pytest.mark.parametrize("fault", SANITIZED)
def test_accesses_out_of_bounds_are_reported(fault: str) -> None:
    command = [sys.executable, "-c", PROBE, str(list(FAULTS).index(fault))]
    environment = sanitizer_environment() | {"PYTHONPATH": str(ROOT / "tests")}
    probe = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert probe.returncode != 0
    assert FAULTS[fault].replace("\\", "") in probe.stderr
    assert "self_test.cpp" in probe.stderr


def check_the_ops(environment: dict[str, str], only: str) -> None:
    """With kernels for one type: a checker takes a minute to compile each, and they differ in the sizes of their tiles. Bounds are
    checked in float64, which most tests are in; races in float32, which has tensor cores. make sanitize has all types in both."""
    files = [f"tests/ops/test_{op}_cuda.py" for op in OPS]
    # the other squashes read and write the same memory
    wanted = " and ".join(f"not {name}" for name in SQUASHES if name not in ("tanh", "none"))
    options = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-k", wanted, "-m", "not values"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    environment = environment | {"IIN_FAST_TEST_TYPE": only, "IIN_FAST_EXAMPLES": "8"}  # of random programs
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_ops_kernels_touch_no_memory_but_their_own() -> None:
    check_the_ops(sanitizer_environment(), "float64")


def test_the_ops_kernels_have_no_races() -> None:
    check_the_ops(os.environ | {"IIN_FAST_TEST_RACES": "1"}, "float32")
