"""Gradients that come with the results: equal bits, and given only to a backward that asks for what was guessed."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flow.programs import Drawn, programs
from iin_fast.nn import MaskedAutoregressiveFlow, NeuralSplineFlow
from iin_fast.ops.flow_program import ahead, flow_program
from iin_fast.ops.flow_program.checks import KEEP

USUAL = ahead.ENOUGH


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    ahead._habits.clear()
    yield
    ahead._habits.clear()


def computed_ahead(output: Tensor) -> bool:
    return "ahead" in vars(output.grad_fn)


def guessed(calls: list[Tensor]) -> list[bool]:
    return [computed_ahead(output) for output in calls]


@settings(max_examples=60, deadline=None)
@given(programs(batches=(16, 70)), st.booleans(), st.booleans(), st.sampled_from((torch.float32, torch.float64)))
def test_same_bits(drawn: Drawn, inverse: bool, base: bool, dtype: torch.dtype) -> None:
    drawn = drawn.to(dtype)
    assume(drawn.parameters)
    weights = torch.linspace(0.5, 1.5, len(drawn.x), dtype=dtype)

    def step() -> list[Tensor]:
        y, logdet = flow_program(drawn.x, drawn.context, drawn.parameters, drawn.program, inverse=inverse, base=base)
        ready = computed_ahead(logdet)
        grads = torch.autograd.grad(logdet, drawn.inputs(), weights, allow_unused=True)
        return [torch.tensor(ready), y, logdet, *(torch.zeros(0) if g is None else g for g in grads)]

    ahead._habits.clear()
    steps = [step() for _ in range(USUAL + 2)]
    assert [bool(ready) for ready, *_ in steps] == [False] * USUAL + [True] * 2
    for _, *found in steps[1:]:
        for f, wanted in zip(found, steps[0][1:], strict=True):
            assert torch.equal(f.nan_to_num(7.0), wanted.nan_to_num(7.0))


class Training:
    """A small flow, after as many steps as make the next one guess."""

    def __init__(self, batch: int = 40, steps: int = USUAL, **options: object) -> None:
        random = torch.Generator().manual_seed(0)
        self.flow = NeuralSplineFlow(4, context_dim=2, hidden_dim=16, generator=random)
        self.x, self.context = torch.randn(batch, 4, generator=random), torch.randn(batch, 2, generator=random)
        self.flow.initialize(self.x, self.context)
        self.weights = torch.rand(batch, generator=random)
        for _ in range(steps):
            self.call().mean().backward()
        self.flow.zero_grad()

    def call(self) -> Tensor:
        return self.flow.log_prob(self.x, self.context)

    def gradients(self, of: Tensor) -> list[Tensor]:
        """Of a number, by the walk that guesses nothing."""
        return list(torch.autograd.grad(of, list(self.flow.parameters())))

    def plain(self, score) -> list[Tensor]:
        kept, ahead.ENOUGH = ahead.ENOUGH, 1 << 60
        try:
            return self.gradients(score(self.call()))
        finally:
            ahead.ENOUGH = kept

    def found(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.flow.parameters()]


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def test_a_step_guesses_once_two_were_the_same() -> None:
    t = Training(steps=0)
    calls = []
    for _ in range(4):
        calls.append(t.call())
        calls[-1].mean().backward()
    # The gradients are given away: a graph that is kept holds none of them.
    assert not any(guessed(calls))
    t.flow.zero_grad()
    assert computed_ahead(t.call())


def test_another_loss_gets_its_own_gradients() -> None:
    t = Training()
    wanted = t.plain(lambda log_prob: (log_prob * t.weights).sum())
    t = Training()
    log_prob = t.call()
    assert computed_ahead(log_prob)
    (log_prob * t.weights).sum().backward()
    assert equal(t.found(), wanted)
    assert not computed_ahead(t.call())


def test_a_gradient_of_y_is_never_guessed_away() -> None:
    random = torch.Generator().manual_seed(0)
    flow = MaskedAutoregressiveFlow(3, hidden_dim=8, actnorm=False, generator=random)
    x = torch.randn(20, 3, generator=random)
    for _ in range(USUAL):
        flow(x)[1].mean().backward()
    z, logdet = flow(x)
    assert computed_ahead(logdet)
    found = torch.autograd.grad(z.square().sum() + logdet.mean(), list(flow.parameters()))
    ahead._habits.clear()
    z, logdet = flow(x)
    assert equal(list(found), list(torch.autograd.grad(z.square().sum() + logdet.mean(), list(flow.parameters()))))


def test_a_call_without_a_backward_ends_it() -> None:
    t = Training()
    assert computed_ahead(t.call())
    assert not computed_ahead(t.call())
    for _ in range(USUAL):
        t.call().mean().backward()
    assert computed_ahead(t.call())


def test_no_gradients_no_guess() -> None:
    t = Training()
    with torch.no_grad():
        assert t.call().grad_fn is None
    assert computed_ahead(t.call())  # a call that needs no backward is none of its business


def test_two_backwards_of_one_graph() -> None:
    t = Training()
    wanted = t.plain(lambda log_prob: log_prob.mean())
    t = Training()
    log_prob = t.call()
    assert computed_ahead(log_prob)
    log_prob.mean().backward(retain_graph=True)
    assert equal(t.found(), wanted)
    log_prob.mean().backward()
    assert equal(t.found(), [g + g for g in wanted])


def test_gradients_of_gradients() -> None:
    def second(log_prob: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(log_prob.mean(), list(t.flow.parameters()), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), list(t.flow.parameters())))

    t = Training()
    log_prob = t.call()
    assert computed_ahead(log_prob)
    found = second(log_prob)
    ahead._habits.clear()
    assert any(bool(g.any()) for g in found) and equal(found, second(t.call()))


def test_graphs_in_flight_keep_to_their_own_guess() -> None:
    """A guess that was made before the loss changed is compared with what its own forward computed with."""
    t = Training()
    first, second = t.call(), t.call()
    assert guessed([first, second]) == [True, False]
    wanted = t.plain(lambda log_prob: (log_prob * t.weights).sum())
    t.flow.zero_grad()
    (second * t.weights).sum().backward()
    t.flow.zero_grad()
    (first * t.weights).sum().backward()
    assert equal(t.found(), wanted)


def test_a_hook_may_write_into_the_gradient() -> None:
    t = Training(steps=0)
    found = []
    for _ in range(USUAL + 2):
        t.flow.zero_grad()
        log_prob = t.call()
        log_prob.register_hook(lambda grad: grad.mul_(2))
        log_prob.mean().backward()
        found.append(t.found())
    wanted = [2 * g for g in t.plain(lambda log_prob: log_prob.mean())]
    for grads in found:
        assert equal(grads, wanted)


def test_a_gradient_that_somebody_keeps_may_change() -> None:
    """What is remembered is a copy: a guess cannot become right after it was made."""
    t, kept = Training(steps=0), []
    wanted = Training(steps=0).plain(lambda log_prob: (log_prob * t.weights).sum())
    for _ in range(USUAL):
        log_prob = t.call()
        log_prob.register_hook(kept.append)
        log_prob.mean().backward()
    t.flow.zero_grad()
    log_prob = t.call()
    assert computed_ahead(log_prob)
    for grad in kept:
        grad.copy_(t.weights)
    (log_prob * t.weights).sum().backward()
    assert equal(t.found(), wanted)


def test_parameters_written_to_between_are_an_error() -> None:
    t = Training()
    log_prob = t.call()
    assert computed_ahead(log_prob)
    with torch.no_grad():
        next(t.flow.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_prob.mean().backward()


def test_gradients_may_be_changed_in_place() -> None:
    """Each backward gives tensors of its own: clipping one step's leaves the next alone."""
    t = Training()
    wanted = t.plain(lambda log_prob: log_prob.mean())
    for _ in range(3):
        t.flow.zero_grad()
        t.call().mean().backward()
        assert equal(t.found(), wanted)
        nn.utils.clip_grad_norm_(t.flow.parameters(), 1e-3)


