"""The report on compiled kernels: that it reads what cuobjdump prints, on made-up text and on the built library."""

import json
from pathlib import Path
from types import ModuleType

import benchmark_scripts
import pytest
import torch

from iin_fast._library import libraries

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gpu_report() -> ModuleType:
    return benchmark_scripts.load("gpu_report")


SASS = """
\tcode for sm_90
\t\tFunction : first
        /*0000*/                   LDG.E.128.CONSTANT R4, [R2] ;    /* 0x00 */
        /*0010*/              @!P0 LDG.E.64 R4, [R2] ;              /* 0x00 */
        /*0020*/              @P1  STG.E.128.STRONG.SM [R2], R4 ;   /* 0x00 */
        /*0030*/                   LDGSTS.E.BYPASS.128 [R3], [R4] ; /* 0x00 */
        /*0040*/                   HMMA.16816.F32.BF16 R4, R4, R8 ; /* 0x00 */
\t\tFunction : second
        /*0000*/                   STL.64 [R1], R4 ;                /* 0x00 */
        /*0010*/                   LDL R4, [R1] ;                   /* 0x00 */
        /*0020*/                   HGMMA.64x64x16.F32 R24, gdesc ;  /* 0x00 */
\tcode for sm_100
\t\tFunction : first
        /*0000*/                   UTCHMMA gdesc[UR4], gdesc[UR6] ; /* 0x00 */
        /*0010*/                   LDG.E.128.CONSTANT.EL R4, [R2] ; /* 0x00 */
"""


def test_instructions_are_counted(gpu_report: ModuleType) -> None:
    found = {(target, name): dict(row) for target, name, row in gpu_report.parse_instructions(SASS.splitlines())}
    assert found == {
        (90, "first"): {"load 16": 1, "store 16": 1, "async copy": 1, "tensor cores": 1},
        (90, "second"): {"spill store": 1, "spill load": 1, "tensor cores": 1},
        (100, "first"): {"tensor cores": 1, "load 16": 1},
    }


