"""What one does with a trained IIN in its run folder: translate latents, change one factor, score it, write its report."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checks import checked_seed
from ..data import Latents, class_context, load_latents
from ..data.latents import read_arrays, read_split
from ..evaluate.likelihood import in_parts
from ..files import read_json, try_to_write, write_file
from ..iin import IIN, Factors
from ..iin.inputs import usual_values
from ..iin.model import outlier_share

__all__ = [
    *(
        "axis",
        "compare_dims",
        "decode",
        "dims",
        "encode",
        "evaluate",
        "interpolate",
        "load_function",
        "report",
        "sample",
        "score",
        "swap",
    ),
]

BATCH = 8192  # rows in one pass

PathLike = str | os.PathLike[str]
Source = Latents | PathLike
Context = Source | int | None  # latents whose labels say the class of each row; one class for all; none


def dims(
    latents: Source,
    *,
    method: str = "linear",
    others: str = "any",
    unlabelled: float | None = None,
    concepts: Sequence[str] | None = None,
    context: str | None = None,
    held_out: float = 0.1,
    seed: int = 0,
) -> dict[str, int]:
    """How many dimensions each concept asks for, estimated from pairs; ``residual`` is last.

    ``method="linear"``, which is recommended: as many directions as pairs that share the concept have in common beyond chance
    (:meth:`iin_fast.LinearIIN.fit`). ``"published"`` and ``"paper"``: those of :func:`iin_fast.estimate_factor_dims`, which divide
    all dimensions; the paper's formula often gives a concept none. They are the sizes that :func:`iin_fast.train.train` takes
    without ``factors`` (the linear ones where it learns on all directions): ``others``, ``unlabelled``, ``context``, ``held_out`` and ``seed`` are those of
    :class:`iin_fast.train.Settings`, and what is held out has no say.

    Raises:
        TypeError, ValueError: latents without labels and pairs, an unknown concept or method.
    """
    from . import Batches, Settings, estimate_sizes, split_rows
    from .batches import fit_linear, units

    data = _latents(latents)
    if data.kind == "unlabelled":
        raise ValueError(f"dims: {data.path or 'latents'} has neither labels nor pairs, which the estimate needs")
    if method not in ("linear", "published", "paper"):
        raise ValueError(f"dims: method is {method!r}, expected 'linear', 'published' or 'paper'")
    if context is not None and context not in data.names:
        raise ValueError(f"dims: context is {context!r}, expected a concept of the latents: {', '.join(data.names)}")
    Settings(held_out=held_out, seed=seed)  # refuses what is out of range
    if concepts is None:
        concepts = [name for name in data.names if name != context]
    train = split_rows(data, held_out, seed)[0]
    if method == "linear":
        data = replace(data, z=usual_values(data.z)[0])
        return fit_linear(data, train, tuple(concepts), seed=seed).sizes
    batches = Batches(data, units(data, train), concepts, seed=seed, others=others, unlabelled=unlabelled)
    return estimate_sizes(data, batches, method=method)


def compare_dims(latents: Mapping[str, Source] | Sequence[PathLike], **options: Any) -> dict[str, dict[str, int]]:
    """How many dimensions each concept asks for in several layers or networks: name to what :func:`dims` says.

    Args:
        latents: name to latents; or files, whose names count without ending.
        **options: of :func:`dims`.

    Raises:
        TypeError, ValueError: as :func:`dims`; two files of one name.
    """
    if not isinstance(latents, Mapping):
        files = [Path(file) for file in latents]
        same = len({file.stem for file in files}) < len(files)  # layer1/z.npz, layer2/z.npz
        named: dict[str, Source] = {str(file.with_suffix("")) if same else file.stem: file for file in files}
        if len(named) < len(files):
            raise ValueError(f"compare_dims: latents are {list(map(str, files))}, expected each file once")
        latents = named
    return {name: dims(source, **options) for name, source in latents.items()}


@torch.no_grad()
def encode(run: PathLike, latents: Source, *, device: str = "cpu") -> Factors:
    """The factors of all latents ``[n, dim]``, on the CPU.

    Where the run was trained with a ``context``, the latents need labels of that concept, here and in all that follows.

    Raises:
        TypeError, ValueError, FileNotFoundError: no model in ``run``, latents that don't fit it.
    """
    model = IIN.load(run, device=device)
    z, context = _z(run, model, latents)
    parts = [model.encode(*rows).tensor.cpu() for rows in in_parts(model, BATCH, z, context)]
    return Factors._wrap(torch.cat(parts), model.sizes)


@torch.no_grad()
def decode(
    run: PathLike,
    factors: Factors | Mapping[str, Tensor] | PathLike,
    *,
    context: Context = None,
    device: str = "cpu",
) -> Tensor:
    """The latents ``[n, dim]`` of factors, on the CPU: the inverse of :func:`encode`.

    Args:
        run: the run folder.
        factors: by name, ``[n, size]`` each; or a file with them, as ``iin-fast encode`` writes it.
        context: of a run that was trained with one: a class for all, by its text or its number, or latents with a label of it
            for each row.
        device: where the model runs.

    Raises:
        TypeError, ValueError, FileNotFoundError: no model in ``run``, factors that are missing or don't fit it.
    """
    model = IIN.load(run, device=device)
    if not isinstance(factors, Mapping):
        factors = _factor_file(Path(factors), model.sizes)
    for name, part in factors.items():
        if not torch.isfinite(part).all():
            raise ValueError(f"decode: factor {name!r} has NaN or Inf, expected finite numbers")
    whole = model._join({name: part.to(device, model.dtype) for name, part in factors.items()})
    assert isinstance(whole, Tensor)
    given = _given_context("decode", run, model, context, len(whole))
    parts = [model.decode(*rows).cpu() for rows in in_parts(model, BATCH, whole, given)]
    return torch.cat(parts) if parts else whole.cpu()


@torch.no_grad()
def swap(
    run: PathLike,
    latents: Source,
    factor: str | Sequence[str],
    donors: Source | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """All latents with one or more factors of others; everything else stays.

    Args:
        run: the run folder.
        latents: what keeps the rest, ``[n, dim]``.
        factor: name, or names.
        donors: what gives the factor, as many rows; by default the same latents in another order, none its own donor.
        seed: of that order.
        device: where the model runs.

    Returns:
        the changed latents ``[n, dim]``, and the row of each one's donor, ``[n]``.

    Raises:
        TypeError, ValueError, FileNotFoundError: no model in ``run``, latents that don't fit it, an unknown factor.
    """
    model = IIN.load(run, device=device)
    z, context = _z(run, model, latents)
    if donors is None:
        if len(z) < 2:
            raise ValueError("swap: latents have one row, expected two at least, or donors")
        order = np.random.default_rng(checked_seed("swap", seed)).permutation(len(z))
        rows = torch.empty(len(z), dtype=torch.int64)
        rows[torch.from_numpy(order)] = torch.from_numpy(np.roll(order, 1))  # one cycle: no row gives to itself
        given, given_context = z, context
    else:
        given, given_context = _z(run, model, donors)
        if len(given) != len(z):
            raise ValueError(f"swap: donors have {len(given)} rows, expected {len(z)} like the latents")
        rows = torch.arange(len(z))
    contexts = (context, None if given_context is None else given_context[rows])
    swapped = [
        model.swap(a, b, factor, context=own, donor_context=other).cpu()
        for a, b, own, other in in_parts(model, BATCH, z, given[rows], *contexts)
    ]
    return torch.cat(swapped), rows


@torch.no_grad()
def interpolate(
    run: PathLike,
    latents: Source,
    start: Sequence[int],
    end: Sequence[int],
    steps: int = 9,
    factor: str | Sequence[str] | None = None,
    *,
    device: str = "cpu",
) -> Tensor:
    """Latents on the way from rows ``start`` to rows ``end``, in one or more factors; by default in all.

    Returns:
        ``[steps, pairs, dim]``, both ends included.

    Raises:
        TypeError, ValueError, FileNotFoundError: no model in ``run``, latents that don't fit it, a row that is not there.
    """
    model = IIN.load(run, device=device)
    z, context = _z(run, model, latents)
    if len(start) != len(end) or not len(start):
        raise ValueError(
            f"interpolate: {len(start)} rows to start and {len(end)} to end at, expected one of each or more"
        )
    for row in (*start, *end):
        if not 0 <= row < len(z):
            raise ValueError(f"interpolate: row {row} is not there, expected 0 to {len(z) - 1}")
    z_a, z_b = (z[list(rows)].to(device) for rows in (start, end))
    own, other = (None if context is None else context[list(rows)].to(device) for rows in (start, end))
    return model.interpolate(z_a, z_b, steps, factor, context=own, context_b=other).cpu()


@torch.no_grad()
def axis(
    run: PathLike,
    with_: Source,
    without: Source,
    latents: Source,
    positions: Sequence[float] = (0, 0.5, 1),
    factor: str | Sequence[str] | None = None,
    *,
    device: str = "cpu",
) -> Tensor:
    """Latents moved along the direction in factor space from latents without something to latents with it.

    Args:
        run: the run folder.
        with_, without: the two groups, by whose means the direction goes; see :meth:`iin_fast.IIN.axis`.
        latents: what is moved, ``[n, dim]``.
        positions: how far: 0 is as it is, 1 the whole way between the means.
        factor: stay within these factors, a name or several; by default in all.
        device: where the model runs.

    Returns:
        ``[positions, n, dim]``.

    Raises:
        TypeError, ValueError, FileNotFoundError: no model in ``run``, latents that don't fit it, an unknown factor.
    """
    model = IIN.load(run, device=device)

    def on_device(source: Source) -> list[Tensor | None]:
        return [None if x is None else x.to(device) for x in _z(run, model, source)]

    (a, own), (b, other) = on_device(with_), on_device(without)
    assert a is not None and b is not None
    direction = model.axis(a, b, factor, context=own, without_context=other)
    z, context = _z(run, model, latents)
    parts = [
        model.traverse(rows, direction, positions, context=known).cpu()
        for rows, known in in_parts(model, BATCH, z, context)
    ]
    return torch.cat(parts, 1)


def sample(run: PathLike, n: int, *, context: Context = None, seed: int = 0, device: str = "cpu") -> Tensor:
    """``n`` latents ``[n, dim]`` of the model's distribution; a seed gives the same ones anywhere. ``context`` is as for
    :func:`decode`.

    Raises:
        TypeError, ValueError, FileNotFoundError: no model in ``run``, ``n`` below 1.
    """
    model = IIN.load(run, device=device)
    generator = torch.Generator().manual_seed(checked_seed("sample", seed))
    given = _given_context("sample", run, model, context, n)
    return model.sample(n, generator, context=None if given is None else given.to(device)).cpu()


@torch.no_grad()
def score(
    run: PathLike, latents: Source, held_in: Source | None = None, *, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """How likely latents are, and how unlikely among others of their kind.

    Args:
        run: the run folder.
        latents: what is scored, ``[n, dim]``.
        held_in: latents of the usual kind that the model was not trained on; by default what the training held out.
        device: where the model runs.

    Returns:
        log p(z) in nats, ``[n]``, given the context where the run was trained with one; and the outlier score of
        :meth:`iin_fast.IIN.outlier_score`, ``[n]``, from 0 (as likely as the likeliest) to almost 1.

    Raises:
        TypeError, ValueError, FileNotFoundError: no model in ``run``, latents that don't fit it or are not there, nothing
            held out.
    """
    model = IIN.load(run, device=device)

    def log_prob(data: Source, rows: NDArray[np.int64] | None = None) -> Tensor:
        parts = _z(run, model, data)
        if rows is not None:
            parts = tuple(None if x is None else x[rows] for x in parts)  # type: ignore[assignment]
        return torch.cat([model.log_prob(*part).cpu() for part in in_parts(model, BATCH, *parts)])

    own = log_prob(latents)
    if held_in is None:
        data, _, rows = _held_out(Path(run), None)
        usual = log_prob(data, rows)
    else:
        usual = log_prob(held_in)
    return own, outlier_share("score", own, usual)


def evaluate(
    run: PathLike,
    latents: Source | None = None,
    *,
    learn_on: Source | None = None,
    concepts: Sequence[str] | None = None,
    decoder: Callable[[Tensor], Any] | str | None = None,
    judge: Callable[[Any], Any] | str | None = None,
    features: Callable[[Any], Any] | str | None = None,
    max_samples: int = 2000,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Takes all metrics of the model in ``run`` on held-out latents, and writes them to ``evaluation.json`` there.

    As in a training with standardised inputs, the farthest usual value of a feature is taken in place of outliers.

    Args:
        run: the run folder.
        latents: by default those it was trained on: the held-out rows are scored, and judge, probes and baselines learn
            on the others. Other latents are all held out; one half is scored, the other is learned on.
        learn_on: labelled latents that judge, probes and baselines learn on instead; then all that is held out is scored.
        concepts: which to swap and to take metrics of; by default all. The judge reads the others too, as swaps should keep them.
        decoder, judge: who reads the swaps, as for :func:`iin_fast.evaluate.evaluate`; or where they are, for
            :func:`load_function`. A decoder is there for a judge of your own.
        features: without labels: a function from what the decoder makes (or from latents) to ``[n, features]``, or where it is;
            the Fréchet distance of samples is taken there. See :func:`iin_fast.evaluate.sample_quality`.
        max_samples, seed, progress: of :func:`iin_fast.evaluate.evaluate`.
        device: where the model and the decoder run.

    Returns:
        the metrics; without labels those of :func:`iin_fast.evaluate.evaluate_unlabelled`.

    Raises:
        ImportError: scikit-learn is missing, and there are labels.
        TypeError, ValueError, FileNotFoundError: no model in ``run``, latents that don't fit it or are not there, nothing
            held out.
        OSError: nothing can be written into ``run``, which is tried first.
    """
    from ..evaluate import write_evaluation

    folder = Path(run)
    model = IIN.load(folder, device=device)
    try_to_write(folder)
    data, train_rows, held_rows = _held_out(folder, latents)
    _, context = _z(folder, model, data)
    usual = (lambda z: z) if model.inputs is None else (lambda z: usual_values(z)[0])
    data = replace(data, z=usual(data.z))
    if decoder is not None and judge is None and features is None:
        raise ValueError(
            "evaluate: decoder is given without judge, expected both: a judge reads what it makes; or features, without labels"
        )
    settings: dict[str, Any] = {"max_samples": max_samples, "seed": seed, "progress": progress, "device": device}
    settings |= {"decoder": _function(decoder), "judge": _function(judge)}
    # A concept that is known anyway is none that factors should hold.
    names = [name for name in data.names if context is None or name != _context_name(folder)]
    if data.labels is None or not (names or concepts):
        if concepts or judge is not None or learn_on is not None:
            given = "learn_on" if judge is None else "judge"
            what = f"concepts is {list(concepts)}" if concepts else f"{given} is given"
            raise ValueError(f"evaluate: {what}, but {data.path or 'latents'} has no labels")
        seen: dict[str, Any] = {"decoder": _function(decoder), "features": _function(features), "n": max_samples}
        return _evaluate_density(folder, model, data, context, train_rows, held_rows, seed, seen)
    if features is not None:
        raise ValueError(
            "evaluate: features is given, expected none for latents with labels; use iin_fast.evaluate.sample_quality"
        )
    learned, learned_context = data, context
    if learn_on is not None:
        learned = _latents(learn_on, folder)
        if learned.labels is None or learned.names != data.names:
            raise ValueError(
                f"evaluate: learn_on has labels of {list(learned.names)}, expected those of {list(data.names)}"
            )
        train_rows, learned_context = np.arange(learned.n), _z(folder, model, learned)[1]
    chosen = [name for name in (concepts or names) if name in data.values]
    settings["values"] = {name: data.values[name][held_rows] for name in chosen}
    if train_rows is not None:
        settings["train_values"] = {name: learned.values[name][train_rows] for name in chosen}
        assert learned.labels is not None
        settings |= {"train_z": usual(learned.z)[train_rows], "train_labels": learned.labels[train_rows]}
    if context is not None:
        settings |= {"context": context[held_rows]}
        if train_rows is not None and learned_context is not None:
            settings |= {"train_context": learned_context[train_rows]}
        concepts = concepts or names
        told = [k for k, name in enumerate(data.names) if name in names or name in concepts]
        data = replace(data, labels=data.labels[:, told], names=tuple(data.names[k] for k in told))
        if "train_labels" in settings:
            settings["train_labels"] = settings["train_labels"][:, told]
    assert data.labels is not None
    return write_evaluation(
        folder, data.z[held_rows], data.labels[held_rows], data.names, concepts=concepts, **settings
    )