@pytest.mark.parametrize("where", ["x", "context", "both"])
def test_gradients_of_the_data_alone(where: str) -> None:
    """``torch.autograd.grad`` asks for less than the flow could give; that, too, is learned."""
    t = Training(steps=0)
    asked = {"x": [t.x], "context": [t.context], "both": [t.x, t.context]}[where]
    for value in (t.x, t.context):
        value.requires_grad_()
    wanted = t.plain(lambda log_prob: log_prob.sum())
    t.call().sum().backward()
    whole = [value.grad for value in asked]
    ahead._habits.clear()
    for number in range(USUAL + 2):
        log_prob = t.call()
        assert computed_ahead(log_prob) == (number >= USUAL)
        if computed_ahead(log_prob):
            _, (_, _, of_parameters) = log_prob.grad_fn.ahead
            assert not any(g.numel() for g in of_parameters)
        assert equal(list(torch.autograd.grad(log_prob.sum(), asked)), whole)
    t.flow.zero_grad()
    t.call().sum().backward()  # guessed for the data, asked for the parameters
    assert equal(t.found(), wanted)


def test_some_parameters_alone() -> None:
    t = Training(steps=0)
    wanted = t.plain(lambda log_prob: log_prob.mean())
    parameters = list(t.flow.parameters())
    for count in (1, len(parameters) - 1):
        for _ in range(USUAL + 2):
            assert equal(list(torch.autograd.grad(t.call().mean(), parameters[-count:])), wanted[-count:])


