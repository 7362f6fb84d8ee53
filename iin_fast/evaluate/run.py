"""All metrics of a model with their baselines, as one dictionary that JSON can hold."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..arrays import MISSING, checked_latents, to_numpy
from ..checks import checked_int, checked_seed
from ..files import write_file
from ..iin import IIN
from ..iin.model import unwrapped
from ._data import Array, Codes, checked_labels, halves, require_sklearn
from .baselines import LinearFactors, LinearRival, MeanShift
from .correlation import pair_correlation, shared_correlation
from .dci import dci
from .information import factor_label_information
from .likelihood import gaussian_nats_per_dim, in_parts, invertibility_error, nats_per_dim, normal_nats_per_dim
from .mig import mig
from .probe import leak
from .sap import sap
from .swaps import Judge, judge_accuracy, latent_judge, swap_outcomes
from .values import value_correlation
from .verdict import pair_verdict, swap_verdict

__all__ = ["encode", "evaluate", "evaluate_unlabelled", "write_evaluation"]


def evaluate(
    model: IIN,
    z: Tensor | ArrayLike,  # [n, dim]
    labels: Tensor | ArrayLike,  # [n, concepts]
    names: Sequence[str],
    *,
    train_z: Tensor | ArrayLike | None = None,
    train_labels: Tensor | ArrayLike | None = None,
    context: Tensor | None = None,
    train_context: Tensor | None = None,
    values: Mapping[str, ArrayLike] | None = None,
    train_values: Mapping[str, ArrayLike] | None = None,
    concepts: Sequence[str] | None = None,
    decoder: Callable[[Tensor], Any] | None = None,
    judge: Judge | None = None,
    max_samples: int = 2000,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Takes every metric of ``model`` on held-out latents, with the baselines that do without an IIN.

    Baselines: ``raw`` (as many dimensions of z for each concept, those that know most about it), ``pca`` (the same of
    principal components), ``linear_iin`` (:class:`iin_fast.LinearIIN`) and, for swaps, ``mean_shift``. Each metric's own
    function says what its number means, and so does the page of :func:`iin_fast.report.write_report`.

    Args:
        model: the IIN. A concept belongs to the factor of the same name.
        z: held-out latents ``[n, dim]``.
        labels: integers ``[n, len(names)]``; -1 where unknown.
        names: of the columns of ``labels``.
        train_z, train_labels: what judge, probes and baselines learn on, best what the model was trained on; by default
            a random half of ``z`` is taken off for it.
        context, train_context: of ``z`` and ``train_z``, ``[n, context_dim]``, for a conditional model; swaps keep the
            context of what keeps the rest. The baselines do not see it.
        values, train_values: of ``z`` and ``train_z``, name to numbers ``[n]`` of continuous concepts, whose labels are bins.
        concepts: which of ``names`` to swap and to take metrics of; by default all. The judge reads the others too, as swaps
            should keep them, unless they have one class alone.
        decoder: latents ``[n, dim]`` (a tensor) to what ``judge`` reads; without it the judge reads latents.
        judge: what it gets to concept to class probabilities ``[n, classes]``; by default small networks trained on the
            latents ``train_z`` (which read latents, also where there is a decoder).
        max_samples: most samples that a metric learns on, and is taken on; time grows with it, for information with its
            square.
        seed: of all draws.
        progress: called with what begins.

    Returns:
        a dictionary of plain values: ``swap``, ``verdict`` (concept to what :func:`swap_verdict` says), ``information``, ``dci``, ``mig``, ``sap``, ``leak``, ``likelihood``,
        ``correlation``, ``invertibility``, ``values`` (where they are given: system to :func:`value_correlation`) and what they were taken on.

    Raises:
        ImportError: no scikit-learn.
        TypeError, ValueError: latents or labels that don't fit the model or each other, a concept with fewer than two
            classes.

    Example:
        >>> import iin_fast
        >>> from iin_fast.evaluate import evaluate
        >>> generator = torch.Generator().manual_seed(0)
        >>> labels = torch.arange(200)[:, None] % 2
        >>> z = torch.randn(200, 6, generator=generator) + 3 * labels
        >>> model = iin_fast.IIN(6, {"sign": 2}, n_flows=1, hidden_dim=8, generator=generator)
        >>> found = evaluate(model, z, labels, ["sign"])
        >>> sorted(found["swap"])
        ['chance', 'iin', 'judge', 'linear_iin', 'mean_shift', 'pca', 'raw']
        >>> found["verdict"]["sign"]["verdict"]  # of an IIN without training
        'worse'
    """
    require_sklearn("evaluate")
    where = "evaluate"
    model = unwrapped(where, model)
    say = progress or (lambda what: None)
    names = list(names)
    checked_int(where, "max_samples", max_samples)
    seed = checked_seed(where, seed)
    x, codes = _data(where, "z", z, "labels", labels, names, concepts, model.dim)
    source = "training samples"
    if (train_z is None) != (train_labels is None):
        raise ValueError(f"{where}: train_z and train_labels are needed together, one is missing")
    if train_z is None or train_labels is None:
        source = "half of the held-out samples"
        first, second = halves(len(x), seed)
        train, train_codes, x, codes = x[first], codes[first], x[second], codes[second]
        if context is not None:
            train_context, context = context[first], context[second]
        if values:
            train_values, values = (
                {name: np.asarray(of)[rows] for name, of in values.items()} for rows in (first, second)
            )
    else:
        train, train_codes = _data(where, "train_z", train_z, "train_labels", train_labels, names, concepts, model.dim)
    asked = names if concepts is None else list(concepts)
    for table, what in ((codes, "labels of the scored samples"), (train_codes, "labels of the samples to learn on")):
        checked_labels(where, table[:, [names.index(name) for name in asked]], asked, len(table), what)
    others = [
        name for j, name in enumerate(names) if name not in asked and _two(codes[:, j]) and _two(train_codes[:, j])
    ]
    columns = [names.index(name) for name in (*asked, *others)]
    names, codes, train_codes = asked, codes[:, columns], train_codes[:, columns]

    say("factors")
    scored, learned_on = _Samples(x, codes, context), _Samples(train, train_codes, train_context)
    task = _Task(model, names, others, scored, learned_on, decoder, judge, max_samples, seed)
    result: dict[str, Any] = {
        "format": "iin_fast.evaluation",
        "version": 1,
        "seed": seed,
        "samples": {"scored": len(x), "learned_on": len(train), "source": source, "most": max_samples},
        "concepts": names,
        "classes": {name: len(np.unique(codes[codes[:, j] >= 0, j])) for j, name in enumerate(names)},
        "factors": model.sizes,
    }
    for metric, take in METRICS.items():
        say(metric)
        result |= take(task)
    if values and train_values:
        say("values")
        result["values"] = {
            who: value_correlation(factors, values, task.train_factors[who], train_values)
            for who, factors in task.factors.items()
        }
    return result


