"""What the Triton kernels of all ops share: launches, tuning, memory of rows, and elementary functions.

A kernel is launched through :func:`launch`, which can also write down what would be launched
(:func:`recorded`), so that every kernel compiles for a target that this machine does not have.

Names of a kernel's arguments, which every launch spells out:

- ``x``: a pointer has the name of its tensor. Its shape stands beside it in the kernel's signature.
- ``x_row``, ``x_net``: the elements from one row or net of ``x`` to the next; :func:`strided` gives them with ``x``. An axis
  without such a name is contiguous.
- ``batch``, ``width``: a size has the name of its axis.
- ``INVERSE``: what is known when the kernel is compiled. ``BLOCK_M``: of a tile. ``WIDE``: the type that sums are kept in.

A pointer that a launch does not use is given another tensor's, since Triton compiles a kernel anew where one is None.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "INTERPRETED",
    "CompileCase",
    "add_term",
    "atan",
    "autotuned",
    "bucket",
    "ceil_div",
    "compensated",
    "compile_case",
    "launch",
    "on_device",
    "power_of_two",
    "recorded",
    "rows",
    "softplus",
    "strided",
    "sum_parts",
    "tanh",
    "tile_of",
    "tiles",
    "tl_dtype",
]

INTERPRETED: bool = triton.knobs.runtime.interpret if hasattr(triton, "knobs") else False
"""Kernels run in Triton's interpreter (TRITON_INTERPRET=1 when Triton was imported), on CPU tensors too."""


FUSED = {"enable_fp_fusion": True}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def bucket(batch: int) -> int:
    """The batch as a key of tuning: its power of two, at least 16, so that a varying batch does not tune at each call."""
    return max(16, power_of_two(batch))


