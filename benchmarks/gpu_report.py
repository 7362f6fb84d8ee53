"""What the compilers made of every GPU kernel, read without a GPU: python benchmarks/gpu_report.py [--check] [--no-triton]

For each kernel of the built CUDA library and each of its targets: registers, shared memory, stack, spills, and how many
of the instructions it has that it was written for (tensor cores, 16-byte access, asynchronous copies). The same for the
Triton kernels, compiled for the same GPUs. Writes benchmarks/results/gpu_report.json and the table in
gpu_report.md; `--check` only compares the table with the file. Ends with 1 if a kernel spills for want of registers,
or lacks an instruction that EXPECTED or EXPECTED_TRITON names.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "gpu_report.json"
DOCUMENT = RESULT.with_suffix(".md")
BEGIN, END = "<!-- gpu report: written by benchmarks/gpu_report.py -->", "<!-- end of gpu report -->"
TARGETS = (80, 90, 100)

# Opcodes by what the report calls them. wgmma comes out as HGMMA, tcgen05 as UTC*MMA.
INSTRUCTIONS = {
    "tensor cores": re.compile(r"^(HMMA|HGMMA|QGMMA|UTC\w*MMA|DMMA)\b"),
    "load 16": re.compile(r"^LDG\.(\w+\.)*128\b"),
    "store 16": re.compile(r"^STG\.(\w+\.)*128\b"),
    "async copy": re.compile(r"^(LDGSTS|UBLKCP|UTMALDG)\b"),
    "spill load": re.compile(r"^LDL\b"),
    "spill store": re.compile(r"^STL\b"),
}

# What a kernel must hold on every target, by its readable name.
EXPECTED = {
    r"^coupling_forward_kernel<\w+, [248]>": ("load 16", "store 16"),
    r"^coupling_backward_kernel<\w+, [248]>": ("load 16", "store 16"),
    r"^pair_nll_kernel<\w+, [248]>": ("load 16",),
    r"^pair_nll_backward_kernel<\w+, [248]>": ("load 16", "store 16"),
    # matrix products: tiles by asynchronous copies of 16 bytes; float64 multiplies without tensor cores
    r"^flow_((last_)?layer|(layer|first)_backward|weight_gradient|persistent(_backward)?)_kernel<": ("async copy",),
    r"^flow_((last_)?layer|(layer|first)_backward|weight_gradient|persistent(_backward)?)_kernel<(?!Exact)": (
        "tensor cores",
    ),
    r"^flow_nets_kernel<": ("tensor cores", "async copy"),
    r"^program_(forward|backward)_kernel<": ("async copy",),
    r"^program_(forward|backward)_kernel<float, [13]>": ("tensor cores",),
    r"^spline_forward_kernel<\w+, (true|1)>": ("load 16",),
    r"^spline_backward_kernel<\w+, (true|1)>": ("load 16", "store 16"),
}

# The same by the name of a compile case, for shapes whose rows begin at multiples of 16 bytes. In bfloat16 a thread needs 8
# neighbouring elements for 16 bytes, which only the largest tile (#0) gives it.
EXPECTED_TRITON = {
    r"^affine_coupling \w+ (float32|float64|bfloat16(?=.*#0)) \[(4096, 32|16, 65536)\].* (forward|backward)\b": (
        "load 16",
        "store 16",
    ),
    r"^pair_nll (float32|float64) \[(25, 64|16, 65536)\] forward\b": ("load 16",),
    r"^pair_nll (float32|float64) \[(25, 64|16, 65536)\] backward": ("load 16", "store 16"),
    r"^flow .* (layer|last_layer|layer_backward|first_layer_backward|weight_gradient)\b": (
        "tensor cores",
        "async copy",
    ),
}

# ptxas may put a value or two aside to let one more block onto a multiprocessor. That is its choice and no lack of
# registers: the kernel must need no local memory once it may have all of them, and this many bytes of stack are the most.
ASIDE = 8


def find_cuobjdump() -> str | None:
    """cuobjdump on PATH, or the one that the triton package brings."""
    found = shutil.which("cuobjdump")
    triton = find_spec("triton")
    if found is None and triton is not None and triton.submodule_search_locations:
        path = Path(next(iter(triton.submodule_search_locations))) / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.exists() else None
    return found


def parse_resources(lines: Iterable[str]) -> Iterator[tuple[int, str, dict[str, int]]]:
    """(target, mangled name, sizes) of each kernel in the output of cuobjdump -res-usage."""
    target, name = 0, None
    for line in lines:
        if line.startswith("arch = "):
            target = int(re.sub(r"\D", "", line))
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif name is not None and "REG:" in line:
            sizes = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            yield target, name, {key: sizes.get(key.upper(), 0) for key in ("reg", "stack", "shared", "local")}
            name = None


def parse_instructions(lines: Iterable[str]) -> Iterator[tuple[int, str, Counter[str]]]:
    """(target, mangled name, how many of each of INSTRUCTIONS) of each kernel in the output of cuobjdump -sass."""
    target, name, found = 0, None, Counter[str]()
    kinds: dict[str, str | None] = {}  # an opcode comes thousands of times
    opcode = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
    for line in lines:
        if match := opcode.match(line):
            word = match[1]
            if word not in kinds:
                kinds[word] = next((kind for kind, pattern in INSTRUCTIONS.items() if pattern.match(word)), None)
            kind = kinds[word]
            if kind is not None:
                found[kind] += 1
        elif "Function : " in line:
            if name is not None:
                yield target, name, found
            name, found = line.split("Function : ")[1].strip(), Counter()
        elif "code for sm_" in line:
            if name is not None:
                yield target, name, found
                name = None
            target = int(re.findall(r"sm_(\d+)", line)[0])
    if name is not None:
        yield target, name, found


def _lines(*command: str) -> Iterator[str]:
    with (
        tempfile.TemporaryFile("w+") as complaints,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True, bufsize=1 << 20) as process,
    ):
        assert process.stdout is not None
        yield from process.stdout
        if process.wait() != 0:
            complaints.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {complaints.read()[-500:]}")


def readable(names: list[str]) -> dict[str, str]:
    """Mangled name to one such as ``coupling_forward_kernel<float, 4>``."""
    filter_program = shutil.which("cu++filt") or shutil.which("c++filt")
    if filter_program is None or not names:
        return {name: name for name in names}
    done = subprocess.run([filter_program], input="\n".join(names), capture_output=True, text=True, check=True)
    return {name: _short(line) for name, line in zip(names, done.stdout.splitlines(), strict=True)}


def _short(demangled: str) -> str:
    text = demangled.removeprefix("void ")
    for namespace in ("iin_fast::", "(anonymous namespace)::", "<unnamed>::"):
        text = text.replace(namespace, "")
    depth, end = 0, len(text)  # the arguments begin at the first "(" outside "<>" and casts such as (Squash)1
    for at, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = at
            break
    text = re.sub(r"\(\w+\)(?=-?\w)", "", text[:end])
    return text.replace("__nv_bfloat16", "bfloat16").replace("__half", "float16")


def read_binary(path: Path, cuobjdump: str) -> dict[str, dict[str, dict[str, int]]]:
    """Readable kernel name to target ("sm_90") to sizes and instruction counts, for a library or a cubin."""
    sizes = {(target, name): row for target, name, row in parse_resources(_lines(cuobjdump, "-res-usage", str(path)))}
    for target, name, found in parse_instructions(_lines(cuobjdump, "-sass", str(path))):
        # the sizes in a cubin, which is for one target alone, come without its name
        key = (target, name) if (target, name) in sizes else (0, name)
        if key in sizes:
            sizes[key] |= {kind: found[kind] for kind in INSTRUCTIONS}
    if missing := [name for (_, name), row in sizes.items() if not INSTRUCTIONS.keys() <= row.keys()]:
        raise RuntimeError(f"{path.name}: cuobjdump -sass shows nothing of {', '.join(missing)}")
    names = readable(sorted({name for _, name in sizes}))
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    for (target, name), row in sorted(sizes.items(), key=lambda item: (names[item[0][1]], item[0])):
        kernels.setdefault(names[name], {})[f"sm_{target}"] = row
    return kernels


def triton_cases() -> list[Any]:
    """The compile cases of every op that has Triton kernels."""
    import importlib

    found = []
    for path in sorted((ROOT / "iin_fast" / "ops").glob("*/triton.py")):
        module = importlib.import_module(f"iin_fast.ops.{path.parent.name}.triton")
        if hasattr(module, "compile_cases"):
            found += module.compile_cases()
    return found


def _spills(row: dict[str, int]) -> int:
    """Accesses to local memory, and whether there is any."""
    return max(row["spill load"] + row["spill store"], int(row["local"] > 0))


def _compile(job: tuple[int, str]) -> tuple[str, str, dict[str, int]]:
    """One Triton kernel for the three targets: its name, what was compiled, and what came out."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    number, cuobjdump = job
    case = _cases()[number]

    def compiled(target: int, **more: Any) -> dict[str, int]:
        options = {**case[4], **more}
        source = ASTSource(case[1], case[2], case[3], options.pop("attrs", None))
        kernel = compile_kernel(source, target=GPUTarget("cuda", target, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            (row,) = (targets for targets in read_binary(Path(file.name), cuobjdump).values())
        return {**next(iter(row.values())), "shared": kernel.metadata.shared}

    rows: dict[str, Any] = {}
    for target in TARGETS:
        try:
            row = rows[f"sm_{target}"] = compiled(target)
            if _spills(row):
                most = compiled(target, maxnreg=min(255, 65536 // (32 * case[4]["num_warps"])))
                row["spills with all registers"] = _spills(most)
        except Exception as error:  # one kernel that does not compile must not hide the others
            rows[f"sm_{target}"] = {"error": str(error).strip().splitlines()[-1][:200] if str(error) else repr(error)}
    return case[0], case[1].__name__.strip("_"), rows


_found: list[Any] = []


def _cases() -> list[Any]:
    if not _found:
        _found.extend(triton_cases())
    return _found


def read_triton(cuobjdump: str, processes: int, only: str = "") -> dict[str, dict[str, Any]]:
    """Every Triton kernel as :func:`read_binary` gives it, under the name of its compile case."""
    jobs = [(number, cuobjdump) for number, case in enumerate(_cases()) if re.search(only, case[0])]
    found = {}
    # fork would carry torch's threads; each process loads what it needs
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for done, (name, kernel, rows) in enumerate(pool.imap(_compile, jobs), 1):
            print(f"triton {done}/{len(jobs)}: {name}", flush=True)
            found[name] = {"kernel": kernel, "targets": rows}
    return found


def defects(report: dict[str, Any]) -> list[str]:
    """Kernels that spill for want of registers, lack an instruction or did not compile."""
    kernels = [(name, targets, EXPECTED) for name, targets in report["cuda"].items()]
    kernels += [(name, case["targets"], EXPECTED_TRITON) for name, case in report.get("triton", {}).items()]
    found = []
    for name, targets, expected in kernels:
        for target, row in targets.items():
            if "error" in row:
                found.append(f"{name} on {target} does not compile: {row['error']}")
                continue
            aside = row["stack"] <= ASIDE and row.get("spills with all registers") == 0
            if (spilled := _spills(row)) and not aside:
                found.append(
                    f"{name} on {target} has {spilled} accesses to local memory ({row['stack']} bytes of stack)"
                )
            for pattern, wanted in expected.items():
                for kind in wanted if re.search(pattern, name) else ():
                    if row[kind] == 0:
                        found.append(f"{name} on {target} has no instruction of kind {kind!r}")
    return found


def _triple(targets: dict[str, dict[str, int]], key: str) -> str:
    values = [str(row.get(key, "?")) for row in targets.values()]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


WANTED = [kind for kind in INSTRUCTIONS if not kind.startswith("spill")]


def _has(targets: dict[str, dict[str, int]]) -> str:
    parts = []
    for kind in WANTED:
        have = [target.removeprefix("sm_") for target, row in targets.items() if row.get(kind, 0)]
        if have:
            parts.append(kind if len(have) == len(targets) else f"{kind} ({', '.join(have)})")
    return ", ".join(parts) or "none of these"


def _hold(cases: list[dict[str, Any]]) -> str:
    """In how many of several cases each kind is there, on all targets."""
    parts = []
    for kind in WANTED:
        holding = sum(all(row.get(kind, 0) for row in case["targets"].values()) for case in cases)
        if holding:
            parts.append(kind if holding == len(cases) else f"{kind} in {holding} of {len(cases)}")
    return ", ".join(parts) or "none of these"


def _row(name: str, targets: dict[str, dict[str, int]], has: str) -> str:
    spills = {
        target: {"spills": row.get("spill load", 0) + row.get("spill store", 0)} for target, row in targets.items()
    }
    numbers = (
        _triple(targets, "reg"),
        _triple(targets, "shared"),
        _triple(targets, "stack"),
        _triple(spills, "spills"),
    )
    return f"| `{name}` | {' | '.join(numbers)} | {has} |"


def _worst(cases: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """One row for several cases: the largest number of each target."""
    worst: dict[str, dict[str, int]] = {}
    for case in cases:
        for target, row in case["targets"].items():
            if "error" in row:
                continue
            have = worst.setdefault(target, dict(row))
            for key, value in row.items():
                have[key] = max(have.get(key, value), value)
    return worst


def table(report: dict[str, Any]) -> str:
    """The part of benchmarks/results/gpu_report.md between the markers."""
    targets = [f"sm_{target}" for target in TARGETS]
    head = [
        f"| kernel | registers | shared memory, bytes | stack | spill instructions | holds, of {len(WANTED)} kinds |",
        "|---|---:|---:|---:|---:|---|",
    ]
    versions = report["versions"]
    lines = [
        f"CUDA C++ ({versions['nvcc']}), {' / '.join(targets)} where they differ. Of the static shared memory, "
        "sm_90 and sm_100 take 1024 bytes a block for themselves; what flow and spline kernels ask for at launch is not in it.",
        "",
        *head,
        *(_row(name, rows, _has(rows)) for name, rows in report["cuda"].items()),
    ]
    if report.get("triton"):
        groups: dict[str, list[dict[str, Any]]] = {}
        for name, case in report["triton"].items():
            op = name.split()[0]
            dtype = next((word for word in name.split() if word in ("float32", "float64", "bfloat16", "float16")), "")
            groups.setdefault(f"{op} {case['kernel']} {dtype}".strip(), []).append(case)
        aside = sum(
            row.get("spills with all registers") == 0
            for case in report["triton"].values()
            for row in case["targets"].values()
        )
        lines += [
            "",
            f"Triton {versions['triton']}: {len(report['triton'])} compiled cases (shapes, squashes and tuning choices), of each "
            "kernel and type the largest numbers, and in how many cases the instructions are there, on all targets. Rows of 31 or "
            "12 elements, which begin at no multiple of 16 bytes, are among the cases. "
            f"{aside} of {len(report['triton']) * len(TARGETS)} put values aside for occupancy, as told below the table.",
            "",
            head[0].replace("| kernel |", "| kernel (cases) |"),
            head[1],
            *(_row(f"{name} ({len(cases)})", _worst(cases), _hold(cases)) for name, cases in sorted(groups.items())),
        ]
    return "\n".join(lines)


def written(text: str, report: dict[str, Any]) -> str:
    """The document with the table of this report."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + "\n" + table(report) + "\n" + END + rest.split(END)[1]


def _versions() -> dict[str, str]:
    found = {"nvcc": "nvcc not found", "triton": "none"}
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        found["nvcc"] = "nvcc " + (re.findall(r"release ([\d.]+)", text) or ["of unknown version"])[0]
    if find_spec("triton"):
        import triton

        found["triton"] = triton.__version__
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare the table with the committed file")
    parser.add_argument(
        "--no-triton", action="store_true", help="leave the Triton kernels as the committed file has them"
    )
    parser.add_argument("--triton-only", default="", metavar="PATTERN", help="cases whose name matches; writes nothing")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if options.check:
        text = DOCUMENT.read_text()
        same = written(text, json.loads(RESULT.read_text())) == text
        if not same:
            print("benchmarks/results/gpu_report.md differs from gpu_report.json beside it: run make gpu-report")
        return int(not same)
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        print("gpu report: no cuobjdump; it comes with the CUDA toolkit and with triton (pip install triton)")
        return 1
    report: dict[str, Any] = {"versions": _versions(), "cuda": {}, "triton": {}}
    if not options.triton_only:
        library = ROOT / "iin_fast" / "lib" / "libiin_fast_cuda.so"
        if not library.exists():
            print(f"gpu report: {library.name} is not built; put nvcc on PATH and run make build")
            return 1
        report["cuda"] = read_binary(library, cuobjdump)
        print(f"CUDA: {len(report['cuda'])} kernels")
    if options.no_triton and RESULT.exists():
        before = json.loads(RESULT.read_text())
        report["triton"], report["versions"]["triton"] = before["triton"], before["versions"]["triton"]
    elif not options.no_triton and find_spec("triton"):
        report["triton"] = read_triton(cuobjdump, options.processes, options.triton_only)
    if options.triton_only:
        print(table(report))
    else:
        RESULT.write_text(json.dumps(report, indent=1) + "\n")
        DOCUMENT.write_text(written(DOCUMENT.read_text(), report))
    found = defects(report)
    print("\n".join(found) or "no kernel lacks registers, and every expected instruction is there")
    return int(bool(found))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
