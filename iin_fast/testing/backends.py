"""Does every backend compute the same? For a model of the user's, and for all ops on the user's machine."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..backends import NAMES, BackendUnavailable, backend
from ..flow import NetBuilder, ProgramBuilder, Weights, affine, mlp, spline
from ..functional import affine_coupling, pair_nll, spline_coupling
from ..nn import Flow
from ..ops.affine_coupling import SQUASHES
from ..ops.flow import flow as flow_op
from ..ops.flow_program import flow_program
from ..ops.registry import OPS
from ..ops.spline_coupling import parameter_count
from ..ops.types import FLOATING, accumulator_type

__all__ = ["Comparison", "Row", "check_ops", "compare_backends"]


@dataclass(frozen=True)
class Row:
    """One compared tensor: the largest difference from the reference, relative to the reference's largest entry."""

    name: str
    backend: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


@dataclass
class Comparison:
    """The rows of a comparison, and the backends that could not run, with the reason of each."""

    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows], default=4)
        lines = [f"{'tensor':<{width}}  backend    max error  tolerance"]
        for row in self.rows:
            verdict = "" if row.ok else "  <-- differs"
            lines.append(f"{row.name:<{width}}  {row.backend:<9}  {row.error:9.1e}  {row.tolerance:9.1e}{verdict}")
        lines += [f"{name}: not run ({reason})" for name, reason in self.skipped.items()]
        return "\n".join(lines)


# What summation in another order may cost, in units of the tensor's largest entry.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.005}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry of ``expected``; NaN where only one of both is finite."""
    if got.numel() == 0:
        return 0.0
    got, expected = got.detach().double(), expected.detach().double()
    same_special = (got == expected) | (got.isnan() & expected.isnan())
    difference = torch.where(same_special, 0.0, (got - expected).abs())
    scale = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0.0
    largest = difference.max().item()  # NaN if there is one
    return 0.0 if largest == 0 else largest / max(scale, 1e-30)


