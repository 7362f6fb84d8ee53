"""Training: it does what a plain loop does, learns what it should, and leaves a whole run folder."""

import json
import math
import os
import signal
import sys
import warnings

import numpy as np
import pytest
import torch
from run_folder import metrics, record

from iin_fast import IIN, FactorLoss, PairSampler
from iin_fast.data import Latents
from iin_fast.train import Batches, held_out_rise, split_rows, train
from iin_fast.train.logs import Log


def test_same_as_a_plain_loop(latents, settings, tmp_path):
    settings = settings(precision="64-true", steps=8, decay_start=4, held_out=0.0, seed=3)
    trained = train(latents, tmp_path / "run", settings, accelerator="cpu")

    z = latents.z.double()
    sampler = PairSampler(latents.labels, seed=3, names=latents.names)
    model = IIN(8, settings.factors, 2, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    loss = FactorLoss(settings.rho)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.5, 0.9))
    for step in range(8):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (8 - step) / 4)
        pairs = sampler.sample(16)
        optimizer.zero_grad()
        loss(model, z[pairs.a], z[pairs.b], pairs.shared).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, rtol=0, atol=1e-9, msg=name)


@pytest.fixture(scope="module")
def finished(latents, tmp_path_factory):
    from iin_fast.train import Settings

    run = tmp_path_factory.mktemp("train") / "run"
    settings = Settings(
        preset="paper",
        batch=32,
        steps=300,
        n_flows=3,
        hidden_dim=32,
        learning_rate=3e-3,
        rho=0.95,
        log_every=20,
        held_out_every=100,
    )
    return run, train(latents, run, settings, accelerator="cpu")


def test_factors_are_learned(finished, latents):
    run, model = finished
    assert list(model.sizes) == ["digit", "color", "residual"] and not model.training
    held = np.load(run / "split.npz")["held_out"]
    z, labels = latents.z[held], latents.labels[held]
    with torch.no_grad():
        factors = model.encode(z)
    for k, name in enumerate(latents.names):
        part = factors[name] - factors[name].mean(0)
        between = sum(
            part[labels[:, k] == c].mean(0).square() * (labels[:, k] == c).double().mean()
            for c in labels[:, k].unique()
        )
        other = factors["residual"] - factors["residual"].mean(0)
        shared = sum(
            other[labels[:, k] == c].mean(0).square() * (labels[:, k] == c).double().mean()
            for c in labels[:, k].unique()
        )
        assert (between.sum() / part.square().mean(0).sum()) > 0.7  # the class explains its factor
        assert (shared.sum() / other.square().mean(0).sum()) < 0.35  # and little of the residual
    lines = metrics(run)
    assert float(lines[-1]["held_out_loss"]) < float(lines[4]["held_out_loss"])
    assert float(lines[-1]["loss"]) < float(lines[0]["loss"]) - 3


def test_run_folder(finished, latents):
    run, model = finished
    names = {path.name for path in run.iterdir()}
    assert names == {"model.safetensors", "config.json", "run.json", "split.npz", "logs", "state"}
    loaded = IIN.load(run)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    (checkpoint,) = (run / "state").iterdir()
    assert checkpoint.name == "step-000000300"
    assert torch.equal(IIN.load(checkpoint).flow.loc, model.flow.loc)

    lines = metrics(run)
    assert [int(line["step"]) for line in lines] == list(range(20, 301, 20))
    assert [line["step"] for line in lines if line["held_out_loss"]] == ["100", "200", "300"]
    for line in lines:
        assert float(line["samples_per_second"]) > 0 and math.isfinite(float(line["nats_per_dim"]))
    assert float(lines[0]["learning_rate"]) == 3e-3 and 0 < float(lines[-1]["learning_rate"]) < 3e-5

    found = record(run)
    assert found["latents"] == {"path": None, "kind": "labels", "sha256": latents.fingerprint()}
    assert found["n"] == 600 and found["steps"] == 300 and found["names"] == ["digit", "color"]
    assert found["factors"] == model.sizes and found["settings"]["decay_start"] == 150
    assert found["versions"]["torch"] == torch.__version__
    split = np.load(run / "split.npz")
    assert len(split["held_out"]) == 60 and len(split["train"]) == 540


class Kept:
    """A logger that keeps what it is told; it breaks at step ``breaks``."""

    def __init__(self, breaks=None):
        self.lines, self.settings, self.ended, self.breaks = [], {}, [], breaks

    def log_hyperparams(self, params):
        self.settings = params

    def log_metrics(self, values, step):
        if step == self.breaks:
            raise OSError("no room")
        self.lines.append((step, values))

    def finalize(self, status):
        self.ended.append(status)


