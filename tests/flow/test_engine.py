"""The compiled op against the definition: values, log-dets and all gradients, on every instruction set, over random programs."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import iin_fast
from flow.programs import KINDS, Drawn, masks, programs, tame
from flow.test_program import corrupted
from iin_fast._library import cpu_isa
from iin_fast.flow import FlowProgram, NetBuilder, ProgramBuilder, Weights, affine, mlp, spline
from iin_fast.flow.layers import Net
from iin_fast.nn import RealNVP
from iin_fast.ops.flow_program import flow_program
from iin_fast.ops.flow_program.checks import KEEP
from iin_fast.testing.backends import relative_error

MEMORY = st.sampled_from(sorted(KEEP))
EDGES = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)  # of tiles of 16, 32 and 64 rows


def weights_of(output: Tensor) -> Tensor:
    """The gradient that each entry of an output gets."""
    return torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).reshape(output.shape)


def results(drawn: Drawn, backend: str, weights_of: Callable[[Tensor], Tensor] = weights_of, **options) -> list[Tensor]:
    """Outputs, and the gradients of a number that weights all of them differently."""
    with iin_fast.backend(backend):
        outputs = flow_program(drawn.x, drawn.context, drawn.parameters, drawn.program, **options)
        score = sum((t * weights_of(t)).sum() for t in outputs)
        grads = torch.autograd.grad(score, drawn.inputs(), allow_unused=True)
    zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(drawn.inputs(), grads, strict=True)]
    return [*(t.detach() for t in outputs), *zeros]


def differences(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """The largest difference of each result."""
    return [relative_error(f, w) * float(w.abs().max() if w.numel() else 0) for f, w in zip(found, wanted, strict=True)]


def sizes(wanted: list[Tensor]) -> list[tuple[float, float]]:
    """Of each result its own largest entry, and that of its like: of all gradients, which have one loss; at least 1.

    A log-det is a sum of larger terms. A gradient behind a saturated activation is a difference of numbers of the latter size.
    """
    own = [float(w.abs().max()) if w.numel() else 0.0 for w in wanted]
    return [(size, max(1.0, size) if place < 2 else max(1.0, *own[2:])) for place, size in enumerate(own)]


def insist(holds: bool) -> None:
    """What is assumed of drawn programs holds for those that a test has made."""
    assert holds


def check(
    drawn: Drawn, assume: Callable[[bool], object] = assume, ours: Callable[..., list[Tensor]] | None = None, **options
) -> None:
    """float64: equal. float32: as near to the truth as the definition in float32 is.

    Gradients jump at kinks and knots, where float32 may fall on the other side: they are held to a hundredth alone.
    """
    run = ours or partial(results, backend="cpp")
    wanted = results(drawn, "reference", **options)
    assume(tame(*wanted))
    nudged = results(drawn.nudged(), "reference", **options)
    assume(all(relative_error(n, w) < 1e-10 for n, w in zip(nudged, wanted, strict=True)))
    found = run(drawn, **options)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in wanted]
    for place, (error, (own, like)) in enumerate(zip(differences(found, wanted), sizes(wanted), strict=True)):
        assert error <= 1e-9 * own + 1e-13 * like, f"result {place} in float64"
    rounded = drawn.to(torch.float32)
    truth = results(rounded.to(torch.float64), "reference", **options)
    plain, found = results(rounded, "reference", **options), run(rounded, **options)
    assert all(t.dtype == torch.float32 for t in found)
    errors = differences(found, truth), differences(plain, truth)
    for place, (error, least, (own, like)) in enumerate(zip(*errors, sizes(truth), strict=True)):
        slack = 1e-5 * own + 1e-6 * like if place < 2 else 1e-2 * like
        assert error <= 8 * least + slack, f"result {place} in float32"


@settings(max_examples=int(os.environ.get("IIN_FAST_EXAMPLES", 100)), deadline=None)
@given(programs(), st.booleans(), st.booleans(), MEMORY)
def test_equals_the_definition(drawn: Drawn, inverse: bool, base: bool, memory: str) -> None:
    check(drawn, inverse=inverse, base=base, memory=memory)


@settings(max_examples=int(os.environ.get("IIN_FAST_EXAMPLES", 40)), deadline=None)
@given(st.data(), st.sampled_from(EDGES), st.booleans(), MEMORY)
def test_edges_of_tiles(data: st.DataObject, batch: int, inverse: bool, memory: str) -> None:
    check(data.draw(programs(batches=(batch, batch), dims=(1, 8))), inverse=inverse, memory=memory)


LARGE = partial(programs, kinds=("coupling", "autoregressive", "linear"), dims=(2, 6), layers=(1, 3), hidden=(185, 240))


@settings(max_examples=int(os.environ.get("IIN_FAST_EXAMPLES", 40)), deadline=None)
@given(LARGE(batches=(40, 300)), st.booleans(), MEMORY)
def test_large_nets(drawn: Drawn, inverse: bool, memory: str) -> None:
    """Their nets are wide enough that threads share them, for 256 rows at a time."""
    check(drawn, inverse=inverse, memory=memory)


@pytest.mark.parametrize("isa", sorted({"avx512", "avx2", "baseline"} - {cpu_isa()}))
def test_every_other_instruction_set(isa: str) -> None:
    """The tests above in a process of its own; a machine without it runs the best that it has."""
    environment = {**os.environ, "IIN_FAST_CPU": isa, "IIN_FAST_EXAMPLES": "40", "IIN_FAST_BACKEND": ""}
    names = [
        f"{Path(__file__)}::{test.__name__}"
        for test in (test_equals_the_definition, test_edges_of_tiles, test_large_nets)
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "3 passed" in done.stdout


def wide(batch: int) -> Drawn:
    """A program of large nets, which threads share, with layers of all kinds between them."""
    random = torch.Generator().manual_seed(batch)

    def parameter(*shape: int, scale: float = 0.3) -> Tensor:
        return (scale * torch.randn(*shape, generator=random, dtype=torch.float64)).requires_grad_()

    dim, context, hidden = 5, 3, 130
    build = ProgramBuilder(dim, context)

    def net(first: int, count: int, outputs: tuple[int, ...]) -> Net:
        net, ends, widths = NetBuilder(), [], (2 + count, hidden, hidden)
        value = net.concat(0, net.context(first, count)) if count else 0
        for out in outputs:
            here = value
            for number, (inputs, units) in enumerate(pairwise((*widths, out))):
                here = net.act(here, "leaky_relu", 0.2) if number else here
                weight = parameter(units * inputs, scale=inputs**-0.5)
                here = net.panels(here, Weights(units, build.ref(weight), build.ref(parameter(units))))
            ends.append(here)
        return net.build(*ends)

    for inverse in (False, True):
        t = spline(4, tail_bound=3.0, gain=0.5)
        build.affine(build.ref(parameter(dim)), build.ref(parameter(dim)), form="exp", inverse=inverse)
        build.coupling((0, 3), (1, 4), net(1, 2, (2 * t.count,)), t, inverse=inverse)
        build.linear(
            build.ref((parameter(dim, dim) / dim).detach().requires_grad_()), storage="square", inverse=inverse
        )
        build.coupling((4, 1), (0, 2), net(0, 0, (2, 2)), affine(2, "tanh"), inverse=inverse)
        build.activation(0.7)
        build.shuffle(build.ref(torch.randperm(dim, generator=random)), inverse=inverse)
    x, given = (torch.randn(batch, n, generator=random, dtype=torch.float64).requires_grad_() for n in (dim, context))
    return Drawn(build.build(), list(build.tensors), x, given)


@pytest.mark.parametrize("batch", [1, 15, 70, 300])
@pytest.mark.parametrize("memory", sorted(KEEP))
@pytest.mark.parametrize("inverse", [False, True])
def test_nets_that_threads_share(batch: int, memory: str, inverse: bool) -> None:
    check(wide(batch), insist, inverse=inverse, base=True, memory=memory)


@pytest.mark.parametrize("memory", sorted(KEEP))
def test_many_rows_are_the_sum_of_their_slices(memory: str) -> None:
    """A wide walk takes 2^10 rows at once."""
    most, drawn = 3 << 10, wide((3 << 10) + 40)
    options = dict(base=True, memory=memory)

    def run(rows: slice) -> tuple[list[Tensor], list[Tensor]]:
        x, context = (t.detach()[rows].requires_grad_() for t in (drawn.x, drawn.context))
        outputs = flow_program(x, context, drawn.parameters, drawn.program, **options)
        learned = [p for p in drawn.parameters if p.requires_grad]
        of_x, of_context, *of_parameters = torch.autograd.grad(
            sum(t.sin().sum() for t in outputs), [x, context, *learned]
        )
        return [t.detach() for t in outputs] + [of_x, of_context], of_parameters

    whole, first, last = (run(rows) for rows in (slice(None), slice(most), slice(most, None)))
    for all_rows, parts in zip(whole[0], zip(first[0], last[0], strict=True), strict=True):
        assert torch.equal(all_rows, torch.cat(parts))
    for total, parts in zip(whole[1], zip(first[1], last[1], strict=True), strict=True):
        assert relative_error(total, sum(parts)) < 1e-12


def masked(batch: int) -> Drawn:
    """Autoregressive layers with so many masked weights that threads share them, though each net is small."""
    random = torch.Generator().manual_seed(batch)
    dim, t = 3, spline(4, tail_bound=3.0, gain=0.5)
    build = ProgramBuilder(dim)
    for dtype in (torch.bool, torch.float64):
        found = masks([1, 0, 2], [101, 67], [j for j in range(dim) for _ in range(t.count)])
        layers = []
        for mask in found:
            weight = torch.randn(mask.shape, generator=random, dtype=torch.float64) / mask.shape[1] ** 0.5
            bias = torch.randn(len(mask), generator=random, dtype=torch.float64)
            parts = weight.requires_grad_(), bias.requires_grad_(), mask.to(dtype)
            layers.append(Weights(len(mask), *(build.ref(part) for part in parts)))
        build.autoregressive(mlp(layers, activation="tanh"), t)
    x = torch.randn(batch, dim, generator=random, dtype=torch.float64)
    return Drawn(build.build(), list(build.tensors), x.requires_grad_(), None)


@pytest.mark.parametrize("inverse", [False, True])
def test_masks_that_threads_apply(inverse: bool) -> None:
    """Other weights at each call: the workspace holds those of the last one."""
    before = torch.get_num_threads()
    try:
        for threads, batch, memory in [(1, 3, "auto"), (2, 70, "save"), (5, 71, "recompute"), (3, 72, "checkpoint")]:
            torch.set_num_threads(threads)
            check(masked(batch), insist, inverse=inverse, memory=memory)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_of_many_rows_are_those_of_few(dtype: torch.dtype) -> None:
    """Beyond 1024 rows tiles are larger. Weights that a mask hides count where they are NaN, as times 0 they are."""
    drawn = masked(1100).to(dtype)

    def sample(rows: slice) -> Tensor:
        return flow_program(drawn.x[rows], None, drawn.parameters, drawn.program, inverse=True)[0]

    parts = [sample(slice(first, first + 110)) for first in range(0, 1100, 110)]
    assert torch.equal(sample(slice(None)), torch.cat(parts))
    with iin_fast.backend("reference"):
        assert relative_error(parts[0], sample(slice(110))) < (1e-4 if dtype == torch.float32 else 1e-11)
    for weight, mask in zip(drawn.parameters, drawn.parameters[2:], strict=False):
        if weight.requires_grad and weight.shape == mask.shape and weight.dim() == 2:
            break
    place = (mask.view(-1) == 0).nonzero()[0]
    kept = weight.view(-1)[place].clone()
    for value in (float("nan"), float("inf")):
        weight.view(-1)[place] = value
        with iin_fast.backend("reference"):
            lost = ~sample(slice(40)).isfinite().all(1)
        assert lost.all() and not sample(slice(40)).isfinite().all(1).any()
    weight.view(-1)[place] = kept
    assert torch.equal(sample(slice(110)), parts[0])


@settings(max_examples=45, deadline=None)
@given(
    st.one_of(programs(batches=(65, 300)), LARGE(batches=(40, 300)), st.builds(wide, st.just(300))),
    st.booleans(),
    MEMORY,
)
def test_same_bits_with_any_number_of_threads(drawn: Drawn, inverse: bool, memory: str) -> None:
    drawn = drawn.to(torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(drawn, "cpp", inverse=inverse, memory=memory)
        assume(tame(*alone))
        for threads in (2, 5):
            torch.set_num_threads(threads)
            for ours, wanted in zip(results(drawn, "cpp", inverse=inverse, memory=memory), alone, strict=True):
                assert torch.equal(ours, wanted)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_densities_under_weights_beyond_the_caches() -> None:
    """Each thread takes rows of its own, from 128 on; other batches and one thread give the same bits."""
    random = torch.Generator().manual_seed(0)
    flow = RealNVP(4, n_flows=2, hidden_dim=1500, actnorm=False, generator=random)
    assert 4 * sum(p.numel() for p in flow.parameters()) > 16 << 20
    x = torch.randn(513, 4, generator=random)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = flow.log_prob(x)
        for threads, rows in [(2, 513), (2, 256), (2, 257), (3, 384), (3, 383), (4, 513)]:
            torch.set_num_threads(threads)
            assert torch.equal(flow.log_prob(x[:rows]), alone[:rows])
    finally:
        torch.set_num_threads(before)
    with iin_fast.backend("reference"):
        assert relative_error(alone, flow.double().log_prob(x.double())) < 1e-5


@pytest.mark.parametrize(("value", "reason"), [(0, "nothing conditions"), (1, "the program has no context")])
def test_a_step_that_reads_an_empty_value_is_an_error(value: int, reason: str) -> None:
    """Of 0 features; Python's own checks refuse it, too."""
    text = f"flow 1 1 0 1 1 coupling 0 1 0 net 1 dense {value} 2 0 0 0 0 -1 0 1 2 affine 1 1.0 1.0 0 1 1 1"
    with pytest.raises(ValueError, match=reason):
        FlowProgram.parse(text)
    with pytest.raises(RuntimeError, match=f"layer 0: value {value} is empty: {reason}"):
        torch.ops.iin_fast.flow_program(torch.zeros(3, 1), None, [torch.zeros(4)], text, False, False, 2)


