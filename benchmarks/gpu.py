"""One run on a machine with a GPU: builds from source, tests, sanitizer, benchmarks. `make gpu`, or

    python3 benchmarks/gpu.py [--out FOLDER] [--minutes 9.5] [--stages build,tests,…] [--limits flow=90,…] [--dry-run]

It takes the python3 it is started with (torch >= 2.10 with CUDA, triton, pytest, cmake, ninja, nvcc on PATH) and needs no
network; with a torch that has no CUDA it ends at once, with 2. Every stage is a process of its own with a time limit: one that
fails or runs out of time is recorded, and the next one runs. FOLDER/gpu.json ($OUT or gpu-results by default) is written again
whenever a stage has something new.

    environment   GPU, driver, clocks, versions, commit
    build         both libraries, in place
    tests         tests/gpu but for Triton's                    ┐
    triton        tests/gpu, those of Triton                    │ nothing is timed,
    sanitizer     compute-sanitizer memcheck and racecheck      ├ so these run side by side
    compile       torch.compile fills its cache                 │
    jax           JAX fills its cache                           ┘
    peaks         a copy, and products of matrices in bfloat16, TF32 and float32
    micro         barriers, fences, the L2 cache, precision of products: gpu_micro.cu
    ops           affine_coupling, pair_nll and spline_coupling in GB/s, each beside a copy
    engine        flows as others train them: ours, other libraries, flowjax under jit
    flow          the published flow: eager, CUDA graphs, other libraries, ours; where stage compile was done, torch.compile

Not among them unless asked for: sanitizer_triton, the sanitizer on Triton's kernels, which takes many minutes.

Times: "warm" is the wall-clock time of a call among many, the device synchronised at both ends; "cold" is a single call
between two CUDA events, its start included, after a write of 256 MiB has emptied the L2 cache. Systems take turns; flowjax,
in its own process, comes after the others of a case.
`--dry-run` walks through all of it on the CPU with tiny sizes and shows nothing but that the script works.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gpu_flow
from gpu_common import PARTS, ROOT, Run, stop

GROUPS = [
    ["environment"],
    ["build"],
    ["tests", "triton", "sanitizer", "sanitizer_triton", "compile", "jax"],
    ["peaks"],
    ["micro"],
    ["ops"],
    ["engine"],
    ["flow"],
]
# seconds; what the stages before have left over goes to the last one
LIMITS = {
    "environment": 40,
    "build": 200,
    "tests": 150,
    "triton": 150,
    "sanitizer": 150,
    "sanitizer_triton": 900,
    "compile": 150,
    "jax": 150,
    "peaks": 40,
    "micro": 40,
    "ops": 60,
    "engine": 90,
    "flow": 600,
}
OPTIONAL = ("sanitizer_triton",)
MICRO = ["-std=c++17", "-O3", "-arch=sm_90", "-I", str(ROOT / "csrc")]  # of nvcc
SHIPPED = ("80", "90", "100")  # compute capabilities that the wheel has code for (CMakeLists.txt)


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
    for name in ("triton", "numpy", "FrEIA", "nflows", "normflows", "zuko", "jax", "flowjax", "pytest", "matplotlib"):
        with contextlib.suppress(PackageNotFoundError):
            run.result["versions"][name] = version(name)
    with run.recorded("commit"):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        run.result["commit"] = found.stdout.strip() if found.returncode == 0 else "unknown (no git)"
    with run.recorded("host"):
        from iin_fast.info import collect

        run.result["host"] = {name: value for name, value in collect().items() if name.startswith("CPU")}
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
    log = run_command(run, command, out("build.log"), environment)
    run.result["seconds"] = time.time() - start
    run.result["warnings"] = [line for line in log.splitlines() if "warning" in line.lower()][:20]
    libraries = sorted(path.name for path in (ROOT / "iin_fast" / "lib").glob("*.so"))
    run.result["libraries"] = libraries
    if "libiin_fast_cuda.so" not in libraries:
        raise RuntimeError("no CUDA library was built: is nvcc on PATH?")
    sys.path.insert(0, str(ROOT))
    from iin_fast.info import collect

    run.result["info"] = collect()


def out(name: str) -> Path:
    """A file of FOLDER."""
    return Path(os.environ["IIN_FAST_GPU_OUT"]) / name


def run_command(run: Run, command: list[str], log: Path, environment: dict[str, str] | None = None) -> str:
    """Run a program; its output goes to the log. Raises if it fails, with the end of the output."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
            start_new_session=True,
        )
        try:
            ended = f"ended with {process.wait(max(1, run.left - 3))}"
        except subprocess.TimeoutExpired:
            ended = "ran out of time"
        finally:
            stop(process)
    text = log.read_text(errors="replace")
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:6])} … {ended}:\n{text[-400:]}")
    return text


