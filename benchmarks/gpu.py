"""One run on a machine with a GPU: builds from source, tests, sanitizer, benchmarks. `make gpu`, or

    python3 benchmarks/gpu.py [--out FOLDER] [--minutes 9.5] [--stages build,tests,…] [--dry-run]

It takes the python3 it is started with (torch >= 2.10 with CUDA, triton, pytest, cmake, ninja, nvcc on PATH) and needs no
network; with a torch that has no CUDA it ends at once, with 2. Every stage is a process of its own with a time limit: one that fails or runs out of time is recorded, and the
next one runs. FOLDER/gpu.json ($OUT or gpu-results by default) is written again whenever a stage has something new.

    environment   GPU, driver, clocks, versions, commit
    build         both libraries, in place
    tests         tests/gpu but for Triton's                    ┐
    triton        tests/gpu, those of Triton                    │
    sanitizer     compute-sanitizer memcheck and racecheck      ├ nothing is timed, so these run side by side
    compile       torch.compile fills its cache for `flow`      ┘
    peaks         a copy, and products of matrices in bfloat16, TF32 and float32
    ops           affine_coupling, pair_nll and spline_coupling in GB/s, each beside a copy
    flow          the published flow: eager, torch.compile, CUDA graphs, other libraries, ours

Times: "warm" is the wall-clock time of a call among many, the device synchronised at both ends; "cold" is a single call
between two CUDA events, its start included, after a write of 256 MiB has emptied the L2 cache. Systems take turns.
`--dry-run` walks through all of it on the CPU with tiny sizes and shows nothing but that the script works.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ROOT / "build" / "gpu"
GROUPS = [["environment"], ["build"], ["tests", "triton", "sanitizer", "compile"], ["peaks"], ["ops"], ["flow"]]
# seconds; what the stages before have left over goes to the last one
LIMITS = {
    "environment": 40,
    "build": 200,
    "tests": 150,
    "triton": 150,
    "sanitizer": 150,
    "compile": 150,
    "peaks": 40,
    "ops": 60,
    "flow": 600,
}
SHIPPED = ("80", "90", "100")  # compute capabilities that the wheel has code for (CMakeLists.txt)
FLUSHED = 256 * 2**20  # bytes; several times the L2 cache of any GPU so far


class Run:
    """What a stage knows: its device, its sizes, when it must end, and where its results go."""

    def __init__(self, stage: str, dry: bool, deadline: float) -> None:
        self.stage, self.dry, self.deadline = stage, dry, deadline
        self.device = "cpu" if dry else "cuda"
        self.result: dict[str, Any] = {}

    @property
    def left(self) -> float:
        return self.deadline - time.time()

    def say(self, line: str) -> None:
        print(f"[{self.stage}, {self.left:.0f} s left] {line}", flush=True)

    def save(self) -> None:
        """Let the parent see what there is."""
        PARTS.mkdir(parents=True, exist_ok=True)
        unfinished = PARTS / f"{self.stage}.tmp"
        unfinished.write_text(json.dumps(self.result))
        unfinished.rename(PARTS / f"{self.stage}.json")

    @contextlib.contextmanager
    def recorded(self, what: str) -> Iterator[None]:
        """A part that may fail: the failure is recorded and the rest goes on."""
        try:
            yield
        except Exception as error:
            text = str(error).strip()
            self.result.setdefault("failed", {})[what] = f"{type(error).__name__}: {text[:500]}"
            self.say(f"{what} FAILED: {type(error).__name__}: {text.splitlines()[0][:200] if text else ''}")
        self.save()


# Stages that build and prove.


def environment(run: Run) -> None:
    import torch

    run.result |= {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "processors": os.cpu_count(),
        "versions": {},
    }
    for name in ("triton", "numpy", "FrEIA", "nflows", "normflows", "pytest", "matplotlib"):
        with contextlib.suppress(PackageNotFoundError):
            run.result["versions"][name] = version(name)
    with run.recorded("commit"):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        run.result["commit"] = found.stdout.strip() if found.returncode == 0 else "unknown (no git)"
    nvcc = shutil.which("nvcc")
    if nvcc:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        run.result["nvcc"] = next(iter(re.findall(r"release ([\d.]+)", text)), "unknown")
    if run.dry:
        return
    with run.recorded("GPU"):
        properties = torch.cuda.get_device_properties(0)
        run.result |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2_cache": properties.L2_cache_size,
        }
        run.say(f"{properties.name}, torch {torch.__version__}")
    with run.recorded("driver and clocks"):
        fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
        values = found.stdout.strip().splitlines()[0].split(", ")
        run.result["smi"] = dict(zip(fields.split(","), values, strict=True))


def build(run: Run) -> None:
    if run.dry:
        run.result["skipped"] = "the dry run takes the libraries that are there"
        return
    import torch

    start = time.time()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {"IIN_FAST_CUDA": "on"}
    major, minor = torch.cuda.get_device_capability()
    if f"{major}{minor}" in SHIPPED:  # the same code as in the wheel, without that for other GPUs
        environment["IIN_FAST_CUDA_ARCHITECTURES"] = f"{major}{minor}"
    log = run_command(run, command, "build", environment)
    run.result["seconds"] = time.time() - start
    run.result["warnings"] = [line for line in log.splitlines() if "warning" in line.lower()][:20]
    libraries = sorted(path.name for path in (ROOT / "iin_fast" / "lib").glob("*.so"))
    run.result["libraries"] = libraries
    if "libiin_fast_cuda.so" not in libraries:
        raise RuntimeError("no CUDA library was built: is nvcc on PATH?")
    sys.path.insert(0, str(ROOT))
    from iin_fast.info import collect

    run.result["info"] = collect()


def run_command(run: Run, command: list[str], name: str, environment: dict[str, str] | None = None) -> str:
    """Run a program; its output goes to FOLDER/<name>.log. Raises if it fails, with the end of the output."""
    folder = Path(os.environ["IIN_FAST_GPU_OUT"])
    log = folder / f"{name}.log"
    with open(log, "w") as file:
        done = subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=os.environ | (environment or {})
        )
    text = log.read_text(errors="replace")
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:6])} … ended with {done.returncode}:\n{text[-1500:]}")
    return text


def tests(run: Run) -> None:
    """Those of the compiled library here, those of Triton, which compile for long, in a stage of their own."""
    variables = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | ({"IIN_FAST_TEST_DEVICE": "cpu"} if run.dry else {})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    if importlib.util.find_spec("xdist") and not run.dry:
        command += ["-n", "5"]
    command += ["-k", ("same_bits and " if run.dry else "") + ("" if run.stage == "triton" else "not ") + "triton"]
    try:
        text = run_command(run, command, run.stage, variables)
    except RuntimeError as error:
        text = str(error)
        run.result["summary"] = text.strip().splitlines()[-1]
        raise
    run.result["summary"] = text.strip().splitlines()[-1]
    run.say(run.result["summary"])


def sanitizer(run: Run) -> None:
    case = [sys.executable, "tests/gpu/sanitizer_case.py", run.device]
    variables = {"PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    program = shutil.which("compute-sanitizer") or next(
        map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
    )
    if run.dry:
        run.result["case"] = run_command(run, [*case, "cpp"], "sanitizer", variables).strip()
        return
    if program is None:
        raise RuntimeError("compute-sanitizer is not on PATH")
    for tool in ("memcheck", "racecheck"):
        for name in ("cpp", "triton"):
            with run.recorded(f"{tool} {name}"):
                command = [program, f"--tool={tool}", "--error-exitcode=9", *case, name]
                text = run_command(run, command, f"sanitizer_{tool}", variables)
                run.result[f"{tool} {name}"] = next(
                    (line.strip("= ") for line in text.splitlines() if "SUMMARY" in line), "no summary"
                )
                run.say(f"{tool} {name}: {run.result[f'{tool} {name}']}")


# Timing.


class Clock:
    """Times calls on the device of the run."""

    def __init__(self, device: str) -> None:
        import torch

        self.torch, self.gpu = torch, device == "cuda"
        size = FLUSHED if self.gpu else 2**16
        self.flush = torch.empty(size, dtype=torch.uint8, device=device)

    def wait(self) -> None:
        if self.gpu:
            self.torch.cuda.synchronize()

    def warm(self, call: Callable[[], object], times: int) -> float:
        """Seconds of a call among `times`."""
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            call()
        self.wait()
        return (time.perf_counter() - start) / times

    def cold(self, call: Callable[[], object]) -> float:
        """Seconds of one call that finds nothing of its own in the L2 cache."""
        self.flush.zero_()
        self.wait()
        if not self.gpu:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def device_only(self, call: Callable[[], object], times: int) -> float:
        """Seconds of a call by CUDA events around `times` of them, queued behind a wait so that launches don't count."""
        if not self.gpu:
            return self.warm(call, times)
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.torch.cuda._sleep(20_000_000)
        begin.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def alternate(
    run: Run, clock: Clock, calls: dict[str, Callable[[], object]], seconds: float
) -> dict[str, dict[str, dict[str, float]]]:
    """Warm and cold times of each call, in turn, for about `seconds` in all."""
    once = {}
    for name, call in list(calls.items()):
        call()
        call()
        once[name] = clock.warm(call, 2)
    turn = min(0.02, seconds / (8 * len(calls)))
    inner = {name: max(1, min(200, int(turn / max(one, 1e-6)))) for name, one in once.items()}
    round_trip = sum(once[name] * (inner[name] + 1) + 2e-4 for name in calls)
    rounds = max(3, min(30, int(min(seconds, run.left / 2) / round_trip)))
    warm: dict[str, list[float]] = {name: [] for name in calls}
    cold: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                warm[name].append(clock.warm(call, inner[name]))
                cold[name].append(clock.cold(call))
    finally:
        gc.enable()
    return {
        name: {
            "warm": spread(warm[name]),
            "cold": spread(cold[name]),
            "calls": {"rounds": rounds, "inner": inner[name]},
        }
        for name in calls
    }


