"""csrc/common/math.h: within a few ulp of the truth, in every instruction set, vectorised as in the kernels."""

import ctypes
import functools
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import mpmath
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"],
}
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
INF = float("inf")


def supported(isa: str) -> bool:
    if isa == "baseline":
        return True
    cpuinfo = Path("/proc/cpuinfo")
    words = cpuinfo.read_text().split() if platform.machine() == "x86_64" and cpuinfo.exists() else []
    return all(flag.removeprefix("-m") in words for flag in ISAS[isa])


@pytest.fixture(scope="module", params=ISAS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if not supported(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    out = tmp_path_factory.mktemp("math") / f"{request.param}.so"
    source = ROOT / "tests" / "common" / "elementary.cpp"
    subprocess.run(["g++", *FLAGS, *ISAS[request.param], f"-I{ROOT / 'csrc'}", str(source), "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


def call(library: ctypes.CDLL, name: str, x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x)
    y = np.empty_like(x)
    function = getattr(library, f"{name}_{'float' if x.dtype == np.float32 else 'double'}")
    function(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), ctypes.c_int64(x.size))
    return y


def each(function: Callable) -> Callable[[np.ndarray], np.ndarray]:
    """A function of mpmath for arrays, where numpy has none."""

    def of_array(x: np.ndarray) -> np.ndarray:
        with mpmath.workdps(30):
            return np.array([x.dtype.type(mpmath.nstr(function(float(v)), 25)) for v in x])

    return of_array


TRUTH = {
    "exp": np.exp,
    "exp_below_zero": np.exp,
    "log": np.log,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "atan": np.arctan,
    "softplus": lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))),
    "normal_cdf": each(mpmath.ncdf),
    "normal_density": each(mpmath.npdf),
}
# ranges that cover small, usual and extreme arguments; down to -103 and -745 results are subnormal numbers
RANGES = {
    "exp": {np.float32: (-103.0, 88.7), np.float64: (-745.0, 709.7)},
    "exp_below_zero": {np.float32: (-87.0, 0.0), np.float64: (-700.0, 0.0)},
    "log": {np.float32: (1e-37, 3e38), np.float64: (1e-300, 1e308)},
    "tanh": {np.float32: (-30.0, 30.0), np.float64: (-30.0, 30.0)},
    "sigmoid": {np.float32: (-80.0, 80.0), np.float64: (-700.0, 700.0)},
    "atan": {np.float32: (-1e6, 1e6), np.float64: (-1e9, 1e9)},
    "softplus": {np.float32: (-103.0, 1e6), np.float64: (-745.0, 1e9)},
    "normal_cdf": {np.float32: (-12.9, 12.9), np.float64: (-37.5, 37.5)},
    "normal_density": {np.float32: (-13.0, 13.0), np.float64: (-37.5, 37.5)},
}
ULP = {"exp": 2, "exp_below_zero": 2, "log": 2, "tanh": 3, "sigmoid": 3, "atan": 2, "softplus": 2}
ULP |= {"normal_cdf": 5, "normal_density": 3}