class _Samples(NamedTuple):
    """Latents with what is known of them."""

    z: Array  # [n, dim]
    codes: Codes  # [n, concepts], those that are asked for first
    context: Tensor | None  # [n, context_dim]


class _Task:
    """What all metrics are taken on: samples, and their factors as the IIN and the linear baselines see them."""

    def __init__(
        self,
        model: IIN,
        names: list[str],
        others: list[str],
        scored: _Samples,
        learned_on: _Samples,
        decoder: Callable[[Tensor], Any] | None,
        judge: Judge | None,
        max_samples: int,
        seed: int,
    ) -> None:
        self.model, self.names, self.scored, self.learned_on = model, names, scored, learned_on
        self.judged = [*names, *others]  # swaps of the names should keep the others
        self.decoder, self.judge, self.max_samples, self.seed = decoder, judge, max_samples, seed
        self.swapped = [name for name in names if name in model.concepts]
        z, codes = learned_on.z, learned_on.codes
        self.linear: dict[str, LinearFactors | LinearRival] = {}
        for kind in ("raw", "pca"):
            self.linear[kind] = LinearFactors(z, codes, self.judged, model.sizes, kind, seed)  # type: ignore[arg-type]
        rival = LinearRival.of(z, codes, self.judged, [name for name in self.judged if name in model.concepts])
        if rival is not None:
            self.linear["linear_iin"] = rival
        # system to factor to [n, size]
        self.factors, self.train_factors = (
            {"iin": encode(model, of.z, of.context)} | {who: basis.encode(of.z) for who, basis in self.linear.items()}
            for of in (scored, learned_on)
        )

    def each(self, metric: Callable[..., Any], learns: bool = False, **options: Any) -> dict[str, Any]:
        """System to what ``metric`` says of its factors; one that learns gets those of the samples to learn on."""
        found = {}
        codes, train_codes = (of.codes[:, : len(self.names)] for of in (self.scored, self.learned_on))
        for who, factors in self.factors.items():
            given = {"train_factors": self.train_factors[who], "train_labels": train_codes} if learns else {}
            found[who] = metric(factors, codes, self.names, seed=self.seed, **given, **options)
        return found

    def both(self, metric: Callable[..., Any], learns: bool) -> dict[str, Any]:
        """The same of whole factors and, as ``dimensions``, of single dimensions."""
        options: dict[str, Any] = {"learns": learns, "max_samples": self.max_samples}
        whole, single = self.each(metric, **options), self.each(metric, **options, dimensions=True)
        return {who: {**found, "dimensions": single[who]} for who, found in whole.items()}