def kernels(call: Callable[[], object]) -> dict[str, int]:
    """Kernels, copies and synchronisations of one call, counted by torch's profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    counts = {"kernels": 0, "copies and fills": 0, "synchronisations": -1}  # the one above is ours
    for event in profiler.events():
        if getattr(event, "is_user_annotation", False):
            continue
        if event.device_type == torch.autograd.DeviceType.CUDA:
            moved = event.name.startswith(("Memcpy", "Memset"))
            counts["copies and fills" if moved else "kernels"] += 1
        elif event.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"):
            counts["synchronisations"] += 1
    return counts


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The same work as a CUDA graph."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


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
    repeats = 3 if run.dry else 9
    run.result["cases"] = {}
    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        for op, case, moved, make in op_cases(run, dtype):
            for name in reversed(available(op, run.device)):
                if run.left < 5:
                    run.say("out of time")
                    return
                with run.recorded(f"{case} {short} {name}"), backend(name):
                    call = make()
                    call()
                    call()
                    times, copies = [], []
                    for _ in range(repeats):
                        times.append(clock.device_only(call, 3))
                        copies.append(clock.device_only(lambda: target.copy_(source), 3))
                    rate, copy = moved / statistics.median(times) / 1e9, 2 * copied / statistics.median(copies) / 1e9
                    row = {"bytes": moved, **spread(times), "gbytes": rate, "copy_gbytes": copy, "of_copy": rate / copy}
                    run.result["cases"].setdefault(f"{case}, {short}", {})[name] = row
                    run.say(f"{case} {short} {name}: {rate:.0f} GB/s, {100 * rate / copy:.0f} % of a copy")


# The flow.

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
COMPILED = FLOW_CASES[:4]  # each of these takes torch.compile most of a minute per mode with an empty cache


def flow_size(run: Run) -> Any:
    from iin_fast.bench import PUBLISHED, FlowSize

    return FlowSize(8, 2, 16, 1) if run.dry else PUBLISHED


def set_precision(precision: str) -> None:
    import torch

    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def compiled_call(run: Run, mode: str | None, kind: str, batch: int, precision: str) -> Callable[[], object]:
    import torch

    from iin_fast.bench import Workload
    from iin_fast.bench.systems import compiled

    torch.manual_seed(0)
    system = compiled(flow_size(run), mode).to(run.device, *low(precision))
    return Workload(kind, kind, batch, flow_size(run), pairs=kind == "step").prepare(system)


def low(precision: str) -> list[Any]:
    import torch

    return [torch.bfloat16] if precision == "bfloat16" else []


def compile_one(run: Run, number: int, mode: str) -> None:
    kind, batch, precision = COMPILED[number]
    set_precision(precision)
    start = time.time()
    call = compiled_call(run, MODES[mode], kind, batch, precision)
    call()
    call()
    run.result |= {"seconds": time.time() - start}


def compile_cache(run: Run) -> None:
    """All of torch.compile's work of the flow stage, side by side, so that it finds it done."""
    if run.dry:
        run.result["skipped"] = "the dry run compiles nothing"
        return
    jobs = {}
    for number, (kind, batch, precision) in enumerate(COMPILED):
        for mode in MODES:
            command = [sys.executable, __file__, "--stage", f"compile_one:{number}:{mode}"]
            command += ["--deadline", str(run.deadline)]
            key = f"{kind} {batch} {precision}, {mode}"
            jobs[key] = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    start = time.time()
    try:
        while jobs and run.left > 3:
            for key, job in list(jobs.items()):
                if job.poll() is not None:
                    run.result[key] = time.time() - start if job.returncode == 0 else f"ended with {job.returncode}"
                    del jobs[key]
                    run.save()
            time.sleep(0.5)
    finally:
        for key, job in jobs.items():
            job.kill()
            run.result[key] = "not finished"