def report(
    run: PathLike, latents: Source | None = None, *, decoder: Callable[[Tensor], Any] | str | None = None
) -> Path:
    """Writes ``report.html`` into ``run``; see :func:`iin_fast.report.write_report`.

    Args:
        run: the run folder.
        latents: what the pictures are made of; by default those it was trained on, if they are still there. ``images`` in
            them stand in for a decoder.
        decoder: latents ``[m, dim]`` to images; or where it is, for :func:`load_function`.

    Returns:
        the path of the page.

    Raises:
        ImportError: matplotlib is missing.
        TypeError, ValueError, FileNotFoundError: no model in ``run``, latents that don't fit it.
    """
    from ..report import write_report

    data = latents_of_run(Path(run), latents)
    return write_report(run, latents=data, decoder=_function(decoder))


def latents_of_run(run: Path, latents: Source | None = None) -> Latents | None:
    """The latents given, else those that the run was trained on; None where they are not there any more."""
    if latents is not None:
        return _latents(latents, run, whole=False)
    found = recorded(run).get("latents", {})
    path = found.get("path")
    if not path or not Path(path).exists():
        return None
    data = _latents(path, run, whole=False)
    if data.fingerprint() != found.get("sha256"):
        warnings.warn(
            f"{path}: changed since the training, so nothing of it is shown; name latents to show", stacklevel=3
        )
        return None
    return data