def tl_dtype(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def rows(t: Tensor, batch: int, width: int) -> Tensor:
    """``t [batch, ...]`` as [batch, width] with columns one element apart; a copy only where strides demand one."""
    if t.dim() != 2:
        t = t.reshape(batch, width)
    return t if width <= 1 or t.stride(1) == 1 else t.contiguous()


@contextmanager
def on_device(x: Tensor) -> Iterator[None]:
    """Launch on the device of x, whatever the current one is."""
    if x.is_cuda:
        with torch.cuda.device(x.device):
            yield
    elif x.device.type == "xpu":
        with torch.xpu.device(x.device):
            yield
    else:
        yield


def autotuned(
    configs: Sequence[triton.Config], key: Sequence[str], fitting: Callable[..., list[triton.Config]] | None = None
) -> Callable[[Any], Any]:
    """triton.autotune, results kept on disk from run to run; the interpreter takes the first config.

    ``fitting(configs, {}, **arguments)`` picks the configs worth trying for the arguments of a launch.
    """
    configs = list(configs[:1]) if INTERPRETED else list(configs)
    prune = None if fitting is None else {"early_config_prune": fitting}
    return triton.autotune(configs, list(key), prune_configs_by=prune, cache_results=not INTERPRETED)


class CompileCase(NamedTuple):
    """What triton.compile needs for a kernel as it is launched."""

    name: str
    kernel: Any  # triton.JITFunction
    signature: dict[str, Any]  # a type's name, or a tuple of them
    constexprs: dict[str, Any]
    options: dict[str, Any]  # num_warps, num_stages; "attrs": what is divisible by 16


_recording: list[CompileCase] | None = None
_label = ""


def launch(kernel: Any, grid: Any, /, **arguments: Any) -> None:
    """Run a kernel, or write it down inside :func:`recorded`. ``arguments`` may hold num_warps and num_stages too.

    Products and sums are fused, as CUDA C++ does: Triton 3.9 warns where that is not said, and 3.10 would not.
    """
    if _recording is None:
        kernel[grid](**arguments, **FUSED)
    else:
        _record(_recording, kernel, arguments)


def strided(axes: str, /, **tensors: Tensor) -> dict[str, Any]:
    """The tensors, and how far apart their first axes lie: ``strided("row", x=x)`` is ``{"x": x, "x_row": x.stride(0)}``."""
    strides = {f"{name}_{axis}": t.stride(i) for name, t in tensors.items() for i, axis in enumerate(axes.split())}
    return tensors | strides


def tiles(batch: int, width: int, block: int) -> Callable[[dict[str, int]], tuple[int]]:
    """The grid of a kernel that gives each program a tile of rows and of ``block`` columns, found by :func:`tile_of`.

    All on the first axis: the others hold 65535 programs, which rows of 2^25 columns exceed.
    """
    return lambda meta: (ceil_div(batch, meta["TILE"] // block) * ceil_div(width, block),)


_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def _record(cases: list[CompileCase], kernel: Any, arguments: dict[str, Any]) -> None:
    """One case for each config of the kernel, specialised as Triton does: on 1, None, and multiples of 16."""
    tuned = isinstance(kernel, triton.runtime.Autotuner)
    function = kernel.fn if tuned else kernel
    configs = kernel.configs if tuned else [None]
    if tuned and kernel.early_config_prune is not None:
        configs = kernel.early_config_prune(configs, {}, **arguments)
    for number, config in enumerate(configs):
        options: dict[str, Any] = {"num_warps": 4, "num_stages": 3, **FUSED}
        values = dict(arguments)
        if config is not None:
            values |= config.kwargs
            options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
        options |= {key: values.pop(key) for key in ("num_warps", "num_stages") if key in values}
        signature: dict[str, Any] = {}
        constexprs: dict[str, Any] = {}
        attrs: dict[tuple[int, ...], list[list[Any]]] = {}
        for parameter in function.params:
            name, value = parameter.name, values[parameter.name]
            free = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (free and type(value) is int and value == 1):
                signature[name], constexprs[name] = "constexpr", value
                continue
            if isinstance(value, tuple):
                signature[name], divisible = ("i32",) * len(value), False
            elif isinstance(value, Tensor):
                signature[name] = "*" + _TYPES[value.dtype]
                divisible = value.storage_offset() * value.element_size() % 16 == 0
            elif isinstance(value, int):
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                divisible = value % 16 == 0
            else:
                signature[name], divisible = "fp32", False
            if divisible and free:
                attrs[(parameter.num,)] = [["tt.divisibility", 16]]
        shown = f"{_label} {function.__name__.strip('_')}" + (f" #{number}" if len(configs) > 1 else "")
        number_of = sum(c.name.split(" (")[0] == shown for c in cases)  # the same kernel with other flags
        shown += f" ({number_of + 1})" if number_of else ""
        case = CompileCase(shown, function, signature, constexprs, {**options, "attrs": attrs})
        same = (c for c in cases if c.kernel is function and c[2:] == case[2:])
        if next(same, None) is None:
            cases.append(case)


def recorded(calls: dict[str, Callable[[], Any]]) -> list[CompileCase]:
    """What the calls would launch, each kernel once for each way it is specialised; on tensors of device "meta"."""
    global _recording, _label
    if INTERPRETED:
        raise RuntimeError("compile_cases: Triton runs in its interpreter; unset TRITON_INTERPRET in a fresh process")
    _recording = []
    try:
        for _label, call in calls.items():
            call()
        return _recording
    finally:
        _recording, _label = None, ""


def compile_case(case: CompileCase, target: Any) -> Any:
    """Compile a case for a ``triton.backends.compiler.GPUTarget``, with or without that GPU in the machine."""
    options = dict(case.options)
    source = triton.compiler.ASTSource(case.kernel, case.signature, case.constexprs, options.pop("attrs"))
    return triton.compile(source, target=target, options=options)


@triton.jit
def tile_of(width, BLOCK_N: tl.constexpr):
    """The tile of rows and the tile of columns of this program, in the grid of :func:`tiles`."""
    across = tl.cdiv(width, BLOCK_N)
    return tl.program_id(0) // across, tl.program_id(0) % across


# Elementary functions on float32 and float64. Not libdevice's, which the interpreter and other makers' GPUs lack.


@triton.jit
def tanh(x):
    """Near 0 x + x³ P(x²), beyond (1 - e) / (1 + e) with e = exp(-2|x|): no cancellation in either."""
    magnitude = tl.abs(x)
    e = tl.exp(-2 * magnitude)
    far = (1 - e) / (1 + e)
    far = tl.where(x < 0, -far, far)
    q = x * x
    if x.dtype == tl.float64:
        # Lambert's continued fraction, enough levels for 0.25: x / (1 + q / (3 + q / (5 + ...)))
        near = x / (1 + q / (3 + q / (5 + q / (7 + q / (9 + q / (11 + q / 13))))))
        return tl.where(magnitude < 0.25, near, far)
    near = x + x * q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835 - q * (1382 / 155925)))))
    return tl.where(magnitude < 0.35, near, far)


