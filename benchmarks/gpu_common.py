"""What the stages of benchmarks/gpu.py share: the run, the clock, launches, CUDA graphs."""

import contextlib
import gc
import json
import os
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ROOT / "build" / "gpu"
FLUSHED = 256 * 2**20  # bytes; several times the L2 cache of any GPU so far

Call = Callable[[], object]


class OutOfTime(BaseException):
    """Not an Exception: what it interrupts, torch.compile for one, catches those."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer, as soon as Python runs again."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Run:
    """What a stage knows: its device, its sizes, when it must end, and where its results go."""

    def __init__(self, stage: str, dry: bool, deadline: float) -> None:
        self.stage, self.dry, self.deadline = stage, dry, deadline
        self.device = "cpu" if dry else "cuda"
        self.result: dict[str, Any] = {}
        self._lock = threading.Lock()

    @property
    def left(self) -> float:
        return self.deadline - time.time()

    def say(self, line: str) -> None:
        print(f"[{self.stage}, {self.left:.0f} s left] {line}", flush=True)

    def save(self) -> None:
        """Let the parent see what there is."""
        PARTS.mkdir(parents=True, exist_ok=True)
        unfinished = PARTS / f"{self.stage}.tmp"
        with self._lock:
            unfinished.write_text(json.dumps(self.result))
            unfinished.rename(PARTS / f"{self.stage}.json")

    @contextlib.contextmanager
    def recorded(self, what: str, failed: dict[str, str] | None = None, seconds: float | None = None) -> Iterator[None]:
        """A part that may fail, or take longer than `seconds`: that is recorded, in `failed` if given, and the rest goes on."""
        try:
            with within(seconds) if seconds else contextlib.nullcontext():
                yield
        except (Exception, OutOfTime) as error:
            text = str(error).strip()
            if error.__context__ is not None and not error.__suppress_context__:
                text += f" (after {type(error.__context__).__name__}: {error.__context__})"
            (self.result.setdefault("failed", {}) if failed is None else failed)[what] = (
                f"{type(error).__name__}: {text[:500]}"
            )
            self.say(f"{what} FAILED: {type(error).__name__}: {text.splitlines()[0][:200] if text else ''}")
        self.save()


def result_of(stage: str) -> dict[str, Any]:
    """What a stage before this one has found; nothing if it did not run."""
    path = PARTS / f"{stage}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group of its own, with the programs that it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


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

    def warm(self, call: Call, times: int) -> float:
        """Seconds of a call among `times`."""
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            call()
        self.wait()
        return (time.perf_counter() - start) / times

    def cold(self, call: Call) -> float:
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

    def device_only(self, call: Call, times: int) -> float:
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


def alternate(run: Run, clock: Clock, calls: dict[str, Call], seconds: float) -> dict[str, dict[str, dict[str, float]]]:
    """Warm and cold times of each call, in turn, for about `seconds` in all."""
    once = {}
    for name, call in calls.items():
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


def launches(call: Call) -> dict[str, int]:
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


def graphed(call: Call) -> Call:
    """The same work as a CUDA graph."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    current = torch.cuda.current_stream()
    current.wait_stream(side)
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except BaseException:
        # a capture that fails leaves torch in it: its stream, its memory pool, and its random numbers
        torch.cuda.set_stream(current)
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(current.device.index, graph.pool())
        generator = torch.cuda.default_generators[current.device.index]
        generator.graphsafe_set_state(generator.clone_state())
        raise

    def replay(reads: Call = call) -> object:  # the tensors that the graph reads live as long as this
        return graph.replay()

    return replay