@settings(max_examples=200, deadline=None)
@given(programs(batches=(3, 3), dims=(1, 6)), st.integers(0, 2**20), st.booleans())
def test_a_corrupted_text_is_an_error_or_a_program(drawn: Drawn, seed: int, inverse: bool) -> None:
    """Given to the library itself, past the checks of Python: it refuses what it cannot read, and never reads out of bounds."""
    text = corrupted(drawn.program.text, seed)
    x, context, parameters = drawn.x.detach(), drawn.context, [p.detach() for p in drawn.parameters]
    context = None if context is None else context.detach()
    try:
        y, logdet, saved = torch.ops.iin_fast.flow_program(x, context, parameters, text, inverse, False, 2)
    except RuntimeError as error:
        assert "flow_program" in str(error)
        return
    assert y.shape == x.shape and logdet.shape == x.shape[:1]
    wanted = "1" * len(parameters)
    grads = torch.ones_like(y), torch.ones_like(logdet)
    arguments = x, saved, context, parameters, text, inverse, False, 2, context is not None, wanted
    if all(p.dtype != torch.bool for p in parameters):
        torch.ops.iin_fast.flow_program_backward(*grads, *arguments)


@settings(max_examples=100, deadline=None)
@given(programs(batches=(3, 3), dims=(1, 6)), st.data())
def test_a_tensor_of_another_size_or_type_is_an_error(drawn: Drawn, data: st.DataObject) -> None:
    """Given to the library itself, as after the checks of Python."""
    assume(any(p.is_floating_point() for p in drawn.parameters))
    used = sorted({read.ref.tensor for reads in drawn.program.reads for read in reads})
    place = data.draw(st.sampled_from(used))
    ends = [
        r.ref.offset + torch.Size(r.shape).numel()
        for reads in drawn.program.reads
        for r in reads
        if r.ref.tensor == place
    ]
    assume(max(ends) > 0)
    parameters = [p.detach() for p in drawn.parameters]
    value = parameters[place]
    parameters[place] = data.draw(
        st.sampled_from(
            [
                value.flatten()[: max(ends) - 1],
                value.float() if value.is_floating_point() else value.int(),
                value.to("meta"),
            ]
        )
    )
    context = None if drawn.context is None else drawn.context.detach()
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.iin_fast.flow_program(drawn.x.detach(), context, parameters, drawn.program.text, False, False, 0)