def test_a_cubin_of_one_target(gpu_report: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = "Resource usage:\n Common:\n  GLOBAL:0\n Function second:\n  REG:64 STACK:8 SHARED:1024 LOCAL:0\n"
    code = SASS.replace("\t\tFunction : first", "").split("\tcode for sm_100")[0]
    monkeypatch.setattr(
        gpu_report, "_lines", lambda *command: (sizes if "-res-usage" in command else code).splitlines()
    )
    row = gpu_report.read_binary(Path("one.cubin"), "cuobjdump")["second"]["sm_0"]
    assert (row["reg"], row["stack"], row["spill load"], row["spill store"]) == (64, 8, 1, 1)
    monkeypatch.setattr(gpu_report, "_lines", lambda *command: sizes.splitlines() if "-res-usage" in command else [])
    with pytest.raises(RuntimeError, match="shows nothing of second"):
        gpu_report.read_binary(Path("one.cubin"), "cuobjdump")


def test_sizes_are_read(gpu_report: ModuleType) -> None:
    text = "arch = sm_80\n Function one:\n  REG:40 STACK:16 SHARED:1056 LOCAL:8 CONSTANT[0]:480 TEXTURE:0\n"
    assert list(gpu_report.parse_resources(text.splitlines())) == [
        (80, "one", {"reg": 40, "stack": 16, "shared": 1056, "local": 8})
    ]


def test_names_are_readable(gpu_report: ModuleType) -> None:
    short = gpu_report._short
    assert short("void iin_fast::k<__half, 8>(iin_fast::Job<__half>, int)") == "k<float16, 8>"
    assert short("void iin_fast::(anonymous namespace)::k<(iin_fast::Squash)1, (bool)1>(float*)") == "k<1, 1>"
    assert short("plain") == "plain"


def test_defects_are_named(gpu_report: ModuleType) -> None:
    clean = {"reg": 32, "stack": 0, "shared": 0, "local": 0} | dict.fromkeys(gpu_report.INSTRUCTIONS, 0)
    good = clean | {"load 16": 3, "store 16": 1}
    name = "coupling_forward_kernel<float, 4>"
    assert gpu_report.defects({"cuda": {name: {"sm_80": good}, "other": {"sm_80": clean}}}) == []
    assert "load 16" in gpu_report.defects({"cuda": {name: {"sm_80": good | {"load 16": 0}}}})[0]
    spilling = clean | {"spill store": 2, "stack": 8}
    assert "2 accesses to local memory" in gpu_report.defects({"cuda": {"k": {"sm_90": spilling}}})[0]
    # put aside for occupancy: few bytes, and none once all registers may be used
    for more, defects in (({}, 0), ({"stack": 16}, 1), ({"spills with all registers": 1}, 1)):
        row = spilling | {"spills with all registers": 0} | more
        case = {"spline x": {"kernel": "forward", "targets": {"sm_90": row}}}
        assert len(gpu_report.defects({"cuda": {}, "triton": case})) == defects
    layer = {"sm_90": clean | {"async copy": 4}}
    assert gpu_report.defects({"cuda": {"flow_layer_kernel<Exact, true, false>": layer}}) == []
    assert "tensor cores" in gpu_report.defects({"cuda": {"flow_layer_kernel<Tf32x3, true, false>": layer}})[0]
    coupling = {"kernel": "forward", "targets": {"sm_80": clean | {"load 16": 1}}}
    for dtype, shape, tile, wanted in (
        ("float32", "[4096, 32]", 2, True),
        ("bfloat16", "[4096, 32]", 0, True),
        ("bfloat16", "[4096, 32]", 1, False),
        ("float32", "[25, 31]", 0, False),
    ):
        case = {f"affine_coupling tanh {dtype} {shape} forward #{tile}": coupling}
        found = gpu_report.defects({"cuda": {}, "triton": case})
        assert (len(found) == 1 and "'store 16'" in found[0]) if wanted else found == []
    layer = {"kernel": "layer", "targets": {"sm_90": clean | {"async copy": 4}}}
    assert "tensor cores" in gpu_report.defects({"cuda": {}, "triton": {"flow bfloat16 [25, 64] layer #1": layer}})[0]
    assert gpu_report.defects({"cuda": {}, "triton": {"flow bfloat16 [25, 64] enter": layer}}) == []
    broken = {"a b": {"kernel": "k", "targets": {"sm_90": {"error": "no"}}}}
    assert "does not compile: no" in gpu_report.defects({"cuda": {}, "triton": broken})[0]


def test_the_table_counts_the_cases_that_hold_an_instruction(gpu_report: ModuleType) -> None:
    row = {"reg": 32, "stack": 0, "shared": 0, "local": 0} | dict.fromkeys(gpu_report.INSTRUCTIONS, 0)
    cases = {
        f"op float32 [{width}, 2]": {
            "kernel": "k",
            "targets": {"sm_80": row | {"reg": width} | more, "sm_90": row | more},
        }
        for width, more in ((40, {"load 16": 1, "async copy": 2}), (50, {"async copy": 1}))
    }
    cases["op float32 [60, 2]"] = {
        "kernel": "k",
        "targets": {"sm_80": row | {"store 16": 1, "async copy": 1}, "sm_90": row},
    }
    report = {"versions": {"nvcc": "nvcc", "triton": "3"}, "cuda": {"c<1>": {"sm_80": row}}, "triton": cases}
    table = gpu_report.table(report)
    assert "| `op k float32 (3)` | 50 / 32 | 0 | 0 | 0 | load 16 in 1 of 3, async copy in 2 of 3 |" in table
    assert "| `c<1>` | 32 | 0 | 0 | 0 | none of these |" in table


def test_the_built_library_is_read_and_has_no_spill(gpu_report: ModuleType) -> None:
    if "cuda" not in libraries:
        pytest.skip("the build had no nvcc, so there is no CUDA library")
    cuobjdump = gpu_report.find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump: it comes with the CUDA toolkit and with triton")
    kernels = gpu_report.read_binary(libraries["cuda"], cuobjdump)
    for vector, dtype in ((4, "float"), (2, "double"), (8, "bfloat16"), (8, "float16")):
        targets = kernels[f"coupling_backward_kernel<{dtype}, {vector}>"]
        assert list(targets) == torch.ops.iin_fast.cuda_targets().split()[:-1]
        assert all(row["reg"] > 16 and row["load 16"] >= 3 and row["store 16"] >= 3 for row in targets.values())
    assert gpu_report.defects({"cuda": kernels}) == []


def test_the_document_shows_the_committed_report(gpu_report: ModuleType) -> None:
    assert gpu_report.main(["--check"]) == 0
    assert json.loads(gpu_report.RESULT.read_text())["cuda"]
