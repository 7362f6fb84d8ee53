"""The CUDA kernels of the flow, run on the host (tests/cuda_emulator), against the definition."""

import ctypes
from typing import Any

import pytest
import torch
from cuda_emulator import ONLY_TYPE, RACES, SANITIZE, call, data, load, type_name
from numerics import check_not_finite, spoiled
from op_cases import ALIGNED_FLOW, FLOW, FLOW_BOUNDS, SMALL_FLOW, FlowShape, cases, flow_inputs, rows_apart
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from iin_fast.backends import available
from iin_fast.ops.flow import flow, reference, torch_products
from iin_fast.ops.flow.saved import pieces_of, saved_bytes, views
from iin_fast.testing.backends import relative_error

SHAPES = cases(FLOW, "cuda")
TENSORS = (
    *("x", "context", "loc", "scale", "weight_in", "bias_in", "weight_hidden", "bias_hidden", "weight_out", "bias_out"),
    "permutation",
)


WAYS = ("best", "layers", "clusters", "nets")  # FlowWay in csrc/flow/flow_kernels.cuh


class FlowSizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("batch", "dim", "n_flows", "hidden", "depth", "context_dim", "contexts")
    ]


class FlowCall(ctypes.Structure):
    """FlowCall in tests/cuda_emulator/flow.cpp."""

    _fields_ = [
        ("sizes", FlowSizes),
        *((name, ctypes.c_void_p) for name in TENSORS),
        ("x_row", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("leaky_slope", "activation_slope")),
        *((name, ctypes.c_bool) for name in ("exact_logdet", "inverse", "tf32")),
        *((name, ctypes.c_void_p) for name in ("y", "logdet", "saved", "grad_y", "grad_logdet")),
        ("grad_y_row", ctypes.c_int64),
        *((f"grad_{name}", ctypes.c_void_p) for name in TENSORS[:-1]),
        *((name, ctypes.c_int64) for name in ("pending", "resident", "way", "launches", "saved_bytes")),
    ]


def arguments(shape: FlowShape | tuple[int, ...], dtype: torch.dtype) -> list[Any]:
    x, *rest = flow_inputs(shape, dtype)
    return [rows_apart(x), *rest]


def flow_call(given: list[Any], slope: float, exact: bool, inverse: bool, tf32: bool) -> FlowCall:
    x, context, loc, *_ = given
    bias_in, bias_hidden = given[5], given[7]
    sizes = FlowSizes(
        *(len(x), x.shape[1], loc.shape[0], bias_in.shape[3], bias_hidden.shape[3]),
        *((0, 0) if context is None else (context.shape[2], context.shape[0])),
    )
    pointers = [ctypes.c_void_p(x.data_ptr()), *(data(t) for t in given[1:])]
    return FlowCall(sizes, *pointers, x.stride(0), 0.01, slope, exact, inverse, tf32)


