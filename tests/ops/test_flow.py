"""flow: the compiled op against the definition, and the properties of the map."""

import itertools
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from numerics import fixed_weights, with_gradients
from op_cases import BACKEND, FLOW, LAYOUTS, FlowShape, cases, environment, few, flow_inputs, rows_apart
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import iin_fast
from iin_fast.ops.flow import flow
from iin_fast.ops.flow.program import flow_as_program
from iin_fast.ops.flow_program.engine import INVERT

NAMES = "x context loc scale weight_in bias_in weight_hidden bias_hidden weight_out bias_out permutation".split()
MEMORIES = ["save", "invert"] if BACKEND == "triton" else ["save", "checkpoint", "invert"]


def results(arguments: list[Tensor | None], backend: str = BACKEND, **options: object) -> dict[str, Tensor]:
    """Outputs, and the gradients of a fixed weighting of both."""
    named = dict(zip(NAMES, arguments, strict=True))
    names = ["y", "logdet", *(n for n, t in named.items() if t is not None and t.is_floating_point())]
    return dict(zip(names, with_gradients(partial(flow, **options), arguments, backend), strict=True))


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


@pytest.mark.triton
@pytest.mark.parametrize("shape", cases(FLOW), ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_float64_equals_the_definition(shape: FlowShape, inverse: bool) -> None:
    arguments = flow_inputs(shape)
    arguments[0] = rows_apart(arguments[0])
    for slope, exact in few([(0.9, True), (0.9, False), (1.0, False)]):
        options = {"inverse": inverse, "activation_slope": slope, "exact_logdet": exact, "leaky_slope": 0.1}
        expected = results(arguments, "reference", **options)
        for memory in MEMORIES:
            for name, got in results(arguments, **options, memory=memory).items():
                assert got.shape == expected[name].shape
                assert got.numel() == 0 or relative(got, expected[name]) < 1e-9, (name, slope, exact, memory)


@pytest.mark.parametrize("shape", cases(FLOW), ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_float32_equals_the_definition(shape: tuple[int, ...], inverse: bool) -> None:
    # Slope 1: where a LeakyReLU has its kink, a last-bit difference of an activation is a jump of a gradient, in any
    # implementation; the kink itself is tested in float64. Inversion loses what exp(-s) amplifies, hence the size.
    options = {"inverse": inverse, "leaky_slope": 1.0}
    expected = results(flow_inputs(shape, size=0.3), "reference", **options)
    arguments = flow_inputs(shape, dtype=torch.float32, size=0.3)
    for memory in MEMORIES:
        for name, got in results(arguments, **options, memory=memory).items():
            assert got.dtype == torch.float32
            assert got.numel() == 0 or relative(got, expected[name]) < 1e-5, (name, memory)


@pytest.mark.parametrize("shape", [(300, 64, 2, 512, 2), (20, 64, 3, 468, 2)], ids=str)
def test_gradients_larger_than_a_cache_equal_the_definition(shape: FlowShape) -> None:
    # They are stored past the caches: whole panels, a panel that is narrower, and rows that come in two chunks.
    arguments = flow_inputs(shape, dtype=torch.float32, size=0.3)
    assert sum(t.nbytes for t in arguments[4:10] if t is not None) > 2**24
    expected = results(flow_inputs(shape, size=0.3), "reference", leaky_slope=1.0)
    for name, got in results(arguments, leaky_slope=1.0).items():
        assert relative(got, expected[name]) < 1e-5, name


def test_gradients_of_both_memories_agree_at_depth_12_in_float32() -> None:
    arguments = flow_inputs((40, 64, 12, 256, 2), dtype=torch.float32, size=0.3)
    saved, inverted = (results(arguments, memory=memory) for memory in ("save", "invert"))
    for name, want in saved.items():
        assert relative(inverted[name], want) < 1e-3, name


def steep() -> tuple[iin_fast.nn.Flow, Tensor]:
    """A flow whose inverse is not exact in float32, as a trained one may be."""
    generator = torch.Generator().manual_seed(0)
    model = iin_fast.nn.Flow(16, 6, 128, 1, generator=generator)
    x = torch.randn(1000, 16, generator=generator)
    model.initialize(x)
    with torch.no_grad():
        model.weight_out *= 8
    return model, x


def gradients(model: iin_fast.nn.Flow, x: Tensor) -> list[Tensor]:
    y, logdet = model(x)
    parameters = list(model.parameters())
    return list(torch.autograd.grad((y.square().sum(1) / 2 - logdet).mean(), parameters))


def test_the_size_of_a_batch_does_not_change_the_gradients() -> None:
    model, x = steep()
    few, many = gradients(model, x), gradients(model, x.repeat(12, 1))
    for got, want in zip(many, few, strict=True):
        assert relative(got, want) < 1e-3


def test_a_checkpoint_gives_the_gradients_of_save_bit_for_bit() -> None:
    for inverse in (False, True):
        arguments = flow_inputs((300, 9, 3, 130, 2, 4, 3), dtype=torch.float32)
        saved, checkpoint = (results(arguments, memory=m, inverse=inverse) for m in ("save", "checkpoint"))
        for name, want in saved.items():
            assert torch.equal(checkpoint[name], want), name


def test_a_checkpoint_keeps_little() -> None:
    kept = {}
    for memory in ("save", "checkpoint"):
        y, _ = flow(*(t if t is None or not t.is_floating_point() else t.requires_grad_() for t in flow_inputs((32, 64, 2, 512, 2))),
                    memory=memory)  # fmt: skip
        kept[memory] = y.grad_fn.saved_tensors[1].numel()
    assert 0 < kept["checkpoint"] < 0.06 * kept["save"]


def test_an_inverse_that_does_not_lead_back_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["iin_fast.ops.inversion"]
    monkeypatch.setattr(module, "_warned", [])
    monkeypatch.setattr(module, "_inverted", itertools.count(1))
    model, x = steep()
    model.memory = "invert"
    with pytest.warns(
        RuntimeWarning, match=r"recovers its input from the output to \d\.\de[-+]\d+ of its size \(16 rows"
    ):
        gradients(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(model, x)
        module._warned.clear()
        gradients(*(t.double() for t in (model, x)))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("memory", MEMORIES)
def test_gradcheck(inverse: bool, memory: str) -> None:
    *tensors, permutation = flow_inputs((2, 3, 2, 2, 1, 1, 2))
    leaves = [t.requires_grad_() for t in tensors if t is not None]

    def function(*given: Tensor) -> tuple[Tensor, Tensor]:
        return flow(*given, permutation, inverse=inverse, memory=memory, leaky_slope=0.3, activation_slope=0.9)

    assert gradcheck(function, leaves)


@pytest.mark.triton
def test_second_derivatives_come_from_the_definition() -> None:
    *tensors, permutation = flow_inputs((1, 3, 1, 2, 0, 1, 1))
    leaves = [t.requires_grad_() for t in tensors if t is not None]
    run = partial(flow, permutation=permutation, leaky_slope=0.3)
    assert gradgradcheck(run, leaves, fast_mode=BACKEND == "triton")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-3)])