def test_loggers_get_the_numbers_of_the_log(latents, settings, tmp_path):
    from lightning_fabric.loggers import CSVLogger

    kept, fabric = Kept(), CSVLogger(tmp_path, name="csv", flush_logs_every_n_steps=1)
    settings = settings(steps=6, log_every=2, seed=3)
    train(latents, tmp_path / "run", settings, accelerator="cpu", loggers=[kept, fabric])
    lines = metrics(tmp_path / "run")
    assert [step for step, _ in kept.lines] == [int(line["step"]) for line in lines] == [2, 4, 6]
    for (_, values), line in zip(kept.lines, lines, strict=True):
        assert values["loss"] == pytest.approx(float(line["loss"]), rel=1e-9)
    assert kept.settings["steps"] == 6 and kept.settings["seed"] == 3
    assert kept.ended == ["success"]
    assert len((tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()) == 4
    broken = Kept(breaks=4)
    with pytest.raises(OSError, match="no room"):
        train(latents, tmp_path / "broken", settings, accelerator="cpu", loggers=[broken])
    assert broken.ended == ["failed"]


def test_tensorboard_has_the_same_values(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = finished
    events = EventAccumulator(str(run / "logs"))
    events.Reload()
    lines = metrics(run)
    for name in ("loss", "nats_per_dim", "learning_rate", "held_out_loss"):
        expected = [(int(line["step"]), float(line[name])) for line in lines if line[name]]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [v for _, v in found] == pytest.approx([v for _, v in expected], rel=1e-6)


def test_held_out_numbers_are_those_of_held_out_pairs(finished, latents):
    run, model = finished
    _, held = split_rows(latents, 0.1, 0)
    pairs = Batches(latents, held).draw(1024, 0)
    za, zb = latents.z[pairs.a], latents.z[pairs.b]
    with torch.no_grad():
        loss = FactorLoss(0.95, normalized=True)(model, za, zb, pairs.shared).item()
        nats = -model.log_prob(torch.cat([za, zb])).double().mean().item() / 8
    last = metrics(run)[-1]
    assert float(last["held_out_loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(last["held_out_nats_per_dim"]) == pytest.approx(nats, rel=1e-5)


def test_report_reads_the_folder(finished, latents):
    pytest.importorskip("matplotlib")
    from iin_fast.report import write_report

    run, _ = finished
    text = write_report(run, latents=latents).read_text()
    (run / "report.html").unlink()
    assert "It learned from 600 latents, in 300 steps" in text and "samples per second" in text
    assert text.count("base64,") == 4  # two plots in two colors
    assert "There is no decoder" in text and "hidden width 32" in text


def test_without_labels_the_density_is_learned(settings, tmp_path):
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 3.0, 0.5])
    latents = Latents.of(scale * torch.randn(4000, 4, generator=generator) + 5)
    model = train(latents, tmp_path / "run", settings(factors=None, steps=150, batch=64), accelerator="cpu")
    assert model.sizes == {"residual": 4}
    entropy = (0.5 * math.log(2 * math.pi * math.e) + scale.log()).mean().item()
    last = metrics(tmp_path / "run")[-1]
    assert abs(float(last["held_out_nats_per_dim"]) - entropy) < 0.05
    # Two independent latents of four features.
    assert float(last["held_out_loss"]) == pytest.approx(8 * float(last["held_out_nats_per_dim"]), rel=1e-5)


def test_standardised_features_of_any_scale_train_and_dead_ones_come_back(latents, settings, tmp_path):
    z = torch.cat([latents.z, torch.full((latents.n, 3), 0.1), latents.z[:, :2]], 1)
    z[:, 1:5] *= 1000
    data = Latents.of(z, latents.labels, latents.names)
    options = {"factors": None, "steps": 60, "others": "any", "noise": 0.2, "keep": "best", "held_out_every": 20}
    model = train(data, tmp_path / "run", settings(standardise=True, **options), accelerator="cpu")
    assert record(tmp_path / "run")["settings"]["standardise"] is True
    # Named factors share what varies; the rest of the features stands in the residual.
    assert model.inputs.live == 9 and sum(model.sizes.values()) == 13
    assert model.inputs.keep.tolist() == [*range(8), 12] and model.sizes["residual"] >= 4
    losses = [float(line["held_out_loss"]) for line in metrics(tmp_path / "run") if line["held_out_loss"]]
    assert max(losses) < 200 and losses[-1] < losses[0]
    loaded = IIN.load(tmp_path / "run")
    with torch.no_grad():
        swapped = loaded.swap(z, z.flip(0), "digit")
    assert torch.equal(swapped[:, 8:11], z[:, 8:11]) and torch.equal(swapped[:, 11], swapped[:, 0])
    assert torch.allclose(loaded.inputs.mean[0], z[np.load(tmp_path / "run" / "split.npz")["train"], 0].mean())
    # A resume has the same map, and goes on with it.
    again = train(data, tmp_path / "run", settings(standardise=True, **options), accelerator="cpu", resume=True)
    assert torch.equal(again.inputs.scale, loaded.inputs.scale)


def test_noise_is_measured_in_each_features_deviation(settings, tmp_path):
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 3.0, 0.5])
    latents = Latents.of(scale * torch.randn(4000, 4, generator=generator) + 5)
    options = settings(factors=None, steps=150, batch=64, noise=1.0)
    model = train(latents, tmp_path / "run", options, accelerator="cpu")
    spread = model.sample(4000, generator).std(0) / scale  # as much noise as there was: √2 times the deviation
    assert torch.allclose(spread, torch.full((4,), math.sqrt(2)), rtol=0.1)