def forward(
    given: list[Any],
    slope: float = 1.0,
    exact: bool = False,
    inverse: bool = False,
    save: bool = False,
    tf32: bool = False,
    resident: int = 0,
    way: str = "best",
    leaky: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor, FlowCall]:
    x = given[0]
    y = torch.full(x.shape, torch.nan, dtype=x.dtype)
    logdet = torch.full(x.shape[:1], torch.nan, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    c = flow_call(given, slope, exact, inverse, tf32)
    c.y, c.logdet, c.leaky_slope = y.data_ptr(), logdet.data_ptr(), leaky
    size = saved_bytes(x, given[5].shape[3], given[7].shape[3], given[2].shape[0], inverse) if save else 0
    saved = torch.full((size,), 255, dtype=torch.uint8)
    c.saved, c.resident, c.way = saved.data_ptr() if save else None, resident, WAYS.index(way)
    call(load("flow").flow_forward, type_name(x.dtype), ctypes.byref(c))
    return y, logdet, saved, c


def backward(
    given: list[Any],
    y: Tensor,
    saved: Tensor,
    grad_y: Tensor,
    grad_logdet: Tensor,
    slope: float = 1.0,
    inverse: bool = False,
    tf32: bool = False,
    weights: bool = True,
    pending: int = 64 * 2**20,
    resident: int = 0,
) -> tuple[list[Tensor | None], FlowCall]:
    """Gradients in the order of TENSORS."""
    c = flow_call([y, *given[1:]], slope, False, inverse, tf32)
    c.saved, c.pending = saved.data_ptr() if saved.numel() else None, pending
    c.resident = resident
    c.grad_y, c.grad_y_row, c.grad_logdet = grad_y.data_ptr(), grad_y.stride(0), grad_logdet.data_ptr()
    grads: list[Tensor | None] = []
    for name, t in zip(TENSORS[:-1], [y, *given[1:-1]], strict=True):
        grad = None
        if name == "context":
            grad = None if t is None else torch.zeros(t.shape, dtype=grad_logdet.dtype)
        elif weights or name in ("x", "loc", "scale"):
            grad = torch.full(t.shape, torch.nan, dtype=t.dtype)
        setattr(c, f"grad_{name}", None if grad is None else grad.data_ptr())
        grads.append(grad)
    call(load("flow").flow_backward, type_name(y.dtype), ctypes.byref(c))
    return grads, c


# Types, and whether TF32 multiplies.
TYPES = [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True), (torch.float16, False)]
if ONLY_TYPE:
    TYPES = TYPES[:1]

# With the direction.
DIRECTED = [(*t, inverse) for inverse in (False, True) for t in TYPES]

JUDGED = [ALIGNED_FLOW, *SHAPES[2 : 3 if ONLY_TYPE else 6]]


def bounds(dtype: torch.dtype, tf32: bool) -> tuple[float, float]:
    return FLOW_BOUNDS[torch.float16 if tf32 else dtype]


def wide(given: list[Any]) -> list[Any]:
    return [t.double() if t is not None and t.is_floating_point() else t for t in given]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_equals_the_definition_in_float64(shape: FlowShape, inverse: bool) -> None:
    given = arguments(shape, torch.float64)
    slope = 0.8 if shape.context_dim else 1.0
    expected = reference.flow(*given, 0.01, slope, True, inverse)
    for save in (False, True):
        y, logdet, _, c = forward(given, slope, True, inverse, save)
        for got, want in zip((y, logdet), expected, strict=True):
            assert relative_error(got, want) < 1e-12, (save, got.shape)
        if shape.batch:
            assert c.launches == 2 * shape.n_flows * (shape.depth + 2) + 3
        if save and shape.batch:
            assert c.saved_bytes == saved_bytes(given[0], shape.hidden, shape.depth, shape.n_flows, inverse)


@pytest.mark.parametrize(("dtype", "tf32", "inverse"), DIRECTED)
def test_other_types_judged_by_float64(dtype: torch.dtype, tf32: bool, inverse: bool) -> None:
    for shape in JUDGED:
        given = arguments(shape, dtype)
        # an exact log-det would jump where rounding takes a value across the kink of the activation
        judge = reference.flow(*wide(given), 0.01, 0.8, False, inverse)
        y, logdet, _, _ = forward(given, 0.8, False, inverse, tf32=tf32)
        for got, want in zip((y, logdet), judge, strict=True):
            assert (got.double() - want).norm() < bounds(dtype, tf32)[0] * want.norm(), (shape, got.shape)
        if tf32 and shape == ALIGNED_FLOW:
            assert (y.double() - judge[0]).norm() > 1e-5 * judge[0].norm()  # it is TF32 that multiplied


@pytest.mark.parametrize("shape", [*SHAPES[1:4], SHAPES[6], ALIGNED_FLOW], ids=str)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_kernel_for_all_layers(shape: FlowShape, inverse: bool, dtype: torch.dtype) -> None:
    given = arguments(shape, dtype)
    options = (0.8 if shape.context_dim else 1.0, True, inverse, True)
    expected = forward(given, *options)
    # a block has several tiles; one has all of them; more blocks than tiles are not started
    for resident in (5, 1, 1000) if shape == SMALL_FLOW else (5,):
        got = forward(given, *options, resident=resident)
        assert got[3].launches == 1
        for a, b in zip(got[:3], expected[:3], strict=True):
            assert torch.equal(a, b)  # the same sums in the same order