def _swaps(task: _Task) -> dict[str, Any]:
    """How swaps end, of every system with one, and in words; nothing where no concept has a factor."""
    model, names, seed = task.model, task.judged, task.seed
    x, codes, context = task.scored
    if not task.swapped:
        return {}
    judge, seen = task.judge, None
    if judge is None:
        judge = latent_judge(task.learned_on.z, task.learned_on.codes, names, seed=seed)
    elif task.decoder is not None:
        made = task.decoder

        @torch.no_grad()
        def seen(z: Array) -> Any:
            return made(torch.from_numpy(z).to(model.device, model.dtype))

    shift = MeanShift(task.learned_on.z, task.learned_on.codes, names)

    @torch.no_grad()
    def by_model(concept: str, keep: Codes, give: Codes) -> Array:
        kept, given = (torch.from_numpy(x[rows]) for rows in (keep, give))
        contexts = (None, None) if context is None else (context[keep], context[give])
        swaps = [
            model.swap(a, b, concept, context=own, donor_context=other)
            for a, b, own, other in in_parts(model, 1024, kept, given, *contexts)
        ]
        return torch.cat(swaps).double().cpu().numpy()

    def by_shift(concept: str, keep: Codes, give: Codes) -> Array:
        column = codes[:, names.index(concept)]
        return shift.swap(x[keep], column[keep], column[give], concept)

    ways: dict[str, Callable[[str, Codes, Codes], Array]] = {"iin": by_model, "mean_shift": by_shift}
    for kind, basis in task.linear.items():
        ways[kind] = lambda concept, keep, give, basis=basis: basis.swap(x[keep], x[give], concept)  # type: ignore[misc]
    outcomes = {
        who: swap_outcomes(way, codes, names, judge, task.swapped, seen, task.max_samples, seed)
        for who, way in ways.items()
    }
    swap = {
        "judge": judge_accuracy(judge, x, codes, names, seen),
        "chance": {name: 1.0 / len(np.unique(codes[codes[:, j] >= 0, j])) for j, name in enumerate(names)},
        **{who: {concept: outcome.summary() for concept, outcome in of.items()} for who, of in outcomes.items()},
    }
    verdict = {
        concept: swap_verdict(concept, {who: of[concept].both for who, of in outcomes.items()}, seed)
        for concept in task.swapped
    }
    return {"swap": swap, "verdict": verdict}


# What is taken, in this order: name to a function that adds to the result.
METRICS: dict[str, Callable[[_Task], dict[str, Any]]] = {
    "swap": _swaps,
    "information": lambda task: {
        "information": task.each(factor_label_information, max_samples=task.max_samples),
    },
    "dci": lambda task: {"dci": task.both(dci, learns=True)},
    "mig": lambda task: {"mig": task.both(mig, learns=False)},
    "sap": lambda task: {"sap": task.both(sap, learns=True)},
    "leak": lambda task: {"leak": task.each(leak, learns=True, max_samples=task.max_samples)},
    "likelihood": lambda task: _density(task.model, task.scored, task.learned_on),
    "correlation": lambda task: {"correlation": task.each(pair_correlation)},
    "invertibility": lambda task: _invertibility(task.model, task.scored),
}


def _density(model: IIN, scored: _Samples, learned_on: _Samples) -> dict[str, Any]:
    return {
        "likelihood": {
            "iin": nats_per_dim(model, torch.from_numpy(scored.z), context=scored.context),
            "iin_learned_on": nats_per_dim(model, torch.from_numpy(learned_on.z), context=learned_on.context),
            "gaussian": gaussian_nats_per_dim(scored.z, learned_on.z),
            "normal": normal_nats_per_dim(scored.z),
        }
    }


def _invertibility(model: IIN, scored: _Samples) -> dict[str, Any]:
    return {"invertibility": invertibility_error(model, torch.from_numpy(scored.z), context=scored.context)}


