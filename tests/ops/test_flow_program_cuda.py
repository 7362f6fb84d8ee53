"""The walk of a whole flow on a GPU, run on the host (tests/cuda_emulator), against the definition."""

import ctypes
import os
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from cuda_emulator import ONLY_TYPE, call, data, load, type_name
from flow.programs import Drawn, programs, tame
from flow.test_engine import check, insist, weights_of, wide
from flow.test_engine import results as definition
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from iin_fast.flow import ABSENT, NetBuilder, ProgramBuilder, Weights, affine, spline
from iin_fast.flow import layers as L

ROOM = 227 * 1024
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


class ProgramCall(ctypes.Structure):
    """A call of the walk (flow_program.cpp)."""

    _fields_ = [
        ("text", ctypes.c_char_p),
        *((n, ctypes.c_int64) for n in ("batch", "room", "tile")),
        *((n, ctypes.c_bool) for n in ("inverse", "base")),
        *((n, ctypes.c_void_p) for n in "x context parameters bool_mask y logdet".split()),
        *((n, ctypes.c_void_p) for n in "grad_y grad_logdet grad_x grad_context grads".split()),
        ("fits", ctypes.c_bool),
        *((n, ctypes.c_int64) for n in "log_rows log_rows_back launches launches_back bytes tape_bytes".split()),
    ]


def pointers(tensors: list[Tensor | None]) -> ctypes.Array:
    return (ctypes.c_void_p * max(len(tensors), 1))(*(None if t is None else t.data_ptr() for t in tensors))


def walk(
    drawn: Drawn,
    inverse: bool = False,
    base: bool = False,
    backward: bool = True,
    room: int = ROOM,
    tile: int = 0,
    tf32: int = 0,
    weights_of: Callable[[Tensor], Tensor] = weights_of,
) -> ProgramCall:
    """The call, its results in the attributes ``results``. tf32: products on tensor cores for each of float32; float64 has none."""
    x, context = drawn.x.detach(), None if drawn.context is None else drawn.context.detach()
    parameters = [p.detach().contiguous() for p in drawn.parameters]
    kinds = bytes(1 if p.dtype == torch.bool else 2 if p.dtype == torch.int64 else 0 for p in parameters)
    y, logdet = torch.full_like(x, torch.nan), x.new_full(x.shape[:1], torch.nan)
    grad_y, grad_logdet = weights_of(y), weights_of(logdet)
    grad_x = torch.full_like(x, torch.nan)
    grad_context = None if context is None else torch.full_like(context, torch.nan)
    grads = [torch.zeros_like(p) if p.requires_grad else None for p in drawn.parameters]
    given = pointers(parameters), kinds, pointers(grads)
    job = ProgramCall(
        drawn.program.text.encode(), len(x), room, tile, inverse, base, data(x), data(context),
        ctypes.cast(given[0], ctypes.c_void_p), ctypes.cast(ctypes.c_char_p(given[1]), ctypes.c_void_p), data(y), data(logdet),
    )  # fmt: skip
    if backward:
        job.grad_y, job.grad_logdet = grad_y.data_ptr(), grad_logdet.data_ptr()
        job.grad_x = grad_x.data_ptr()
        job.grad_context = None if grad_context is None else grad_context.data_ptr()
        job.grads = ctypes.cast(given[2], ctypes.c_void_p)
    if tf32 and x.dtype == torch.float32:
        call(load("flow_program_tensor").program_run_tensor, ctypes.c_int64(tf32), ctypes.byref(job))
    else:
        call(load("flow_program").program_run, type_name(x.dtype, "flow_program"), ctypes.byref(job))
    learned = [g for g in grads if g is not None]
    job.results = [y, logdet, grad_x, *learned, *([] if grad_context is None else [grad_context])]
    return job


def results(drawn: Drawn, **options) -> list[Tensor]:
    """As those of test_engine."""
    job = walk(drawn, **options)
    if not job.fits:  # as where two layers read one parameter
        assume(False)
    return job.results


