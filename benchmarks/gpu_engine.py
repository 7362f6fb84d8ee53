"""The stage of benchmarks/gpu.py that times flows as others train them, with the models of engine.py, on the GPU."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import engine
from gpu_common import PARTS, ROOT, Call, Clock, Run, alternate, graphed, launches, result_of, spread
from gpu_flow import cleared, made, set_precision

Case = dict[str, Any]

FLOWS = {"NSF": engine.NSF, "NSF, LU, dim 16": engine.LU, "MAF": engine.MAF, "RealNVP": engine.NVP}
SAMPLED = {"NSF": {**engine.NSF, "context_dim": 0}, "MAF": engine.SAMPLED, "RealNVP": engine.NVP}
BATCHES = (50, 256, 4096, 65536)
# in the order of their worth; the others follow
FIRST = [
    ("NSF", "step", 256),
    ("NSF", "step", 50),
    ("NSF", "log_prob", 65536),
    ("NSF", "step", 4096),
    ("MAF", "step", 256),
    ("RealNVP", "step", 256),
    ("NSF", "sample", 4096),
    ("MAF", "sample", 4096),
]
COUNTED = 4  # of the first cases, whose launches are counted
COMPILED = "torch.compile"  # of the plain torch definition of ours, in the first case
# One process is allowed all memory of the GPU by default, and products of float32 are made in TF32.
JAX = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / "build" / "gpu_jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def case_of(flow: str, measure: str, batch: int) -> Case:
    sizes = (SAMPLED if measure == "sample" else FLOWS)[flow]
    return {**sizes, "flow": flow, "batch": batch, "measure": measure, "name": f"{flow}, {measure}, batch {batch}"}


def cases_of(run: Run) -> list[Case]:
    if run.dry:
        tiny = {"layers": 2, "hidden": 8, "batch": 4}
        return [case_of(*which) | tiny for which in [FIRST[0], *FIRST[-4:]]]
    rest = [
        (flow, measure, batch)
        for measure in ("step", "log_prob", "sample")
        for flow in (SAMPLED if measure == "sample" else FLOWS)
        for batch in BATCHES
    ]
    return [case_of(*which) for which in dict.fromkeys([*FIRST, *rest])]


def with_maps(call: Call, maps: Any) -> Call:
    """A call whose programs run layer by layer in plain torch, with these maps for the transformers."""
    from iin_fast.nn import program_flow
    from iin_fast.ops.flow_program import reference

    whole = program_flow.flow_program

    def layers(
        x: Any, context: Any, parameters: Any, program: Any, *, inverse: bool = False, base: bool = False
    ) -> Any:
        return reference.flow_program(x, context, parameters, program, inverse, base, maps)

    def forced() -> object:
        program_flow.flow_program = layers  # type: ignore[assignment]
        try:
            return call()
        finally:
            program_flow.flow_program = whole

    return forced


def with_tf32(call: Call, products: int) -> Call:
    """A call that makes each product of float32 of one product of TF32 on tensor cores, or of three."""
    from iin_fast.ops.flow_program import walk

    def forced() -> object:
        before, walk.FLOAT32_PRODUCTS = walk.FLOAT32_PRODUCTS, products
        try:
            return call()
        finally:
            walk.FLOAT32_PRODUCTS = before

    return forced


def compiled_call(run: Run, case: Case) -> Call:
    """The step of the definition, whose density torch.compile has made."""
    import torch

    from iin_fast.ops.flow_program import reference

    flow = engine.ours(case).to(run.device)
    program = flow.program()  # type: ignore[operator]

    def log_prob(x: Any, context: Any = None) -> Any:
        return reference.flow_program(x, context, flow._tensors(), program, base=True)[1]  # type: ignore[operator]

    engine.torch_call("iin-fast", flow, case)  # the start of ActNorm
    flow.log_prob = torch.compile(log_prob, dynamic=False)
    return engine.torch_call("iin-fast", flow, case)


def systems(run: Run, case: Case) -> Iterator[tuple[str, Callable[[], Call]]]:
    """(name, a function that makes the call) of everything that is compared in a case."""
    import torch

    from iin_fast.ops.flow_program import LAYER_BY_LAYER, reference

    def prepare(side: str, model: Callable[[Case], Any], **adam: Any) -> Call:
        torch.manual_seed(0)
        flow = model(case)
        assert flow is not None
        return engine.torch_call(side, flow.to(run.device), case, **adam)

    def ours(**adam: Any) -> Call:
        return prepare("iin-fast", engine.ours, **adam)

    def captured(products: int) -> Call:
        call = with_tf32(ours() if run.dry else ours(capturable=True), products)
        return call if run.dry else graphed(call)

    yield "iin-fast", ours
    if not run.dry:
        yield "iin-fast, CUDA graph", lambda: captured(0)
    for products in (3,) if run.dry else (1, 3):
        yield f"iin-fast, {products} x TF32, CUDA graph", lambda products=products: captured(products)  # type: ignore[misc]
    yield "iin-fast, layer by layer", lambda: with_maps(ours(), LAYER_BY_LAYER)
    yield "plain torch", lambda: with_maps(ours(), reference.DEFINITION)
    for side, model in engine.SIDES.items():
        if model is not engine.ours and importlib.util.find_spec(side) and model(case) is not None:
            yield side, lambda side=side, model=model: prepare(side, model)  # type: ignore[misc]


class Jax:
    """flowjax in a process of its own on the same GPU; one that fails or takes too long is replaced by a new one."""

    def __init__(self) -> None:
        self.here = bool(importlib.util.find_spec("flowjax") and importlib.util.find_spec("jax"))
        self._process: engine.Jax | None = None

    def start(self) -> engine.Jax:
        if self._process is None:
            PARTS.mkdir(parents=True, exist_ok=True)
            with open(PARTS / "jax.log", "a") as log:
                self._process = engine.Jax(sys.executable, stderr=log, env=os.environ | JAX)
        return self._process

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None

    def time(self, seconds: float, case: Case, limit: float) -> dict[str, Any]:
        """For ``seconds``; an answer may take ``limit``."""
        try:
            answer = self.start().measure(case | {"in_a_row": 10}, seconds, limit)
        except BaseException:
            self.stop()
            raise
        return {"warm": spread(answer.pop("times"))} | answer


def time_torch(run: Run, clock: Clock, case: Case, seconds: float, rest: float) -> None:
    """All but flowjax, unless that would leave less than ``rest`` seconds."""
    if run.left < rest + seconds + 2:
        run.result.setdefault("left_out", []).append(case["name"])
        return
    row: dict[str, Any] = {"case": case, "systems": {}, "failed": {}}
    run.result["cases"][case["name"]] = row
    calls = made(run, clock, row, systems(run, case), 10)
    with run.recorded(case["name"]):
        row["systems"] = alternate(run, clock, calls, seconds)
    del calls
    cleared(run)
    run.say(f"{case['name']}: " + ", ".join(f"{k} {1e3 * s['warm']['median']:.3f}" for k, s in row["systems"].items()))


def time_jax(run: Run, jax: Jax, case: Case, rest: float) -> None:
    """flowjax, likewise."""
    row = run.result["cases"].get(case["name"])
    if row is None or not jax.here or run.left < rest + 2 or case.get("lu"):  # flowjax has no LU layers
        return
    with run.recorded("flowjax", row["failed"]):
        row["systems"]["flowjax"] = jax.time(0.3, case, min(30.0, run.left - rest))
        run.say(f"{case['name']}: flowjax {1e3 * row['systems']['flowjax']['warm']['median']:.3f}")


def time_compiled(run: Run, clock: Clock, case: Case) -> None:
    row = run.result["cases"].get(case["name"])
    if row is None or not isinstance(result_of("compile").get("engine"), float) or run.left < 10:
        return
    beside = {name: make for name, make in systems(run, case) if name == "iin-fast"}
    calls = made(run, clock, row, iter([*beside.items(), (COMPILED, lambda: compiled_call(run, case))]), 25)
    if COMPILED in calls:
        with run.recorded(COMPILED):
            rows = alternate(run, clock, calls, 1.0)
            row["systems"][COMPILED] = rows.pop(COMPILED) | {"beside": rows}


def count_launches(run: Run, case: Case) -> None:
    found = run.result["cases"].get(case["name"], {}).get("systems", {})
    for name, make in systems(run, case):
        if name in found and run.left > 5:
            call = make()
            call()
            found[name] |= launches(call)


def engine_stage(run: Run) -> None:
    clock, jax, cases = Clock(run.device), Jax(), cases_of(run)
    set_precision("float32")
    run.result |= {"cases": {}, "flowjax": "installed" if jax.here else "not installed"}
    if jax.here:
        jax.start()  # it loads its libraries meanwhile
    first = len(cases) if run.dry else len(FIRST)
    try:
        for number, case in enumerate(cases[:first]):
            seconds = 0.3 if run.dry else 1.5 if number < COUNTED else 1.0
            time_torch(run, clock, case, seconds, 20 if jax.here and number >= COUNTED else 0)
        for case in cases[:first]:
            time_jax(run, jax, case, 0 if run.dry else 10)
        with run.recorded("launches"):
            for case in [] if run.dry else cases[:COUNTED]:
                count_launches(run, case)
        time_compiled(run, clock, cases[0])
        for case in cases[first:]:
            time_torch(run, clock, case, 0.7, 0)
            time_jax(run, jax, case, 2)
    finally:
        jax.stop()
    run.save()


def compile_engine(run: Run) -> None:
    """What time_compiled will find in torch.compile's cache."""
    set_precision("float32")
    call = compiled_call(run, cases_of(run)[0])
    call()
    call()


def compile_jax(run: Run, number: int) -> None:
    """What flowjax will find in JAX's cache."""
    jax = Jax()
    try:
        jax.time(0.0, cases_of(run)[number], run.left)
    finally:
        jax.stop()
