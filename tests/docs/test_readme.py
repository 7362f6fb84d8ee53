"""The README's code runs, and its tables are those of the committed results."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import benchmark_scripts
import pytest
import torch

ROOT = Path(__file__).parents[2]


def test_tables_come_from_the_result_files() -> None:
    done = subprocess.run([sys.executable, "benchmarks/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_noisy_time_has_a_mark() -> None:
    readme = benchmark_scripts.load("readme")
    assert readme.milliseconds({"min": 0.001, "median": 0.0012, "max": 0.002}) == "1.2"
    assert readme.milliseconds({"min": 0.001, "median": 0.0012, "max": 0.0021}) == "1.2†"
    for page, tables in readme.PAGES.items():
        for table in tables.values():
            assert ("†" in table()) <= ("†: the slowest run took over 2 times" in (ROOT / page).read_text())


def test_code_runs() -> None:
    """Its three examples, one after the other, as a new user would paste them."""
    pytest.importorskip("nflows")
    text = (ROOT / "README.md").read_text()
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    # the swap took the donor's digit and kept the color: the nearest class means say so
    labels, swapped = names["labels"], names["swapped"]
    means = torch.stack(
        [torch.stack([names["table"]["digit"][d] + names["table"]["color"][c] for c in range(4)]) for d in range(10)]
    )
    nearest = torch.cdist(swapped, means.flatten(0, 1)).argmin(1)
    assert torch.equal(nearest // 4, labels["digit"][8:16]) and torch.equal(nearest % 4, labels["color"][:8])
    assert "10 of 10 layers run in programs" in str(names["report"])
    assert names["nats"].isfinite().all() and names["samples"].shape == (100, 100, 6)
