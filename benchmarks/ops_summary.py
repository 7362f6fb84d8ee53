"""From pytest-benchmark's file to what is committed: python benchmarks/ops_summary.py IN OUT"""

import json
import sys
from pathlib import Path

from iin_fast.info import collect


def main(source: Path, target: Path) -> None:
    measured = json.loads(source.read_text())
    cases = {
        entry["name"]: {key: entry["stats"][key] for key in ("min", "median", "max", "rounds")}
        for entry in measured["benchmarks"]
    }
    target.write_text(json.dumps({"when": measured["datetime"], "machine": collect(), "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