def sequential(drawn: Drawn, inverse: bool) -> bool:
    """Whether a layer finds features one by one."""
    layers = drawn.program.layers
    turned = [isinstance(layer, L.Inverse) for layer in layers]
    inner = [layer.layer if isinstance(layer, L.Inverse) else layer for layer in layers]
    return any(isinstance(layer, L.Autoregressive) and t != inverse for layer, t in zip(inner, turned, strict=True))


@settings(max_examples=int(os.environ.get("IIN_FAST_EXAMPLES", 40)), deadline=None, suppress_health_check=SLOW)
@given(programs(batches=(1, 70)), st.booleans(), st.booleans())
def test_equals_the_definition(drawn: Drawn, inverse: bool, base: bool) -> None:
    assume(not sequential(drawn, inverse))
    check(drawn, ours=results, inverse=inverse, base=base)


@settings(max_examples=int(os.environ.get("IIN_FAST_EXAMPLES", 12)), deadline=None, suppress_health_check=SLOW)
@given(programs(batches=(1, 140), dims=(1, 8)), st.sampled_from([8, 16, 32, 64]))
def test_tiles_of_every_size(drawn: Drawn, tile: int) -> None:
    assume(not sequential(drawn, False))
    check(drawn, ours=partial(results, tile=tile))


@settings(max_examples=int(os.environ.get("IIN_FAST_EXAMPLES", 15)), deadline=None, suppress_health_check=SLOW)
@given(programs(batches=(1, 70), dims=(1, 12), layers=(1, 3), hidden=(1, 40)), st.booleans())
def test_three_products_of_tf32_are_as_exact_as_float32(drawn: Drawn, inverse: bool) -> None:
    assume(not sequential(drawn, inverse))
    check(drawn, ours=partial(results, tf32=3), inverse=inverse)


