"""torch.export round trips with a dynamic batch, an AOTInductor package and the inductor compiler, run from Python."""

import io

import pytest
import torch
from torch import Tensor, nn

from iin_fast.nn import Flow

from .cases import CASES, Case, gradients, learned, same, tensors

every = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


class Run(nn.Module):
    """Cases as one module, so that one compilation serves all of them."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.modules_of_cases = nn.ModuleList(case.module() for case in cases)

    def forward(self, inputs: list) -> list:
        return [tensors(module(*given)) for module, given in zip(self.modules_of_cases, inputs, strict=True)]


def export(cases: list[Case], batch: int = 5) -> torch.export.ExportedProgram:
    given = ([case.inputs(batch) for case in cases],)
    return torch.export.export(Run(cases), given, dynamic_shapes=([case.dynamic() for case in cases],))


@every
def test_export_round_trip(case: Case):
    """Saved and loaded, the program takes any batch, and learns: its gradients are the module's."""
    file = io.BytesIO()
    torch.export.save(export([case]), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (5, 2, 64):
        (found,) = loaded([case.inputs(batch)])
        same(found, case.module()(*case.inputs(batch)))

    def call(*inputs: object) -> object:
        return loaded([inputs])[0]

    module = case.module()
    same(gradients(call, loaded, case.inputs(3)), gradients(module, module, case.inputs(3)))


def test_a_wide_flow_takes_any_batch() -> None:
    """Also one of which the values that are kept would be large: how much is kept is no condition of the graph."""
    flow, x = Flow(8, 2, 4096, 2), torch.randn(5, 8)
    flow(x)
    batch = torch.export.Dim("batch", min=1)
    loaded = torch.export.export(flow, (x,), dynamic_shapes={"x": {0: batch}}).module()
    same(loaded(x[:3]), flow(x[:3]))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> object:
    """All cases compiled ahead of time into one package, and loaded from its file."""
    with torch.no_grad():
        program = export(CASES)
    path = str(tmp_path_factory.mktemp("aoti") / "cases.pt2")
    fast = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    path = torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=fast)
    return torch._inductor.aoti_load_package(path)


@every
def test_package(package: object, case: Case):
    place = CASES.index(case)
    with torch.no_grad():
        for batch in (5, 64):
            found = package([other.inputs(batch) for other in CASES])[place]
            same(found, case.module()(*case.inputs(batch)))


INDUCTOR = ["affine_coupling", "spline_coupling", "pair_nll", "Flow"]


def test_inductor():
    """The whole compiler, with its backward. It is slow, so one compilation serves one case of each op."""
    cases = [case for case in CASES if case.name in INDUCTOR]
    assert len(cases) == len(INDUCTOR)
    module = Run(cases)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)

    def results(call: nn.Module, batch: int) -> list[Tensor]:
        inputs = [case.inputs(batch) for case in cases]
        wanted = [t for part, given in zip(module.modules_of_cases, inputs, strict=True) for t in learned(part, given)]
        found = tensors(call(inputs))
        score = sum((t * torch.linspace(0.5, 1.5, t.numel()).reshape(t.shape)).sum() for t in found)
        return [*found, *torch.autograd.grad(score, wanted, allow_unused=True, materialize_grads=True)]

    for batch in (5, 9):
        same(results(compiled, batch), results(module, batch))