def test_a_device_that_refuses_one_kernel_for_all_layers() -> None:
    given = arguments(SHAPES[2], torch.float64)
    y, logdet, saved, c = forward(given, save=True)
    refused = forward(given, save=True, resident=-5)
    assert refused[3].launches == c.launches > 1
    assert all(torch.equal(a, b) for a, b in zip(refused[:3], (y, logdet, saved), strict=True))
    grads, c = backward(given, y, saved, y, logdet)
    refused_grads, refused_c = backward(given, y, saved, y, logdet, resident=-5)
    assert refused_c.launches == c.launches > 1
    assert all(torch.equal(a, b) for a, b in zip(refused_grads, grads, strict=True) if a is not None)


def test_more_rows_than_one_kernel_takes() -> None:
    given = arguments(FlowShape(130, 8, 2, 16, 1), torch.float64)
    y, logdet, saved, c = forward(given, save=True, resident=8)
    assert c.launches > 1
    assert backward(given, y, saved, y, logdet, resident=8)[1].launches > 1


@pytest.mark.parametrize(
    ("dtype", "batch", "hidden"),
    # the weights of a hidden layer are more tiles than the persistent kernels' buffers
    [(torch.float64, 64, 209), (torch.float32, 5, 400), (torch.bfloat16, 5, 784)],
)
def test_weights_that_go_round_the_buffers_of_one_kernel(dtype: torch.dtype, batch: int, hidden: int) -> None:
    if dtype == torch.float32 and ONLY_TYPE or dtype != torch.float64 and SANITIZE:
        pytest.skip("takes long under a checker; float64 touches the same places of the buffers")
    given = arguments((batch, 16, 1, hidden, 1), dtype)
    options = (0.8, True, False, True, True)
    y, logdet, saved, _ = forward(given, *options)
    got = forward(given, *options, resident=40)
    assert got[3].launches == 1
    assert all(torch.equal(a, b) for a, b in zip(got[:3], (y, logdet, saved), strict=True))
    if dtype != torch.bfloat16:  # its backward goes round the same code, and the emulator takes long
        call_of = (given, y, saved, y, logdet, 0.8, False, True)
        expected, (grads, c) = backward(*call_of)[0], backward(*call_of, resident=40)
        assert c.launches == 1
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True) if a is not None)


# Two clusters share two tiles, or three; panels that are not full; two panels of last layers; a context for each block; no
# hidden layer, and as many as parts of the depth are on their way.
IN_CLUSTERS = [
    FlowShape(40, 16, 2, 72, 2, 3, 2),
    FlowShape(70, 16, 1, 136, 0),
    FlowShape(3, 160, 1, 192, 1),
]


@pytest.mark.parametrize("shape", IN_CLUSTERS, ids=str)
@pytest.mark.parametrize(("dtype", "tf32", "inverse"), DIRECTED)
def test_clusters_of_blocks(shape: FlowShape, dtype: torch.dtype, tf32: bool, inverse: bool) -> None:
    if (dtype, tf32) != (torch.float32, False) and shape != IN_CLUSTERS[0] or RACES and inverse:
        pytest.skip("takes long; what lies where is the same")
    given = arguments(shape, dtype)
    judge = reference.flow(*wide(given), 0.01, 0.8, False, inverse)
    options = (0.8, False, inverse)
    y, logdet, saved, c = forward(given, *options, save=True, tf32=tf32, way="clusters")
    assert c.launches == 2
    for got, want in zip((y, logdet), judge, strict=True):
        assert (got.double() - want).norm() < bounds(dtype, tf32)[0] * want.norm()
    if (dtype, tf32) != (torch.float32, False) or RACES:
        return
    # nothing kept; and what is kept, and an exact log-det, differ from other ways by rounding alone
    assert all(
        torch.equal(a, b) for a, b in zip(forward(given, *options, way="clusters")[:2], (y, logdet), strict=True)
    )
    _, exact, kept, _ = forward(given, 0.8, True, inverse, save=True, way="layers")
    pieces = pieces_of(given[0], shape.hidden, shape.depth, shape.n_flows, inverse, True)
    for got, want in zip(views(saved, pieces), views(kept, pieces), strict=True):
        assert got.numel() == 0 or (got - want).norm() < bounds(dtype, tf32)[0] * want.norm()
    assert not torch.allclose(exact, logdet)
    torch.testing.assert_close(forward(given, 0.8, True, inverse, way="clusters")[1], exact)


