"""FrEIA's sequences as programs: the same results, both directions, with and without a condition."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import Net
from derivatives import with_gradients
from torch import Tensor, nn

import iin_fast

FrEIA = pytest.importorskip("FrEIA")
import FrEIA.framework as Ff  # noqa: E402
import FrEIA.modules as Fm  # noqa: E402

DIM, CONDITION, BATCH = 5, 3, 7
TOLERANCE = dict(rtol=1e-9, atol=1e-9)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def subnet(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, outputs))


def sequence(cls: Any, conditional: bool = False, **options: Any) -> nn.Module:
    """Two blocks and a permutation between them."""
    made = Ff.SequenceINN(DIM)
    given = {"cond": 0, "cond_shape": (CONDITION,)} if conditional else {}
    made.append(cls, subnet_constructor=subnet, **given, **options)
    made.append(Fm.PermuteRandom)
    made.append(cls, subnet_constructor=subnet, **given, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return made.double()


def with_scale(made: nn.Module) -> nn.Module:
    """Blocks that preserve volume give the float 0 as their log-det; one more block makes it a tensor."""
    made.append(Fm.AffineCouplingOneSided, subnet_constructor=subnet)
    return made.double()


BLOCKS: dict[str, Callable[[bool], nn.Module]] = {
    "GLOW": lambda c: sequence(Fm.GLOWCouplingBlock, c),
    "RNVP": lambda c: sequence(Fm.RNVPCouplingBlock, c, clamp_activation="TANH", clamp=1.3, split_len=2),
    "GLOW, sigmoid": lambda c: sequence(Fm.GLOWCouplingBlock, c, clamp_activation="SIGMOID", split_len=2),
    "RNVP, sigmoid": lambda c: sequence(Fm.RNVPCouplingBlock, c, clamp_activation="SIGMOID"),
    "one sided": lambda c: sequence(Fm.AffineCouplingOneSided, c),
    "all in one": lambda c: sequence(Fm.AllInOneBlock, c),
    "all in one, soft": lambda c: sequence(
        Fm.AllInOneBlock, c, permute_soft=True, global_affine_type="SIGMOID", affine_clamping=1.2
    ),
    "all in one, reversed": lambda c: sequence(Fm.AllInOneBlock, c, reverse_permutation=True),
    "GIN": lambda c: with_scale(sequence(Fm.GINCouplingBlock, c)),
    "GIN, tanh": lambda c: with_scale(sequence(Fm.GINCouplingBlock, c, clamp_activation="TANH", split_len=2)),
    "GIN, sigmoid": lambda c: with_scale(sequence(Fm.GINCouplingBlock, c, clamp_activation="SIGMOID", clamp=1.2)),
    "all in one, GIN": lambda c: sequence(Fm.AllInOneBlock, c, gin_block=True),
    "all in one, exp": lambda c: sequence(Fm.AllInOneBlock, c, global_affine_type="EXP"),
}


def graph(conditional: bool, cls: Any = None, last: Any = None) -> nn.Module:
    """A chain of the same kinds of blocks."""
    condition = Ff.ConditionNode(CONDITION)
    nodes = [Ff.InputNode(DIM)]
    given = {"conditions": condition} if conditional else {}
    matrix = torch.eye(DIM) + 0.3 * torch.randn(DIM, DIM)
    for block, arguments, more in (
        (Fm.GLOWCouplingBlock, {"subnet_constructor": subnet}, given),
        (Fm.ActNorm, {}, {}),
        (Fm.FixedLinearTransform, {"M": matrix.double(), "b": torch.randn(DIM).double()}, {}),
        (last or Fm.PermuteRandom, {}, {}),
        (Fm.AllInOneBlock, {"subnet_constructor": subnet}, given),
    ):
        nodes.append(Ff.Node(nodes[-1], block, arguments, **more))
    made = (cls or Ff.GraphINN)(
        [*nodes, Ff.OutputNode(nodes[-1]), *([condition] if conditional else [])], verbose=False
    ).double()
    with torch.no_grad():
        made(torch.randn(20, DIM).double(), torch.randn(20, CONDITION).double() if conditional else None)
    return made


BLOCKS["graph"] = graph
BLOCKS["reversible graph"] = lambda c: graph(c, Ff.ReversibleGraphNet)


def data(conditional: bool) -> tuple[Tensor, Tensor | None]:
    x = torch.randn(BATCH, DIM, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(BATCH, CONDITION, dtype=torch.float64, requires_grad=True) if conditional else None


def results(model: nn.Module, x: Tensor, c: Tensor | None, order: int = 1) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = [x, *parameters, *([] if c is None else [c])]
    condition = None if c is None else [c]
    return with_gradients([partial(model, x, condition, rev=rev) for rev in (False, True)], wanted, order)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_results_and_gradients_are_the_library_s(name: str, conditional: bool, calls: list[int]) -> None:
    own, inputs = BLOCKS[name](conditional), data(conditional)
    fast = copy.deepcopy(own)
    report = iin_fast.accelerate(fast)
    torch.testing.assert_close(results(fast, *inputs), results(own, *inputs), **TOLERANCE)
    if "soft" in name:
        assert not calls and "a soft permutation" in str(report), "a rotation in float32 only"
        calls += [0, 0]
    else:
        line = next(line for line in report.lines if line.path == "")
        assert line.why.startswith(tuple(f"{n} of {n} layers run in programs" for n in (3, 4, 5))), str(report)
    assert len(calls) == 2
    single = copy.deepcopy(own).float(), copy.deepcopy(fast).float()
    floats = [None if v is None else v.detach().float().requires_grad_() for v in inputs]
    torch.testing.assert_close(results(single[1], *floats), results(single[0], *floats), rtol=1e-4, atol=1e-4)
    assert len(calls) == 4
    iin_fast.restore(fast)
    assert [type(m) for m in fast.modules()] == [type(m) for m in own.modules()]


@pytest.mark.parametrize("name", ["all in one", "GIN"])
def test_another_default_device_changes_nothing(name: str, calls: list[int]) -> None:
    own, (x, c) = BLOCKS[name](True), data(True)
    fast = copy.deepcopy(own)
    with torch.device("meta"):
        iin_fast.accelerate(fast)
        found = fast(x, [c])
    torch.testing.assert_close(found, own(x, [c]), **TOLERANCE)
    assert len(calls) == 1


def test_second_derivatives() -> None:
    own, inputs = BLOCKS["all in one"](True), data(True)
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    torch.testing.assert_close(results(fast, *inputs, 2), results(own, *inputs, 2), **TOLERANCE)


def test_what_cuts_a_program(calls: list[int]) -> None:
    own = sequence(Fm.GLOWCouplingBlock)
    own.append(Fm.GLOWCouplingBlock, subnet_constructor=Net)
    own.append(Fm.NICECouplingBlock, subnet_constructor=subnet)
    own.append(Fm.AllInOneBlock, subnet_constructor=subnet, learned_householder_permutation=2)
    own = own.double()
    fast, (x, _) = copy.deepcopy(own), data(False)
    report = iin_fast.accelerate(fast)
    assert next(line.why for line in report.lines if line.path == "").startswith("4 of 6 layers"), str(report)
    for rev in (False, True):
        torch.testing.assert_close(fast(x, rev=rev), own(x, rev=rev), **TOLERANCE)
    assert sorted(calls) == [2, 2, 5, 5]


@pytest.mark.parametrize("block", [Fm.NICECouplingBlock, Fm.GINCouplingBlock])
def test_a_sequence_without_log_det_gives_a_float_as_before(block: Any, calls: list[int]) -> None:
    own, (x, _) = sequence(block), data(False)
    wanted = own(x)
    iin_fast.accelerate(own)
    found = own(x)
    assert torch.equal(found[0], wanted[0]) and type(found[1]) is type(wanted[1]) is float and not calls


@pytest.mark.parametrize(
    "change",
    [
        lambda x, c: (x[:, :4], [c]),
        lambda x, c: (x, [c[:, :2]]),
        lambda x, c: (x, [c[:3]]),
        lambda x, c: (x, None),
        lambda x, c: (x, []),
        lambda x, c: (x.detach().float(), [c]),
        lambda x, c: ((x,), [c]),
        lambda x, c: (x[:0], [c[:0]]),
    ],
)
@pytest.mark.parametrize("name", ["GLOW", "all in one", "graph"])
def test_errors_are_the_library_s(name: str, change: Callable[[Tensor, Tensor], Any]) -> None:
    own, (x, c) = BLOCKS[name](True), data(True)
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    given = change(x, c)
    for rev in (False, True):
        outcomes = []
        for model in (own, fast):
            try:
                outcomes.append([part.shape for part in model(*given, rev=rev)])
            except Exception as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1]


def test_patch(calls: list[int]) -> None:
    own, (x, _) = BLOCKS["all in one"](False), data(False)
    wanted = own(x)
    with iin_fast.patch("freia"):
        torch.testing.assert_close(own(x), wanted, **TOLERANCE)
    assert len(calls) == 1


class Odd(Fm.PermuteRandom):
    """A user's block."""