def whole_numbers(batch: int, hidden: int, dim: int) -> Drawn:
    """Additive couplings and an autoregressive layer whose values, and gradients of whole gradients, are small whole numbers."""
    random = torch.Generator().manual_seed(batch)

    def some(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=random).float()

    build = ProgramBuilder(dim, 3)
    ends = list(range(dim // 2)), list(range(dim // 2, dim))
    for conditioning, transformed in (ends, ends[::-1]):
        net, widths = NetBuilder(), (len(conditioning) + 3, hidden, hidden, len(transformed))
        value = net.concat(0, 1)
        for number, (inputs, units) in enumerate(pairwise(widths)):
            value = net.act(value, "relu") if number else value
            weight = some(units, inputs) * (torch.rand(units, inputs, generator=random) < 4 / inputs)
            bias = build.ref(some(units).requires_grad_()) if number else ABSENT
            value = net.dense(value, Weights(units, build.ref(weight.requires_grad_()), bias))
        build.coupling(conditioning, transformed, net.build(value), affine(len(transformed), "none"))
    build.linear(build.ref((some(dim, dim).tril(-1) + torch.eye(dim)).requires_grad_()), storage="square", form="plain")
    return Drawn(build.build(), list(build.tensors), some(batch, dim).requires_grad_(), some(batch, 3).requires_grad_())


@pytest.mark.parametrize("tf32", [3] if ONLY_TYPE else [1, 3])
@pytest.mark.parametrize(
    ("batch", "hidden", "dim", "tile"), [(70, 70, 7, 64), (21, 33, 9, 16), (40, 130, 5, 32), (9, 3, 2, 8)]
)
def test_whole_numbers_are_the_same_on_tensor_cores(tf32: int, batch: int, hidden: int, dim: int, tile: int) -> None:
    """TF32 has them all, so that no entry may be off, in tiles and panels of any size."""
    drawn = whole_numbers(batch, hidden, dim)

    def grads(t: Tensor) -> Tensor:
        return (torch.arange(t.numel()) % 3 - 1).reshape(t.shape).to(t.dtype)

    found = walk(drawn, tile=tile, tf32=tf32, weights_of=grads).results
    wanted = definition(drawn.to(torch.float64), "reference", weights_of=grads)
    assert all(float(t.abs().max()) < 2**11 for t in wanted)
    for place, (have, want) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(have.double(), want), f"result {place}"


@pytest.mark.values
def test_one_product_of_tf32_is_near() -> None:
    drawn = small(40, hidden=30).to(torch.float32)
    for found, want in zip(walk(drawn, tf32=1).results, definition(drawn, "reference"), strict=True):
        assert float((found - want).norm() / want.norm()) < 5e-3


@settings(max_examples=int(os.environ.get("IIN_FAST_EXAMPLES", 20)), deadline=None, suppress_health_check=SLOW)
@given(
    programs(
        kinds=("autoregressive", "autoregressive", "affine", "permute"), batches=(1, 40), dims=(1, 9), layers=(1, 3)
    ),
    st.booleans(),
)
def test_sampling_from_autoregressive_layers(drawn: Drawn, inverse: bool) -> None:
    wanted = definition(drawn, "reference", inverse=inverse)[:2]
    assume(tame(*wanted))
    job = walk(drawn, inverse=inverse, backward=False)
    assume(job.fits)
    for found, want in zip(job.results[:2], wanted, strict=True):
        assert_close(found, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("batch", "inverse"),
    [(1, True), (70, False), *([] if ONLY_TYPE else [(1, False), (15, True), (15, False), (70, True)])],
)
def test_nets_of_several_panels(batch: int, inverse: bool) -> None:
    check(wide(batch), insist, ours=results, inverse=inverse, base=True)


def small(batch: int, hidden: int = 12, dim: int = 4) -> Drawn:
    """Two couplings with a spline, whose nets read a context."""
    random = torch.Generator().manual_seed(0)
    build = ProgramBuilder(dim, 2)
    for turn in (False, True):
        halves = list(range(dim // 2)), list(range(dim // 2, dim))
        t = spline(3, tail_bound=2.0)
        weights, widths = [], (dim - dim // 2 + 2, hidden, t.count * (dim // 2))
        for inputs, units in pairwise(widths):
            weight = (torch.randn(units, inputs, generator=random, dtype=torch.float64) / inputs**0.5).requires_grad_()
            bias = torch.zeros(units, dtype=torch.float64).requires_grad_()
            weights.append(Weights(units, build.ref(weight), build.ref(bias)))
        net = NetBuilder()
        first = net.dense(net.concat(0, 1), weights[0])
        build.coupling(*halves[:: -1 if turn else 1], net.build(net.dense(net.act(first, "silu"), weights[1])), t)
    x, context = (torch.randn(batch, n, generator=random, dtype=torch.float64).requires_grad_() for n in (dim, 2))
    return Drawn(build.build(), list(build.tensors), x, context)


@pytest.mark.values
def test_more_tiles_than_accumulators() -> None:
    drawn = small(2100)
    job = walk(drawn, tile=8)
    assert 2100 > 256 << job.log_rows_back
    for found, want in zip(job.results, definition(drawn, "reference"), strict=True):
        assert_close(found, want, rtol=1e-9, atol=1e-11)
    drawn = whole_numbers(2100, 5, 3)
    found, wanted = (walk(drawn, tile=8, tf32=tf32, weights_of=torch.ones_like).results for tf32 in (3, 0))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_launches() -> None:
    """The table where the program is new; packing and the walk; and packing once more for the sums of gradients."""
    job = walk(small(40))
    tables, tapes = (-(-size // 3968) for size in (job.bytes, job.tape_bytes))
    assert (job.launches, job.launches_back) == (tables + 2, tapes + 2)


def test_the_same_bits_every_time() -> None:
    first, second = (walk(small(300).to(torch.float32)).results for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("inverse", [False, True])
def test_what_is_not_finite_stays_in_its_row(value: float, inverse: bool) -> None:
    drawn = small(11)
    want = walk(drawn, inverse=inverse, backward=False).results
    with torch.no_grad():
        drawn.x[4, 1] = value
    found = walk(drawn, inverse=inverse, backward=False).results
    assert not bool(found[0][4].isfinite().all())
    rest = [row for row in range(11) if row != 4]
    assert all(torch.equal(a[rest], b[rest]) for a, b in zip(found[:2], want[:2], strict=True))


def test_what_a_block_has_no_room_for_is_refused() -> None:
    assert walk(small(9), room=24 * 1024).fits
    assert not walk(small(9), room=4 * 1024).fits