def load_function(where: str) -> Callable[..., Any]:
    """A function by its place: ``package.module:name`` or ``path/to/file.py:name``.

    Raises:
        ValueError: no such place, or something else is there.
        ImportError: the module can't be imported.
    """
    module_name, colon, name = where.rpartition(":")
    if not colon or not module_name or not name:
        raise ValueError(f"{where!r} is no place of a function, expected package.module:name or file.py:name")
    if module_name.endswith(".py"):
        file = Path(module_name)
        spec = importlib.util.spec_from_file_location(file.stem, file) if file.is_file() else None
        if spec is None or spec.loader is None:
            raise FileNotFoundError(f"{module_name}: no such file, expected Python with the function {name!r}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(module_name)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{module_name} has no function {name!r}")
    return function  # type: ignore[no-any-return]


def _function(function: Callable[..., Any] | str | None) -> Callable[..., Any] | None:
    return load_function(function) if isinstance(function, str) else function


def _latents(latents: Source, run: PathLike | None = None, whole: bool = True) -> Latents:
    """Checked latents; with the codes that the training in ``run`` had for texts and bins.

    ``whole``: else of the file that the training drew a sample of, the same sample.
    """
    if run is None:
        return latents if isinstance(latents, Latents) else load_latents(latents)
    record = recorded(Path(run))
    trained = record.get("latents", {})
    same = not whole and not isinstance(latents, Latents) and str(Path(latents).resolve()) == trained.get("path")
    data = read_like(record, latents, sample=trained.get("rows") if same else None)
    return data.coded_like(
        record.get("classes", {}), record.get("edges", {}), record.get("names", ()), str(data.path or "latents")
    )


