"""What the CUDA library asks of the driver, on a machine without a GPU: fake_gpu.c writes it down."""

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import benchmark_scripts
import pytest

from iin_fast._library import libraries

HERE = Path(__file__).parent
OLDEST = 12000  # the CUDA of driver 525

gpu_report = benchmark_scripts.load("gpu_report")
cuobjdump = gpu_report.find_cuobjdump()
pytestmark = pytest.mark.skipif(
    "cuda" not in libraries or shutil.which("gcc") is None or cuobjdump is None,
    reason="needs a build with nvcc, gcc, and cuobjdump, which comes with the CUDA toolkit and with triton",
)


class Machine:
    """A folder with the fake driver, and the kernels of the library as their machine code describes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        driver = folder / "libcuda.so.1"
        command = ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-Wl,-soname,libcuda.so.1", "-o", driver]
        subprocess.run([*command, HERE / "fake_gpu.c"], check=True)
        self.kernels = self.parameters(libraries["cuda"])
        lines = (" ".join([name, *map(str, sizes)]) for name, sizes in self.kernels.items())
        (folder / "parameters").write_text("\n".join(lines))

    @staticmethod
    def parameters(binary: Path) -> dict[str, list[int]]:
        """Kernels of a library or an image: the bytes of each parameter."""
        kernels: dict[str, dict[int, int]] = {}
        name = None
        listing = subprocess.run([str(cuobjdump), "-elf", binary], capture_output=True, text=True, check=True).stdout
        for line in listing.splitlines():
            if line.startswith("."):
                name = line.removeprefix(".nv.info.") if line.startswith(".nv.info._Z") else None
            elif name and (found := re.search(r"Ordinal : 0x(\w+)\s+Offset\s*: \w+\s+Size\s*: 0x(\w+)", line)):
                kernels.setdefault(name, {})[int(found[1], 16)] = int(found[2], 16)
        return {name: [sizes[i] for i in range(len(sizes))] for name, sizes in kernels.items()}

    def run(self, what: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
        """The process, and the words of each line of the log."""
        log = self.folder / "log"
        log.write_text("")
        set_here = {
            "LD_PRELOAD": str(self.folder / "libcuda.so.1"),
            "FAKE_GPU_LOG": str(log),
            "FAKE_GPU_PARAMETERS": str(self.folder / "parameters"),
            "FAKE_GPU_VERSION": str(OLDEST),
        }
        command = [sys.executable, HERE / "cuda_calls.py", what]
        done = subprocess.run(command, env=os.environ | set_here | environment, capture_output=True, text=True)
        return done, [line.split() for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("gpu"))


def test_every_op_loads_its_image_and_launches_its_kernels(machine: Machine) -> None:
    launched: set[str] = set()
    for refuses in ("", "1"):  # few rows go through one kernel, or, where that is refused, through many
        done, log = machine.run("everything", FAKE_GPU_REFUSES=refuses)
        assert done.returncode == 0, done.stderr[-2000:]
        images = [Path(words[1]) for words in log if words[0] == "load"]
        assert len(images) == len(list((HERE.parents[1] / "csrc").glob("*/*_cuda.cu")))  # each once
        launched |= {words[1] for words in log if words[0] == "launch"}
    there = {name for image in images for name in machine.parameters(image)}
    for kernel, clusters, count in (("flow_nets_kernel", "", 8), ("flow_cluster_kernel", "1000", 4)):
        done, log = machine.run(
            "wide nets", FAKE_GPU_SHARED=str(227 * 1024), FAKE_GPU_CLUSTERS=clusters
        )  # of 9.0 and 10.0
        assert done.returncode == 0, done.stderr[-2000:]
        wide = {words[1] for words in log if words[0] == "launch"}
        assert sum(kernel in name for name in wide) == count
        launched |= wide
    assert launched <= there
    assert sorted(machine.kernels.keys() - launched) == []


def test_arguments_grid_and_stream_arrive(machine: Machine) -> None:
    done, log = machine.run("one")
    assert done.returncode == 0, done.stderr[-2000:]
    x, y, logdet = map(int, done.stdout.split())
    ((_, name, grid, block, shared, cooperative, stream, *parameters),) = (w for w in log if w[0] == "launch")
    assert "coupling_forward_kernelIf" in name and stream == "0x5150" and (shared, cooperative) == ("0", "0")
    # 3 rows of 4 values: one block of 256 threads is enough
    assert grid == "1,1,1" and block == "256,1,1"
    job, log_lanes = map(bytes.fromhex, parameters)
    # x, the raw scale and the shift with their strides, then y, the log-det and no partial sums
    assert struct.unpack_from("11q", job) == (x, 4, x, 4, x, 4, y, logdet, 0, 3, 4)
    assert struct.unpack("i", log_lanes) == (0,)


def test_a_thread_without_a_context(machine: Machine) -> None:
    done, log = machine.run("in_a_thread")
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    assert [words[0] for words in log] == ["load", "launch", "launch"]


def test_a_device_that_refuses_cooperative_launches_goes_layer_by_layer(machine: Machine) -> None:
    together = [words for words in machine.run("few rows")[1] if words[0] == "launch"]
    assert [words[5] for words in together] == ["1"] * 5 and len({words[1] for words in together}) == 2
    done, log = machine.run("few rows", FAKE_GPU_REFUSES="1")
    assert done.returncode == 0, done.stderr[-2000:]
    launches = [words for words in log if words[0] == "launch"]
    assert len(launches) > 5 * 5 and not any("persistent" in words[1] for words in launches)


def test_a_gpu_without_code_is_named(machine: Machine) -> None:
    done, _ = machine.run("one", FAKE_GPU_NO_CODE="1")
    assert done.returncode == 1
    assert re.search(
        r"affine_coupling: the load of a kernel failed on cuda:0: error 209 \(this build has code for sm_\d+.* only; "
        "build iin-fast from source for this GPU",
        done.stderr,
    )