# For the kernel of both nets of a half: layers of one pass and of two, last layers in a narrow pass and in wide ones, inputs in both
# halves, tiles of rows with a rest. Up to 32 rows (64 of 16 bits) tiles are small.
NETS = [
    FlowShape(5, 16, 2, 24, 1),
    FlowShape(7, 16, 1, 264, 2, 3),
    FlowShape(2, 144, 1, 320, 0, 200),
    FlowShape(67, 16, 1, 264, 1),
    FlowShape(131, 32, 1, 64, 1, 5, 1),
]
NETS = NETS[:2] if ONLY_TYPE else NETS


@pytest.mark.parametrize("shape", NETS, ids=str)
@pytest.mark.parametrize(("dtype", "tf32", "inverse"), DIRECTED)
def test_both_nets_in_one_launch(dtype: torch.dtype, tf32: bool, inverse: bool, shape: FlowShape) -> None:
    if shape.batch > 64 and inverse == (shape.hidden > 256):
        pytest.skip("takes long; one direction each")
    given = arguments(shape, dtype)
    judge = reference.flow(*wide(given), 0.01, 0.8, False, inverse)
    y, logdet, saved, c = forward(given, 0.8, False, inverse, True, tf32, way="nets")
    assert c.launches == 4 * shape.n_flows + 3  # it is this kernel that ran
    for got, want in zip((y, logdet), judge, strict=True):
        assert (got.double() - want).norm() < bounds(dtype, tf32)[0] * want.norm(), got.shape
    if tf32:
        assert (y.double() - judge[0]).norm() > 1e-6 * judge[0].norm()  # it is TF32 that multiplied
    pieces = pieces_of(given[0], shape.hidden, shape.depth, shape.n_flows, inverse, True)
    other = forward(given, 0.8, False, inverse, True, tf32)[2]
    for got, want in zip(views(saved, pieces), views(other, pieces), strict=True):
        assert (got.double() - want.double()).norm() <= bounds(dtype, tf32)[0] * want.double().norm(), got.shape
    if not ONLY_TYPE:  # what is kept changes no bit
        without = forward(given, 0.8, False, inverse, False, tf32, way="nets")
        assert torch.equal(without[0], y) and torch.equal(without[1], logdet)


@pytest.mark.parametrize("leaky", [0.0, 1.0, 1.5])
def test_slopes_of_the_nets_in_one_launch(leaky: float) -> None:
    given = arguments(FlowShape(5, 16, 1, 24, 1), torch.float32)
    expected = reference.flow(*wide(given), leaky, 1.0, False, False)
    for got, want in zip(forward(given, way="nets", leaky=leaky), expected, strict=False):
        assert (got.double() - want).norm() < bounds(torch.float32, False)[0] * want.norm()


