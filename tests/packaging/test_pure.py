"""The package without compiled libraries, which IIN_FAST_NATIVE=off builds."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from iin_fast._library import libraries

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package of the wheel, which is built on a machine without any compiler."""
    folder = tmp_path_factory.mktemp("pure")
    source = folder / "source"  # a copy: builds leave files behind, and other tests build at the same time
    for name in ("csrc", "iin_fast"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "lib"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    command += ["-w", str(folder), str(source)]
    environment = {**os.environ, "IIN_FAST_NATIVE": "off", "CXX": "/no/compiler"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(package: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(package)}
    return subprocess.run([sys.executable, "-c", code], cwd=package, env=environment, capture_output=True, text=True)


def test_plain_torch_computes(package: Path) -> None:
    code = """
import pathlib, torch, iin_fast
from iin_fast.backends import available
from iin_fast.info import collect
from iin_fast.ops.registry import OPS
assert not list((pathlib.Path(iin_fast.__file__).parent / "lib").glob("*"))
assert all(available(op, "cpu") == ["reference"] and "cpp" not in available(op, "cuda") for op in OPS)
model = iin_fast.IIN(8, {"color": 3}, n_flows=2, hidden_dim=16)
z = torch.randn(10, 8)
z_, logdet = model(z)
logdet.sum().backward()
assert (model.decode(model.encode(z)) - z).abs().max() < 1e-4
flow = iin_fast.nn.NeuralSplineFlow(4)
flow.log_prob(torch.randn(3, 4)).sum().backward()
print(torch.ops.iin_fast.flow.default._schema)
print(torch.ops.iin_fast_triton.flow.default._schema)
print(collect()["CPU instruction set"])
assert collect()["backends"].startswith("reference")
"""
    done = run(package, code)
    assert done.returncode == 0, done.stderr
    schema, twin, cpu = done.stdout.splitlines()
    assert schema == str(torch.ops.iin_fast.flow.default._schema)
    assert twin == schema.replace("iin_fast::", "iin_fast_triton::")
    assert cpu.startswith("none: a pure package")


def test_it_knows_the_schemas_of_the_library(package: Path) -> None:
    done = run(package, "import json, iin_fast._build_info as b; print(json.dumps(b.SCHEMAS))")
    here = {str(torch._C.parse_schema(schema)) for schema in json.loads(done.stdout)}
    ops = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("iin_fast::")}
    compiled = {name for name in ops if not name.startswith(("iin_fast::cuda_", "iin_fast::start_values"))}
    found = {str(getattr(torch.ops.iin_fast, name.split("::")[1]).default._schema) for name in compiled}
    assert {text.removeprefix("iin_fast::") for text in found} == here


def test_the_compiled_backend_is_missed_in_words(package: Path) -> None:
    done = run(package, "import torch, iin_fast\nwith iin_fast.backend('cpp'): iin_fast.IIN(6)(torch.randn(4, 6))")
    assert done.returncode == 1
    assert "only reference can run it; this is a pure package" in done.stderr


@pytest.mark.skipif("cpu" not in libraries, reason="this is a pure package")
def test_a_build_without_a_compiler_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    environment = {**os.environ, "CXX": "no-such-compiler"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "building iin-fast needs a C++ compiler, and found none named no-such-"
    )
    assert "IIN_FAST_NATIVE=off pip install" in done.stderr
