"""accelerate and patch change no result: outputs, log-dets, gradients, both ways, every class and option."""

import copy
import importlib
from typing import Any

import pytest
import torch
from cases import Case, all_cases, has
from torch import Tensor, nn

import iin_fast
from iin_fast.dropin import registry, stacks
from iin_fast.ops.flow_program import engine

CASES = all_cases()
LIBRARY = {"nflows": "nflows", "normflows": "normflows", "FrEIA": "freia", "zuko": "zuko"}
LIMIT = 1e-12  # in float64
FACTORS = 4, 16  # how much farther from the truth than the library's own float32 results and gradients may be
FLOOR = 1e-6  # what is always allowed, relative to the largest entry


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small affine couplings and small batches of stacks take the fused ops too."""
    monkeypatch.setattr(registry, "AFFINE_DEVICES", ("cpu",))
    monkeypatch.setattr(stacks, "ROWS", 0)


def made(case: Case, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(7)
    module = case.build().to(dtype)
    for parameter in module.parameters():  # FrEIA's own start gives factors of 1 and shifts of 0
        if parameter.requires_grad and float(parameter.detach().std()) == 0 and parameter.numel() > 1:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.3)
    x = torch.rand(case.shape, dtype=dtype) if case.unit else 1.5 * torch.randn(case.shape, dtype=dtype)
    return module, x


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, list | tuple):
        return [tensor for part in result for tensor in tensors(part)]
    return []


def shape_of(result: Any) -> Any:
    """Types and shapes, so that a float stays a float and a tuple a tuple."""
    if isinstance(result, Tensor):
        return tuple(result.shape), result.dtype
    if isinstance(result, list | tuple):
        return type(result), [shape_of(part) for part in result]
    return result


def mixture(found: list[Tensor]) -> Any:
    """A sum of all numbers with fixed factors."""
    generator = torch.Generator().manual_seed(5)
    return sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in found if t.requires_grad)


def outcome(case: Case, module: nn.Module, call: str, x: Tensor) -> tuple[Any, list[Tensor], list[Tensor]]:
    """The result, its tensors, and gradients of a fixed mixture of them by the input and all parameters."""
    x = x.clone().requires_grad_()
    result = case.calls[call](module, x)
    found = tensors(result)
    loss = mixture(found)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return shape_of(result), [t.detach() for t in found], list(grads)


def close(got: list[Tensor], want: list[Tensor], limit: float) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, rtol=limit, atol=limit * max(1.0, float(w.abs().max()) if w.numel() else 1.0)), (
            f"off by {float((g - w).abs().max()):.1e} at magnitude {float(w.abs().max()):.1e}"
        )


def in_float64(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a library that turns its condition to float32 keep float64."""
    if case.dtype is not None:
        monkeypatch.setattr(Tensor, "float", Tensor.double)


def off(got: list[Tensor], truth: list[Tensor]) -> float:
    """The root mean square error over all tensors, each relative to its largest entry, or to 1."""
    assert len(got) == len(truth)
    errors = [
        float((g - t).square().mean().sqrt()) / max(1.0, float(t.abs().max()))
        for g, t in zip(got, truth, strict=True)
        if t.numel()
    ]
    return float(torch.tensor(errors).square().mean().sqrt())


