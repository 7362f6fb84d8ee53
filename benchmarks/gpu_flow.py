"""The stages of benchmarks/gpu.py that time the GPU itself, the small ops and the published flow."""

import contextlib
import dataclasses
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gpu_common import ROOT, Call, Clock, Run, alternate, graphed, launches, result_of, spread


def peaks(run: Run) -> None:
    """What the same GPU does at best in this run: copied bytes and products of matrices, on random data."""
    import torch

    clock = Clock(run.device)
    size = 2**12 if run.dry else 2**29
    source = torch.randn(size // 4, device=run.device)
    target = torch.empty_like(source)
    run.result["copy_gbytes"] = 2 * size / min(
        clock.device_only(lambda: target.copy_(source), 5) for _ in range(5)
    ) / 1e9  # fmt: skip
    run.save()
    n = 64 if run.dry else 8192
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("float32", torch.float32, "highest"),
    ):
        with run.recorded(name):
            torch.set_float32_matmul_precision(precision)
            a, b = torch.randn(2, n, n, device=run.device, dtype=dtype)
            torch.mm(a, b)
            best = min(clock.device_only(lambda a=a, b=b: torch.mm(a, b), 5) for _ in range(4))
            run.result[f"{name}_tflops"] = 2 * n**3 / best / 1e12
    torch.set_float32_matmul_precision("highest")
    run.say(", ".join(f"{key} {value:.4g}" for key, value in run.result.items() if key != "failed"))


# The small ops against a copy.


def op_cases(run: Run, dtype: Any) -> Iterator[tuple[str, str, int, Callable[[], Callable[[], object]]]]:
    """(op, case, bytes that must move, a function that makes the call) of every small op, forward and backward."""
    import torch

    from iin_fast.functional import affine_coupling, pair_nll, spline_coupling

    rows = 64 if run.dry else 2**20
    bins, features = 8, 8
    count = 3 * bins - 1
    item = torch.empty(0, dtype=dtype).element_size()

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=run.device, dtype=dtype)

    def backward(function: Callable[..., tuple[Any, ...]], *given: Any) -> Callable[[], object]:
        leaves = [t.requires_grad_() for t in given]
        outputs = function(*leaves)
        grads = [torch.randn_like(o) for o in outputs]
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    def forward(function: Callable[..., tuple[Any, ...]], *given: Any) -> Callable[[], object]:
        return lambda: function(*given)

    def nll(za: Any, zb: Any) -> tuple[Any, ...]:
        logdet = torch.zeros(len(za), device=run.device)
        return (pair_nll(za, zb, logdet, logdet, shared, [22, 11, 31], 0.975),)

    def spline(v: Any, p: Any) -> tuple[Any, ...]:
        return spline_coupling(v, p, bins=bins, tail_bound=3.0)

    def spline_inverse(v: Any, p: Any) -> tuple[Any, ...]:
        return spline_coupling(v, p, bins=bins, tail_bound=3.0, inverse=True)

    shared = torch.rand(rows, 3, device=run.device) < 0.5
    wide, narrow = item * rows * 64, item * rows * features
    for op, case, moved, make, function, shapes in (
        ("affine_coupling", "forward", 4 * wide, forward, affine_coupling, [(rows, 64)] * 3),
        ("affine_coupling", "backward", 6 * wide, backward, affine_coupling, [(rows, 64)] * 3),
        ("pair_nll", "forward", 2 * wide, forward, nll, [(rows, 64)] * 2),
        ("pair_nll", "backward", 4 * wide, backward, nll, [(rows, 64)] * 2),
        ("spline_coupling", "forward", (count + 2) * narrow, forward, spline, None),
        ("spline_coupling", "inverse", (count + 2) * narrow, forward, spline_inverse, None),
        ("spline_coupling", "backward", (2 * count + 3) * narrow, backward, spline, None),
    ):
        sizes = shapes or [(rows, features), (rows, features, count)]
        yield op, f"{op} {case}", moved, lambda m=make, f=function, s=sizes: m(f, *(draw(*shape) for shape in s))


