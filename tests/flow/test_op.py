"""The op flow_program: arguments, backends, and how it composes with torch."""

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import iin_fast
from flow.programs import Drawn, programs, tame
from iin_fast.flow import ABSENT, FlowProgram, NetBuilder, ProgramBuilder, Ref, Weights, affine, mlp, spline
from iin_fast.ops.flow_program import LAYER_BY_LAYER, flow_program, reference

DIM, CONTEXT = 4, 2


def example(dtype: torch.dtype = torch.float64, batch: int = 5) -> Drawn:
    """An ActNorm, an autoregressive layer under a context, an LU mixing, a spline coupling."""
    random = torch.Generator().manual_seed(0)
    builder = ProgramBuilder(DIM, CONTEXT)

    def normal(*shape: int) -> Tensor:
        return 0.5 * torch.randn(*shape, generator=random, dtype=torch.float64)

    def weights(inputs: int, out: int, mask: Tensor | None = None) -> Weights:
        parts = normal(out, inputs).requires_grad_(), normal(out).requires_grad_(), mask
        return Weights(out, *map(builder.ref, parts))

    builder.affine(
        builder.ref(normal(DIM).requires_grad_()),
        builder.ref((1 + normal(DIM).abs()).requires_grad_()),
        order="shift_first",
    )
    first, last = (
        torch.ones(DIM, DIM + CONTEXT, dtype=torch.bool).tril(),
        torch.ones(DIM, DIM, dtype=torch.bool).tril(-1),
    )
    layers = [weights(DIM + CONTEXT, DIM, torch.cat([first[:, :DIM], torch.ones(DIM, CONTEXT, dtype=torch.bool)], 1))]
    layers.append(weights(DIM, 2 * DIM, last.repeat(2, 1)))
    builder.autoregressive(mlp(layers, activation="tanh", context=True), affine(DIM, "softplus", clamp=1e-3))
    square = (0.1 * normal(DIM, DIM)).requires_grad_()
    builder.linear(builder.ref(square), storage="square")
    layers = [weights(2, 6), weights(6, 2 * 11)]
    builder.coupling([0, 2], [1, 3], mlp(layers), spline(4, tail_bound=2.0))
    x, context = normal(batch, DIM).requires_grad_(), normal(batch, CONTEXT).requires_grad_()
    return Drawn(builder.build(), builder.tensors, x, context).to(dtype)


def run(drawn: Drawn, **options) -> tuple[Tensor, Tensor]:
    return flow_program(drawn.x, drawn.context, drawn.parameters, drawn.program, **options)