@triton.jit
def atan(x):
    """Folded to |u| <= tan(pi/8), then the series; the pieces and terms of csrc/common/math.h."""
    magnitude = tl.abs(x)
    beyond = magnitude > 2.414213562373095
    middle = magnitude > 0.41421356237309503
    zero = tl.zeros_like(x)  # constants in the type of x: a bare Python float is a float32
    numerator = tl.where(beyond, zero - 1, tl.where(middle, magnitude - 1, magnitude))
    denominator = tl.where(beyond, magnitude, tl.where(middle, magnitude + 1, zero + 1))
    offset = tl.where(beyond, zero + 1.5707963267948966, tl.where(middle, zero + 0.7853981633974483, zero))
    u = numerator / denominator
    q = u * u
    total = zero
    TERMS: tl.constexpr = 21 if x.dtype == tl.float64 else 9
    for i in tl.static_range(TERMS):
        total = q * ((1 - 2 * ((TERMS - i) % 2)) / (2 * (TERMS - i) + 1) + total)
    result = offset + (u + u * total)
    return tl.where(x < 0, -result, result)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), without overflow or cancellation, and its derivative, the sigmoid."""
    e = tl.exp(-tl.abs(x))
    u = 1 + e
    log1p = tl.log(u) - ((u - 1) - e) / u  # what rounding took from u comes back
    return tl.maximum(x, 0.0) + log1p, tl.where(x >= 0, 1 / u, e / u)


@triton.jit
def add_term(total, lost, term):
    """total + term, and ``lost`` with the rounding error of that addition: CompensatedSum of csrc/common/sum.h."""
    result = total + term
    added = result - total
    return result, lost + ((total - (result - added)) + (term - added))


@triton.jit
def compensated(total, lost):
    """The sum that :func:`add_term` made. Of an infinite one ``lost`` is NaN."""
    return tl.where(tl.abs(total) < float("inf"), total + lost, total)


@triton.jit(do_not_specialize=["batch"])
def _sum_parts(parts, out, batch, count, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """out[row] = parts[0, row] + ... + parts[count - 1, row], always in this order."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < batch
    total = tl.zeros([BLOCK], WIDE)
    lost = tl.zeros([BLOCK], WIDE)
    at = parts + row
    for _ in range(count):
        total, lost = add_term(total, lost, tl.load(at, mask=valid, other=0.0))
        at += batch
    tl.store(out + row, compensated(total, lost), mask=valid)


def sum_parts(parts: Tensor, out: Tensor) -> None:
    """Sum ``parts [count, batch]`` into ``out [batch]``, in a fixed order."""
    count, batch = parts.shape
    grid = (ceil_div(batch, 128),)
    sizes = dict(batch=batch, count=count, WIDE=tl_dtype(out.dtype), BLOCK=128)
    launch(_sum_parts, grid, parts=parts, out=out, num_warps=4, **sizes)