def read_like(record: Mapping[str, Any], latents: Source, **part: Any) -> Latents:
    """Latents with the features that a training had, in their order, as its ``record`` names them.

    ``part``: the sample or shard of a file, as for :func:`iin_fast.data.load_latents`.
    """
    columns = tuple(record.get("columns", ()))
    if not isinstance(latents, Latents):
        known: dict[str, Any] = {"concepts": record.get("names", ()), "continuous": record.get("edges", ())}
        return load_latents(latents, columns=columns, **known, **part)
    if not columns or not latents.columns or latents.columns == columns:
        return latents
    missing = [name for name in columns if name not in latents.columns]
    if missing:
        raise ValueError(
            f"latents: have no feature {', '.join(map(repr, missing[:8]))}, expected the columns of the training; "
            "load_latents(…, columns=…) says which columns of a table are features"
        )
    order = [latents.columns.index(name) for name in columns]
    return replace(latents, z=latents.z[:, order], columns=columns)


def _z(run: PathLike, model: IIN, latents: Source) -> tuple[Tensor, Tensor | None]:
    """Latents and their context, in the model's type, on the CPU. Other labels than the context's may be of any kind."""
    record = recorded(Path(run))
    data = read_like(record, latents)
    where = str(data.path or "latents")
    if data.dim != model.dim:
        raise ValueError(f"{where}: z has {data.dim} features, expected {model.dim} like the model in {os.fspath(run)}")
    if not model.context_dim:
        return data.z.to(model.dtype), None
    context = _class_context(run, model, data)
    return data.z.to(model.dtype), context.to(model.dtype)