def test_gradients_by_inputs_of_backward() -> None:
    t = Training(steps=0)
    wanted = t.plain(lambda log_prob: log_prob.mean())
    first, *others = t.flow.parameters()
    for _ in range(USUAL + 2):
        t.flow.zero_grad()
        t.call().mean().backward(inputs=others[:2])
        assert first.grad is None and equal([p.grad for p in others[:2]], wanted[1:3])


def test_checkpointed_steps() -> None:
    t = Training()
    wanted = t.plain(lambda log_prob: log_prob.mean())
    for _ in range(USUAL + 2):
        t.flow.zero_grad()
        checkpoint(t.call, use_reentrant=False).mean().backward()
        assert equal(t.found(), wanted)


def test_other_batches_flows_and_types_have_their_own() -> None:
    t = Training()
    assert not computed_ahead(t.flow.log_prob(t.x[:30], t.context[:30]))
    assert not computed_ahead(t.flow.double().log_prob(t.x.double(), t.context.double()))
    assert not computed_ahead(Training(steps=0).call())


def test_who_says_what_is_kept_gets_that() -> None:
    t = Training()
    program, parameters = t.flow.program(), [*t.flow.parameters()]
    for memory in ("save", "checkpoint", "recompute"):
        for _ in range(USUAL + 1):
            _, logdet = flow_program(t.x, t.context, parameters, program, memory=memory)
            assert not computed_ahead(logdet)
            logdet.mean().backward()


def test_modes_see_the_ops_that_they_know() -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    t = Training()
    with Seen():
        t.call().mean().backward()
    assert "iin_fast.flow_program.default" in names and not any("ahead" in name for name in names)


@torch.no_grad()
def test_wide_nets() -> None:
    """They gain where the values of all rows are too many to be kept: those of a slice of 1024 are few. Same bits."""
    random = torch.Generator().manual_seed(0)
    flow = NeuralSplineFlow(4, hidden_dim=200, n_flows=1, generator=random)
    x = torch.randn(2100, 4, generator=random)
    flow.initialize(x)
    program, parameters, op = flow.program(), list(flow.parameters()), torch.ops.iin_fast
    gains = [op.flow_program_gains_ahead(program.text, rows, 4, False) for rows in (1, 15, 300, 2100, 1 << 18)]
    assert gains == [False] * 4 + [True]
    wanted = "1" * len(parameters)
    for batch in (300, 2100):
        rows, grad = x[:batch], torch.rand(batch, generator=random)
        y, logdet, saved = op.flow_program(rows, None, parameters, program.text, False, True, KEEP["auto"])
        of_x, _, of_parameters = op.flow_program_backward(
            None, grad, rows, saved, None, parameters, program.text, False, True, KEEP["auto"], False, wanted
        )
        *results, found_x, _, found = op.flow_program_ahead(
            grad, rows, None, parameters, program.text, False, True, False, wanted
        )
        assert equal([*results, found_x, *found], [y, logdet, of_x, *of_parameters])


def test_little_is_remembered() -> None:
    t = Training(steps=0)
    for batch in range(1, ahead.MOST + 20):
        t.flow.log_prob(t.x[:1].expand(batch, 4), t.context[:1].expand(batch, 2)).mean().backward()
        assert len(ahead._habits) <= ahead.MOST