@pytest.mark.values
@pytest.mark.parametrize(("dtype", "tf32", "inverse"), DIRECTED)
def test_gradients_from_what_both_nets_saved(dtype: torch.dtype, tf32: bool, inverse: bool) -> None:
    """By our tiles, and by products of torch's."""
    shape = FlowShape(33, 16, 2, 72, 1, 3, 2)
    given = arguments(shape, dtype)
    expected, grad_y, grad_logdet = true_gradients(given, 1.0, inverse)
    y, _, saved, _ = forward(given, 1.0, False, inverse, True, tf32, way="nets")
    grads = [grad_y.to(dtype), grad_logdet.float()]
    by_tiles, _ = backward(given, y, saved, *grads, 1.0, inverse, tf32)
    options = (0.01, 1.0, inverse, 2, True, True, tf32)
    by_products = torch_products.flow_backward(*grads, y, saved, *given[1:], *options)
    for found in (by_tiles, by_products):
        for name, got, want in zip(TENSORS, found, expected, strict=False):
            assert (got.double() - want).norm() < bounds(dtype, tf32)[1] * want.norm(), name


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (FlowShape(3, 16, 1, 520, 0), torch.bfloat16),  # too wide
        (FlowShape(3, 16, 1, 24, 0, 510), torch.float32),  # too many inputs
        (FlowShape(3, 16, 1, 20, 0), torch.bfloat16),  # rows of weights that no copy of 16 bytes begins with
        (FlowShape(3, 18, 1, 16, 0), torch.float32),
        (FlowShape(3, 16, 1, 16, 0), torch.float64),
    ],
    ids=str,
)
def test_nets_that_do_not_fit_one_launch(shape: FlowShape, dtype: torch.dtype) -> None:
    given = arguments(shape, dtype)
    expected, got = forward(given), forward(given, way="nets")
    assert got[3].launches == expected[3].launches
    assert all(torch.equal(a, b) for a, b in zip(got[:2], expected[:2], strict=True))


@pytest.mark.values
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize(("way", "hidden"), [("nets", 24), ("clusters", 72)])
def test_what_is_not_finite_in_nets_and_clusters(way: str, hidden: int, tf32: bool, inverse: bool) -> None:
    clean = arguments((3, 8, 1, hidden, 1, 2), torch.float32)
    clean[0] = clean[0].contiguous()
    for label, (*tensors, _) in spoiled([*clean[:-1], torch.ones(3)], False):
        truth = reference.flow(*tensors, clean[-1], 0.01, 0.8, False, inverse)
        found = forward([*tensors, clean[-1]], 0.8, False, inverse, tf32=tf32, way=way)
        for got, want in zip(found, truth, strict=False):
            check_not_finite(got, want, label, "kinds")


@pytest.mark.values
def test_the_published_size_in_one_launch() -> None:
    given = arguments((9, 64, 1, 512, 2), torch.float32)
    judge, _ = reference.flow(*wide(given))
    plain, _ = reference.flow(*given)
    y, _, _, _ = forward(given, way="nets")
    error = (y.double() - judge).norm()
    assert error < 2 * (plain.double() - judge).norm() + 1e-7 * judge.norm()  # as good as float32


@pytest.mark.values
def test_the_published_size_in_float32() -> None:
    given = arguments((25, 64, 1, 512, 2), torch.float32)
    judge, _ = reference.flow(*wide(given))
    plain, _ = reference.flow(*given)
    y, _, _, _ = forward(given)
    error = (y.double() - judge).norm()
    assert error < 2 * (plain.double() - judge).norm() + 1e-7 * judge.norm()  # as good as float32


def true_gradients(given: list[Any], slope: float, inverse: bool) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """In float64, of a fixed mixture of the outputs, and the gradients of these."""
    leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in wide(given)]
    y, logdet = reference.flow(*leaves, 0.01, slope, False, inverse)
    grad_y = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).reshape(y.shape)
    grad_logdet = torch.linspace(-1, 1.5, len(logdet), dtype=torch.float64)
    if not len(y):
        return [None] * 10, grad_y, grad_logdet
    torch.autograd.backward([y, logdet], [grad_y, grad_logdet])
    return [None if t is None else t.grad for t in leaves[:-1]], grad_y, grad_logdet


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_equal_the_definition_in_float64(shape: FlowShape, inverse: bool) -> None:
    given = arguments(shape, torch.float64)
    slope = 0.8 if shape.context_dim else 1.0
    expected, grad_y, grad_logdet = true_gradients(given, slope, inverse)
    for save in (True, False):
        y, _, saved, _ = forward(given, slope, False, inverse, save)
        grads, c = backward(given, y, saved, grad_y, grad_logdet, slope, inverse)
        for name, got, want in zip(TENSORS, grads, expected, strict=False):
            if want is None:  # autograd has none for a tensor without elements either
                assert got is None or not got.numel(), name
            else:
                assert relative_error(got, want) < 1e-11, (save, name)
        n, depth = shape.n_flows, shape.depth
        layers = 2 * n * (depth + 2)
        outer = 2 + (depth > 0)
        assert c.launches == (layers + 3 + outer if save else 2 * layers + 4 + 2 * n * outer)
        # a block has several tiles; one has all of them; more blocks than tiles are not started
        for resident in () if shape.batch > 64 else (5, 1, 1000) if shape == SMALL_FLOW else (5,):
            together, c = backward(given, y, saved, grad_y, grad_logdet, slope, inverse, resident=resident)
            assert c.launches == 1
            for name, got, same in zip(TENSORS, together, grads, strict=False):
                assert got is None or torch.equal(got, same), (save, resident, name)  # the same sums in the same order


