"""torch.compile in one graph: values and gradients, any batch size without compiling again, the first call of ActNorm."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from iin_fast.nn import Flow

from .cases import CASES, DIM, Case, gradients, normal, same, seeded

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
    same(gradients(compiled, module, case.inputs(1)), gradients(module, module, case.inputs(1)))


@every
def test_dynamic_is_one_graph(case: Case):
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