@functools.cache
def arguments(name: str, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Arguments over the whole range, and what the function is there in more digits."""
    rng = np.random.default_rng(0)
    low, high = RANGES[name][dtype]
    if name == "log":
        x = np.exp(rng.uniform(np.log(low), np.log(high), 100_000))
        x = np.concatenate([x, rng.uniform(0.5, 2, 100_000), 1 + rng.normal(0, 1e-4, 10_000)])
    else:
        small = np.exp(rng.uniform(-30, 2, 100_000)) * rng.choice([-1, 1], 100_000)
        below = rng.uniform(max(low, -1000.0), 0, 100_000)
        x = np.concatenate([rng.uniform(low, high, 100_000), below, small, rng.normal(0, 3, 100_000)]).clip(low, high)
    x = x.astype(dtype)[:: 20 if name.startswith("normal") else 1]  # mpmath takes 50 us for one
    return x, TRUTH[name](x.astype(np.float64 if dtype == np.float32 else np.longdouble))


@pytest.mark.parametrize("name", TRUTH)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_accuracy(library: ctypes.CDLL, name: str, dtype: type) -> None:
    x, truth = arguments(name, dtype)
    error = np.abs(call(library, name, x).astype(truth.dtype) - truth) / np.spacing(np.abs(truth).astype(dtype))
    assert error.max() <= ULP[name], f"worst at {x[error.argmax()]!r}: {error.max():.2f} ulp"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp_far_below_zero(library: ctypes.CDLL, dtype: type) -> None:
    least = np.finfo(dtype).smallest_normal
    got = call(library, "exp_below_zero", np.array([-INF, -1e30, -1000.0] * 8, dtype))
    assert (0 < got).all() and (got <= 1.001 * least).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("exp", [-INF, INF, np.nan, 0.0, 1000.0, -1000.0], [0.0, INF, np.nan, 1.0, INF, 0.0]),
        ("exp_below_zero", [np.nan, 0.0], [np.nan, 1.0]),
        ("log", [0.0, -1.0, INF, np.nan, 1.0], [-INF, np.nan, INF, np.nan, 0.0]),
        ("tanh", [-INF, INF, np.nan, 0.0], [-1.0, 1.0, np.nan, 0.0]),
        ("sigmoid", [-INF, INF, np.nan, 0.0], [0.0, 1.0, np.nan, 0.5]),
        ("atan", [-INF, INF, np.nan, 0.0], [-np.pi / 2, np.pi / 2, np.nan, 0.0]),
        ("normal_cdf", [-INF, INF, np.nan, 0.0, -40.0, 40.0, -1e30], [0.0, 1.0, np.nan, 0.5, 0.0, 1.0, 0.0]),
        ("normal_density", [-INF, INF, np.nan, -40.0, 1e30], [0.0, 0.0, np.nan, 0.0, 0.0]),
    ],
)
def test_edges(library: ctypes.CDLL, name: str, x: list[float], expected: list[float], dtype: type) -> None:
    got = call(library, name, np.array(x * 8, dtype))
    np.testing.assert_array_equal(got, np.array(expected * 8, dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_subnormal_numbers(library: ctypes.CDLL, dtype: type) -> None:
    x = np.array([np.finfo(dtype).tiny / 8] * 16, dtype)
    np.testing.assert_allclose(call(library, "log", x), np.log(x.astype(np.longdouble)).astype(dtype), rtol=1e-6)
    np.testing.assert_array_equal(call(library, "tanh", x), x)


def convert(library: ctypes.CDLL, name: str, x: np.ndarray, dtype: type) -> np.ndarray:
    # in pieces of 13, so that both the vectors of 8 and what is left over of them are used
    rows = [np.empty(len(piece), dtype) for piece in np.array_split(x, -(-len(x) // 13))]
    for piece, row in zip(np.array_split(x, -(-len(x) // 13)), rows, strict=True):
        piece = np.ascontiguousarray(piece)
        getattr(library, name)(
            ctypes.c_void_p(piece.ctypes.data), ctypes.c_void_p(row.ctypes.data), ctypes.c_int64(len(row))
        )
    return np.concatenate(rows)


def test_every_float16_is_read(library: ctypes.CDLL) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    expected = bits.view(np.float16).astype(np.float32)
    found = convert(library, "from_half", bits, np.float32)
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(expected))


def test_float16_is_rounded_to_nearest_even(library: ctypes.CDLL) -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.unique(halves[np.isfinite(halves)])
    ties = (finite[1:] + finite[:-1]) / 2  # exact in float32
    ties = np.concatenate([ties, [65520.0, -65520.0, 2.0**-25, -(2.0**-25)]]).astype(np.float32)
    around = [np.nextafter(ties, np.float32(side)) for side in (-INF, INF)]
    more = np.random.default_rng(0).integers(2**32, size=100_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([halves, ties, *around, more])
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    found = convert(library, "to_half", x, np.uint16).view(np.float16)
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found[~np.isnan(found)]), np.signbit(expected[~np.isnan(expected)]))