def results(drawn: Drawn, outputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of a number that weights them all differently."""
    score = sum((t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).reshape(t.shape)).sum() for t in outputs)
    grads = torch.autograd.grad(score, drawn.inputs(), allow_unused=True)
    zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(drawn.inputs(), grads, strict=True)]
    return [*outputs, *zeros]


@settings(max_examples=60, deadline=None)
@given(programs(), st.booleans())
def test_layer_by_layer_equals_the_definition(drawn: Drawn, inverse: bool) -> None:
    arguments = drawn.x, drawn.context, drawn.parameters, drawn.program, inverse
    fused = reference.flow_program(*arguments, maps=LAYER_BY_LAYER)
    plain = results(drawn, reference.flow_program(*arguments))
    assume(tame(*plain))
    for found, wanted in zip(results(drawn, fused), plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("memory", ["auto", "save", "checkpoint", "recompute"])
@pytest.mark.parametrize("inverse", [False, True])
def test_equals_the_definition(inverse: bool, memory: str) -> None:
    drawn = example()
    with iin_fast.backend("reference"):
        wanted = results(drawn, run(drawn, inverse=inverse, base=True))
    for _ in range(2):  # with and without a look at the parameters
        found = results(drawn, run(drawn, inverse=inverse, base=True, memory=memory))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_gradients_only_where_they_are_asked_for() -> None:
    drawn = example()
    wanted = results(drawn, run(drawn))[2:]
    for only in range(len(wanted)):
        one = example()
        for place, tensor in enumerate(one.inputs()):
            if place != only:
                tensor.requires_grad_(False)
        (grad,) = torch.autograd.grad(sum(t.sum() for t in run(one)), one.inputs())
        full = torch.autograd.grad(sum(t.sum() for t in run(drawn)), drawn.inputs()[only])[0]
        torch.testing.assert_close(grad, full)
    with torch.no_grad():
        assert not any(t.requires_grad for t in run(drawn))


def test_one_output_alone() -> None:
    drawn = example()
    for place in range(2):
        with iin_fast.backend("reference"):
            wanted = torch.autograd.grad(run(drawn)[place].sum(), drawn.inputs(), allow_unused=True)
        found = torch.autograd.grad(run(drawn)[place].sum(), drawn.inputs(), allow_unused=True)
        for tensor, ours, theirs in zip(drawn.inputs(), found, wanted, strict=True):
            zeros = torch.zeros_like(tensor)
            torch.testing.assert_close(zeros if ours is None else ours, zeros if theirs is None else theirs)


def test_second_derivatives() -> None:
    drawn = example(batch=2)
    inputs = drawn.inputs()
    first = torch.autograd.grad(run(drawn, base=True)[1].sum(), inputs, create_graph=True, allow_unused=True)
    score = sum(g.square().sum() for g in first if g is not None)
    found = torch.autograd.grad(score, inputs, allow_unused=True)
    with iin_fast.backend("reference"):
        first = torch.autograd.grad(run(drawn, base=True)[1].sum(), inputs, create_graph=True, allow_unused=True)
        score = sum(g.square().sum() for g in first if g is not None)
        wanted = torch.autograd.grad(score, inputs, allow_unused=True)
    torch.testing.assert_close(found, wanted)


def test_strides_do_not_matter() -> None:
    drawn = example()
    wanted = results(drawn, run(drawn))

    def turned(t: Tensor) -> Tensor:
        return t.detach().T.contiguous().T.requires_grad_(t.requires_grad) if t.dim() == 2 else t

    other = Drawn(drawn.program, [turned(p) for p in drawn.parameters], turned(drawn.x), turned(drawn.context))
    assert not other.x.is_contiguous()
    torch.testing.assert_close(results(other, run(other)), wanted)


def test_vmap() -> None:
    drawn = example()
    x, context = (torch.stack([t.detach(), t.detach() + 0.5, -t.detach()], 1) for t in (drawn.x, drawn.context))

    def one(x: Tensor, context: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return flow_program(x, context, parameters, drawn.program)

    parameters = [p.detach() for p in drawn.parameters]
    fixed = (None,) * len(parameters)
    found = torch.vmap(one, in_dims=(1, 1, *fixed))(x, context, *parameters)
    wanted = [one(x[:, i], context[:, i], *parameters) for i in range(3)]
    torch.testing.assert_close(found, tuple(torch.stack(parts) for parts in zip(*wanted, strict=True)))
    many = torch.stack([parameters[0], 2 * parameters[0]])  # parameters of their own
    found = torch.vmap(one, in_dims=(None, None, 0, *fixed[1:]))(
        drawn.x.detach(), drawn.context.detach(), many, *parameters[1:]
    )
    wanted = [one(drawn.x.detach(), drawn.context.detach(), p, *parameters[1:]) for p in many]
    torch.testing.assert_close(found, tuple(torch.stack(parts) for parts in zip(*wanted, strict=True)))


def test_torch_func_and_vectorized_jacobian() -> None:
    drawn = example(batch=2)

    def density(x: Tensor) -> Tensor:
        return flow_program(x, drawn.context.detach(), drawn.parameters, drawn.program, base=True)[1]

    x = drawn.x.detach()
    wanted = torch.autograd.functional.jacobian(density, x)
    torch.testing.assert_close(torch.func.jacrev(density)(x), wanted)
    torch.testing.assert_close(torch.func.jacfwd(density)(x), wanted)
    torch.testing.assert_close(torch.autograd.functional.jacobian(density, x, vectorize=True), wanted)


@pytest.mark.parametrize("inverse", [False, True])
def test_compile(inverse: bool) -> None:
    drawn = example()
    compiled = torch.compile(
        lambda x, context, *p: flow_program(x, context, p, drawn.program, inverse=inverse),
        fullgraph=True,
        backend="aot_eager",
    )
    found = compiled(drawn.x, drawn.context, *drawn.parameters)
    torch.testing.assert_close(results(drawn, found), results(drawn, run(drawn, inverse=inverse)))


def test_compile_refuses_what_does_not_fit() -> None:
    drawn = example()
    compiled = torch.compile(
        lambda x, context, *p: flow_program(x, context, p, drawn.program), fullgraph=True, backend="aot_eager"
    )
    short = [drawn.parameters[0][:3], *drawn.parameters[1:]]
    with pytest.raises(Exception, match=r"layer 0 \(affine\): shift"):
        compiled(drawn.x, drawn.context, *short)


def test_autocast_computes_in_float32() -> None:
    drawn = example(torch.float32)
    wanted = run(drawn)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(drawn)
        narrow = flow_program(drawn.x.bfloat16(), drawn.context, drawn.parameters, drawn.program)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert narrow[0].dtype == torch.float32


def test_definition_in_16_bits() -> None:
    drawn = example(torch.bfloat16)
    with iin_fast.backend("reference"):
        y, logdet = run(drawn)
    wanted = run(drawn.to(torch.float32))
    assert y.dtype == torch.bfloat16 and logdet.dtype == torch.float32
    torch.testing.assert_close((y, logdet), (wanted[0].bfloat16(), wanted[1]))


def changed(number: int, change) -> Drawn:
    drawn = copy.copy(example())
    drawn.parameters = list(drawn.parameters)
    drawn.parameters[number] = change(drawn.parameters[number].detach())
    return drawn


def other(**fields) -> Drawn:
    drawn = copy.copy(example())
    for name, value in fields.items():
        setattr(drawn, name, value)
    return drawn


def cyclic() -> Drawn:
    """One dense layer whose mask lets features 1 and 2 read each other."""
    mask = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 1, 0]], dtype=torch.bool)
    net = NetBuilder()
    builder = ProgramBuilder(3)
    net = net.build(net.dense(0, Weights(3, builder.ref(torch.ones(3, 3)), ABSENT, builder.ref(mask))))
    builder.permute([0, 1, 2])
    builder.autoregressive(net, affine(3, "none"))
    return Drawn(builder.build(), builder.tensors, torch.zeros(2, 3), None)


def zero(form: str) -> Drawn:
    text = "affine 0 0 0.0 -1 0 0 0" if form == "affine" else "linear 1 0 0.0 0 0 -1 0 -1 0 -1 0"
    return Drawn(
        FlowProgram.parse(f"flow 1 2 0 1 1 {text}"),
        [torch.tensor([1.0, 2.0, 3.0, 0.0])[-2:] if form == "affine" else torch.tensor([[1.0, 2.0], [3.0, 0.0]])],
        torch.zeros(2, 2),
        None,
    )


BAD = {
    "x rank": (lambda: other(x=torch.zeros(4, dtype=torch.float64)), ValueError, r"flow_program: x has shape \[4\], expected \[batch, 4\]"),
    "x features": (lambda: other(x=torch.zeros(5, 3, dtype=torch.float64)), ValueError, r"x has shape \[5, 3\], expected \[batch, 4\]"),
    "x integer": (lambda: other(x=torch.zeros(5, 4, dtype=torch.int64)), TypeError, r"x has dtype int64"),
    "no context": (lambda: other(context=None), ValueError, r"context is None, expected \[5, 2\]"),
    "context shape": (lambda: other(context=torch.zeros(4, 2, dtype=torch.float64)), ValueError, r"context has shape \[4, 2\], expected \[5, 2\]"),
    "context dtype": (lambda: other(context=torch.zeros(5, 2)), TypeError, r"context has dtype float32, expected float64 like x"),
    "context not wanted": (lambda: other(program=FlowProgram(4, 0, 10, ())), ValueError, r"context is given, expected None"),
    "too few": (lambda: other(parameters=example().parameters[:-1]), ValueError, r"parameters holds 12 tensors, expected 13"),
    "no tensor": (lambda: changed(3, lambda p: p.tolist()), TypeError, r"parameters\[3\] is a list"),
    "short": (lambda: changed(2, lambda p: p[:2]), ValueError, r"layer 1 \(autoregressive\): step 1 weight, parameters\[2\], has shape \[2, 6\], expected \[4, 6\]: 24 elements at least"),
    "dtype": (lambda: changed(8, lambda p: p.float()), TypeError, r"layer 2 \(linear\): lower, parameters\[8\], has dtype float32, expected float64 like x"),
    "mask dtype": (lambda: changed(4, lambda p: p.int()), TypeError, r"layer 1 \(autoregressive\): step 1 mask, parameters\[4\], has dtype int32, expected float64 like x, or bool"),
    "device": (lambda: changed(8, lambda p: p.to("meta")), ValueError, r"parameters\[8\] is on meta, expected cpu"),
    "cyclic": (cyclic, ValueError, r"layer 1 \(autoregressive\): the masks let features \[1, 2\] depend on themselves"),
    "zero scale": (lambda: zero("affine"), ValueError, r"layer 0 \(affine\): scale holds 0"),
    "zero diagonal": (lambda: zero("linear"), ValueError, r"layer 0 \(linear\): diagonal holds 0"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("name", BAD)
def test_errors_say_where_and_what(name: str, backend: str) -> None:
    make, error, message = BAD[name]
    drawn = make()
    with pytest.raises(error, match=message), iin_fast.backend(backend):
        run(drawn)


def test_a_parameter_that_changed_in_place_is_refused() -> None:
    """After a first call that checked it."""
    drawn = example()
    run(drawn)
    drawn.parameters[0].data = drawn.parameters[0].data[:3].clone()
    with pytest.raises(ValueError, match=r"layer 0 \(affine\): shift"):
        run(drawn)
    drawn = example()
    run(drawn)
    drawn.parameters[0].data = drawn.parameters[0].data.float()
    with pytest.raises(TypeError, match=r"layer 0 \(affine\): shift"):
        run(drawn)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("inverse", [False, True])
def test_masks_that_lost_their_order_in_place_are_refused(backend: str, inverse: bool) -> None:
    flow = iin_fast.nn.MaskedAutoregressiveFlow(3, n_flows=1, hidden_dim=8)
    tensors = [t.detach() if t.is_floating_point() else t.clone() for t in flow._tensors()]
    x, program = torch.randn(4, 3), flow.program()
    with iin_fast.backend(backend):
        flow_program(x, None, tensors, program, inverse=inverse)
        for mask in tensors:
            if mask.dtype == torch.bool:
                mask.fill_(True)
        with pytest.raises(ValueError, match=r"the masks let features \[0, 1, 2\] depend on themselves"):
            flow_program(x, None, tensors, program, inverse=inverse)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flow 1 2 0 0 1 permute 1 0\0", "got '0"),
        ("flow 1 +2 0 0 1 permute 1 0", r"got '\+2', expected an integer"),
        ("flow 1 2 0 0 1 activation 0x1p-1 1", "got '0x1p-1', expected a number"),
        ("flow 1 2 0 0 1 inverse inverse permute 1 0", "got 'inverse' twice"),
        ("flow 1 2 0 1 1 affine 0 1 0.0 -1 4 0 2", "a parameter is missing"),
        ("flow 1 2 0 65537 0", "got '65537', expected an integer from 0 to 65536"),
        ("flow 1 2 0 0 99 permute 1 0", "got '99', expected an integer from 0 to"),
    ],
)
def test_the_compiled_op_takes_no_text_that_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError):
        FlowProgram.parse(text)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.iin_fast.flow_program(torch.randn(2, 2), None, [torch.ones(9)], text, False, False, 0)


def test_memory_is_checked() -> None:
    with pytest.raises(ValueError, match="memory is 'invert', expected one of 'auto', 'recompute'"):
        run(example(), memory="invert")


def test_a_tensor_that_no_layer_reads() -> None:
    builder = ProgramBuilder(2)
    unused = torch.zeros(3, requires_grad=True)
    builder.ref(unused)
    scale = torch.ones(2, requires_grad=True)
    builder.affine(scale=builder.ref(scale))
    y, _ = flow_program(torch.ones(1, 2), None, builder.tensors, builder.build())
    assert torch.autograd.grad(y.sum(), [scale, unused], allow_unused=True)[1] is None
    assert Ref(0) == builder.ref(unused)
