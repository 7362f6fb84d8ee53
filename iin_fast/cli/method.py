"""iin-fast train, dims, encode, decode, swap, interpolate, sample, score, evaluate, report, explore: from latents to a page about them."""

import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..allocator import keep_freed_memory
from ..train import Settings
from .console import console
from .settings import settings_options

__all__ = [
    "axis",
    "decode",
    "dims",
    "encode",
    "evaluate",
    "explore",
    "interpolate",
    "report",
    "sample",
    "score",
    "swap",
    "train",
]

LATENTS = typer.Argument(
    metavar="LATENTS",
    show_default=False,
    help="z \\[n, dim] and labels \\[n, concepts] or an array for each concept, in .npz, .npy, .safetensors or .pt; a table: .csv, "
    ".parquet, .arrow, a folder of datasets; or pairs za, zb, factor",
)
LatentsFile = Annotated[Path, LATENTS]
Run = Annotated[Path, typer.Argument(metavar="RUN", show_default=False, help="the folder that train wrote")]
Out = Annotated[Path, typer.Option(show_default=False, help="file to write, .npz, .safetensors or .csv")]
Shard = Annotated[
    str,
    typer.Option(show_default=False, help="i/n: part i of n of the rows, counted from 0; for files larger than memory"),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
Context = Annotated[
    str,
    typer.Option(
        show_default=False,
        help="of a run trained with --context: a class for all (its text, or its number), or a file of latents with a label of it for each row",
    ),
]
Factor = Annotated[list[str], typer.Option(show_default=False, help="a factor's name; several times for several")]


@settings_options
def train(
    out: Annotated[Path, typer.Option(show_default=False, help="the run folder; all that comes of it goes there")],
    settings: Settings,
    latents: Annotated[Path | None, LATENTS] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="go on from the last checkpoint in --out with its own latents and settings; --steps may be more",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="take away the run in --out and train anew")] = False,
    epochs: Annotated[
        float | None,
        typer.Option(show_default=False, help="in place of --steps: times that each row is seen, on average"),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            show_default=False, help="train on so many, drawn at random. Default: all, or of a large file some"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …, in place of --accelerator and --devices")] = "",
    accelerator: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    devices: Annotated[int, typer.Option(help="of each node; under torchrun its environment counts")] = 1,
    nodes: Annotated[int, typer.Option(help="machines; under torchrun its environment counts")] = 1,
    strategy: Annotated[str, typer.Option(help="auto or ddp")] = "auto",
    logger: Annotated[
        str,
        typer.Option(
            help="a function that gives a logger of Lightning Fabric (MLflow, Weights & Biases): package.module:name or file.py:name"
        ),
    ] = "",
    typed: typer.Context = None,  # type: ignore[assignment]
) -> None:
    """Train an IIN on the latents of any pretrained model.

    Pairs of latents that share a concept teach each factor its concept. Samples without any label take part through their
    likelihood; without labels at all the IIN is unsupervised. Ctrl-C writes a checkpoint; so does every --save-every steps,
    and after a crash the same command with --resume loses nothing.
    """
    from ..data import load_latents
    from ..data.rows import training_rows
    from ..train import early_end, held_out_rise, inspect_latents, loss_rise
    from ..train import train as run_training
    from ..train.run_folder import load_function

    keep_freed_memory()
    if latents is None and not resume:
        raise ValueError("LATENTS is missing: iin-fast train LATENTS --out RUN; --resume alone knows those of its run")
    if resume and typed is not None:
        _check_given(typed, out, settings)
    fresh = latents is not None and not (resume and (out / "run.json").is_file())
    data: Any = latents  # of a resume the training knows the rows
    if latents is not None and fresh:
        data = load_latents(latents, sample=rows or training_rows(latents))
    if fresh and os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
        replaced = settings.standardise is not False or settings.start != "random"
        for line in (*data.notes, *inspect_latents(data, replaced).lines()):
            console.print(f"[yellow]note:[/yellow] {escape(line)}", highlight=False, soft_wrap=True)
    where: dict[str, Any] = {"accelerator": accelerator, "devices": devices, "nodes": nodes, "strategy": strategy}
    where |= {"device": device or None, "force": force, "epochs": epochs}
    where |= {"rows": None if fresh else rows}
    where["loggers"] = [load_function(logger)()] if logger else []
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="train: ")  # printed below
            model = run_training(data, out, settings, resume=resume, progress=True, **where)
    except KeyboardInterrupt:
        if _leave_group():
            goes_on = f"iin-fast train --out {escape(str(out))} --resume goes on"
            left = goes_on if (out / "run.json").exists() else "before anything was written"
            console.print(f"stopped; {left}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    if not _leave_group():
        return
    table = Table("factor", "dimensions")
    for name, size in model.sizes.items():
        table.add_row(escape(name), str(size))
    console.print(table)
    for advice in filter(None, (early_end(out), held_out_rise(out), loss_rise(out))):
        console.print(f"[yellow]note:[/yellow] {escape(advice)}", highlight=False, soft_wrap=True)
    console.print(
        "written to {0}; next: iin-fast evaluate {0}, then iin-fast report {0}".format(escape(str(out))),
        highlight=False,
        soft_wrap=True,
    )


def dims(
    latents: Annotated[list[Path], LATENTS],
    compare: Annotated[
        bool, typer.Option("--compare", help="several files, of layers or networks: a column for each, and its share")
    ] = False,
    plot: Annotated[Path | None, typer.Option(show_default=False, help="with --compare: a picture, .png")] = None,
    method: Annotated[str, typer.Option(help="linear, published, paper or all; with --compare one, or linear")] = "all",
    others: Annotated[str, typer.Option(help="as for train: differ, agree or any")] = "any",
    unlabelled: Annotated[float | None, typer.Option(help="as for train")] = None,
    context: Annotated[str, typer.Option(help="as for train: a concept that is no factor")] = "",
    held_out: Annotated[float, typer.Option(help="as for train: share of the latents that has no say")] = 0.1,
    seed: Annotated[int, typer.Option(help="as for train")] = 0,
) -> None:
    """Estimate how many dimensions each concept asks for, from what pairs that share it have in common.

    With the same options the sizes of the method linear are those that train takes without --factors.
    """
    from ..data import load_latents
    from ..train.run_folder import dims as run_dims

    if compare:
        options: dict[str, Any] = {"others": others, "unlabelled": unlabelled, "held_out": held_out, "seed": seed}
        _compare(latents, plot, method="linear" if method == "all" else method, context=context or None, **options)
        return
    if len(latents) > 1 or plot is not None:
        raise ValueError("dims: several files and --plot need --compare, which takes one or more of them")
    data = load_latents(latents[0])
    methods = ("linear", "published", "paper") if method == "all" else (method,)
    options = {
        "others": others,
        "unlabelled": unlabelled,
        "held_out": held_out,
        "seed": seed,
        "context": context or None,
    }
    found = {name: run_dims(data, method=name, **options) for name in methods}
    table = Table("factor", *methods)
    for name in found[methods[0]]:
        table.add_row(escape(name), *(str(sizes[name]) for sizes in found.values()))
    console.print(table)
    if method == "all":
        console.print(
            "linear is recommended: as many directions as pairs that share the concept have in common beyond chance. published "
            "and paper share out all dimensions. The paper's formula weighs a concept by exp of its summed correlations, and the "
            "residual by exp of all dimensions, so that a concept gets 0 unless it correlates nearly all of them.",
            highlight=False,
            soft_wrap=True,
        )


def _compare(latents: list[Path], plot: Path | None, **options: Any) -> None:
    """A table of factor sizes with a column for each file, and the picture."""
    from ..report import picture_file, plot_dims
    from ..train.run_folder import compare_dims

    if plot is not None:
        picture_file(plot)  # an ending that is none is refused before the work
    found = compare_dims(latents, **options)
    table = Table("factor", *map(escape, found))
    for factor in dict.fromkeys(name for sizes in found.values() for name in sizes):
        cells = (
            f"{sizes[factor]} ({sizes[factor] / sum(sizes.values()):.0%})" if factor in sizes else ""
            for sizes in found.values()
        )
        table.add_row(escape(factor), *cells)
    table.add_section()
    table.add_row("dimensions", *(str(sum(sizes.values())) for sizes in found.values()))
    console.print(table)
    if plot is not None:
        _wrote(plot_dims(found, plot), f"shares of {len(found)} files")


def encode(run: Run, latents: LatentsFile, out: Out, shard: Shard = "", device: Device = "cpu") -> None:
    """Translate latents into factors: one array \\[n, size] for each factor."""
    from ..train.run_folder import encode as run_encode

    factors = run_encode(run, _part(run, latents, shard), device=device)
    _save(out, dict(factors), run, latents)
    sizes = ", ".join(f"{name} {size}" for name, size in factors.sizes.items())
    _wrote(out, f"{factors.tensor.shape[0]} samples in {sizes} dimensions")


def decode(
    run: Run,
    factors: Annotated[Path, typer.Argument(metavar="FACTORS", show_default=False, help="the file that encode wrote")],
    out: Out,
    context: Context = "",
    device: Device = "cpu",
) -> None:
    """Translate factors back into latents z, which the pretrained model's own decoder reads."""
    from ..train.run_folder import decode as run_decode

    z = run_decode(run, factors, context=context or None, device=device)
    _save(out, {"z": z}, run, factors, context)
    _wrote(out, f"{len(z)} latents")


def swap(
    run: Run,
    latents: LatentsFile,
    factor: Factor,
    out: Out,
    donors: Annotated[
        Path | None,
        typer.Option(help="latents that give the factor, a row for each. Default: the same latents in another order"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of that order")] = 0,
    device: Device = "cpu",
) -> None:
    """Give each latent one factor of another sample; everything else stays. Writes z, and each donor's row."""
    from ..train.run_folder import swap as run_swap

    z, rows = run_swap(run, latents, factor, donors, seed=seed, device=device)
    _save(out, {"z": z, "donor": rows}, run, latents, donors)
    _wrote(out, f"{len(z)} latents with another's {' and '.join(factor)}")


def interpolate(
    run: Run,
    latents: LatentsFile,
    start: Annotated[
        list[int], typer.Option(show_default=False, help="row where the way starts; several times for several")
    ],
    end: Annotated[list[int], typer.Option(show_default=False, help="row where it ends, one for each start")],
    out: Out,
    factor: Annotated[
        list[str] | None, typer.Option(help="what moves; several times for several. Default: all")
    ] = None,
    steps: Annotated[int, typer.Option(help="latents on the way, both ends included")] = 9,
    device: Device = "cpu",
) -> None:
    """Walk from one sample towards another in one factor. Writes z, way after way, and each one's position from 0 to 1."""
    import torch

    from ..train.run_folder import interpolate as run_interpolate

    z = run_interpolate(run, latents, start, end, steps, factor or None, device=device)
    position = torch.linspace(0, 1, steps).repeat(len(start))
    _save(out, {"z": z.transpose(0, 1).reshape(-1, z.shape[2]), "position": position}, run, latents)
    _wrote(out, f"{len(position)} latents, {steps} for each of {len(start)} ways")


def axis(
    run: Run,
    latents: LatentsFile,
    with_: Annotated[Path, typer.Option("--with", show_default=False, help="latents that have something")],
    without: Annotated[Path, typer.Option(show_default=False, help="latents that don't")],
    out: Out,
    factor: Annotated[
        list[str] | None, typer.Option(help="stay within this one; several times for several. Default: all")
    ] = None,
    position: Annotated[
        list[float] | None, typer.Option(help="how far, 1 is from mean to mean; several times. Default: 0, 0.5, 1")
    ] = None,
    device: Device = "cpu",
) -> None:
    """Move latents along the direction from those without something to those with it. Writes z, way after way, and positions."""
    import torch

    from ..train.run_folder import axis as run_axis

    places = position or [0.0, 0.5, 1.0]
    z = run_axis(run, with_, without, latents, places, factor or None, device=device)
    found = {"z": z.transpose(0, 1).reshape(-1, z.shape[2]), "position": torch.tensor(places).repeat(z.shape[1])}
    _save(out, found, run, latents, with_, without)
    _wrote(out, f"{z.shape[0] * z.shape[1]} latents, {len(places)} for each of {z.shape[1]}")


def sample(
    run: Run,
    out: Out,
    n: Annotated[int, typer.Option("--n", help="how many")] = 16,
    context: Context = "",
    seed: Annotated[int, typer.Option(help="the same seed gives the same latents")] = 0,
    device: Device = "cpu",
) -> None:
    """Draw latents z from the IIN's distribution."""
    from ..train.run_folder import sample as run_sample

    z = run_sample(run, n, context=context or None, seed=seed, device=device)
    _save(out, {"z": z}, run, context)
    _wrote(out, f"{len(z)} latents")


def score(
    run: Run,
    latents: LatentsFile,
    out: Out,
    held_in: Annotated[
        Path | None,
        typer.Option(help="latents of the usual kind, not trained on. Default: what train held out"),
    ] = None,
    shard: Shard = "",
    device: Device = "cpu",
) -> None:
    """Find outliers: writes each latent's log_prob, in nats, and outlier_score, the share of usual ones that is likelier."""
    from ..train.run_folder import score as run_score

    log_prob, outlier_score = run_score(run, _part(run, latents, shard), held_in, device=device)
    _save(out, {"log_prob": log_prob, "outlier_score": outlier_score}, run, latents, held_in)
    share = (outlier_score >= 0.95).double().mean().item()
    _wrote(
        out,
        f"{len(log_prob)} latents, {log_prob.double().mean().item():.2f} nats on average; {share:.1%} of them score 0.95 or "
        "more (of usual ones at most 5 %)",
    )


def evaluate(
    run: Run,
    latents: Annotated[
        Path | None,
        typer.Argument(
            metavar="[LATENTS]", show_default=False, help="default: what train held out; others are all held out"
        ),
    ] = None,
    learn_on: Annotated[
        Path | None,
        typer.Option(help="labelled latents that judge, probes and baselines learn on. Default: what train learned on"),
    ] = None,
    concept: Annotated[
        list[str] | None,
        typer.Option(
            help="swap this one and take metrics of it; several times for several. Default: all. Swaps are judged on all in any case"
        ),
    ] = None,
    decoder: Annotated[
        str,
        typer.Option(
            help="what --judge or --features reads is made of latents by this: package.module:name or file.py:name"
        ),
    ] = "",
    judge: Annotated[
        str,
        typer.Option(help="reads swaps: a function to class probabilities of each concept. Default: small networks"),
    ] = "",
    features: Annotated[
        str, typer.Option(help="without labels: reads what --decoder makes of samples, a function to \\[n, features]")
    ] = "",
    max_samples: Annotated[int, typer.Option(help="most samples a metric is taken on")] = 2000,
    seed: Annotated[int, typer.Option(help="of all draws")] = 0,
    device: Device = "cpu",
) -> None:
    """Take all metrics on held-out latents, beside what does without an IIN; writes RUN/evaluation.json."""
    from ..train.run_folder import evaluate as run_evaluate

    with console.status("evaluating") as status:
        found = run_evaluate(
            run,
            latents,
            learn_on=learn_on,
            concepts=concept or None,
            decoder=decoder or None,
            judge=judge or None,
            features=features or None,
            max_samples=max_samples,
            seed=seed,
            device=device,
            progress=lambda what: status.update(f"evaluating: {what}"),
        )
    show_evaluation(found)
    console.print(
        f"written to {escape(str(run / 'evaluation.json'))}; iin-fast report {escape(str(run))} shows it with what each number means",
        highlight=False,
        soft_wrap=True,
    )


def show_evaluation(found: dict[str, Any]) -> None:
    """The most telling numbers of an evaluation, as a table and a few lines."""
    likelihood = found["likelihood"]
    if found["concepts"]:
        console.print(_scores(found))
    for verdict in found.get("verdict", {}).values():
        console.print(escape(verdict["text"]), highlight=False, soft_wrap=True)
    if "values" in found:
        console.print(_values(found["values"]))
    if "frechet" in found:
        distance = found["frechet"]
        console.print(
            f"Fréchet distance from {distance['n']} held-out ones, in {distance['in']}: samples {distance['iin']:.4g}, of a Gaussian "
            f"{distance['gaussian']:.4g}, what it learned on {distance['train']:.4g}",
            highlight=False,
            soft_wrap=True,
        )
    if "pairs" in found:
        console.print(_correlations(found["pairs"]))
    console.print(
        f"nats per dimension: {likelihood['iin']:.3f} (what it learned on: {likelihood['iin_learned_on']:.3f}; a Gaussian: "
        f"{likelihood['gaussian']:.3f}); largest inversion error {found['invertibility']['max']:.1e}",
        highlight=False,
        soft_wrap=True,
    )


def report(
    run: Run,
    latents: Annotated[
        Path | None,
        typer.Option(help="what the pictures are made of. Default: what it was trained on. images in it are shown"),
    ] = None,
    decoder: Annotated[
        str, typer.Option(help="a function from latents to images: package.module:name or file.py:name")
    ] = "",
) -> None:
    """Write RUN/report.html: one page with swaps, interpolations, metrics and how it was trained."""
    from ..train.run_folder import report as run_report

    path = run_report(run, latents, decoder=decoder or None)
    console.print(f"written to {escape(str(path))}", highlight=False, soft_wrap=True)


def explore(
    run: Run,
    latents: Annotated[
        Path | None,
        typer.Option(help="samples to choose from. Default: what the run was trained on. images in it are shown"),
    ] = None,
    decoder: Annotated[
        str, typer.Option(help="a function from latents to images: package.module:name or file.py:name")
    ] = "",
    port: Annotated[int, typer.Option(help="of the page, on this machine alone; 0 takes a free one")] = 0,
    browser: Annotated[bool, typer.Option(help="open a browser")] = True,
    device: Device = "cpu",
) -> None:
    """Open a local page to look inside: swap factors, move along their axes, walk from one sample to another."""
    from ..explore import Explorer
    from ..explore.page import HOST, free_port, serve

    explorer = Explorer(run, latents, decoder=decoder or None, device=device)
    port = port or free_port()
    console.print(f"http://{HOST}:{port} (Ctrl-C ends it)", highlight=False, soft_wrap=True)
    serve(explorer, port=port, browser=browser)


def _scores(found: dict[str, Any]) -> Table:
    from ..report import COLUMNS

    table = Table("", *COLUMNS.values(), title="higher is better, but for the leak")

    def line(text: str, values: dict[str, float]) -> None:
        table.add_row(text, *(f"{values[who]:.2f}" if who in values else "" for who in COLUMNS))

    for name in found.get("swap", {}).get("iin", ()):
        both = {who: found["swap"][who][name]["both"] for who in COLUMNS if who in found["swap"]}
        line(f"swap {escape(name)}: changed, all else kept", both)
    for key in ("mig", "sap"):
        line(key.upper(), {who: scores[key] for who, scores in found[key].items()})
    for key in ("disentanglement", "completeness", "informativeness"):
        line(f"DCI {key}", {who: scores[key] for who, scores in found["dci"].items()})
    for name in found["concepts"]:
        line(f"leak of {escape(name)}", {who: scores[name]["mlp"] for who, scores in found["leak"].items()})
    return table


def _values(values: dict[str, Any]) -> Table:
    from ..report import COLUMNS

    columns = {who: title for who, title in COLUMNS.items() if who in values}
    table = Table("", *columns.values(), title="correlation of a continuous concept with what is read from a factor")
    for concept in next(iter(values["iin"].values())):
        for factor in values["iin"]:
            shown = [f"{values[who][factor][concept]:.2f}" if factor in values[who] else "" for who in columns]
            table.add_row(f"{escape(concept)} from {escape(factor)}", *shown)
    return table


def _correlations(pairs: dict[str, Any]) -> Table:
    from ..iin.factors import RESIDUAL
    from ..report import COLUMNS

    columns = {who: title for who, title in COLUMNS.items() if who in pairs}
    rho = "1" if pairs["rho"] is None else f"{pairs['rho']:.3g}"
    title = f"correlation over {pairs['n']} held-out pairs"
    table = Table("", *columns.values(), "asked for", title=title)
    for name in pairs["names"]:
        for text, kind, factor, goal in (
            ("that share {}: its factor", "shared", name, rho),
            ("that share {}: the residual", "shared", RESIDUAL, "0"),
            ("that do not share {}: its factor", "apart", name, "0"),
        ):
            values = [pairs[who][kind].get(factor, {}).get(name) for who in columns]
            if any(value is not None for value in values):
                shown = ["" if value is None else f"{value:.2f}" for value in values]
                table.add_row(f"pairs {text.format(escape(name))}", *shown, goal)
    return table


def _part(run: Path, latents: Path, shard: str) -> Any:
    """Latents, or part i of n of them."""
    from ..train.run_folder import read_like, recorded

    if not shard:
        return latents
    i, slash, n = shard.partition("/")
    if not (slash and i.isdigit() and n.isdigit()):
        raise ValueError(f"--shard is {shard!r}, expected a part and their number like 0/8")
    return read_like(recorded(run), latents, shard=(int(i), int(n)))


def _check_given(typed: typer.Context, out: Path, settings: Settings) -> None:
    """Refuse an option of a resume that names a default which is not what the run has: it would be passed over."""
    from ..train.loop import check_setting
    from ..train.run_folder import recorded

    for name, known in recorded(out).get("settings", {}).items():
        source = typed.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            check_setting(name, getattr(settings, name, known), known, out)


def _leave_group() -> bool:
    """Ends the group of processes, if there is one; whether this is the first of them.

    A process that ended with the group's threads still there would now and then be aborted by the C++ library, and
    torchrun would report a failure of a training that was done.
    """
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return True
    first = torch.distributed.get_rank() == 0
    torch.distributed.destroy_process_group()
    return first


def _save(out: Path, arrays: dict[str, Any], run: Path, *read: Path | str | None) -> None:
    """Write what a command made, but not over what it read, nor over what the run is made of."""
    from ..data import save_arrays
    from ..train.loop import FILES, FOLDERS

    for file in read:
        if file and out.exists() and os.path.exists(file) and os.path.samefile(out, file):
            raise ValueError(f"--out is {out}, which this command reads; take another file")
    place, folder = out.resolve(), run.resolve()
    if folder in place.parents and place.relative_to(folder).parts[0] in (*FOLDERS, *FILES):
        raise ValueError(f"--out is {out}, which is a part of the run; take another file")
    save_arrays(out, arrays)


def _wrote(out: Path, what: str) -> None:
    console.print(f"{escape(str(out))}: {escape(what)}", highlight=False, soft_wrap=True)