@pytest.mark.parametrize("n_flows", [12, 48])
def test_round_trip(dtype: torch.dtype, bound: float, n_flows: int) -> None:
    x, *rest = flow_inputs((40, 16, n_flows, 64, 2), dtype=dtype, size=0.2)
    rest[2] = rest[2].sign() * rest[2].abs().clamp(0.8, 1.25)  # the ActNorm of 48 random blocks spans 12 decades
    y, logdet = flow(x, *rest, activation_slope=0.9, exact_logdet=True)
    back, back_logdet = flow(y, *rest, inverse=True, activation_slope=0.9, exact_logdet=True)
    assert relative(back, x) < bound
    assert relative(back_logdet, -logdet) < bound


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dim", [2, 7])
def test_logdet_is_that_of_the_jacobian(inverse: bool, dim: int) -> None:
    x, *rest = flow_inputs((1, dim, 3, 17, 1, 3))
    options = {"inverse": inverse, "activation_slope": 0.8, "exact_logdet": True}
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v, *rest, **options)[0], x).reshape(dim, dim)
    assert_close(jacobian.slogdet().logabsdet, flow(x, *rest, **options)[1][0])


@pytest.mark.parametrize("shape", [(29, 7, 2, 70, 2), (300, 64, 2, 512, 1), (130, 8, 2, 64, 2)], ids=str)
def test_rows_are_independent_and_nan_is_not_hidden(shape: tuple[int, ...]) -> None:
    x, *rest = flow_inputs(shape, dtype=torch.float32)
    clean_y, clean_logdet = flow(x, *rest)
    x[3, 1] = torch.nan
    y, logdet = flow(x, *rest)
    assert torch.isnan(y[3]).any() and torch.isnan(logdet[3])
    others = torch.arange(len(x)) != 3
    assert_close(y[others], clean_y[others], rtol=0, atol=0)
    assert_close(logdet[others], clean_logdet[others], rtol=0, atol=0)
    leaf = x.clone().requires_grad_()
    y, logdet = flow(leaf, *rest)
    (y[others].sum() + logdet[others].sum()).backward()
    assert leaf.grad[others].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(130, 8, 2, 64, 2), (300, 64, 1, 256, 2)], ids=str)
