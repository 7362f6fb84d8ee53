"""Drives CMake for the compiled libraries and gives the wheel its tag. The build itself is CMakeLists.txt."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.extension import Extension

ROOT = Path(__file__).parent.resolve()
BUILD_INFO = Path("iin_fast") / "_build_info.py"
PURE = os.environ.get("IIN_FAST_NATIVE", "on") == "off"
"""Whether to build a package without compiled libraries, in which plain torch computes, and Triton where there is one."""
WITHOUT = "IIN_FAST_NATIVE=off pip install ... installs it without compiled kernels"


def commit() -> str:
    """The commit of this source tree; an unpacked sdist carries it in its build info."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        existing = ROOT / BUILD_INFO
        if existing.exists():
            return existing.read_text().split('COMMIT = "')[1].split('"')[0]
        return "unknown"


def schemas() -> list[str]:
    """What the compiled library would tell torch of its ops."""
    calls = [
        call
        for path in sorted(ROOT.glob("csrc/**/*.cpp"))
        for call in re.findall(r'm\.def\(((?:\s*"[^"]*")+)\)', path.read_text())
    ]
    return ["".join(re.findall(r'"([^"]*)"', call)) for call in calls]


def write_build_info(folder: Path) -> None:
    target = folder / BUILD_INFO
    text = f'"""Written by the build."""\n\nCOMMIT = "{commit()}"\nSCHEMAS: list[str] = {schemas() if PURE else []}\n'
    if not target.exists() or target.read_text() != text:
        target.write_text(text)


class CMakeBuild(build_ext):
    """Builds the libraries into iin_fast/lib of the build folder, or of the source tree for an editable install."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        target = ROOT if in_place else Path(self.build_lib).resolve()
        output = target / "iin_fast" / "lib"
        output.mkdir(parents=True, exist_ok=True)
        torch = importlib.util.find_spec("torch")
        if torch is None or not torch.submodule_search_locations:
            raise SystemExit("building iin-fast needs torch for its headers: pip install torch")
        isas = os.environ.get("IIN_FAST_ISAS", "all")
        toolchain = Path(os.environ.get("CMAKE_TOOLCHAIN_FILE", "")).stem
        # kept between builds, so that a second build compiles what changed
        work = ROOT / "build" / "-".join(filter(None, ["cmake", toolchain, "" if isas == "all" else isas]))
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if cmake is None or ninja is None:
            raise SystemExit("building iin-fast needs cmake and ninja: pip install cmake ninja")
        compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
        if not any(map(shutil.which, compilers)):
            raise SystemExit(
                f"building iin-fast needs a C++ compiler, and found none named {', '.join(compilers)}: install GCC 11 or "
                f"newer (apt install g++, dnf install gcc-c++), or set CXX; {WITHOUT}"
            )
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(work), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DIIN_FAST_TORCH={next(iter(torch.submodule_search_locations))}",
            f"-DIIN_FAST_OUTPUT={output}",
            f"-DIIN_FAST_ISAS={isas}",
            f"-DIIN_FAST_CUDA={os.environ.get('IIN_FAST_CUDA', 'auto')}",
        ]
        architectures = os.environ.get("IIN_FAST_CUDA_ARCHITECTURES", "").replace(",", ";")
        # without it the list of CMakeLists.txt, whatever an earlier build was for
        configure.append(
            f"-DIIN_FAST_CUDA_ARCHITECTURES={architectures}" if architectures else "-UIIN_FAST_CUDA_ARCHITECTURES"
        )
        os.environ.setdefault("NINJA_STATUS", "compiling: file %f of %t, %e s: ")
        for command in (configure, [cmake, "--build", str(work)]):
            if subprocess.run(command).returncode != 0:
                raise SystemExit(f"building iin-fast failed: the compiler's messages stand above; {WITHOUT}")
        if not (output / "libiin_fast_cuda.so").exists():
            self.warn("no CUDA compiler was found: this build holds the CPU library only")

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "iin_fast" / "lib").glob("*.so")]


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        write_build_info(ROOT if getattr(self, "editable_mode", False) else Path(self.build_lib))


class SDist(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        write_build_info(Path(base_dir))


class Wheel(bdist_wheel):
    """One wheel for every Python: the libraries use neither CPython's API nor torch's unstable C++ one."""

    def finalize_options(self) -> None:
        self.py_limited_api = False if PURE else "cp310"
        super().finalize_options()

    def run(self) -> None:
        super().run()
        if sys.platform != "linux" or PURE:
            return
        # auditwheel reads which glibc the libraries need and names the platform by it; torch's libraries come with torch
        (built,) = Path(self.dist_dir).glob("*-linux_*.whl")
        excluded = ["libtorch_cpu.so", "libc10.so", "libtorch.so"]
        command = [sys.executable, "-m", "auditwheel", "repair", "-w", self.dist_dir]
        command += [word for name in excluded for word in ("--exclude", name)]
        subprocess.run([*command, str(built)], check=True)
        built.unlink()


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return not PURE


setup(
    distclass=BinaryDistribution,
    ext_modules=[] if PURE else [Extension("iin_fast.lib", [])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy, "sdist": SDist, "bdist_wheel": Wheel},
)
