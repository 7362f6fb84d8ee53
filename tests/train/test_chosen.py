"""A training without options: settings chosen from the latents, a linear start, the model with the best swaps."""

import math

import numpy as np
import pytest
import torch
from run_folder import metrics, record

pytest.importorskip("lightning_fabric")

import iin_fast.train.loop as loop
from iin_fast import IIN, LinearIIN, PairSampler
from iin_fast.data import Latents
from iin_fast.evaluate import gaussian_nats_per_dim
from iin_fast.iin import Factors
from iin_fast.train import Settings, early_end, inspect_latents, split_rows, train
from iin_fast.train import run_folder as commands
from iin_fast.train.judge import SwapJudge
from iin_fast.train.loop import CONTRAST_RHO, contrast
from iin_fast.train.settings import CONTRAST, NOISE_FALLS, PAPER, PATIENT, Facts

SHORT = {"steps": 30, "n_flows": 2, "hidden_dim": 16}


def additive(n=600, dim=12, seed=0, noise=0.3):
    """Two concepts whose class means add up."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.stack([torch.randint(0, k, (n,), generator=generator) for k in (4, 3)], 1)
    means = torch.randn(2, 4, dim, generator=generator)
    z = means[0, labels[:, 0]] + means[1, labels[:, 1]] + noise * torch.randn(n, dim, generator=generator)
    return Latents.of(z, labels, ["digit", "color"])


def signs(n=1500, seed=0):
    """A concept that is the sign of a product: its classes have one mean."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (n, 2), generator=generator)
    x = 2.0 * labels - 1
    parts = [x[:, :1], x[:, :1] * x[:, 1:], 0.5 * torch.randn(n, 4, generator=generator)]
    z = torch.cat(parts, 1) @ torch.randn(6, 8, generator=generator)
    return Latents.of(z + 0.1 * torch.randn(n, 8, generator=generator), labels, ["a", "product"])


def highest(lines):
    """The largest loss of a log, of either sign and with the held-out ones."""
    return max(abs(float(line[name])) for line in lines for name in ("loss", "held_out_loss") if line[name])


def paired(data):
    pairs = PairSampler(data.labels, names=data.names).sample(800)
    return Latents.of_pairs(data.z[pairs.a], data.z[pairs.b], pairs.factor, data.names)


JUDGES = {}  # their networks learn for seconds, and most tests have the same latents


def judged(data, model):
    key = data.fingerprint()
    if key not in JUDGES:
        JUDGES[key] = SwapJudge(data, *split_rows(data, 0.1, 0), data.names)
    return JUDGES[key](model).mean().item()


def test_the_paper_is_a_preset():
    paper = Settings(preset="paper")
    assert {name: getattr(paper, name) for name in PAPER} == PAPER
    assert paper.chosen(Facts(10, 1, 4, "labels")) is paper
    assert paper.record()["learning_rate"] == pytest.approx(4.5e-6 * 25) and paper.record()["decay_start"] == 5000
    assert Settings(preset="paper", n_flows=3).n_flows == 3