def tests(run: Run) -> None:
    """Those of the compiled library here, those of Triton, which compile for long, in a stage of their own."""
    path = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"PYTHONPATH": os.pathsep.join(path)} | ({"IIN_FAST_TEST_DEVICE": "cpu"} if run.dry else {})
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/gpu"]  # -v: names as they end
    if importlib.util.find_spec("xdist") and not run.dry:
        command += ["-n", "12" if run.stage == "triton" else "5"]
    command += ["-k", ("same_bits and " if run.dry else "") + ("" if run.stage == "triton" else "not ") + "triton"]
    try:
        text = run_command(run, command, out(f"{run.stage}.log"), variables)
    except RuntimeError as error:
        text = str(error)
        run.result["summary"] = text.strip().splitlines()[-1]
        raise
    run.result["summary"] = text.strip().splitlines()[-1]
    run.say(run.result["summary"])


def findings(text: str) -> list[str]:
    """What a log of compute-sanitizer says of errors: its first lines about them, messages of exceptions, the summary."""
    said = [line for line in text.splitlines() if line.startswith("=========") and line.strip("= ")]
    first = [line for line in said if not any(word in line for word in ("COMPUTE-SANITIZER", "SUMMARY", "Host Frame"))]
    thrown = [
        line
        for line in text.splitlines()
        if re.match(r"\s*([\w.]*(Error|Exception)\b|what\(\)|terminate called)", line)
    ]
    return [line[:300] for line in first[:12] + thrown[:6] + [line for line in said if "SUMMARY" in line]]


def sanitizer(run: Run) -> None:
    """Both tools side by side, on our kernels alone."""
    name = "triton" if run.stage.endswith("triton") else "cpp"
    case = [sys.executable, "tests/gpu/sanitizer_case.py", run.device, name]
    variables = {"PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    program = shutil.which("compute-sanitizer") or next(
        map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
    )
    if run.dry:
        run.result["case"] = run_command(run, case, out("sanitizer.log"), variables).strip().splitlines()[-1]
        return
    if program is None:
        raise RuntimeError("compute-sanitizer is not on PATH")
    ours = ["--kernel-name", "kns=iin_fast"] if name == "cpp" else []

    def watch(tool: str) -> None:
        command = [program, f"--tool={tool}", "--error-exitcode=9", "--report-api-errors=no", *ours, *case]
        log = out(f"sanitizer_{tool}_{name}.log")
        with run.recorded(f"{tool} {name}"):
            try:
                run_command(run, command, log, variables)
            finally:
                run.result[f"{tool} {name}"] = findings(log.read_text(errors="replace"))
        run.say(f"{tool} {name}: " + "\n".join(run.result[f"{tool} {name}"]))

    with ThreadPoolExecutor() as pool:
        list(pool.map(watch, ("memcheck", "racecheck")))


def micro(run: Run) -> None:
    """benchmarks/gpu_micro.cu, built if its program is not there; prints one JSON object."""
    program, source = ROOT / "build" / "gpu_micro", ROOT / "benchmarks" / "gpu_micro.cu"
    if run.dry:
        run.result["skipped"] = "the dry run has no GPU"
        return
    if not program.exists():
        run_command(run, ["nvcc", *MICRO, "-o", str(program), str(source)], PARTS / "micro.log")
    text = run_command(run, [str(program)], PARTS / "micro.log")
    run.result |= json.loads(text)
    run.say(text.strip())


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


def engine(run: Run) -> None:
    import gpu_engine

    gpu_engine.engine_stage(run)


STAGES: dict[str, Callable[[Run], None]] = {
    "environment": environment,
    "build": build,
    "tests": tests,
    "triton": tests,
    "sanitizer": sanitizer,
    "sanitizer_triton": sanitizer,
    "compile": gpu_flow.compile_cache,
    "jax": gpu_flow.jax_cache,
    "peaks": gpu_flow.peaks,
    "micro": micro,
    "ops": gpu_flow.ops,
    "engine": engine,
    "flow": gpu_flow.flow,
}


def run_stage(stage: str, dry: bool, deadline: float) -> int:
    """One stage, in this process; or a job of stage compile or jax: "compile:" and which."""
    name, *arguments = stage.split(":")
    run = Run(stage, dry, deadline)
    sys.path.insert(0, str(ROOT))
    with run.recorded(name):
        if arguments:
            gpu_flow.compile_one(run, *arguments)
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
                stop(process)
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
    parser.add_argument(
        "--stages",
        default=",".join(s for s in STAGES if s not in OPTIONAL),
        help=f"comma-separated; default: all but {', '.join(OPTIONAL)}",
    )
    parser.add_argument(
        "--limits", default="", help="seconds of stages, as flow=90,tests=60, in place of the usual ones"
    )
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
    for limit in filter(None, options.limits.split(",")):
        stage, _, seconds = limit.partition("=")
        if stage not in STAGES or not seconds.isdigit():
            parser.error(f"--limits has {limit!r}, expected a stage and seconds, as flow=90")
        LIMITS[stage] = int(seconds)
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