def _class_context(run: PathLike, model: IIN, data: Latents) -> Tensor:
    """The context of latents, by their labels."""
    record, name, where = recorded(Path(run)), _context_name(run), str(data.path or "latents")
    classes, edges = ({k: v for k, v in record.get(key, {}).items() if k == name} for key in ("classes", "edges"))
    data = data.coded_like(classes, edges, (name,), where)
    if data.labels is not None and name in classes and name in data.names:
        texts, last = data.classes[name], int(data.labels[:, data.names.index(name)].max())
        if last >= model.context_dim:
            raise ValueError(
                f"{where}: labels of {name!r}, the context, have the class {texts[last]!r}, expected one of the training: "
                f"{', '.join(classes[name][:20])}"
            )
    return class_context(where, data.labels, data.names, name, model.context_dim)


def _context_name(run: PathLike) -> str:
    """The concept whose class is the context of the run's model."""
    name = recorded(Path(run)).get("settings", {}).get("context")
    if not isinstance(name, str):
        raise ValueError(
            f"{os.fspath(run)}: its model wants a context, but run.json does not say which; use iin_fast.IIN"
        )
    return name


def _given_context(where: str, run: PathLike, model: IIN, context: Context, n: int) -> Tensor | None:
    """The context ``[n, context_dim]`` of rows that have no labels of their own."""
    if not model.context_dim:
        if context is not None:
            raise ValueError(f"{where}: context is given, expected none for a run that was trained without")
        return None
    name = _context_name(run)
    if context is None:
        raise ValueError(f"{where}: context is missing, expected a class of {name!r}, or latents with labels of it")
    record = recorded(Path(run))
    classes = record.get("classes", {}).get(name, [])
    text = str(context)
    a_class = text in classes or (not classes and text.isdecimal())  # before a file of that name
    if a_class or (isinstance(context, int | str) and not os.path.exists(text)):
        if not a_class and classes:
            raise ValueError(
                f"{where}: context is {context!r}, expected a class of {name!r}: {', '.join(classes[:20])}"
            )
        if not a_class and isinstance(context, str):
            raise FileNotFoundError(
                f"{where}: context is {context!r}, which is no file and no number of a class of {name!r}"
            )
        code = classes.index(text) if classes else int(text)
        if not 0 <= code < model.context_dim:
            raise ValueError(f"{where}: context is {context}, expected a class from 0 to {model.context_dim - 1}")
        seen = record.get("context_classes")
        if seen and code not in seen:
            raise ValueError(
                f"{where}: context is {context}, expected a class of the training: {', '.join(map(str, seen[:20]))}"
            )
        return torch.eye(model.context_dim, dtype=model.dtype)[code].repeat(n, 1)
    assert not isinstance(context, int)
    data = read_like(record, context)
    if data.n != n:
        raise ValueError(f"{where}: context has {data.n} rows, expected {n}, one for each that comes out")
    return _class_context(run, model, data).to(model.dtype)