def test_same_bits_twice(threads: int, shape: tuple[int, ...]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        arguments = flow_inputs(shape, dtype=torch.float32)
        first, second = results(arguments), results(arguments)
    finally:
        torch.set_num_threads(before)
    for name, want in first.items():
        assert_close(second[name], want, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(130, 8, 2, 64, 2), (300, 9, 2, 256, 1, 3, 2)], ids=str)
def test_same_bits_with_any_number_of_threads(shape: tuple[int, ...]) -> None:
    before = torch.get_num_threads()
    arguments, found = flow_inputs(shape, dtype=torch.float32), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append([results(arguments, memory=memory) for memory in MEMORIES])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            for name, value in want.items():
                assert_close(got[name], value, rtol=0, atol=0)


def test_many_threads_share_the_work_correctly() -> None:
    before = torch.get_num_threads()
    arguments = [flow_inputs((batch, 9, 1, hidden, 1)) for hidden in (70, 300) for batch in (1, 3, 50, 300)]
    expected = [results(a, "reference") for a in arguments]
    torch.set_num_threads(9)
    try:
        got = [results(a) for a in arguments]
    finally:
        torch.set_num_threads(before)
    for ours, wants in zip(got, expected, strict=True):
        for name, want in wants.items():
            assert relative(ours[name], want) < 1e-9, name


@pytest.mark.triton
def test_strides_of_every_kind() -> None:
    x, *rest = flow_inputs((6, 7, 2, 17, 1))
    expected = flow(x, *rest)
    for layout in LAYOUTS.values():
        assert_close(flow(layout(x), *rest), expected, rtol=0, atol=0)
    transposed = [t.clone() if t is None or t.dim() < 2 else t.t().contiguous().t() for t in rest[1:3]]
    assert_close(flow(x, rest[0], *transposed, *rest[3:]), expected, rtol=0, atol=0)


@pytest.mark.triton
@pytest.mark.parametrize("wanted", few(["x", "bias_hidden", "context", "loc"], 2))
@pytest.mark.parametrize("memory", few(MEMORIES))
def test_only_the_wanted_gradients_are_given(wanted: str, memory: str) -> None:
    arguments = flow_inputs((5, 6, 2, 17, 1, 3))
    everything = results(arguments, memory=memory)
    leaves = [t if t is None else t.detach().clone() for t in arguments]
    leaves[NAMES.index(wanted)].requires_grad_()
    y, logdet = flow(*leaves, memory=memory)
    torch.autograd.backward([y, logdet], fixed_weights([y, logdet]))
    for name, leaf in zip(NAMES, leaves, strict=True):
        if leaf is not None:
            assert (leaf.grad is not None) == (name == wanted)
    assert_close(leaves[NAMES.index(wanted)].grad, everything[wanted])