def flow_systems(run: Run, kind: str, batch: int, precision: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, a function that makes the call) of everything that is compared in a case."""
    import torch

    from iin_fast.backends import available, backend
    from iin_fast.bench import Workload
    from iin_fast.bench.systems import build as build_system
    from iin_fast.bench.systems import eager_joint, ours

    size, device = flow_size(run), run.device
    case = Workload(kind, kind, batch, size, pairs=kind == "step")

    def prepare(make: Callable[[], Any], **adam: Any) -> Callable[[], object]:
        torch.manual_seed(0)
        system = make().to(device, *low(precision))
        system.adam |= adam
        return case.prepare(system)

    def forcing(name: str, call: Callable[[], object]) -> Callable[[], object]:
        def forced() -> object:
            with backend(name):
                return call()

        return forced

    yield "eager", lambda: prepare(lambda: build_system("eager", size))
    if kind == "step":
        yield "eager, joint", lambda: prepare(lambda: build_system("eager, joint", size))

    def eager_without_flag() -> Any:  # a graph cannot hold the flag's way to the host
        system = eager_joint(size)
        for module in system.module.modules():
            if hasattr(module, "reads_flag"):
                module.reads_flag = False
        return system

    capturable = {"capturable": True} if kind == "step" else {}
    if not run.dry:
        yield "eager, CUDA graph", lambda: graphed(prepare(eager_without_flag, **capturable))
        if (kind, batch, precision) in COMPILED:
            for name, mode in MODES.items():
                yield name, lambda mode=mode: compiled_call(run, mode, kind, batch, precision)
    if (batch <= 512 or run.dry) and precision != "bfloat16":
        for name in ("FrEIA", "nflows", "normflows"):
            with contextlib.suppress(PackageNotFoundError):
                version(name)
                yield name, lambda name=name: prepare(lambda: build_system(name, size))
    yield "iin-fast", lambda: prepare(lambda: ours(size))
    for name in available("flow", device):
        if name == "reference":
            continue
        yield f"iin-fast, {name}", lambda name=name: forcing(name, prepare(lambda: ours(size)))
        if not run.dry:
            yield (
                f"iin-fast, {name}, CUDA graph",
                lambda name=name: graphed(forcing(name, prepare(lambda: ours(size), **capturable))),
            )


def flow(run: Run) -> None:
    import torch

    from iin_fast.bench import Workload

    torch._dynamo.config.recompile_limit = 64
    clock = Clock(run.device)
    run.result["cases"] = {}
    cases = [("forward", 4, "float32"), ("step", 4, "float32")] if run.dry else FLOW_CASES
    known = json.loads((PARTS / "peaks.json").read_text()) if (PARTS / "peaks.json").exists() else {}
    for number, (kind, batch, precision) in enumerate(cases):
        # the first cases are worth the time; the others share what they leave
        seconds = 1.0 if run.dry else 6.0 if number < 4 else 2.0
        if run.left < 15:
            run.say("out of time")
            run.result["left_out"] = [" ".join(map(str, case)) for case in cases[number:]]
            break
        key = f"{kind}, {f'{batch // 2} pairs' if kind == 'step' else f'batch {batch}'}, {precision}"
        case: dict[str, Any] = {"kind": kind, "batch": batch, "precision": precision, "failed": {}}
        run.result["cases"][key] = case
        set_precision(precision)
        calls: dict[str, Callable[[], object]] = {}
        for name, make in flow_systems(run, kind, batch, precision):
            if run.left < 12:
                break
            try:
                call = make()
                call()
                clock.wait()
                calls[name] = call
            except Exception as error:
                text = str(error).strip()
                case["failed"][name] = f"{type(error).__name__}: {text[:300]}"
                run.say(f"{key}: {name} FAILED: {text.splitlines()[0][:150] if text else type(error).__name__}")
        with run.recorded(key):
            case["systems"] = alternate(run, clock, calls, seconds)
            if not run.dry:
                for name, call in calls.items():
                    if not name.startswith("compile"):
                        case["systems"][name] |= kernels(call)
            size = flow_size(run)
            case["operations"] = 2.0 * size.weights * batch * (3 if kind == "step" else 1)
            if known.get("copy_gbytes"):
                peak = known.get(
                    {"bfloat16": "bfloat16_tflops", "tf32": "tf32_tflops"}.get(precision, "float32_tflops")
                )
                if peak:
                    # the floor counts weights of 4 bytes
                    bytes_per = (2e9 if precision == "bfloat16" else 1e9) * known["copy_gbytes"]
                    case["floor"] = Workload(kind, kind, batch, size).floor(1e12 * peak, bytes_per, bytes_per)
            eager = case["systems"].get("eager")
            for row in case["systems"].values():
                row["tflops"] = case["operations"] / row["warm"]["median"] / 1e12
                if eager:
                    row["times_eager"] = eager["warm"]["median"] / row["warm"]["median"]
            mine = case["systems"].get("iin-fast")
            if eager and mine:
                run.say(
                    f"{key}: eager {1e3 * eager['warm']['median']:.3f} ms, iin-fast {1e3 * mine['warm']['median']:.3f} ms"
                )
        del calls
        gc.collect()
        if not run.dry:
            torch.cuda.empty_cache()
    run.save()


# The whole.


def draw(result: dict[str, Any], out: Path) -> None:
    """flow.png and ops.png, where matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    machine = f"{result.get('environment', {}).get('gpu', 'no GPU: a dry run')}, torch {result.get('environment', {}).get('torch')}"
    cases = {k: c for k, c in result.get("flow", {}).get("cases", {}).items() if c.get("systems")}
    if cases:
        figure, axes = plt.subplots(len(cases), 1, figsize=(8, 1.2 + 1.6 * len(cases)), squeeze=False)
        for axis, (name, case) in zip(axes[:, 0], cases.items(), strict=True):
            rows = case["systems"]
            medians = [1e3 * row["warm"]["median"] for row in rows.values()]
            colors = ["tab:orange" if key.startswith("iin-fast") else "tab:blue" for key in rows]
            axis.barh(list(rows), medians, color=colors)
            axis.set_title(f"{name}: ms, median of warm calls", fontsize=8)
            axis.set_xscale("log")
            axis.invert_yaxis()
            axis.tick_params(labelsize=6)
        figure.suptitle(machine, fontsize=9)
        figure.tight_layout()
        figure.savefig(out / "flow.png", dpi=100)
        plt.close(figure)
    small = result.get("ops", {}).get("cases", {})
    if small:
        figure, axis = plt.subplots(figsize=(8, 1 + 0.5 * len(small)))
        backends = sorted({name for rows in small.values() for name in rows})
        for i, name in enumerate(backends):
            at = [j + 0.25 * i for j, rows in enumerate(small.values()) if name in rows]
            axis.barh(at, [100 * rows[name]["of_copy"] for rows in small.values() if name in rows], 0.25, label=name)
        axis.set_yticks(range(len(small)), list(small), fontsize=6)
        axis.set(xlabel="% of the bandwidth of a copy in the same run", title=machine)
        axis.invert_yaxis()
        axis.legend()
        figure.tight_layout()
        figure.savefig(out / "ops.png", dpi=100)
        plt.close(figure)


