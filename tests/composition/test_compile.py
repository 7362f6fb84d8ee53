"""torch.compile in one graph: values and gradients, any batch size without compiling again, the first call of ActNorm."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from iin_fast.nn import Flow

from .cases import CASES, DIM, OPS, Case, gradients, normal, same, seeded

every = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@every
def test_one_graph_for_any_batch(case: Case):
    """Two graphs: one for the first batch size, one for all others."""
    module = case.module()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch in (5, 7):
        same(gradients(compiled, module, case.inputs(batch)), gradients(module, module, case.inputs(batch)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (9, 3, 64):
            same(gradients(compiled, module, case.inputs(batch)), gradients(module, module, case.inputs(batch)))
    if case in OPS:  # torch.compile makes a graph of its own for one row
        same(gradients(compiled, module, case.inputs(1)), gradients(module, module, case.inputs(1)))


PLAIN = [case for case in CASES if not case.name.endswith((" inverse", " context"))]


@pytest.mark.parametrize("case", PLAIN, ids=[case.name for case in PLAIN])
def test_dynamic_is_one_graph(case: Case):
    """The second graph of the test above is as dynamic; here the first one is."""
    module, counter = case.module(), CompileCounter()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        compiled(*case.inputs(5))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch in (9, 3, 64):
                same(compiled(*case.inputs(batch)), module(*case.inputs(batch)))


def test_first_call_starts_actnorm():
    def fresh() -> Flow:
        return Flow(DIM, n_flows=2, hidden_dim=8, generator=seeded())

    flow, eager, x = fresh(), fresh(), 3 * normal(1, 16, DIM) + 1
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        same(compiled(x), eager(x))
    assert flow._started == (True, True) and flow.initialized.all()
    same([flow.loc, flow.scale], [eager.loc, eager.scale])


SAMPLERS = ["IIN", "Flow", "NeuralSplineFlow"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_any_number_of_samples_is_one_graph_more(name: str):
    module: Any = next(case for case in CASES if case.name == name).module()
    counter = CompileCounter()
    compiled = torch.compile(lambda n: module.sample(n), fullgraph=True, backend=counter)
    for n in (4, 7, 9, 30):
        assert compiled(n).shape == (n, DIM)
    assert counter.frame_count == 2


@pytest.mark.parametrize("given", ["latents", "log-likelihoods"])
def test_outlier_scores_are_one_graph(given: str):
    model: Any = next(case for case in CASES if case.name == "IIN").module()
    held_in = normal(3, 50, DIM)
    if given != "latents":
        held_in = model.log_prob(held_in).detach()
    compiled = torch.compile(model.outlier_score, fullgraph=True, backend="aot_eager")
    same(compiled(normal(1, 5, DIM), held_in), model.outlier_score(normal(1, 5, DIM), held_in))
    assert compiled(normal(1, 5, DIM), held_in * torch.nan).isnan().all()
    with pytest.raises(ValueError, match="held_in has NaN"):
        model.outlier_score(normal(1, 5, DIM), held_in * torch.nan)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model.outlier_score(torch.randn(5, DIM), torch.randn(50, DIM)).shape == (5,)


@pytest.mark.parametrize("name", ["NeuralSplineFlow", "MaskedAutoregressiveFlow", "Compose"])
def test_a_file_with_other_permutations(name: str):
    """The program is a constant of the compiled graph, until the permutations change."""
    module = next(case for case in CASES if case.name == name).module()
    compiled, x = torch.compile(module, fullgraph=True, backend="aot_eager"), normal(1, 5, DIM)
    before = compiled(x)[0]
    state = {k: v.roll(1, -1) if k.endswith("permutation") else v for k, v in module.state_dict().items()}
    module.load_state_dict(state)
    found = compiled(x)
    same(found, module(x))
    assert not torch.allclose(found[0], before)


@pytest.mark.parametrize("call", ["log_prob", "rsample_and_log_prob"])
def test_density_compiles(call: str):
    flow = next(case for case in CASES if case.name == "Flow").module()

    def score(x: torch.Tensor) -> torch.Tensor:
        density = flow.distribution(validate_args=False)
        if call == "log_prob":
            return density.log_prob(x)
        draw, log_prob = density.rsample_and_log_prob((len(x),))
        return log_prob - density.log_prob(draw)

    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    x = normal(1, 5, DIM)
    if call == "log_prob":
        same(compiled(x), score(x))
    else:
        same(compiled(x), torch.zeros(5), rtol=0, atol=1e-4)