def recorded(run: Path) -> dict[str, Any]:
    """What the training wrote of itself; empty for a folder of ``IIN.save``."""
    file = run / "run.json"
    if not file.is_file():
        return {}
    record = read_json(file)
    for name in ("latents", "settings", "classes", "edges"):
        if not isinstance(record.get(name, {}), dict):
            raise ValueError(f"{file}: {name} is {record[name]!r}, expected a JSON object")
    lists = {name: record.get(name, []) for name in ("names", "columns")}
    lists |= {f"{part}.{name}": value for part in ("classes", "edges") for name, value in record.get(part, {}).items()}
    for name, value in lists.items():
        texts = not name.startswith(("classes.", "edges."))
        if not isinstance(value, list) or texts and not all(isinstance(one, str) for one in value):
            raise ValueError(f"{file}: {name} is {value!r}, expected a list{' of texts' if texts else ''}")
    path = record.get("latents", {}).get("path")
    if not isinstance(path, str | None):
        raise ValueError(f"{file}: latents.path is {path!r}, expected a text")
    return record


def _held_out(run: Path, latents: Source | None) -> tuple[Latents, NDArray[np.int64] | None, NDArray[np.int64]]:
    """Latents, the rows to learn on (None: half of the others) and the rows that are held out."""
    trained = recorded(run).get("latents", {})
    path = trained.get("path")
    if latents is None and path is None:
        raise ValueError(f"{run}: does not say which latents it was trained on; name the latents")
    if latents is None and not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file, although the run was trained on it; name the latents")
    own = latents is None
    data = _latents(path if latents is None else latents, run, whole=False)
    if data.fingerprint() != trained.get("sha256"):
        if own:
            raise ValueError(f"{path}: changed since the training; name latents that are held out")
        return data, None, np.arange(data.n)
    train_rows, held_rows = read_split(run / "split.npz")
    last = max(train_rows.max(initial=-1), held_rows.max(initial=-1))
    if last >= data.n:
        raise ValueError(f"{run / 'split.npz'}: has the row {last}, expected below {data.n}, the rows of the latents")
    if len(held_rows) == 0:
        raise ValueError(f"{run}: the training held nothing out; name other latents")
    return data, train_rows, held_rows