def as_exact_as_own(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 against float64: accelerated results and gradients lie about as near to the truth as the library's own."""
    module, x = made(case, torch.float32)
    with monkeypatch.context() as patched:
        in_float64(case, patched)
        truth = copy.deepcopy(module).double()
        truths = {call: outcome(case, truth, call, x.double())[1:] for call in case.calls}
    own = {call: outcome(case, module, call, x)[1:] for call in case.calls}
    iin_fast.accelerate(module)
    for call in case.calls:
        found = outcome(case, module, call, x)[1:]
        for what, factor, *parts in zip(("result", "gradient"), FACTORS, found, own[call], truths[call], strict=True):
            got, wanted = off(parts[0], parts[2]), off(parts[1], parts[2])
            assert got <= factor * wanted + FLOOR, (
                f"{call}, {what}: off by {got:.1e}, the library's own by {wanted:.1e}"
            )


@pytest.mark.parametrize(
    "module",
    [
        "nflows",
        "normflows",
        "zuko",
        "FrEIA",
        "FrEIA.modules.splines",
        "iin.models.iin",
        "net2net.modules.flow.flatflow",
        "invariances.model.blocks",
    ],
)
def test_library_is_here(module: str) -> None:
    """A skip says whose cases did not run."""
    if not has(module):
        pytest.skip(f"{module} is not installed: its cases did not run")
    assert any(case.name.startswith(module.split(".")[0]) for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_accelerated_model_gives_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = made(case, torch.float64)
    in_float64(case, monkeypatch)
    before = {call: outcome(case, module, call, x) for call in case.calls}
    classes = [type(m) for m in module.modules()]
    parameters, keys = list(module.parameters()), list(module.state_dict())
    report = iin_fast.accelerate(module)
    assert len(report.replaced) == case.replaced, str(report)
    assert all(now is then for now, then in zip(module.parameters(), parameters, strict=True))
    assert list(module.state_dict()) == keys
    assert all(isinstance(m, cls) for m, cls in zip(module.modules(), classes, strict=True))
    limit = LIMIT * case.loose
    for call, (shape, values, grads) in before.items():
        found = outcome(case, module, call, x)
        assert found[0] == shape, call
        close(found[1], values, limit)
        close(found[2], grads, 10 * limit)
    iin_fast.restore(module)
    assert [type(m) for m in module.modules()] == classes
    for call, (_, values, _) in before.items():
        close(outcome(case, module, call, x)[1], values, 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_direct_gradients_are_torchs(case: Case) -> None:
    module, x = made(case, torch.float32)
    iin_fast.accelerate(module)
    for call in case.calls:
        found = []
        for direct in (False, True):
            module.zero_grad()
            with iin_fast.direct_gradients(direct):
                torch.manual_seed(0)
                loss = mixture(tensors(case.calls[call](module, x)))
                if isinstance(loss, Tensor):  # else nothing has gradients
                    loss.backward()
            found.append([None if p.grad is None else p.grad.clone() for p in module.parameters()])
        for mine, torchs in zip(*found, strict=True):
            assert (mine is None) == (torchs is None), call
            assert torchs is None or torch.equal(mine, torchs), call


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_is_as_exact_as_own(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = made(case, torch.float32)
    wanted = {call: outcome(case, module, call, x)[0] for call in case.calls}
    iin_fast.accelerate(module)
    assert {call: outcome(case, module, call, x)[0] for call in case.calls} == wanted  # types and shapes
    as_exact_as_own(case, monkeypatch)


PLANTED = {
    "affine_coupling": ("nflows affine", "normflows affine exp channel", "FrEIA GLOWCouplingBlock ATAN"),
    "spline_coupling": ("nflows masked spline tails=None", "normflows masked spline", "zuko NSF context=2"),
}  # fmt: skip


@pytest.mark.parametrize("which", [0, 1], ids=("y", "logdet"))
@pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(op, c, id=c.name) for op, names in PLANTED.items() for c in CASES if c.name in names],
)
def test_an_error_of_a_thousandth_would_be_found(
    op: str, case: Case, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = importlib.import_module(f"iin_fast.ops.{op}")._calls
    run = calls["cpp"]
    monkeypatch.setitem(calls, "cpp", lambda *a: [t * (1.001 if i == which else 1) for i, t in enumerate(run(*a))])
    with pytest.raises(AssertionError, match="off by"):
        as_exact_as_own(case, monkeypatch)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_fast_code_runs(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equality alone would hold if every call went back to the library's own code."""
    if (
        "norm" in case.name.split()[1:]
        or "shuffle" in case.name.split()[1:]
        or "additive" in case.name
        or "NICE" in case.name
    ):
        pytest.skip("plain torch operations, no op")
    module, x = made(case, case.dtype or torch.float64)
    calls = []
    for name in ("affine_coupling", "spline_coupling"):
        op = importlib.import_module(f"iin_fast.ops.{name}")
        run = op._calls["cpp"]
        monkeypatch.setitem(op._calls, "cpp", lambda *args, run=run: (calls.append(run), run(*args))[1])
    program = engine.call
    monkeypatch.setattr(engine, "call", lambda *args: (calls.append(program), program(*args))[1])
    for call in case.calls:
        case.calls[call](module, x)
    assert not calls
    iin_fast.accelerate(module)
    for call in case.calls:
        calls.clear()
        with torch.no_grad():
            case.calls[call](module, x)
        odd = case.name == "net2net stack 5" and call == "inverse"
        assert calls or odd, f"{call} did not use an op"


@pytest.mark.parametrize("case", [c for c in CASES if c.name.split()[0] in LIBRARY], ids=lambda case: case.name)
def test_patched_library_gives_the_same(case: Case) -> None:
    module, x = made(case, torch.float64)
    twin = copy.deepcopy(module)
    before = {call: outcome(case, module, call, x) for call in case.calls}
    with iin_fast.patch(LIBRARY[case.name.split()[0]]):
        for call, (shape, values, grads) in before.items():
            found = outcome(case, twin, call, x)
            assert found[0] == shape
            close(found[1], values, LIMIT * case.loose)
            close(found[2], grads, 10 * LIMIT * case.loose)
    for call, (_, values, _) in before.items():
        close(outcome(case, twin, call, x)[1], values, 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_second_derivatives(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient by the input, differentiated by the input and all parameters."""
    module, x = made(case, torch.float64)
    in_float64(case, monkeypatch)

    def second() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        found = tensors(case.calls["forward" if "forward" in case.calls else "inverse"](module, leaf))
        total = sum((t.square()).sum() for t in found if t.requires_grad)
        (first,) = torch.autograd.grad(total, leaf, create_graph=True)
        wanted = [leaf, *(p for p in module.parameters() if p.requires_grad)]
        return list(torch.autograd.grad(first.square().sum(), wanted, allow_unused=True, materialize_grads=True))

    before = second()
    iin_fast.accelerate(module)
    close(second(), before, 1e-10 * case.loose)