STAGES: dict[str, Callable[[Run], None]] = {
    "environment": environment,
    "build": build,
    "tests": tests,
    "triton": tests,
    "sanitizer": sanitizer,
    "compile": compile_cache,
    "peaks": peaks,
    "ops": ops,
    "flow": flow,
}


def run_stage(stage: str, dry: bool, deadline: float) -> int:
    """One stage, in this process."""
    name, *arguments = stage.split(":")
    run = Run(stage, dry, deadline)
    sys.path.insert(0, str(ROOT))
    with run.recorded(name):
        if name == "compile_one":
            compile_one(run, int(arguments[0]), arguments[1])
        else:
            STAGES[name](run)
    return int(bool(run.result.get("failed")))


def run_all(out: Path, minutes: float, wanted: list[str], dry: bool) -> dict[str, Any]:
    """All stages; gives what gpu.json holds."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(PARTS, ignore_errors=True)
    PARTS.mkdir(parents=True)
    end = time.time() + 60 * minutes
    result: dict[str, Any] = {"dry_run": dry, "stages": {}}
    variables = os.environ | {"IIN_FAST_GPU_OUT": str(out.resolve()), "PYTHONUNBUFFERED": "1"}
    seen: dict[str, int] = {}

    def collect() -> None:
        changed = False
        for part in PARTS.glob("*.json"):
            stamp = part.stat().st_mtime_ns
            if ":" not in part.stem and seen.get(part.stem) != stamp:
                seen[part.stem], changed = stamp, True
                result[part.stem] = json.loads(part.read_text())
        if changed:
            write()

    def write() -> None:
        unfinished = out / "gpu.json.tmp"
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
        unfinished.rename(out / "gpu.json")

    for group in GROUPS:
        processes = {}
        for stage in group:
            if stage not in wanted:
                continue
            deadline = min(end, time.time() + LIMITS[stage])
            command = [sys.executable, __file__, "--stage", stage, "--deadline", str(deadline)]
            command += ["--dry-run"] if dry else []
            print(f"== {stage} (at most {deadline - time.time():.0f} s)", flush=True)
            process = subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True)
            processes[stage] = (process, time.time(), deadline)
        while processes:
            for stage, (process, start, deadline) in list(processes.items()):
                late = time.time() > deadline + 5
                if process.poll() is None and not late:
                    continue
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, 9)  # with the programs it started; the group is its own
                    process.wait()
                outcome = "out of time" if late else "done" if process.returncode == 0 else "failed"
                result["stages"][stage] = {"outcome": outcome, "seconds": round(time.time() - start, 1)}
                print(f"== {stage}: {outcome} after {time.time() - start:.0f} s", flush=True)
                del processes[stage]
                collect()
                write()
            collect()
            time.sleep(0.2)
    collect()
    write()
    try:
        draw(result, out)
    except Exception as error:  # pictures are an extra
        result["pictures"] = f"failed: {error}"
        write()
    return result


def refusal() -> str | None:
    """Why this Python cannot run anything on a GPU, if so."""
    try:
        import torch
    except ImportError:
        found = "no torch"
    else:
        if torch.version.cuda is not None:
            return None
        found = f"torch {torch.__version__}, which is built without CUDA"
    return (
        f"{sys.executable} has {found}. Start this with a python3 that has a CUDA build of torch: first on PATH for "
        "`make gpu`, or `make gpu PYTHON=/its/bin/python3`. `--dry-run` needs none."
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="One run on a machine with a GPU: build, tests, sanitizer, benchmarks."
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything; the last stage takes what is left")
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated; default: all")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny: shows that the script works")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.stage:
        return run_stage(options.stage, options.dry_run, options.deadline)
    wanted = options.stages.split(",")
    unknown = [stage for stage in wanted if stage not in STAGES]
    if unknown:
        parser.error(f"unknown stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if not options.dry_run and (reason := refusal()):
        print(f"gpu: {reason}", file=sys.stderr)
        return 2
    result = run_all(options.out, options.minutes, wanted, options.dry_run)
    for stage, row in result["stages"].items():
        print(f"{stage:12} {row['outcome']:12} {row['seconds']:7.1f} s")
    print(f"written to {options.out / 'gpu.json'}")
    return int(any(row["outcome"] != "done" for row in result["stages"].values()))


if __name__ == "__main__":
    sys.exit(main())