def test_masks_without_an_order_are_an_error() -> None:
    """Where Python did not look: sampling would never know a first feature."""
    text = "flow 1 2 0 2 1 autoregressive net 1 dense 0 2 0 0 -1 0 1 0 1 2 affine 4 1.0 1.0 -1 1 0 1"
    FlowProgram.parse(text)
    parameters = [torch.ones(2, 2), torch.ones(2, 2)]
    with pytest.raises(RuntimeError, match="layer 0: its masks leave no order"):
        torch.ops.iin_fast.flow_program(torch.zeros(3, 2), None, parameters, text, True, False, 0)


ENDS = [0.0, 1e-4, 0.3, 5.0, 17.0, 64.0, 80.0, 86.9, 88.5, 104.5, 158.6, 710.5, 2e3, 1e6, 1e30]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["relu", "leaky_relu", "elu", "silu", "gelu", "tanh", "sigmoid", "atan"])
def test_activations_at_the_ends_of_their_range(kind: str, dtype: torch.dtype) -> None:
    """exp(x) of an ELU was garbage below -87 in float32."""
    x = torch.zeros(2 * len(ENDS), 2, dtype=dtype)
    x[:, 0] = torch.tensor(ENDS + [-end for end in ENDS])
    builder, one = ProgramBuilder(2), torch.ones(1, 1, dtype=dtype)
    weights = Weights(1, builder.ref(one))
    builder.coupling([0], [1], mlp([weights, weights], activation=kind, slope=0.3), affine(1, "none"))
    found, grads = [], []
    for name in ("reference", "cpp"):
        given = x.clone().requires_grad_()
        with iin_fast.backend(name):
            y, _ = flow_program(given, None, builder.tensors, builder.build())
        y[:, 1].sum().backward()
        found.append(y[:, 1].detach())
        grads.append(given.grad)
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("place", ["x", "parameter"])
@settings(max_examples=40, deadline=None)
@given(data=st.data(), inverse=st.booleans(), value=st.sampled_from([float("nan"), float("inf")]))
def test_what_is_not_finite_stays_so(place: str, data: st.DataObject, inverse: bool, value: float) -> None:
    """A row that the definition cannot compute has no finite result in the engine."""
    drawn = data.draw(programs(batches=(1, 40), dims=(1, 6), kinds=KINDS))
    parameters = [p for p in drawn.parameters if p.requires_grad and p.numel()]
    tensor = drawn.x if place == "x" or not parameters else data.draw(st.sampled_from(parameters))
    with torch.no_grad():
        tensor.view(-1)[0] = value
        arguments = drawn.x, drawn.context, drawn.parameters, drawn.program
        with iin_fast.backend("reference"):
            y, logdet = flow_program(*arguments, inverse=inverse)
        lost = ~(y.isfinite().all(1) & logdet.isfinite())
        y, logdet = flow_program(*arguments, inverse=inverse)
    assert not (y.isfinite().all(1) & logdet.isfinite())[lost].any()