@pytest.mark.parametrize("rows", [50, 1000, 100_000])
@pytest.mark.parametrize("dim", [2, 40, 768])
def test_every_setting_is_chosen_and_fits_the_time(rows, dim):
    for kind in ("labels", "pairs", "unlabelled"):
        facts = Facts(rows, rows // 10, dim, kind)
        chosen = Settings().chosen(facts)
        still_open = {name for name, value in chosen.record().items() if value is None}
        assert still_open == {"factors", "context", "unlabelled"}
        assert chosen.chosen(facts) == chosen  # so that a resume has the same
        assert chosen.keep == ("swaps" if kind == "labels" else "best")
        assert chosen.contrast == (CONTRAST if kind == "labels" and rows == 100_000 else 0.0)
        assert Settings().chosen(facts._replace(whole=False)).contrast == 0.0
        assert Settings(minutes=0.5).chosen(facts).steps <= chosen.steps
        assert (chosen.variance, Settings().chosen(facts._replace(variance=0.99)).variance) == (1.0, 0.99)
        assert str(chosen.steps) in chosen.text(facts)
    assert NOISE_FALLS[1] <= PATIENT < 1  # much noise hides what sharp bends gain
    assert Settings().chosen(facts._replace(held_out=0)).keep == "last"
    assert (
        Settings(steps=7, noise=0.1, others="agree").chosen(facts).record() | {"steps": 7, "noise": 0.1}
        == Settings(steps=7, noise=0.1, others="agree").chosen(facts).record()
    )


def test_noise_keeps_copies_equal(tmp_path):
    data = additive()
    copied = Latents.of(torch.cat([data.z, 1e4 * data.z[:, :1], 1e4 * data.z[:, :1]], 1), data.labels, data.names)
    train(copied, tmp_path / "run", Settings(**SHORT | {"steps": 2}, log_every=1), accelerator="cpu")
    losses = [float(line["loss"]) for line in metrics(tmp_path / "run") if line["loss"]]
    assert len(losses) == 2 and max(losses) < 1e3  # noise that differs by 5,000 would make it 1e7


@pytest.mark.parametrize("kind", ["labels", "pairs", "unlabelled"])
def test_training_starts_at_the_linear_solution(kind, tmp_path):
    data = additive()
    data = {"labels": data, "pairs": paired(data), "unlabelled": Latents.of(data.z)}[kind]
    settings = Settings(steps=1, learning_rate=1e-12, n_flows=2, hidden_dim=16, variance=1.0)
    model = train(data, tmp_path / "run", settings, accelerator="cpu")
    found = record(tmp_path / "run")
    assert found["settings"]["start"] == "linear" and found["settings"]["n_flows"] == 2
    rows = split_rows(data, 0.1)[0]
    z = data.z[torch.from_numpy(rows)]
    if kind == "unlabelled":
        x = model.encode(z).tensor
        assert torch.allclose(x.T @ x / len(x), torch.eye(12), atol=0.05)
        return
    if kind == "labels":
        sampler = PairSampler(data.labels[torch.from_numpy(rows)], names=data.names, others="any")
        linear = LinearIIN.fit(z, sampler)
    else:
        half = len(rows) // 2
        linear = LinearIIN.fit_pairs(z[:half], z[half:], data.shared[torch.from_numpy(rows[:half])], data.names)
    assert model.sizes == linear.sizes and sum(model.sizes.values()) == 12
    for factor in ("digit", "color"):
        assert torch.allclose(model.swap(z, z.flip(0), factor), linear.swap(z, z.flip(0), factor), atol=1e-3)


def test_a_default_training_swaps_and_goes_on_after_a_stop(tmp_path, monkeypatch):
    data = additive()
    whole = train(data, tmp_path / "whole", Settings(**SHORT), accelerator="cpu")
    assert judged(data, whole) > 0.9
    looks = [line for line in metrics(tmp_path / "whole") if line["held_out_loss"]]
    assert looks[0]["step"] == "0" and looks[0]["loss"] == "" and looks[-1]["step"] == "30"
    assert all(0 <= float(line["held_out_swaps"]) <= 1 for line in looks)

    pairs = loop._Training._pairs
    monkeypatch.setattr(
        loop._Training, "_pairs", lambda self, step, own: pairs(self, step if step < 20 else 1 / 0, own)
    )
    with pytest.raises(ZeroDivisionError):
        train(data, tmp_path / "run", Settings(**SHORT), accelerator="cpu")
    monkeypatch.undo()
    train(data, tmp_path / "run", Settings(**SHORT), accelerator="cpu", resume=True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_what_training_spoils_is_not_kept(tmp_path):
    data = additive(n=200, dim=20, noise=1.0)
    settings = Settings(steps=60, n_flows=4, hidden_dim=64, learning_rate=0.06, warmup=0, clip=0.0, noise=0.0)
    model = train(data, tmp_path / "run", settings, accelerator="cpu")
    looks = [float(line["held_out_swaps"]) for line in metrics(tmp_path / "run") if line["held_out_swaps"]]
    assert judged(data, model) == pytest.approx(max(looks[0], judged(data, model)))
    assert looks[-1] < looks[0] <= judged(data, model) + 1e-6
    assert torch.equal(IIN.load(tmp_path / "run").encode(data.z).tensor, model.encode(data.z).tensor)


def test_sizes_are_given_in_part(tmp_path):
    data = additive()
    sizes = {}
    for name, given in (("a", {"color": 1}), ("b", {"digit": 5, "color": 0}), ("c", {"color": 2, "residual": 10})):
        for preset in ("auto", "paper"):
            settings = Settings(given, preset=preset, **{**SHORT, "steps": 1})
            sizes[name, preset] = train(data, tmp_path / f"{name}{preset}", settings, accelerator="cpu").sizes
    assert sizes["a", "auto"] == {"color": 1, "digit": 3, "residual": 8}
    assert sizes["a", "paper"]["color"] == 1 and sizes["a", "paper"]["digit"] > 0
    for preset in ("auto", "paper"):
        assert sizes["b", preset] == {"digit": 5, "residual": 7}
        assert sizes["c", preset] == {"color": 2, "residual": 10}


def test_no_scale_and_no_outlier_makes_a_default_training_diverge(tmp_path):
    data = additive(n=300)
    z = torch.cat([data.z, torch.full((300, 2), 7.0), data.z[:, :1]], 1)
    z[:, 1:5] *= 1e6
    z[::50, 6] = 1e18
    z[:, 7] = 1e-12 * z[:, 7] + 1e-6
    broken = Latents.of(z, data.labels, data.names)
    train(broken, tmp_path / "run", Settings(**SHORT), accelerator="cpu")
    lines = metrics(tmp_path / "run")
    assert all(math.isfinite(float(line["loss"])) and abs(float(line["loss"])) < 1e4 for line in lines if line["loss"])
    model = IIN.load(tmp_path / "run")
    assert torch.equal(model.decode(model.encode(z))[:, 12:14], z[:, 12:14])


@pytest.mark.parametrize("kind", ["labels", "unlabelled"])
def test_noise_does_not_bury_directions_that_hardly_vary(kind, tmp_path):
    data = additive(n=300)
    generator = torch.Generator().manual_seed(1)
    z = torch.cat([data.z, data.z[:, :4] + 1e-4 * torch.randn(300, 4, generator=generator)], 1)
    labels = (data.labels, data.names) if kind == "labels" else ()
    for seed in range(3):
        settings = Settings(**SHORT, seed=seed, held_out_every=2, patience=0)
        train(Latents.of(z, *labels), tmp_path / str(seed), settings, accelerator="cpu")
        lines = metrics(tmp_path / str(seed))
        assert (
            max(abs(float(line["loss"])) for line in lines if line["loss"]) < 500
        )  # buried they would make it a million


OUTLIERS = {
    "a row": lambda z: z[7].mul_(1e3),
    "a far row": lambda z: z[7].mul_(1e30),
    "rows of both sides": lambda z: z[5:25].mul_(1e6),
    "a column": lambda z: z[::50, 3].mul_(1e6),
    "cells": lambda z: z[:24].view(-1)[::13].mul_(-1e4),
    "the ends of float16": lambda z: z[::40, 2:5].fill_(torch.finfo(torch.float16).max),
}


@pytest.mark.parametrize("spoil", OUTLIERS)
def test_outliers_do_not_hide_the_rest(spoil, tmp_path):
    data = additive()
    z = data.z.clone()
    OUTLIERS[spoil](z)
    if "float16" in spoil:
        z = z.half()
    spoilt = Latents.of(z, data.labels, data.names)
    with pytest.warns(UserWarning, match=r"train: outliers in \d+ of 600 rows \([057]\b.*\) and \d+ of 12 features"):
        model = train(spoilt, tmp_path / "run", Settings(**SHORT), accelerator="cpu")
    assert highest(metrics(tmp_path / "run")) < 500
    assert judged(data, model) > 0.9
    train(spoilt, tmp_path / "run", Settings(**SHORT), accelerator="cpu", resume=True)  # the same latents


def test_outliers_decide_neither_sizes_nor_scores(tmp_path):
    pytest.importorskip("sklearn")
    data = additive()
    z = data.z.clone()
    z[::40] *= 1e6
    spoilt = Latents.of(z, data.labels, data.names)
    model = train(spoilt, tmp_path / "run", Settings(**SHORT, variance=1.0), accelerator="cpu")
    assert commands.dims(spoilt) == commands.dims(data) == model.sizes
    swaps = commands.evaluate(tmp_path / "run", spoilt)["swap"]
    assert min(found["both"] for found in swaps["iin"].values()) > 0.5 and min(swaps["judge"].values()) > 0.7


@pytest.mark.parametrize("kind", ["pairs", "unlabelled"])
def test_outliers_without_labels(kind, tmp_path):
    data = additive()
    data.z[::50] *= 1e6
    data = paired(data) if kind == "pairs" else Latents.of(data.z)
    train(data, tmp_path / "run", Settings(**SHORT), accelerator="cpu")
    assert highest(metrics(tmp_path / "run")) < 500


def test_heavy_tails_do_not_hide_the_rest(tmp_path):
    data = additive(dim=24)
    generator = torch.Generator().manual_seed(1)
    cauchy = torch.randn(600, 24, generator=generator) / torch.randn(600, 24, generator=generator)
    heavy = Latents.of(data.z + 0.1 * cauchy, data.labels, data.names)
    assert " of 600 rows " in inspect_latents(heavy).outliers
    model = train(heavy, tmp_path / "run", Settings(**SHORT), accelerator="cpu")
    assert highest(metrics(tmp_path / "run")) < 500
    assert judged(data, model) > 0.9


def test_a_large_loss_that_varies_is_no_divergence(tmp_path, monkeypatch):
    loss, random = loop._Training._loss, np.random.default_rng(0)

    def varying(self, pairs):
        value, nats = loss(self, pairs)
        return value + 1e5 * random.uniform(0.9, 1.2), nats

    monkeypatch.setattr(loop._Training, "_loss", varying)
    train(additive(), tmp_path / "run", Settings(**SHORT, patience=0, held_out_every=1), accelerator="cpu")


def test_a_batch_with_an_outlier_is_no_divergence(tmp_path, monkeypatch):
    loss = loop._Training._loss

    def spiked(self, pairs):
        value, nats = loss(self, pairs)
        return value + 1e4 * (
            self.progress.step in (12, 29)
        ), nats  # in the middle, and where the last checkpoint is written

    monkeypatch.setattr(loop._Training, "_loss", spiked)
    settings = Settings(**SHORT, patience=0, held_out_every=1)
    train(additive(), tmp_path / "run", settings, accelerator="cpu")
    assert max(float(line["loss"]) for line in metrics(tmp_path / "run") if line["loss"]) > 1e3


def test_a_training_that_diverges_leaves_the_best_model(tmp_path):
    data = additive()
    settings = Settings(steps=60, learning_rate=1e6, warmup=0, clip=0.0, n_flows=2, hidden_dim=16)
    with pytest.raises(FloatingPointError, match="the checkpoint of step 0 is intact"):
        train(data, tmp_path / "run", settings, accelerator="cpu")
    assert judged(data, IIN.load(tmp_path / "run")) > 0.9


def test_without_labels_a_default_training_is_no_worse_than_a_gaussian(tmp_path):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(500, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    data = Latents.of(z)
    train(data, tmp_path / "run", Settings(**SHORT), accelerator="cpu")
    rows, held = (torch.from_numpy(rows) for rows in split_rows(data, 0.1))
    gaussian = gaussian_nats_per_dim(z[held].double().numpy(), z[rows].double().numpy())
    best = min(float(line["held_out_nats_per_dim"]) for line in metrics(tmp_path / "run") if line["held_out_loss"])
    assert best < gaussian + 0.03


def test_a_difference_in_swaps_counts_when_it_is_more_than_chance():
    data = additive()
    judge = SwapJudge(data, *split_rows(data, 0.1), data.names)
    rows = torch.cat(list(judge.keepers.values()))
    random = np.random.default_rng(0)
    first = torch.from_numpy(random.random(len(rows)) < 0.5).float()
    assert not judge.better(first, first)
    # One row that always fails, and then never does, is one observation.
    lucky = torch.where(rows == rows[0], 1.0, first)
    unlucky = torch.where(rows == rows[0], 0.0, first)
    assert not judge.better(lucky, unlucky)
    assert judge.better(torch.ones(len(rows)), first)


def test_a_training_that_gains_nothing_more_stops(tmp_path):
    data = additive(n=200, dim=20)
    options = {"n_flows": 4, "hidden_dim": 64, "learning_rate": 0.01, "noise": 0.0, "held_out_every": 5, "log_every": 5}
    settings = Settings(steps=400, patience=3, **options)
    train(data, tmp_path / "run", settings, accelerator="cpu")
    looks = [line for line in metrics(tmp_path / "run") if line["held_out_loss"]]
    end = int(looks[-1]["step"])
    losses = [float(line["held_out_loss"]) for line in looks]
    assert 130 <= end < 400 and min(losses[-3:]) >= min(losses[:-3])  # looks count from step 120 on
    assert f"ended at step {end} of 400" in early_end(tmp_path / "run") and early_end(tmp_path) == ""
    model = (tmp_path / "run" / "model.safetensors").read_bytes()
    train(data, tmp_path / "run", settings, accelerator="cpu", resume=True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == model
    assert metrics(tmp_path / "run")[-1]["step"] == str(end)


def test_contrast_is_the_cross_entropy_of_the_odds_of_pairs():
    generator = torch.Generator().manual_seed(0)
    sizes = {"digit": 2, "color": 1, "residual": 3}
    x, y = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    shared = torch.tensor([[True, False], [False, True], [True, True], [False, False], [True, False]])
    mixed = torch.tensor([[1, CONTRAST_RHO], [CONTRAST_RHO, 1]], dtype=torch.float64)
    together = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=torch.float64), mixed)
    alone = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    each = together.log_prob(torch.stack([x, y], -1)) - alone.log_prob(x) - alone.log_prob(y)
    odds = torch.stack([each[:, :2].sum(1), each[:, 2]], 1)
    expected = -torch.where(shared, odds.sigmoid(), (-odds).sigmoid()).log().mean(0).sum()
    found = contrast(Factors._wrap(x, sizes), Factors._wrap(y, sizes), shared)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_concept_that_lies_in_no_direction_is_found(tmp_path):
    data = signs(seed=2)
    rows = split_rows(data, 0.1)
    assert SwapJudge(data, *rows, data.names).hidden() == ("product",)
    assert SwapJudge(additive(), *split_rows(additive(), 0.1), ("digit", "color")).hidden() == ()
    settings = Settings(steps=300, n_flows=6, hidden_dim=64, held_out_every=30)
    model = train(data, tmp_path / "run", settings, accelerator="cpu")
    found = record(tmp_path / "run")["settings"]
    assert (found["start"], found["contrast"]) == ("redrawn", CONTRAST)
    looks = [float(line["held_out_swaps"]) for line in metrics(tmp_path / "run") if line["held_out_swaps"]]
    assert looks[0] < 0.4  # the linear solution
    assert model.sizes == {"a": 1, "product": 2, "residual": 5}
    assert judged(data, model) > 0.9


def test_a_redrawn_start_goes_on_after_a_stop_and_keeps_the_linear_solution_if_it_gains_nothing(tmp_path):
    data = additive()
    settings = Settings(**SHORT, start="redrawn")
    whole = train(data, tmp_path / "whole", settings, accelerator="cpu")
    linear = train(data, tmp_path / "linear", Settings(**SHORT | {"steps": 1}, learning_rate=1e-12), accelerator="cpu")
    assert torch.equal(whole.encode(data.z).tensor, linear.encode(data.z).tensor)
    with pytest.MonkeyPatch.context() as patch:
        pairs = loop._Training._pairs
        patch.setattr(loop._Training, "_pairs", lambda self, step, own: pairs(self, step if step < 20 else 1 / 0, own))
        with pytest.raises(ZeroDivisionError):
            train(data, tmp_path / "run", settings, accelerator="cpu")
    train(data, tmp_path / "run", settings, accelerator="cpu", resume=True)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_codes_of_classes_may_be_large_and_a_concept_without_labels_is_not_judged():
    data = additive()
    labels = data.labels.clone()
    labels[:, 0] += 20_230_101
    rows = split_rows(data, 0.1, 0)
    model = IIN(12, {"digit": 4, "color": 3}, n_flows=1, hidden_dim=8)
    usual = SwapJudge(data, *rows, data.names)(model)
    assert torch.equal(SwapJudge(Latents.of(data.z, labels, data.names), *rows, data.names)(model), usual)
    labels[torch.from_numpy(rows[0]), 0] = -1
    judge = SwapJudge(Latents.of(data.z, labels, data.names), *rows, data.names)
    assert list(judge.labels) == ["color"] and judge(model).isfinite().all()