@pytest.mark.parametrize(("dtype", "tf32", "inverse"), DIRECTED)
def test_one_kernel_for_all_gradients(dtype: torch.dtype, tf32: bool, inverse: bool) -> None:
    given = arguments((9, 6, 2, 24, 1, 3, 2), dtype)
    for save in (True, False):
        y, logdet, saved, _ = forward(given, 0.8, False, inverse, save, tf32)
        call_of = (given, y, saved, y, logdet, 0.8, inverse, tf32)
        expected, (got, c) = backward(*call_of)[0], backward(*call_of, resident=7)
        assert c.launches == 1
        for name, a, b in zip(TENSORS, got, expected, strict=False):
            assert a is None or torch.equal(a, b), (save, name)


@pytest.mark.parametrize(("dtype", "tf32", "inverse"), DIRECTED)
def test_gradients_of_other_types_judged_by_float64(dtype: torch.dtype, tf32: bool, inverse: bool) -> None:
    for shape in JUDGED:
        given = arguments(shape, dtype)
        expected, grad_y, grad_logdet = true_gradients(given, 1.0, inverse)
        y, _, saved, _ = forward(given, 1.0, False, inverse, True, tf32)
        sums = torch.float32
        grads, _ = backward(given, y, saved, grad_y.to(dtype), grad_logdet.to(sums), 1.0, inverse, tf32)
        for name, got, want in zip(TENSORS, grads, expected, strict=False):
            if want is not None and want.numel():
                assert (got.double() - want).norm() < bounds(dtype, tf32)[1] * want.norm(), (shape, name)


@pytest.mark.parametrize("inverse", [False, True])
def test_weight_gradients_in_groups_of_steps(inverse: bool) -> None:
    given = arguments(SMALL_FLOW, torch.float64)
    y, logdet, saved, _ = forward(given, inverse=inverse, save=True)
    whole, _ = backward(given, y, saved, y, logdet, inverse=inverse)
    parts, c = backward(
        given, y, saved, y, logdet, inverse=inverse, pending=4 * 2 * 7 * (2 + 3 * 17) * 8
    )  # 4 of 6 steps
    assert c.launches == 2 * 3 * (2 + 2) + 3 + 2 * 3
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True) if a is not None)


def test_what_is_not_wanted_is_not_computed() -> None:
    given = arguments(SMALL_FLOW, torch.float64)
    expected, grad_y, grad_logdet = true_gradients(given, 1.0, False)
    y, _, saved, _ = forward(given, save=True)
    grads, c = backward(given, y, saved, grad_y, grad_logdet, weights=False)
    assert [g is None for g in grads] == [name.startswith(("weight", "bias")) for name in TENSORS[:-1]]
    assert relative_error(grads[0], expected[0]) < 1e-11
    assert c.launches == 2 * 3 * (2 + 2) + 3
    together, c = backward(given, y, saved, grad_y, grad_logdet, weights=False, resident=5)
    assert c.launches == 1
    assert all(torch.equal(a, b) for a, b in zip(together, grads, strict=True) if a is not None)


