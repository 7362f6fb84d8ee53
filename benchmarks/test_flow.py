"""pytest-benchmark over the systems and workloads of `iin-fast bench`: pytest benchmarks --benchmark-group-by=param:workload"""

from importlib.util import find_spec

import pytest

from iin_fast.bench import SYSTEMS, WORKLOADS
from iin_fast.bench.systems import build


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_flow(benchmark, system: str, workload: str) -> None:
    if system in ("FrEIA", "nflows", "normflows") and find_spec(system) is None:
        pytest.skip(f"{system} is not installed")
    case = WORKLOADS[workload]
    if system == "compile frozen" and not case.inference:
        pytest.skip("frozen weights cannot be trained")
    benchmark.pedantic(case.prepare(build(system, case.size)), warmup_rounds=2, rounds=7)