def test_a_graph_is_cut_by_a_block_of_another_kind(calls: list[int]) -> None:
    own, (x, _) = graph(False, last=Odd), data(False)
    fast = copy.deepcopy(own)
    report = iin_fast.accelerate(fast)
    assert next(line.why for line in report.lines if line.path == "").startswith("4 of 5 layers"), str(report)
    torch.testing.assert_close(results(fast, x, None), results(own, x, None), **TOLERANCE)
    assert sorted(calls) == [4, 4, 6, 6]


def test_a_graph_that_is_no_chain_runs_the_library_s_code(calls: list[int]) -> None:
    start = Ff.InputNode(DIM)
    split = Ff.Node(start, Fm.Split, {})
    block = Ff.Node(split.out0, Fm.PermuteRandom, {})
    merged = Ff.Node([block.out0, split.out1], Fm.Concat, {})
    own = Ff.GraphINN([start, split, block, merged, Ff.OutputNode(merged)]).double()
    x, _ = data(False)
    wanted = own(x)
    report = iin_fast.accelerate(own)
    assert "a graph that is no chain" in str(report) and not report.replaced
    torch.testing.assert_close(own(x), wanted, **TOLERANCE)
    assert not calls


def test_options_of_a_graph_s_call_stay(calls: list[int]) -> None:
    own, (x, c) = graph(True), data(True)
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    assert fast(x, c, jac=False)[0].shape == x.shape and len(fast(x, [c], intermediate_outputs=True)[0]) == 8
    torch.testing.assert_close(fast(x, c)[0], own(x, c)[0], **TOLERANCE)
    assert len(calls) == 1


def test_a_node_that_gets_another_module_is_seen() -> None:
    own, (x, _) = graph(False), data(False)
    iin_fast.accelerate(own)
    own(x)
    node = own.node_list[1]
    node.module = copy.deepcopy(node.module)
    with torch.no_grad():
        for parameter in node.module.parameters():
            parameter.mul_(1.5)
    found = own(x)
    iin_fast.restore(own)
    torch.testing.assert_close(own(x), found, **TOLERANCE)