@pytest.mark.values
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_not_finite(dtype: torch.dtype, inverse: bool) -> None:
    """Backward of the inverse has ActNorm's input as its output + loc, so nothing finite comes of a loc that is not."""
    clean = arguments((3, 5, 1, 17, 1, 2), dtype)
    clean[0] = clean[0].contiguous()
    for label, (*tensors, grad_y, grad_logdet) in spoiled([*clean[:-1], clean[0], torch.ones(3, dtype=dtype)], False):
        given = [*tensors, clean[-1]]
        leaves = [t.clone().requires_grad_() for t in tensors]
        truth = reference.flow(*leaves, clean[-1], 0.01, 0.8, False, inverse)
        truths = torch.autograd.grad(truth, leaves, [grad_y, grad_logdet])
        y, logdet, saved, _ = forward(given, 0.8, False, inverse, True)
        grads, _ = backward(given, y, saved, grad_y, grad_logdet, 0.8, inverse)
        for i, (got, want) in enumerate(zip([y, logdet, *grads], [*truth, *truths], strict=True)):
            check_not_finite(got, want, (label, i), "kinds" if i < 2 or not inverse else "none lost")


@pytest.mark.values
@pytest.mark.parametrize("inverse", [False, True])
def test_logdets_of_many_parts(inverse: bool) -> None:
    """The log of 0.9 for each of 1,600 features: alone, or with the slope of the activation below 0."""
    dim, n = 100, 16
    given = arguments((2, dim, n, 1, 0), torch.float32)
    given[0], given[2], given[3] = torch.full((2, dim), -1.0), torch.zeros(n, dim), torch.full((n, dim), 0.9)
    given[4:-1] = [torch.zeros_like(t) for t in given[4:-1]]
    for slope in (1.0, 0.9):
        _, logdet, _, _ = forward(given, slope, True, inverse)
        want = dim * n * (given[3][0, 0].double().log() + torch.tensor(slope, dtype=torch.float64).log())
        want = -want if inverse else want
        assert ((logdet.double() - want).abs() <= 2 * torch.finfo(torch.float32).eps * want.abs()).all()


@pytest.mark.parametrize("inverse", [False, True])
def test_a_wrong_permutation_stays_inside(inverse: bool) -> None:
    if RACES:
        pytest.skip("a feature that is named twice is written twice")
    given = arguments((5, 4, 2, 8, 1), torch.float32)
    given[-1] = torch.full_like(given[-1], 2**40)
    y, logdet, saved, _ = forward(given, inverse=inverse, save=True)
    for resident in (0, 5):
        assert backward(given, y, saved, y, logdet, inverse=inverse, resident=resident)[1].launches  # and no fault


@pytest.mark.values
def test_the_same_bits_every_time() -> None:
    given = arguments(FlowShape(33, 9, 2, 70, 1, 2), torch.float32)
    first, second = (forward(given, save=True)[:3] for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    grads = [backward(given, y, saved, y, logdet)[0] for y, logdet, saved in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True) if a is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_and_types_on_a_gpu_as_compile_sees_them(dtype: torch.dtype) -> None:
    if "cpp" not in available("flow", "cuda"):
        pytest.skip("the build had no nvcc, so there is no CUDA library")
    given = arguments(SMALL_FLOW, dtype)
    with FakeTensorMode(), torch.no_grad():
        tensors = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in given]
        y, logdet, saved = torch.ops.iin_fast.flow(*tensors, 0.01, 1.0, False, False, 2)
        assert (y.dtype, logdet.dtype) == (dtype, torch.float64 if dtype == torch.float64 else torch.float32)
        assert (saved.dtype, saved.numel()) == (torch.uint8, saved_bytes(given[0], 17, 2, 3, False))
        options = (0.01, 1.0, False, 2, True, True)
        grads = torch.ops.iin_fast.flow_backward(y, logdet, y, saved, *tensors[1:], *options)
        for t, grad in zip(tensors, grads, strict=False):
            assert (grad.shape, grad.dtype, grad.device.type) == (t.shape, dtype, "cuda")
        y, logdet = flow(*tensors)
        assert (y.shape, logdet.shape) == ((7, 5), (7,))