def _run(function: Callable[..., Any], inputs: list[Any], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of ``function(*inputs)`` and the gradients of a fixed mixture of them."""
    leaves = [
        t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs
    ]
    outputs = [t for t in tree_leaves(function(*leaves)) if isinstance(t, Tensor)]
    found = {f"output {i}": t for i, t in enumerate(outputs)}
    wanted = {f"grad of input {i}": t for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad}
    wanted |= {f"grad of {name}": p for name, p in parameters.items() if p.requires_grad}
    differentiable = [t for t in outputs if t.requires_grad]
    if differentiable and wanted:
        # weights that differ from entry to entry, so that no two errors cancel
        weights = [torch.linspace(0.5, 1.5, t.numel(), device=t.device).reshape(t.shape).to(t) for t in differentiable]
        grads = torch.autograd.grad(differentiable, list(wanted.values()), weights, allow_unused=True)
        found |= {name: g for name, g in zip(wanted, grads, strict=True) if g is not None}
    return found


def _compare(
    function: Callable[..., Any], inputs: list[Any], parameters: dict[str, Tensor], name: str, slack: float = 1
) -> Comparison:
    with backend("reference"):
        expected = _run(function, inputs, parameters)
    comparison = Comparison()
    for candidate in NAMES[1:]:
        try:
            with backend(candidate):
                got = _run(function, inputs, parameters)
        except BackendUnavailable as reason:
            comparison.skipped[candidate] = str(reason)
            continue
        for key, want in expected.items():
            error = relative_error(got[key], want) if key in got else float("nan")
            comparison.rows.append(Row(f"{name}{key}", candidate, error, slack * TOLERANCES[want.dtype]))
    return comparison


def compare_backends(model: torch.nn.Module, x: Tensor, *more: Any) -> Comparison:
    """Run a model with every backend and compare outputs and gradients with those of the reference.

    Args:
        model: any module that uses iin_fast's ops; called as ``model(x, *more)``. A model with random parts (dropout)
            must be in eval mode; ActNorm layers should have had their data-dependent start.
        x: its input; ``more``: further arguments.

    Returns:
        A :class:`Comparison`: one row for every output and gradient on every backend; ``print`` shows it as a table, and
        ``.ok`` is True if all of them agree within the tolerance of their dtype.

    Example:
        >>> import torch, iin_fast
        >>> model = iin_fast.IIN(8, {"color": 3}, n_flows=2, hidden_dim=16)
        >>> _ = model(torch.randn(32, 8))
        >>> iin_fast.testing.compare_backends(model, torch.randn(5, 8)).ok
        True
    """
    return _compare(model, [x, *more], dict(model.named_parameters()), "")


def _affine_coupling_cases(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Callable[..., Any], list[Any]]]:
    generator = torch.Generator().manual_seed(0)
    for shape in [(0, 4), (1, 1), (7, 31), (25, 32), (3, 1000)]:
        x, raw, shift = torch.randn(3, *shape, generator=generator, dtype=torch.float64).to(device, dtype).unbind(0)
        for squash in SQUASHES:
            for inverse in (False, True):

                def call(*given: Tensor, squash: str = squash, inverse: bool = inverse) -> tuple[Tensor, Tensor]:
                    raw_scale = given[1] if len(given) == 3 else None
                    return affine_coupling(given[0], raw_scale, given[-1], squash=squash, inverse=inverse)

                inputs = [x, shift] if squash == "none" else [x, raw, shift]
                yield f"{list(shape)} {squash}{' inverse' if inverse else ''}", call, inputs


def _pair_nll_cases(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Callable[..., Any], list[Any]]]:
    generator = torch.Generator().manual_seed(0)
    wide = accumulator_type(dtype)
    for batch, sizes in [(0, [4]), (1, [1]), (7, [3, 4, 5]), (25, [22, 11, 31]), (3, [600, 1])]:
        za, zb = torch.randn(2, batch, sum(sizes), generator=generator, dtype=torch.float64).to(device, dtype)
        logdet_a, logdet_b = torch.randn(2, batch, generator=generator, dtype=torch.float64).to(device, wide)
        shared = (torch.rand(batch, len(sizes), generator=generator) < 0.5).to(device)

        def call(
            za: Tensor,
            zb: Tensor,
            logdet_a: Tensor,
            logdet_b: Tensor,
            shared: Tensor = shared,
            sizes: list[int] = sizes,
        ) -> Tensor:
            return pair_nll(za, zb, logdet_a, logdet_b, shared, sizes, 0.975, normalized=True)

        yield f"[{batch}, {sum(sizes)}] in {len(sizes)} factors", call, [za, zb, logdet_a, logdet_b]


def _spline_coupling_cases(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Callable[..., Any], list[Any]]]:
    generator = torch.Generator().manual_seed(0)
    for batch, features, bins, tails in [
        (0, 4, 8, "linear"),
        (7, 3, 1, None),
        (25, 32, 8, "linear"),
        (3, 5, 10, "circular"),
    ]:
        # bins of like sizes: in a narrow one rounding of the coordinate is what counts
        x = torch.randn(batch, features, generator=generator, dtype=torch.float64)
        raw = torch.randn(batch, features, parameter_count(bins, tails), generator=generator, dtype=torch.float64) / 2
        for form in ("nflows", "zuko"):
            for inverse in (False, True):
                options: dict[str, Any] = {"bins": bins, "tails": tails, "parameterization": form, "inverse": inverse}

                def call(x: Tensor, raw: Tensor, options: dict[str, Any] = options) -> tuple[Tensor, Tensor]:
                    return spline_coupling(x, raw, tail_bound=2.0, **options)

                label = f"[{batch}, {features}] {bins} bins, tails {tails}, {form}{' inverse' if inverse else ''}"
                yield label, call, [x.to(device, dtype), raw.to(device, dtype)]


def _flow_cases(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Callable[..., Any], list[Any]]]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(0, 4, 2, 8, 1, 0), (1, 2, 1, 1, 0, 0), (7, 5, 3, 17, 2, 3), (25, 64, 2, 130, 2, 0), (300, 8, 2, 64, 1, 2)]
    for batch, dim, n_flows, hidden, depth, context_dim in sizes:
        options: dict[str, Any] = {"context_dim": context_dim, "activation_slope": 0.9 if context_dim else 1.0}
        flow = Flow(dim, n_flows, hidden, depth, **options, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            assert flow.loc is not None
            flow.loc.normal_(generator=generator)
            flow.scale.uniform_(0.5, 2, generator=generator)
        flow = flow.to(device, dtype)
        parameters = [
            flow.weight_in,
            flow.bias_in,
            flow.weight_hidden,
            flow.bias_hidden,
            flow.weight_out,
            flow.bias_out,
        ]
        x = torch.randn(batch, dim, generator=generator, dtype=torch.float64).to(device, dtype)
        context = torch.randn(1, batch, context_dim, generator=generator, dtype=torch.float64).to(device, dtype)
        for inverse in (False, True):
            for memory in ("save", "invert"):

                def call(
                    *given: Any, slope: float = flow.activation_slope, inverse: bool = inverse, memory: str = memory
                ) -> tuple[Tensor, Tensor]:
                    return flow_op(*given, activation_slope=slope, inverse=inverse, memory=memory)

                label = f"[{batch}, {dim}] {n_flows} blocks of {hidden}{' inverse' if inverse else ''}, {memory}"
                inputs = [x, context if context_dim else None, flow.loc, flow.scale, *parameters, flow.permutation]
                yield label, call, inputs


def _flow_program_cases(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Callable[..., Any], list[Any]]]:
    """Each kind of layer once, under a context."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / 2

    for batch, dim, hidden in [(0, 3, 8), (1, 2, 5), (7, 5, 17), (70, 8, 64)]:
        builder = ProgramBuilder(dim, 2)

        def weights(inputs: int, out: int, mask: Tensor | None = None, b: ProgramBuilder = builder) -> Weights:
            return Weights(out, b.ref(normal(out, inputs) * inputs**-0.5), b.ref(normal(out)), b.ref(mask))

        half = dim // 2
        builder.affine(builder.ref(normal(dim)), builder.ref(normal(dim)), form="exp")
        net = mlp([weights(half + 2, hidden), weights(hidden, (dim - half) * 11)], context=True)
        builder.coupling(range(half), range(half, dim), net, spline(4, tail_bound=2.0))
        builder.permute(reversed(range(dim)))
        builder.linear(builder.ref(normal(dim, dim) / dim), bias=builder.ref(normal(dim)), storage="square")
        steps = NetBuilder()
        first = steps.dense(0, weights(dim, dim, torch.ones(dim, dim, dtype=torch.bool).tril()))
        sum_ = steps.add(steps.act(first, "tanh"), steps.dense(1, weights(2, dim)))
        last = steps.dense(sum_, weights(dim, 2 * dim, torch.ones(dim, dim, dtype=torch.bool).tril(-1).repeat(2, 1)))
        builder.autoregressive(steps.build(last), affine(dim, "tanh"))
        builder.activation(0.9)
        program = builder.build()
        parameters = [t if t.dtype == torch.bool else t.to(dtype) for t in builder.tensors]
        inputs = [t.to(device) for t in (normal(batch, dim).to(dtype), normal(batch, 2).to(dtype), *parameters)]
        for inverse in (False, True):

            def call(
                x: Tensor, context: Tensor, *given: Tensor, program: Any = program, inverse: bool = inverse
            ) -> tuple[Tensor, Tensor]:
                return flow_program(x, context, given, program, inverse=inverse, base=True)

            yield f"[{batch}, {dim}] nets of {hidden}{' inverse' if inverse else ''}", call, inputs


# of each op: its cases, and how much larger than an element's its rounding may be
CASES = {
    "affine_coupling": (_affine_coupling_cases, 1),
    "pair_nll": (_pair_nll_cases, 1),
    # knots are sums of bins, and log-dets logarithms of their quotients
    "spline_coupling": (_spline_coupling_cases, 10),
    # many layers deep: rounding grows on the way
    "flow": (_flow_cases, 20),
    "flow_program": (_flow_program_cases, 20),
}


def dtypes_of(op: str, device: str) -> tuple[torch.dtype, ...]:
    """The types that an op takes on a device."""
    return OPS[op].cpu_types if device == "cpu" else FLOATING


def check_ops(device: str = "cpu") -> Comparison:
    """Every op on every backend and dtype against its reference, over shapes that are empty, tiny, odd and large.

    Returns:
        A :class:`Comparison` with one row for each op, dtype, case and tensor.
    """
    total = Comparison()
    for op, (cases, slack) in CASES.items():
        for dtype in dtypes_of(op, device):
            for label, call, inputs in cases(dtype, device):
                name = f"{op} {str(dtype).removeprefix('torch.')} {label}: "
                found = _compare(call, inputs, {}, name, slack)
                total.rows += found.rows
                total.skipped |= {f"{op} on {candidate}": reason for candidate, reason in found.skipped.items()}
    return total
