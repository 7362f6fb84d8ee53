"""What this installation is and what it runs on."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import __version__
from ._library import cpu_isa, cuda_versions, libraries, needed_driver
from .backends import NAMES

__all__ = ["collect", "commit_of", "versions"]


def commit_of(folder: Path, digits: int = 12) -> str | None:
    """The commit of a clone, ``-dirty`` where its files were changed."""
    command = ["git", "describe", "--always", "--dirty", f"--abbrev={digits}", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError:  # no git here
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def versions(*names: str) -> dict[str, str]:
    """Of the distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def commit() -> str:
    """The commit of the source tree that this runs from, or that the package was built from."""
    root = Path(__file__).parents[1]
    found = commit_of(root) if (root / ".git").exists() else None
    if found:
        return found
    try:
        from ._build_info import COMMIT  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return "unknown (a source tree that was not built)"
    return COMMIT


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none found"
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return ", ".join(found)


def _driver() -> str:
    driver, runtime = cuda_versions()
    if not runtime:
        return "no matter: this build has no CUDA library"
    found = f"serves CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "none found"
    return f"{found}; the CUDA library of this build needs {needed_driver(runtime)}"


def _backends() -> str:
    from .backends import registered

    parts = []
    for name in NAMES:
        devices = sorted({device for op in registered().values() for (n, device) in op if n == name})
        if devices:
            parts.append(name if devices == ["any"] else f"{name} ({', '.join(devices)})")
    return ", ".join(parts)


def _cpu_model() -> str:
    """The name, with the numbers of family and model where there are some: virtual machines shorten the name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().split("\n\n")[0].splitlines() if cpuinfo.exists() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in found:
        return platform.processor() or platform.machine()
    numbers = [f"{key.split()[-1]} {found[key]}" for key in ("cpu family", "model") if key in found]
    return found["model name"] + (f" ({', '.join(numbers)})" if numbers else "")


def collect() -> dict[str, str]:
    """Version, commit, torch, Python, backends, CPU instruction set, GPU targets and driver of the build, GPUs found."""
    targets = "none: built without a CUDA compiler, CPU only" if libraries else "none: a pure package"
    if "cuda" in libraries:
        targets = torch.ops.iin_fast.cuda_targets()
    return {
        "iin-fast": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backends": _backends(),
        "CPU": f"{_cpu_model()}, {torch.get_num_threads()} threads",
        "CPU instruction set": cpu_isa(),
        "GPU targets in this build": targets,
        "GPU driver": _driver(),
        "GPU": _gpus(),
    }