def ops(run: Run) -> None:
    import torch

    from iin_fast.backends import available, backend

    clock = Clock(run.device)
    copied = 2**12 if run.dry else 2**28
    source, target = torch.randn(2, copied // 4, device=run.device)
    run.result["cases"] = {}
    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        for op, case, moved, make in op_cases(run, dtype):
            for name in reversed(available(op, run.device)):
                if run.left < 5:
                    run.say("out of time")
                    return
                slow = name == "reference"
                if slow and dtype != torch.float32 and not run.dry:
                    continue
                repeats, inner = (1 if op == "spline_coupling" else 3, 1) if slow else (3 if run.dry else 9, 3)
                with run.recorded(f"{case} {short} {name}"), backend(name):
                    call = make()
                    for _ in range(1 if slow else 2):
                        call()
                    times, copies = [], []
                    for _ in range(repeats):
                        times.append(clock.device_only(call, inner))
                        copies.append(clock.device_only(lambda: target.copy_(source), 3))
                    rate, copy = moved / statistics.median(times) / 1e9, 2 * copied / statistics.median(copies) / 1e9
                    row = {"bytes": moved, **spread(times), "gbytes": rate, "copy_gbytes": copy, "of_copy": rate / copy}
                    run.result["cases"].setdefault(f"{case}, {short}", {})[name] = row
                    run.say(f"{case} {short} {name}: {rate:.0f} GB/s, {100 * rate / copy:.0f} % of a copy")


# The published flow.

# (kind, batch, precision) in the order of their worth: a run that is cut short has the first ones
FLOW_CASES = [
    ("forward", 25, "float32"),
    ("step", 50, "float32"),
    ("forward", 16384, "tf32"),
    ("forward", 16384, "bfloat16"),
    ("inverse", 25, "float32"),
    ("forward", 1, "float32"),
    ("forward", 256, "float32"),
    ("step", 50, "tf32"),
    ("step", 512, "tf32"),
    ("forward", 25, "tf32"),
    ("forward", 25, "bfloat16"),
    ("forward", 4096, "tf32"),
    ("step", 4096, "tf32"),
    ("inverse", 4096, "tf32"),
    ("forward", 16384, "float32"),
    ("inverse", 1, "float32"),
    ("inverse", 256, "float32"),
    ("inverse", 16384, "tf32"),
    ("step", 2, "float32"),
    ("step", 16384, "tf32"),
]
MODES = {"compile": None, "compile, reduce-overhead": "reduce-overhead", "compile, max-autotune": "max-autotune"}
COMPILED = FLOW_CASES[:2]  # each of these takes torch.compile most of a minute per mode with an empty cache
COUNTED = FLOW_CASES[:4]  # whose launches are counted: the profiler takes a while for each call
SMALL_BATCH = 512  # up to which the other libraries are timed
LARGE_BATCH = 4096  # both ways of large batches are timed

Case = tuple[str, int, str]


def flow_size(run: Run) -> Any:
    from iin_fast.bench import PUBLISHED, FlowSize

    return FlowSize(8, 2, 16, 1) if run.dry else PUBLISHED


def set_precision(precision: str) -> None:
    import torch

    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def name_of(case: Case) -> str:
    kind, batch, precision = case
    return f"{kind}, {f'{batch // 2} pairs' if kind == 'step' else f'batch {batch}'}, {precision}"


def within_context(context: Callable[[], contextlib.AbstractContextManager[None]], call: Call) -> Call:
    """The same call in a context that it opens each time."""

    def inside() -> object:
        with context():
            return call()

    return inside


class Flows:
    """The systems that are compared. Each is built once; a case begins with the parameters that it had then."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._built: dict[tuple[str, bool], Any] = {}

    def prepare(self, name: str, case: Case, **adam: Any) -> Call:
        """The call that is timed; ``name`` is one of iin_fast.bench, or "eager, without copies"."""
        import torch

        from iin_fast.bench import Workload
        from iin_fast.bench.systems import build, eager_joint

        kind, batch, precision = case
        size, low = flow_size(self.run), precision == "bfloat16"
        if (name, low) not in self._built:
            torch.manual_seed(0)
            copies = "without copies" in name or name.startswith("compile")
            system = eager_joint(size, reads_flag=False) if copies else build(name.removesuffix(", graph"), size)
            system.to(self.run.device, *([torch.bfloat16] if low else []))
            if name.startswith("compile"):
                torch._dynamo.config.recompile_limit = 64
                system.forward = torch.compile(system.module.forward, dynamic=False, mode=MODES[name])  # type: ignore[union-attr]
            self._built[name, low] = system, [p.detach().clone() for p in system.parameters]
        system, start = self._built[name, low]
        with torch.no_grad():
            torch._foreach_copy_(system.parameters, start)
        system = dataclasses.replace(system, adam=system.adam | (adam if kind == "step" else {}))
        return Workload(kind, kind, batch, size, pairs=kind == "step").prepare(system)

    def of(self, case: Case) -> Iterator[tuple[str, Callable[[], Call]]]:
        """(name, a function that makes the call) of all that neither torch.compile nor Triton has to compile first."""
        kind, batch, precision = case
        yield "eager", lambda: self.prepare("eager", case)
        if kind == "step":
            yield "eager joint", lambda: self.prepare("eager joint", case)
        if not self.run.dry:
            graph = "eager, without copies"
            yield "eager, CUDA graph", lambda: graphed(self.prepare(graph, case, capturable=True))
        if (batch <= SMALL_BATCH and precision == "float32") or self.run.dry:
            for name in ("FrEIA", "nflows", "normflows"):
                with contextlib.suppress(PackageNotFoundError):
                    version(name)
                    yield name, lambda name=name: self.prepare(name, case)  # type: ignore[misc]
        yield "iin-fast", lambda: self.prepare("iin-fast", case)
        if not self.run.dry:
            yield "iin-fast, CUDA graph", lambda: graphed(self.prepare("iin-fast, graph", case, capturable=True))
        if batch >= LARGE_BATCH and not self.run.dry:
            from iin_fast.ops.flow.torch_products import forced

            yield (
                "iin-fast, products of torch, CUDA graph",
                lambda: graphed(
                    within_context(lambda: forced(True), self.prepare("iin-fast, graph", case, capturable=True))
                ),
            )

    def compiled_later(self, case: Case) -> Iterator[tuple[str, Callable[[], Call]]]:
        """The others: torch.compile in the modes that stage `compile` was done with, and our Triton kernels."""
        from iin_fast.backends import available, backend

        done = result_of("compile")
        for mode in MODES:
            if isinstance(done.get(f"{name_of(case)}, {mode}"), float):
                yield mode, lambda mode=mode: self.prepare(mode, case)  # type: ignore[misc]
        if "triton" not in available("flow", self.run.device):
            return

        def on_triton(call: Call) -> Call:
            return within_context(lambda: backend("triton"), call)

        yield "iin-fast, triton", lambda: on_triton(self.prepare("iin-fast", case))
        if not self.run.dry:
            yield (
                "iin-fast, triton, CUDA graph",
                lambda: graphed(on_triton(self.prepare("iin-fast, graph", case, capturable=True))),
            )


def made(
    run: Run, clock: Clock, row: dict[str, Any], systems: Iterator[tuple[str, Callable[[], Call]]], seconds: float
) -> dict[str, Call]:
    """Calls that have run once, of those that run; why the others don't is put into row["failed"]."""
    calls: dict[str, Call] = {}
    for name, make in systems:
        if run.left < 3:
            break
        with run.recorded(name, row["failed"], min(seconds, run.left)):
            call = make()
            call()
            clock.wait()
            calls[name] = call
    return calls


def cleared(run: Run) -> None:
    """Memory of the last case is given back."""
    import torch

    gc.collect()
    if not run.dry:
        torch.cuda.empty_cache()


def judge(run: Run, key: str, row: dict[str, Any], case: Case) -> None:
    """Adds what follows from the times: operations, TFLOP/s, ratios, the floor."""
    from iin_fast.bench import Workload

    kind, batch, precision = case
    size, peaks = flow_size(run), result_of("peaks")
    row["operations"] = 2.0 * size.weights * batch * (3 if kind == "step" else 1)
    peak = peaks.get(f"{precision}_tflops")
    if peak and peaks.get("copy_gbytes"):
        # the floor counts weights of 4 bytes
        bytes_per = (2e9 if precision == "bfloat16" else 1e9) * peaks["copy_gbytes"]
        row["floor"] = Workload(kind, kind, batch, size).floor(1e12 * peak, bytes_per, bytes_per)
    for system in row["systems"].values():
        system["tflops"] = row["operations"] / system["warm"]["median"] / 1e12
        eager = system.get("beside", row["systems"]).get("eager")
        if eager:
            system["times_eager"] = eager["warm"]["median"] / system["warm"]["median"]
    run.say(f"{key}: " + ", ".join(f"{name} {1e3 * s['warm']['median']:.3f}" for name, s in row["systems"].items()))


def flow(run: Run) -> None:
    clock, flows = Clock(run.device), Flows(run)
    run.result["cases"] = {}
    cases = [("forward", 4, "float32"), ("step", 4, "float32")] if run.dry else FLOW_CASES
    for number, case in enumerate(cases):
        # half of a case's time goes to what comes before its measurement
        key, seconds = name_of(case), 3.0 if number < 4 else min(1.5, 0.5 * run.left / (len(cases) - number))
        seconds = 0.5 if run.dry else seconds
        if run.left < seconds + 3:
            run.say("out of time")
            run.result["left_out"] = [name_of(case) for case in cases[number:]]
            break
        set_precision(case[2])
        row: dict[str, Any] = {**dict(zip(("kind", "batch", "precision"), case, strict=True)), "failed": {}}
        run.result["cases"][key] = row
        calls = made(run, clock, row, flows.of(case), 20)
        with run.recorded(key):
            row["systems"] = alternate(run, clock, calls, seconds)
            judge(run, key, row, case)
        del calls
        cleared(run)
    with run.recorded("launches"):
        for case in [] if run.dry else COUNTED:
            systems = run.result["cases"].get(name_of(case), {}).get("systems", {})
            set_precision(case[2])
            for name, make in flows.of(case):
                if name in systems and run.left > 5:
                    call = make()
                    call()
                    systems[name] |= launches(call)
            cleared(run)
            run.save()
    for case in cases[:4]:
        key = name_of(case)
        if "systems" not in run.result["cases"].get(key, {}) or run.left < 10:
            continue
        row = run.result["cases"][key]
        set_precision(case[2])
        beside = {name: make for name, make in flows.of(case) if name in ("eager", "iin-fast")}
        for name, make in flows.compiled_later(case):
            calls = made(run, clock, row, iter([*beside.items(), (name, make)]), 25)
            if name not in calls:
                continue
            with run.recorded(f"{key}, {name}"):
                rows = alternate(run, clock, calls, 1.0)
                row["systems"][name] = rows.pop(name) | {"beside": rows}
                judge(run, key, row, case)
        cleared(run)


def compile_one(run: Run, what: str, which: str = "") -> None:
    """A job of the stages below: "engine"; "jax" and the number of a case there; or the number of a case here and a mode."""
    if what.isdigit():
        case = COMPILED[int(what)]
        set_precision(case[2])
        call = Flows(run).prepare(which, case)
        call()
        call()
        return
    import gpu_engine

    if what == "jax":
        gpu_engine.compile_jax(run, int(which))
    else:
        gpu_engine.compile_engine(run)


def compile_cache(run: Run) -> None:
    """torch.compile's work of the later stages, so that they find it done."""
    jobs = {f"{name_of(case)}, {mode}": f"compile:{i}:{mode}" for i, case in enumerate(COMPILED) for mode in MODES}
    side_by_side(run, jobs | {"engine": "compile:engine"})


def jax_cache(run: Run) -> None:
    """JAX's, likewise."""
    import gpu_engine

    side_by_side(run, {" ".join(map(str, case)): f"compile:jax:{i}" for i, case in enumerate(gpu_engine.FIRST)})


def side_by_side(run: Run, stages: dict[str, str]) -> None:
    """Jobs in processes of their own; the result has the seconds that each took, or how it failed."""
    if run.dry:
        run.result["skipped"] = "the dry run compiles nothing"
        return
    jobs = {}
    for key, stage in stages.items():
        command = [
            sys.executable,
            str(ROOT / "benchmarks" / "gpu.py"),
            "--stage",
            stage,
            "--deadline",
            str(run.deadline),
        ]
        jobs[key] = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    start = time.time()
    try:
        while jobs and run.left > 3:
            for key, job in list(jobs.items()):
                if job.poll() is not None:
                    failed = result_of(stages[key]).get("failed", f"ended with {job.returncode}")
                    run.result[key] = failed if job.returncode else time.time() - start
                    del jobs[key]
                    run.save()
            time.sleep(0.5)
    finally:
        for key, job in jobs.items():
            job.kill()
            run.result[key] = "not finished"