@pytest.fixture(scope="module")
def by_heart(latents, tmp_path_factory):
    """A function: a long training on few latents, with what is given: folder, model, warnings; each done once."""
    from iin_fast.train import Settings

    made = {}

    def run(**given):
        key = tuple(given.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("by_heart") / "run"
            few = Latents.of(latents.z[:60], latents.labels[:60, :1], ["digit"])
            options = {"batch": 32, "steps": 160, "n_flows": 2, "hidden_dim": 32, "learning_rate": 3e-3}
            settings = Settings({"digit": 3}, preset="paper", held_out=0.3, held_out_every=40, **options, **given)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                model = train(few, folder, settings, accelerator="cpu")
            made[key] = folder, model, [str(warning.message) for warning in told]
        return made[key]

    return run


def held_out_losses(run):
    return [float(line["held_out_loss"]) for line in metrics(run) if line["held_out_loss"]]


def test_noise_keeps_a_flow_from_learning_few_latents_by_heart(by_heart):
    assert held_out_losses(by_heart(noise=0.3)[0])[-1] < held_out_losses(by_heart()[0])[-1] - 20


def test_the_best_model_is_kept(by_heart, latents):
    run, model, _ = by_heart(keep="best")
    losses = held_out_losses(run)
    assert losses == held_out_losses(by_heart()[0])  # the training is the same
    few = Latents.of(latents.z[:60], latents.labels[:60, :1], ["digit"])
    pairs = Batches(few, split_rows(few, 0.3)[1]).draw(1024, 0)
    loss = FactorLoss(0.975, normalized=True)
    for kept in (model, IIN.load(run), IIN.load(next((run / "state").iterdir()) / "best")):
        with torch.no_grad():
            found = loss(kept, few.z[pairs.a], few.z[pairs.b], pairs.shared).item()
        assert found == pytest.approx(min(losses), rel=1e-5) and min(losses) < losses[-1] - 20
    with pytest.raises(ValueError, match="keep is 'best', expected 'last' where there are no held-out pairs"):
        train(few, run.parent / "none", record_settings(run, held_out=0.0), accelerator="cpu")


def record_settings(run, **given):
    from iin_fast.train import Settings

    return Settings(**{**record(run)["settings"], **given})


def test_a_held_out_loss_that_rises_is_told(by_heart, finished):
    assert held_out_rise(finished[0]) == "" == held_out_rise(finished[0].parent)
    last, best = held_out_rise(by_heart()[0]), held_out_rise(by_heart(keep="best")[0])
    assert by_heart()[2] == [f"train: {last}"] and by_heart(noise=0.3)[2] == []
    losses = held_out_losses(by_heart()[0])
    assert f"rose from {min(losses):.2f} nats per pair at step 40 to {losses[-1]:.2f} at step 160" in last
    assert last.endswith("step 40 was not kept (keep best does that)") and best.endswith("step 40 was kept")


def test_missing_labels_and_ready_pairs(latents, settings, tmp_path):
    labels = latents.labels.clone()
    labels[::2] = -1
    labels[1::4, 1] = -1
    model = train(Latents.of(latents.z, labels, latents.names), tmp_path / "a", settings(), accelerator="cpu")
    assert model.concepts == ("digit", "color")
    pairs = PairSampler(latents.labels, names=latents.names).sample(500)
    ready = Latents.of_pairs(latents.z[pairs.a], latents.z[pairs.b], pairs.factor, latents.names)
    model = train(ready, tmp_path / "b", settings(factors=None), accelerator="cpu")
    assert model.concepts == ("digit", "color")
    for name in "ab":
        lines = metrics(tmp_path / name)
        assert float(lines[-1]["loss"]) < float(lines[0]["loss"])


def test_some_concepts_and_precisions(latents, settings, tmp_path):
    model = train(
        latents, tmp_path / "a", settings(factors={"color": 2, "digit": 0}, precision="64-true"), accelerator="cpu"
    )
    assert model.sizes == {"color": 2, "residual": 6} and model.dtype == torch.float64
    mixed = train(latents, tmp_path / "b", settings(precision="bf16-mixed"), accelerator="cpu")
    plain = train(latents, tmp_path / "c", settings(), accelerator="cpu")
    assert mixed.dtype == torch.float32
    losses = [float(metrics(tmp_path / name)[-1]["loss"]) for name in "bc"]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert not torch.equal(mixed.flow.loc, plain.flow.loc)


def test_spline_couplings(latents, settings, tmp_path):
    model = train(latents, tmp_path / "run", settings(coupling="spline", steps=60), accelerator="cpu")
    assert model.coupling == "spline" and record(tmp_path / "run")["settings"]["coupling"] == "spline"
    with torch.no_grad():
        assert torch.equal(IIN.load(tmp_path / "run").encode(latents.z).tensor, model.encode(latents.z).tensor)
    lines = metrics(tmp_path / "run")
    assert float(lines[-1]["held_out_loss"]) < float(lines[1]["held_out_loss"])


def test_another_seed_and_the_same(latents, settings, tmp_path):
    runs = [
        train(latents, tmp_path / str(i), settings(steps=5, seed=s), accelerator="cpu") for i, s in enumerate([1, 1, 2])
    ]
    files = [(tmp_path / str(i) / "model.safetensors").read_bytes() for i in range(3)]
    assert files[0] == files[1] != files[2] and len(runs) == 3


def test_the_global_random_state_stays(latents, settings, tmp_path):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train(latents, tmp_path / "run", settings(steps=2), accelerator="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_no_held_out_pairs(latents, settings, tmp_path):
    train(latents, tmp_path / "a", settings(steps=20, held_out=0.0), accelerator="cpu")
    digit = torch.arange(30) % 3
    digit[split_rows(Latents.of(latents.z[:30]), 0.1)[1]] = torch.arange(3) + 7  # each alone of its class
    few = Latents.of(latents.z[:30], {"digit": digit})
    train(few, tmp_path / "b", settings(steps=20, factors={"digit": 3}), accelerator="cpu")
    for name in "ab":
        assert all(line["held_out_loss"] == "" for line in metrics(tmp_path / name))


def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(latents, settings, tmp_path):
    run = tmp_path / "run"
    z = latents.z.clone()
    z[split_rows(latents, 0.1)[0][::100]] = 1e25  # a few outliers; their squares are no float32
    broken = Latents.of(z, latents.labels, latents.names)
    with pytest.raises(
        FloatingPointError, match=r"not finite .*after step \d+ or shortly before; no checkpoint was written"
    ):
        train(broken, run, settings(), accelerator="cpu")
    assert not (run / "model.safetensors").exists()

    run = tmp_path / "later"
    options = settings(steps=400, save_every=1, log_every=7, learning_rate=1e4, warmup=10**6, decay_start=400)
    with pytest.raises(FloatingPointError, match=r"the checkpoint of step \d+ is intact. A lower learning_rate"):
        train(latents, run, options, accelerator="cpu")
    (checkpoint,) = (run / "state").glob("*")
    for folder in (run, checkpoint):
        model = IIN.load(folder)
        assert all(torch.isfinite(p).all() for p in model.parameters())
    assert "nan" not in (run / "logs" / "metrics.csv").read_text()


@pytest.mark.parametrize(("number", "coupling"), [(signal.SIGINT, "affine"), (signal.SIGTERM, "spline")])
def test_a_signal_writes_a_checkpoint_and_resume_goes_on(latents, settings, tmp_path, monkeypatch, number, coupling):
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = settings(log_every=3, coupling=coupling)
    train(latents, whole, options, accelerator="cpu")
    write = Log.write

    def interrupt(self, step, values):
        write(self, step, values)
        if step == 12:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    monkeypatch.setattr(Log, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(latents, run, options, accelerator="cpu")
    assert signal.getsignal(number) is handler
    (checkpoint,) = (run / "state").iterdir()
    assert checkpoint.name in ("step-000000012", "step-000000013")  # the handler runs between two of Python's steps
    assert (run / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    monkeypatch.undo()
    train(latents, run, options, accelerator="cpu", resume=True)
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [{**line, "samples_per_second": ""} for line in metrics(run)] == [
        {**line, "samples_per_second": ""} for line in metrics(whole)
    ]


def test_folders_with_another_run_are_refused(latents, settings, tmp_path):
    run = tmp_path / "run"
    train(latents, run, settings(steps=4), accelerator="cpu")
    before = (run / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds a run already; resume it, or take another folder"):
        train(latents, run, settings(steps=4), accelerator="cpu")
    with pytest.raises(ValueError, match="rho is 0.5, but the run in .* has 0.975; resume takes the same"):
        train(latents, run, settings(steps=4, rho=0.5), resume=True, accelerator="cpu")
    other = Latents.of(latents.z + 1, latents.labels, latents.names)
    with pytest.raises(ValueError, match="latents is '.*', but the run"):
        train(other, run, settings(steps=4), resume=True, accelerator="cpu")
    assert (run / "model.safetensors").read_bytes() == before
    (run / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="run.json: damaged, or not of a training"):
        train(latents, run, settings(steps=4), resume=True, accelerator="cpu")


def test_a_damaged_checkpoint_is_named(latents, settings, tmp_path):
    run = tmp_path / "run"
    train(latents, run, settings(steps=4), accelerator="cpu")
    (checkpoint,) = (run / "state").iterdir()
    file = checkpoint / "training.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="step-000000004: damaged checkpoint"):
        train(latents, run, settings(steps=4), resume=True, accelerator="cpu")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="training.safetensors: no such file"):
        train(latents, run, settings(steps=4), resume=True, accelerator="cpu")


@pytest.mark.parametrize("package", ["lightning_fabric", "torch.utils.tensorboard"])
def test_a_missing_package_is_named(latents, settings, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'iin-fast\[train\]'"):
        train(latents, tmp_path / "run", settings(), accelerator="cpu")
    assert not (tmp_path / "run").exists()


def test_a_residual_is_what_the_concepts_leave_over(latents, settings, tmp_path, capsys):
    with pytest.raises(ValueError, match="which sums to 5, expected 8, the features of the latents, where residual"):
        train(latents, tmp_path / "a", settings(factors={"digit": 2, "residual": 3}), accelerator="cpu")
    given = settings(factors={"digit": 2, "residual": 6}, steps=2)
    assert train(latents, tmp_path / "a", given, accelerator="cpu", progress=True).sizes == {"digit": 2, "residual": 6}
    assert "color: no factor" in capsys.readouterr().out


def test_latents_of_one_direction_are_refused(tmp_path):
    z = torch.randn(60, 1, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 5) + torch.arange(4)
    with pytest.raises(ValueError, match="latents vary in 1 direction beside constants and copies, expected 2"):
        train(Latents.of(z), tmp_path / "run", None, accelerator="cpu")


def test_what_does_not_fit_is_refused(latents, settings, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(TypeError, match="settings is a dict, expected iin_fast.train.Settings"):
        train(latents, run, {"steps": 4})
    with pytest.raises(ValueError, match="strategy is 'fsdp', expected 'auto' or 'ddp'"):
        train(latents, run, settings(), strategy="fsdp")
    with pytest.raises(ValueError, match="batch is 16, expected a multiple of 3"):
        train(latents, run, settings(), devices=3, accelerator="cpu")
    with pytest.raises(ValueError, match="devices is 0"):
        train(latents, run, settings(), devices=0, accelerator="cpu")
    with pytest.raises(ValueError, match=r"factors names 'shape'"):
        train(latents, run, settings(factors={"shape": 2}), accelerator="cpu")
    with pytest.raises(ValueError, match=r"sum to 10, expected at most dim = 8"):
        train(latents, run, settings(factors={"digit": 9}), accelerator="cpu")
    noise = Latents.of(torch.randn(100, 4), {"digit": torch.arange(100) % 4})
    with pytest.raises(ValueError, match=r"the estimate gives \['digit'\] no dimension"):
        train(noise, run, settings(factors=None, dims_method="paper"), accelerator="cpu")
    assert not run.exists()
    assert json.dumps(settings().record())