def _evaluate_density(
    run: Path,
    model: IIN,
    data: Latents,
    context: Tensor | None,
    train_rows: NDArray[np.int64] | None,
    held_rows: NDArray[np.int64],
    seed: int,
    seen: dict[str, Any],
) -> dict[str, Any]:
    """What can be said without labels."""
    from ..evaluate import evaluate_unlabelled, sample_quality
    from . import split_rows
    from .batches import units

    source = "training samples"
    if train_rows is None:
        if data.n < (2 if data.shared is None else 4):
            raise ValueError("evaluate: latents have one row or one pair, expected two at least")
        train_rows, held_rows = split_rows(data, 0.5, seed)
        source = "half of the held-out samples"
    options: dict[str, Any] = {"source": source, "seed": seed}
    if context is not None:
        options |= {"context": context[held_rows], "train_context": context[train_rows]}
    if data.shared is not None:
        options |= {"names": data.names, "rho": recorded(run).get("settings", {}).get("rho")}
        for name, rows in (("shared", held_rows), ("train_shared", train_rows)):
            options[name] = data.shared[torch.from_numpy(units(data, rows))]
    result = evaluate_unlabelled(model, data.z[held_rows], data.z[train_rows], **options)
    if min(len(held_rows), len(train_rows)) > 1:
        seen |= {"seed": seed, "context": options.get("context")}
        result["frechet"] = sample_quality(model, data.z[held_rows], data.z[train_rows], **seen)
        result["frechet"]["in"] = (
            "features" if seen["features"] else "decoded samples" if seen["decoder"] else "latents"
        )
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    write_file(run / "evaluation.json", text.encode())
    return result


def _factor_file(file: Path, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    if file.suffix == ".csv":
        return _factor_table(file, sizes)
    factors: dict[str, Tensor] = {}
    for name, array in read_arrays(file).items():
        numbers = isinstance(array, Tensor) or array.dtype.kind == "f"
        part = torch.as_tensor(array) if numbers else torch.empty(0, dtype=torch.bool)
        if not part.is_floating_point() or part.dim() != 2:
            found = f"{array.dtype} of shape {list(array.shape)}"
            raise TypeError(f"{file}: {name} is {found}, expected real numbers [n, size] for each factor")
        factors[name] = part
    return factors


def _factor_table(file: Path, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Factors from columns ``digit0``, ``digit1``, …, as a .csv of ``encode`` has them."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, expected factors")
    with open(file, encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))
    columns = {name: k for k, name in enumerate(rows[0] if rows else ())}
    factors: dict[str, Tensor] = {}
    for name, size in sizes.items():
        missing = [column for column in (f"{name}{k}" for k in range(size)) if column not in columns]
        if missing:
            raise ValueError(f"{file}: has no column {missing[0]!r}, expected {size} of the factor {name!r}")
        own = [columns[f"{name}{k}"] for k in range(size)]
        try:
            values = [[float(row[k]) for k in own] for row in rows[1:]]
            factors[name] = torch.tensor(values, dtype=torch.float64).reshape(-1, size)
        except (ValueError, IndexError) as error:
            raise ValueError(f"{file}: {name} holds what is no number, or a row is cut ({error})") from error
    return factors