@pytest.mark.triton
def test_gradient_of_one_output_alone() -> None:
    arguments = [
        t.requires_grad_() if t is not None and t.is_floating_point() else t for t in flow_inputs((5, 6, 2, 17, 1))
    ]
    x = arguments[0]
    for pick in (0, 1):
        (got,) = torch.autograd.grad(flow(*arguments)[pick].sum(), x)
        with iin_fast.backend("reference"):
            (want,) = torch.autograd.grad(flow(*arguments)[pick].sum(), x)
        assert_close(got, want)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("keep", [0, INVERT])
def test_opcheck(inverse: bool, keep: int) -> None:
    x, context, *parameters = flow_inputs((3, 5, 2, 6, 1, 2), dtype=torch.float32)
    rest = (flow_as_program(5, 2, 6, 1, 2, 1, 0.01, 0.9, True).text, inverse, False, keep)
    torch.library.opcheck(torch.ops.iin_fast.flow_program, (x, context[0], parameters, *rest))
    for t in (x, context, *parameters[:-1]):
        t.requires_grad_()
    torch.library.opcheck(torch.ops.iin_fast.flow_program, (x, context[0], parameters, *rest))
    x, context, *parameters = (t.detach() for t in (x, context, *parameters))
    y, logdet, saved = torch.ops.iin_fast.flow_program(x, context[0], parameters, *rest)
    for context_grad, wanted in ((True, "111111110"), (False, "110000000")):
        backward = (y, logdet, x, saved, context[0], parameters, *rest, context_grad, wanted)
        torch.library.opcheck(torch.ops.iin_fast.flow_program_backward, backward)


@pytest.mark.triton
@pytest.mark.parametrize("memory", few(["invert", "auto", "checkpoint"]))
def test_compiles_into_one_graph(memory: str) -> None:
    arguments = flow_inputs((5, 6, 2, 17, 1), dtype=torch.float32)
    leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in arguments]
    compiled = torch.compile(lambda *a: flow(*a, memory=memory), fullgraph=True, backend="aot_eager", dynamic=True)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    for batch in (5, 3):
        given = [leaves[0][:batch], *leaves[1:]]
        outputs, expected = compiled(*given), flow(*given, memory=memory)
        assert_close(outputs, expected)
        got = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), wanted)
        assert_close(got, torch.autograd.grad(expected[0].sum() + expected[1].sum(), wanted))


def test_exports() -> None:
    x, context, *rest = flow_inputs((5, 6, 2, 17, 1), dtype=torch.float32)

    class Model(torch.nn.Module):
        def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
            return flow(value, None, *rest)

    program = torch.export.export(Model(), (x,), dynamic_shapes={"value": {0: torch.export.Dim("batch")}})
    assert_close(program.module()(x[:3]), flow(x[:3], None, *rest))