def evaluate_unlabelled(
    model: IIN,
    z: Tensor | ArrayLike,  # [n, dim]
    train_z: Tensor | ArrayLike,  # [m, dim]
    *,
    shared: Tensor | ArrayLike | None = None,  # [n / 2, concepts]
    train_shared: Tensor | ArrayLike | None = None,  # [m / 2, concepts]
    names: Sequence[str] = (),
    context: Tensor | None = None,  # [n, context_dim]
    train_context: Tensor | None = None,  # [m, context_dim]
    rho: float | None = None,
    source: str = "training samples",
    seed: int = 0,
) -> dict[str, Any]:
    """Takes what metrics of ``model`` there are for held-out latents without labels: alone, or as pairs that share concepts.

    Args:
        model: the IIN.
        z: held-out latents ``[n, dim]``; of pairs the first samples, then the second ones.
        train_z: what the Gaussian and the linear baselines learn on, likewise.
        shared, train_shared: bool, what each pair of ``z`` and of ``train_z`` shares; with them the factors are compared
            with those of the linear baselines (:meth:`LinearFactors.of_pairs`) by :func:`shared_correlation`.
        names: of the columns of ``shared``.
        context, train_context: of ``z`` and ``train_z``, for a conditional model.
        rho: the correlation that the model was trained for, noted beside them.
        source: what ``train_z`` is, noted.
        seed: of the draw that held latents out, noted.

    Returns:
        a dictionary of plain values: ``likelihood``, ``invertibility``, with ``shared`` also ``pairs`` and ``verdict`` (concept to
        what :func:`pair_verdict` says); and what they were taken on.

    Raises:
        TypeError, ValueError: latents that don't fit the model, ``shared`` that doesn't fit them.
    """
    where = "evaluate_unlabelled"
    seed = checked_seed(where, seed)
    x, train = checked_latents(where, "z", z), checked_latents(where, "train_z", train_z)
    if (shared is None) != (train_shared is None):
        raise ValueError(f"{where}: shared and train_shared are needed together, one is missing")
    nothing = np.zeros((0, 0), dtype=np.int64)
    scored, learned_on = _Samples(x, nothing, context), _Samples(train, nothing, train_context)
    result: dict[str, Any] = {
        "format": "iin_fast.evaluation",
        "version": 1,
        "seed": seed,
        "samples": {"scored": len(x), "learned_on": len(train), "source": source},
        "concepts": [],
        "classes": {},
        "factors": model.sizes,
        **_density(model, scored, learned_on),
        **_invertibility(model, scored),
    }
    if shared is not None and train_shared is not None:
        parts = {"iin": encode(model, x, context)}
        for kind in ("pca", "raw"):
            parts[kind] = LinearFactors.of_pairs(train, train_shared, names, model.sizes, kind).encode(x)  # type: ignore[arg-type]
        rival = LinearRival.of_pairs(train, to_numpy(train_shared), names, model.concepts)
        if rival is not None:
            parts["linear_iin"] = rival.encode(x)
            known = to_numpy(shared)
            result["verdict"] = {
                name: pair_verdict(name, {who: parts[who][name] for who in ("iin", "linear_iin")}, known[:, k], seed)
                for k, name in enumerate(names)
                if name in parts["iin"] and name in parts["linear_iin"] and 0 < known[:, k].sum() < len(known)
            }
        result["pairs"] = {
            "n": len(x) // 2,
            "rho": rho,
            "names": list(names),
            **{who: shared_correlation(found, shared, names) for who, found in parts.items()},
        }
    return result


def write_evaluation(
    run_folder: str | os.PathLike[str], *args: Any, device: torch.device | str | None = None, **settings: Any
) -> dict[str, Any]:
    """:func:`evaluate` of the model in ``run_folder``, written to ``evaluation.json`` there; the file appears whole.

    Args:
        run_folder: a folder that ``IIN.save`` or a training wrote.
        *args, **settings: of :func:`evaluate`, without the model.
        device: where the model runs; by default the CPU.

    Returns:
        what :func:`evaluate` gives.
    """
    result = evaluate(IIN.load(run_folder, device=device), *args, **settings)
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    write_file(Path(run_folder) / "evaluation.json", text.encode())
    return result


@torch.no_grad()
def encode(model: IIN, z: Array, context: Tensor | None = None, batch: int = 1024) -> dict[str, Array]:
    """The model's factors of ``z`` ``[n, dim]``, name to float64 ``[n, size]``."""
    parts = [model.encode(*rows).tensor for rows in in_parts(model, batch, torch.from_numpy(z), context)]
    values = torch.cat(parts).double().cpu().numpy()
    edges = np.cumsum(list(model.sizes.values()))[:-1]
    return dict(zip(model.sizes, np.split(values, edges, axis=1), strict=True))


def _data(
    where: str,
    z_name: str,
    z: Tensor | ArrayLike,
    labels_name: str,
    labels: Tensor | ArrayLike,
    names: list[str],
    concepts: Sequence[str] | None,
    dim: int,
) -> tuple[Array, Codes]:
    x = checked_latents(where, z_name, z)
    if x.shape[1] != dim:
        raise ValueError(f"{where}: {z_name} has shape {list(x.shape)}, expected [n, {dim}] like the model")
    table = to_numpy(labels)
    if concepts is None or table.ndim != 2 or table.shape[1] != len(names):
        return x, checked_labels(where, table, names, len(x), labels_name)
    unknown = [name for name in concepts if name not in names]
    if unknown or not concepts:
        raise ValueError(f"{where}: concepts is {list(concepts)}, expected some of {names}")
    checked_labels(where, table[:, [names.index(name) for name in concepts]], list(concepts), len(x), labels_name)
    return x, checked_labels(where, table, names, len(x), labels_name, classes=0)


def _two(column: Codes) -> bool:
    """Whether there are two classes at least."""
    return len(np.unique(column[column != MISSING])) > 1
