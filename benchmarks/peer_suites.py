"""The libraries' own test suites, with and without iin_fast.patch: every test must end the same way.

    python benchmarks/peer_suites.py --out benchmarks/results/peer_suites.json
    python benchmarks/peer_suites.py --source freia=FOLDER --out benchmarks/results/peer_suites.json

Suites come from the source distributions of the package index, of the versions installed here; nflows, normflows and zuko
ship theirs. FrEIA's does not; --source names a clone of its repository. nflows' need torchtestcase. In the run with ``patch``, small
couplings take the fused ops too, and the calls of each op are counted. torch, numpy and random are seeded before each test.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from iin_fast.info import collect, commit_of

ROOT = Path(__file__).resolve().parents[1]

# distribution, and where its tests stand
SUITES = {
    "nflows": ("nflows", "tests"),
    "normflows": ("normflows", "normflows"),
    "zuko": ("zuko", "tests"),
    "freia": ("FrEIA", "tests"),
}

PLUGIN = """
import atexit, collections, importlib, json, os, random
import numpy, pytest, torch

@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0), numpy.random.seed(0), random.seed(0)

if os.environ["PATCH"]:
    import iin_fast
    from iin_fast.dropin import registry

    registry.AFFINE_DEVICES = ("cpu",)
    print(iin_fast.patch(os.environ["PATCH"]).report)
    counts = collections.Counter()

    def counted(name, op):
        def call(*args):
            counts[name] += 1
            return op(*args)
        return call

    for name in ("affine_coupling", "spline_coupling"):
        calls = importlib.import_module(f"iin_fast.ops.{name}")._calls
        calls["cpp"] = counted(name, calls["cpp"])
    engine = importlib.import_module("iin_fast.ops.flow_program.engine")
    engine.call = counted("flow_program", engine.call)
    atexit.register(lambda: open(os.environ["COUNTS"], "w").write(json.dumps(counts)))
"""


def suite(name: str, source: Path | None, scratch: Path) -> Path | None:
    """The folder that holds the library's sources and tests, or None."""
    distribution, tests = SUITES[name]
    if source is None:
        version = importlib.metadata.version(distribution)
        wanted = f"{distribution}=={version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*command, "--no-binary", ":all:", wanted, "-d", str(scratch)], check=True)
        archive = next(path for path in scratch.glob("*.tar.gz") if path.name.lower().startswith(distribution.lower()))
        with tarfile.open(archive) as file:
            file.extractall(scratch, filter="data")
        source = next(p for p in scratch.iterdir() if p.is_dir() and p.name.lower().startswith(distribution.lower()))
    found = [*source.glob(f"{tests}/**/test_*.py"), *source.glob(f"{tests}/**/*_test.py")]
    return source if found else None


def run(name: str, folder: Path, patch: bool, scratch: Path) -> tuple[dict[str, str], dict[str, int]]:
    """Each test's outcome, and the calls of each op."""
    plugins, results, counts = scratch / "plugins", scratch / f"{name}.xml", scratch / f"{name}.json"
    plugins.mkdir(exist_ok=True)
    (plugins / "peer_plugin.py").write_text(PLUGIN)
    path = os.pathsep.join([str(plugins), str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "PATCH": name if patch else "", "COUNTS": str(counts)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peer_plugin", "-p", "no:cacheprovider", "--no-header"]
    command += ["-o", "python_files=test_*.py *_test.py", "-o", "addopts=", f"--junit-xml={results}", SUITES[name][1]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if not results.exists():
        raise RuntimeError(f"{name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    ended = outcomes(results)
    results.unlink()
    return ended, json.loads(counts.read_text()) if patch else {}


def outcomes(results: Path) -> dict[str, str]:
    """How each test of a JUnit file ended: "passed", "failure", "error" or "skipped"."""
    found = {}
    for case in ElementTree.parse(results).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        found[f"{case.get('classname')}::{case.get('name')}"] = kinds[0] if kinds else "passed"
    return found


def compare(name: str, source: Path | None) -> dict[str, object]:
    version = {"commit": commit_of(source, 40)} if source else {"version": importlib.metadata.version(SUITES[name][0])}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        found = suite(name, source, scratch)
        if found is None:
            return {**version, "note": "its source distribution carries no tests"}
        before, _ = run(name, found, False, scratch)
        after, calls = run(name, found, True, scratch)
    differ = {
        test: [before.get(test), after.get(test)] for test in before | after if before.get(test) != after.get(test)
    }
    tally = {
        kind: sum(outcome == kind for outcome in before.values()) for kind in ("passed", "failure", "error", "skipped")
    }
    return {**version, **tally, "op_calls_under_patch": calls, "different_under_patch": differ}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--source", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sources = dict(item.split("=", 1) for item in arguments.source)
    results: dict[str, dict[str, object]] = {}
    for name in arguments.only:
        results[name] = compare(name, Path(sources[name]).resolve() if name in sources else None)
        print(name, json.dumps(results[name]), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": collect(), "suites": results}, indent=2) + "\n")
    if any(result.get("different_under_patch") for result in results.values()):
        sys.exit("some tests end differently under patch")
    if any(result.get("error") for result in results.values()):
        sys.exit("some tests could not run")


if __name__ == "__main__":
    main()
