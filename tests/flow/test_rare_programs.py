"""Programs that few would write: each once gave wrong numbers in the compiled op."""

import pytest
import torch
from torch import Tensor

import iin_fast
from iin_fast.flow import FlowProgram, NetBuilder, ProgramBuilder, Weights, affine, mlp
from iin_fast.ops.flow_program import flow_program

DIM = 4


def narrow(depth: int, width: int, dtype: torch.dtype) -> tuple[FlowProgram, list[Tensor]]:
    """One coupling with a deep net of narrow layers."""
    random, builder = torch.Generator().manual_seed(0), ProgramBuilder(DIM)

    def weights(inputs: int, out: int) -> Weights:
        weight = torch.randn(out, inputs, generator=random, dtype=dtype) / inputs**0.5
        return Weights(
            out, builder.ref(weight.requires_grad_()), builder.ref(torch.zeros(out, dtype=dtype).requires_grad_())
        )

    layers = [weights(2, width), *(weights(width, width) for _ in range(depth)), weights(width, 4)]
    builder.coupling([0, 2], [1, 3], mlp(layers, activation="leaky_relu", slope=0.01), affine(2, "tanh"))
    return builder.build(), builder.tensors


def test_slices_of_a_walk_that_is_wide_for_all_rows_alone() -> None:
    """2048 rows are work enough to share each step, and the 1024 of a slice are not: values lie where the whole walk puts them."""
    program, parameters = narrow(19, 30, torch.float64)
    x = torch.randn(2048, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradients(memory: str) -> tuple[Tensor, ...]:
        logdet = flow_program(x, None, parameters, program, memory=memory)[1]
        return torch.autograd.grad(logdet, parameters, torch.linspace(0.5, 1.5, len(x), dtype=x.dtype))

    with iin_fast.backend("reference"):
        wanted = gradients("auto")
    for memory in ("save", "checkpoint", "recompute"):
        for found, want in zip(gradients(memory), wanted, strict=True):
            torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    ones = torch.linspace(0.5, 1.5, len(x), dtype=x.dtype)
    plain = [p.detach() for p in parameters]
    *_, found = torch.ops.iin_fast.flow_program_ahead(
        ones, x, None, plain, program.text, False, False, False, "1" * len(plain)
    )
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [5, 300])
@pytest.mark.parametrize("width", [8, 600])
def test_a_mask_may_weigh(rows: int, width: int) -> None:
    random, builder = torch.Generator().manual_seed(0), ProgramBuilder(2)

    def weights(inputs: int, out: int) -> Weights:
        weight = torch.randn(out, inputs, generator=random, dtype=torch.float64) / inputs**0.5
        mask = torch.tensor([0.0, 0.5, 1.0, -2.0])[torch.randint(4, (out, inputs), generator=random)].double()
        return Weights(out, builder.ref(weight.requires_grad_()), mask=builder.ref(mask))

    builder.coupling([0], [1], mlp([weights(1, width), weights(width, width), weights(width, 2)]), affine(1, "tanh"))
    program, parameters = builder.build(), builder.tensors
    x = torch.randn(rows, 2, generator=random, dtype=torch.float64)
    learned = [p for p in parameters if p.requires_grad]

    def gradients() -> tuple[Tensor, ...]:
        y, logdet = flow_program(x, None, parameters, program)
        return torch.autograd.grad(y.square().sum() + logdet.sum(), learned)

    with iin_fast.backend("reference"):
        wanted = gradients()
    for found, want in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["leaky_relu", "elu"])
def test_slopes_below_zero_are_refused(kind: str) -> None:
    builder, net = ProgramBuilder(2), NetBuilder()
    first = net.dense(0, Weights(3, builder.ref(torch.zeros(3, 1))))
    value = net.dense(net.act(first, kind, -0.2), Weights(2, builder.ref(torch.zeros(2, 3))))
    with pytest.raises(ValueError, match=f"slope is -0.2, expected 0 or more for {kind}"):
        builder.coupling([0], [1], net.build(value), affine(1, "tanh"))
        builder.build()


def test_a_net_with_such_a_slope_runs_as_ever() -> None:
    pytest.importorskip("FrEIA")
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import AllInOneBlock

    def net(inputs: int, outputs: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(inputs, 8), torch.nn.LeakyReLU(-0.2), torch.nn.Linear(8, outputs))

    flow = SequenceINN(4)
    flow.append(AllInOneBlock, subnet_constructor=net)
    x, learned = torch.randn(6, 4), [p for p in flow.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(flow(x)[1].sum(), learned, allow_unused=True)
    report = str(iin_fast.accelerate(flow))
    found = torch.autograd.grad(flow(x)[1].sum(), learned, allow_unused=True)
    assert "LeakyReLU with negative_slope -0.2" in report
    for got, want in zip(found, wanted, strict=True):
        assert (got is None) == (want is None) and (got is None or torch.allclose(got, want, atol=1e-6))


@pytest.mark.parametrize("raw", [-90.0, -110.0, 80.0])
def test_log_scales_that_no_float32_can_hold(raw: float) -> None:
    """The log-det of exp(raw) is raw, and its gradient 1, where exp(raw) is no number any more."""
    builder = ProgramBuilder(1)
    scale = torch.tensor([raw], requires_grad=True)
    builder.affine(builder.ref(torch.zeros(1)), builder.ref(scale), form="exp")
    _, logdet = flow_program(torch.zeros(3, 1), None, builder.tensors, builder.build())
    assert torch.equal(logdet, torch.full((3,), raw))
    assert torch.autograd.grad(logdet.sum(), scale)[0].item() == 3.0


def test_masks_that_lost_their_order_are_refused_ahead_too() -> None:
    """They change in place after the op has learned what gradient comes: nothing of an earlier call may be returned."""
    builder = ProgramBuilder(2)
    mask = torch.tensor([[False, False], [True, False]])
    weight = torch.ones(2, 2, requires_grad=True)
    net = mlp([Weights(2, builder.ref(weight), mask=builder.ref(mask))])
    builder.autoregressive(net, affine(2, "none"))
    program, parameters = builder.build(), builder.tensors
    for _ in range(4):
        flow_program(torch.ones(20, 2), None, parameters, program, inverse=True)[1].sum().backward()
    mask.fill_(True)
    with pytest.raises((RuntimeError, ValueError), match="layer 0|features"):
        flow_program(torch.ones(20, 2), None, parameters, program, inverse=True)[1].sum().backward()


@pytest.mark.parametrize("forced", ["cpp", "reference"])
def test_a_permutation_that_is_none_is_refused_in_every_tensor(forced: str) -> None:
    """Also where it lies in the place of a good one that is gone."""
    builder = ProgramBuilder(3)
    good = torch.tensor([2, 0, 1])
    builder.shuffle(builder.ref(good))
    program, x = builder.build(), torch.zeros(2, 3)
    with iin_fast.backend(forced):
        for _ in range(20):
            flow_program(x, None, [torch.tensor([2, 0, 1])], program)
            with pytest.raises((RuntimeError, ValueError), match="permutation"):
                flow_program(x, None, [torch.tensor([0, 0, 1])], program)
