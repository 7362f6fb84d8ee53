"""iin-fast info, check, demo, bench: what is installed, whether it computes right, what it does, how fast."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ..allocator import keep_freed_memory
from .console import console
from .method import show_evaluation

__all__ = ["bench", "check", "demo", "info"]


def info() -> None:
    """Show version, commit, torch, Python, backends, CPU instruction set, GPU targets and GPUs."""
    from ..info import collect

    table = Table(show_header=False, box=None)
    for name, value in collect().items():
        table.add_row(name, value)
    console.print(table)


def check(
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is a GPU")] = "",
    verbose: Annotated[bool, typer.Option(help="show every row, not only the worst of each op")] = False,
) -> None:
    """Run every op on every backend on this machine and compare it with its definition in plain torch."""
    import torch

    from ..testing.backends import Row, check_ops

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with console.status(f"all ops, backends and dtypes on {device}"):
        comparison = check_ops(device)
    table = Table("op", "dtype", "backend", "tensors", "error", "tolerance", "")
    table.columns[0].no_wrap = True
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in comparison.rows:
        op, dtype, label = row.name.split(" ", 2)
        groups.setdefault((op, dtype, label if verbose else "", row.backend), []).append(row)
    for (op, dtype, label, name), rows in groups.items():
        worst = max(rows, key=lambda row: row.error if row.error == row.error else float("inf"))
        verdict = "ok" if all(row.ok for row in rows) else "[red]DIFFERS[/red]"
        numbers = (str(len(rows)), f"{worst.error:.1e}", f"{worst.tolerance:.1e}")
        table.add_row(f"{op} {label}".strip(), dtype, name, *numbers, verdict)
    console.print(table)
    left_out: dict[str, list[str]] = {}
    for name, reason in comparison.skipped.items():
        left_out.setdefault(reason.partition(" is forced, but ")[2] or reason, []).append(name)
    for reason, names in left_out.items():
        console.print(f"not run: {', '.join(names)}: {reason}", style="dim", highlight=False)
    wrong = sum(not row.ok for row in comparison.rows)
    console.print(f"{len(comparison.rows)} tensors compared, {wrong} differ")
    if wrong:
        raise typer.Exit(1)


def demo(
    out: Annotated[Path, typer.Option(help="run folder, with pictures, evaluation and report")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="the whole run follows from it")] = 0,
    quick: Annotated[bool, typer.Option(help="a run of about a minute, for a first impression")] = False,
) -> None:
    """Coloured digits: train an autoencoder and an IIN on its latents, swap digit and colour, evaluate, write a report."""
    from ..demo import Plan, run_demo

    keep_freed_memory()
    found, page = run_demo(
        out, seed=seed, plan=Plan.quick() if quick else None, say=lambda line: console.print(line, highlight=False)
    )
    show_evaluation(found)
    console.print(f"open {page}", highlight=False, soft_wrap=True)


def bench(
    out: Annotated[Path, typer.Option(help="folder for JSON and pictures")] = Path("runs/bench"),
    peers: Annotated[str, typer.Option(help="comma-separated: FrEIA,nflows,normflows,compile; default: all")] = "",
    quick: Annotated[bool, typer.Option(help="a minute or two: few repeats, no compile, no sweeps")] = False,
) -> None:
    """Time the flow against the published composition, torch.compile and other libraries, in one run."""
    from ..bench import run_bench
    from ..bench.timing import noise_in

    wanted = [name.strip() for name in peers.split(",") if name.strip()] or None
    result = run_bench(
        out, peers=wanted, quick=quick, say=lambda line: console.print(line, style="dim", highlight=False)
    )
    table = Table("case", "system", "median ms", "min", "max", "x eager", "x floor")
    for case, found in result["cases"].items():
        for name, row in found["systems"].items():
            times = (f"{1e3 * row[key]:.2f}" for key in ("median", "min", "max"))
            ratios = (f"{row['times_eager']:.2f}", f"{row['times_floor']:.2f}")
            table.add_row(
                case, name, *times, *ratios, style="bold" if name == "iin-fast" else "", end_section=name == "iin-fast"
            )
    console.print(table)
    timed = {f"{case} {name}": row for case, found in result["cases"].items() for name, row in found["systems"].items()}
    if noise := noise_in(timed):
        console.print(f"[yellow]note:[/yellow] {noise}", highlight=False, soft_wrap=True)
    for name, row in result["inversion"].items():
        console.print(
            f"inversion error, {name}: {row['max_error']:.1e} (eager {row['max_error_eager']:.1e})", highlight=False
        )
    for name, by_depth in result.get("memory", {}).get("systems", {}).items():
        parts = ", ".join(f"{depth} blocks {row['above_gradients']:.0f} MiB" for depth, row in by_depth.items())
        console.print(f"peak memory above gradients, {name}: {parts}", highlight=False)
    console.print(f"written to {escape(str(out))}")
