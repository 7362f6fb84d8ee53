"""accelerate and patch change no result: outputs, log-dets, gradients, both ways, every class and option."""

import copy
import functools
from typing import Any

import pytest
import torch
from cases import Case, all_cases
from torch import Tensor, nn

import iin_fast
from iin_fast.dropin import known

CASES = all_cases()
LIBRARY = {"nflows": "nflows", "normflows": "normflows", "FrEIA": "freia", "zuko": "zuko"}
DTYPES = (torch.float64, torch.float32)
LIMIT = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small affine couplings take the fused op too."""
    monkeypatch.setattr(known, "SMALL", 0)


def made(case: Case, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    if case.dtype not in (None, dtype):
        pytest.skip(f"the library takes {case.dtype} alone")
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


def outcome(case: Case, module: nn.Module, call: str, x: Tensor) -> tuple[Any, list[Tensor], list[Tensor]]:
    """The result, its tensors, and gradients of a fixed mixture of them by the input and all parameters."""
    x = x.clone().requires_grad_()
    result = case.calls[call](module, x)
    found = tensors(result)
    generator = torch.Generator().manual_seed(5)
    loss = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in found if t.requires_grad)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return shape_of(result), [t.detach() for t in found], list(grads)


def close(got: list[Tensor], want: list[Tensor], limit: float) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, rtol=limit, atol=limit * max(1.0, float(w.abs().max()) if w.numel() else 1.0)), (
            f"off by {float((g - w).abs().max()):.1e} at magnitude {float(w.abs().max()):.1e}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=("f64", "f32"))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_accelerated_model_gives_the_same(case: Case, dtype: torch.dtype) -> None:
    module, x = made(case, dtype)
    before = {call: outcome(case, module, call, x) for call in case.calls}
    classes = [type(m) for m in module.modules()]
    parameters, keys = list(module.parameters()), list(module.state_dict())
    report = iin_fast.accelerate(module)
    assert len(report.replaced) == case.replaced, str(report)
    assert all(now is then for now, then in zip(module.parameters(), parameters, strict=True))
    assert list(module.state_dict()) == keys
    assert all(isinstance(m, cls) for m, cls in zip(module.modules(), classes, strict=True))
    limit = LIMIT[dtype] * case.loose
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
    for name in ("affine_coupling", "spline_coupling", "flow"):
        op = getattr(torch.ops.iin_fast, name)
        monkeypatch.setattr(
            torch.ops.iin_fast, name, functools.partial(lambda op, *a: (calls.append(op), op(*a))[1], op)
        )
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
            close(found[1], values, LIMIT[torch.float64] * case.loose)
            close(found[2], grads, 10 * LIMIT[torch.float64] * case.loose)
    for call, (_, values, _) in before.items():
        close(outcome(case, twin, call, x)[1], values, 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_second_derivatives(case: Case) -> None:
    module, x = made(case, torch.float64)

    def second() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        found = tensors(case.calls["forward" if "forward" in case.calls else "inverse"](module, leaf))
        total = sum((t.square()).sum() for t in found if t.requires_grad)
        (first,) = torch.autograd.grad(total, leaf, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), leaf, allow_unused=True, materialize_grads=True))

    before = second()
    iin_fast.accelerate(module)
    close(second(), before, 1e-10 * case.loose)
