"""How far splines are from the truth, ours and those of nflows and zuko: python benchmarks/spline_accuracy.py [OUT.json]

float32 against the peer's own float64 on the same numbers, by |found - truth| / (1 + |truth|): y, log-det per element, and the
gradients of y and log-det by x and the raw values. Raw values are normal with a standard deviation `spread`; 800 coordinates
at random and every knot with its neighbours (there the log-det has a kink, and no gradient is asked of it), forward and
inverse together. And the round trip |inverse(forward(x)) - x|, in float32 and float64.

Nothing is timed; the same machine gives the same numbers again.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iin_fast.info import collect, versions

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "ops"))
from spline_peers import NAMES, case, distance, nflows, ours, results, round_trip, zuko  # noqa: E402

LIMIT = 1e-5
BINS, SPREADS = (1, 8, 64), (0.01, 1.0, 8.0)
SEEDS = range(7)


def summary(errors: list[Tensor]) -> dict[str, float | int]:
    """Of what is finite; "nan" counts the rest."""
    flat = torch.cat([e.flatten() for e in errors])
    finite = flat[flat.isfinite()]
    return {
        "max": finite.max().item(),
        "99 %": finite.quantile(0.99).item(),
        "median": finite.median().item(),
        "beyond": (finite > LIMIT).double().mean().item(),
        "nan": flat.numel() - finite.numel(),
    }


def against_the_truth(peer: Any, bins: int, spread: float) -> dict[str, Any]:
    errors: dict[tuple[str, str, str], list[Tensor]] = {}
    refused = 0
    for inverse in (False, True):
        x, raw, near = case(peer, bins, spread, inverse, torch.float32, random_rows=200)
        arguments = x, raw, near, inverse
        truth = results(peer.run, *arguments, torch.float64)
        systems = {"iin-fast": results(ours(peer), *arguments, torch.float32)}
        try:
            systems[peer.name] = results(peer.run, *arguments, torch.float32)
        except AssertionError:  # nflows: a discriminant below 0
            refused += 1
        for system, found in systems.items():
            for name, got, want in zip(NAMES, found, truth, strict=True):
                quantity = name if name in ("y", "log-det") else "gradients"
                for place, where in (("off knots", ~near), ("on knots", near)):
                    if got.numel():
                        errors.setdefault((place, quantity, system), []).append(distance(got, want)[where])
    table: dict[str, Any] = {"calls refused by the peer": refused}
    for (place, quantity, system), found in errors.items():
        table.setdefault(place, {}).setdefault(quantity, {})[system] = summary(found)
    return table


def there_and_back(peer: Any, bins: int, spread: float, dtype: torch.dtype) -> dict[str, Any]:
    """Means and largest errors, medians over seeds, on what the peer takes and gives a number for."""
    found, refused, missing = [], 0, 0
    for seed in SEEDS:
        mine, theirs = (round_trip(run, bins, spread, dtype, seed) for run in (ours(peer), peer.run))
        if theirs is None:
            refused += 1
            continue
        missing += int(theirs.isnan().sum())
        both = torch.stack([mine, theirs])[:, theirs.isfinite()]
        found.append(torch.stack([both.mean(1), both.amax(1)], 1))
    middle = torch.stack(found).median(0).values
    rows = {
        name: {"mean": m, "max": largest}
        for name, (m, largest) in zip(("iin-fast", peer.name), middle.tolist(), strict=True)
    }
    return {"seeds refused by the peer": refused, "NaN of the peer": missing, **rows}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    cases: list[dict[str, Any]] = []
    for make, bins, spread in itertools.product((nflows, zuko), BINS, SPREADS):
        if bins == 1 and spread != 1:  # one bin is the identity, whatever its raw values
            continue
        peer = make()
        case_ = {"peer": peer.name, "bins": bins, "spread": spread, **against_the_truth(peer, bins, spread)}
        case_["round trip"] = {
            str(dtype).removeprefix("torch."): there_and_back(peer, bins, spread, dtype)
            for dtype in (torch.float32, torch.float64)
        }
        cases.append(case_)
        worst = {q: {s: f"{r['max']:.0e}" for s, r in row.items()} for q, row in case_["off knots"].items()}
        print(peer.name, bins, spread, worst)
    peers = versions("nflows", "zuko")
    result = {"machine": collect(), "peers": peers, "limit": LIMIT, "cases": cases}
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results" / "spline_accuracy.json")