def test_autocast_computes_in_float32() -> None:
    arguments = flow_inputs((5, 6, 2, 17, 1), dtype=torch.float32)
    half = [arguments[0].bfloat16(), *arguments[1:]]
    with torch.autocast("cpu", torch.bfloat16):
        got = flow(*half)
    assert_close(got, flow(half[0].float(), *arguments[1:]))


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_every_instruction_set(isa: str) -> None:
    probe = (
        "import test_flow as t\n"
        "from op_cases import FLOW, cases\n"
        "from iin_fast._library import cpu_isa\n"
        "for shape in (s for s in cases(FLOW) if s.batch * s.hidden < 10_000):\n"
        "    t.test_float64_equals_the_definition(shape, False)\n"
        "    t.test_float32_equals_the_definition(shape, True)\n"
        "print(cpu_isa())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, env=environment(isa), check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (isa, "baseline")


GUARDED = """
import ctypes, mmap, torch
from op_cases import flow_inputs
from iin_fast.ops.flow import flow

libc = ctypes.CDLL(None, use_errno=True)
keep = []

def at_the_end_of_a_page(tensor):
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    keep.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + pages * page), page, 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages * page - size)
    return copy.copy_(tensor.flatten()).view(tensor.shape)

for shape in [(2, 3, 1, 17, 1, 2, 1), (30, 7, 1, 70, 0, 0, 1), (9, 2, 1, 1, 1, 0, 1)]:
    for dtype in (torch.float32, torch.float64):
        arguments = flow_inputs(shape, dtype=dtype)
        guarded = [a if a is None or a.numel() == 0 else at_the_end_of_a_page(a) for a in arguments]
        for memory in ("save", "checkpoint", "invert"):
            y, logdet = flow(guarded[0], guarded[1], guarded[2].requires_grad_(), *guarded[3:4],
                             guarded[4].requires_grad_(), *guarded[5:], memory=memory)
            (y.sum() + logdet.sum()).backward()
print("inside")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="guards pages with mprotect")
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_nothing_is_read_beyond_a_tensor(isa: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GUARDED], capture_output=True, text=True, env=environment(isa), check=False
    )
    assert done.returncode == 0 and done.stdout.strip() == "inside", (done.returncode, done.stderr)


class TestBadInput:
    def check(self, error: type[Exception], message: str, **changed: object) -> None:
        arguments = dict(zip(NAMES, flow_inputs((5, 6, 2, 17, 1, 3)), strict=True))
        with pytest.raises(error, match=message):
            flow(**{**arguments, **changed})

    def test_each(self) -> None:
        x = torch.randn(5, 6, dtype=torch.float64)
        self.check(TypeError, "x has dtype float16, expected one of float32, float64", x=x.half())
        self.check(TypeError, "loc has dtype float32, expected float64 like x", loc=torch.randn(2, 6))
        self.check(TypeError, "x is a list", x=[1.0])
        self.check(ValueError, r"x has shape \[5\], expected \[batch, dim\]", x=x[:, 0])
        self.check(ValueError, r"x has shape \[5, 1\], expected \[batch, dim\]", x=x[:, :1])
        self.check(ValueError, r"loc has shape \[5\], expected \[n_flows, 6\]", loc=x[:, 0])
        self.check(ValueError, r"scale has shape \[2, 5\], expected \[2, 6\]", scale=x[:2, :5])
        self.check(ValueError, r"weight_in has shape \[5, 6\], expected \[2, 2, 2, 102\]", weight_in=x)
        self.check(ValueError, r"bias_in has shape \[5, 6\], expected \[2, 2, 2, hidden\]", bias_in=x)
        self.check(ValueError, r"context has shape \[5, 6\], expected \[1 or 2, 5, context_dim\]", context=x)
        self.check(ValueError, r"context has shape \[3, 5, 3\]", context=torch.zeros(3, 5, 3, dtype=torch.float64))
        self.check(
            ValueError, "scale is on meta, expected cpu like x", scale=torch.zeros(2, 6, device="meta", dtype=x.dtype)
        )
        self.check(TypeError, "permutation is torch.float64, expected an int64 tensor", permutation=x[:2])
        self.check(RuntimeError, r"permutation\[1\] is not a permutation", permutation=torch.arange(12).view(2, 6))
        self.check(
            ValueError, "memory is 'keep', expected one of 'auto', 'save', 'checkpoint', 'invert'", memory="keep"
        )
        self.check(ValueError, "leaky_slope is -0.1", leaky_slope=-0.1)
        self.check(ValueError, "activation_slope is 0.0", activation_slope=0.0)


@pytest.mark.triton
def test_gradients_with_a_graph_when_inputs_depend_on_each_other() -> None:
    x, _, *tensors, permutation = flow_inputs((2, 3, 1, 2, 1, 1))
    y, logdet = flow(x.requires_grad_(), x[None, :, :1].sin(), *tensors, permutation, leaky_slope=0.3)
    total = y.sum() + logdet.sum()
    (with_graph,) = torch.autograd.grad(total, x, create_graph=True)
    (without,) = torch.autograd.grad(total, x)
    assert_close(with_graph, without)
