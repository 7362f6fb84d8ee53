"""What of a training is not finite, or gets worse and worse: it ends in one line that says where, and keeps what was good."""

import pytest
import torch

from iin_fast import IIN
from iin_fast.train import loop, loss_rise, state, train
from iin_fast.train.numerics import first_not_finite


def model(coupling="affine", **options):
    generator = torch.Generator().manual_seed(0)
    made = IIN(6, n_flows=3, hidden_dim=8, hidden_depth=1, coupling=coupling, generator=generator, **options)
    made(torch.randn(64, 6, generator=generator))
    return made


@pytest.mark.parametrize(
    ("name", "index", "value", "where"),
    [
        ("loc", (1, 2), 3e38, "block 1, ActNorm"),
        ("bias_in", (2, 0, 1, 3), 3e38, "block 2, half 0, shift net, layer 1"),
        ("bias_hidden", (0, 1, 1, 0, 5), 3e38, "block 0, half 1, shift net, layer 2"),
        ("bias_out", (0, 1, 1, 1), 3.4e38, "block 0, half 1, affine map"),
        ("bias_out", (1, 0, 0, 1), torch.nan, "parameter flow.bias_out, block 1"),
        ("scale", (2, 1), torch.inf, "parameter flow.scale, block 2"),
    ],
)
def test_the_layer_is_named(name, index, value, where):
    broken = model()
    with torch.no_grad():
        if "shift net" in where:
            for weight in (broken.flow.weight_hidden, broken.flow.weight_out):
                weight.mul_(100)
        if where.endswith("map"):
            broken.flow.bias_out[0, 1, 0] = 5  # exp(tanh(5)) is e
            broken.flow.loc[0] += 1e38
            broken.flow.scale[0] = 1
        if where.endswith("ActNorm"):
            broken.flow.scale[1] = 10
        getattr(broken.flow, name)[index] = value
    z = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    assert not torch.isfinite(broken.log_prob(z)).all()
    assert first_not_finite(broken, z) == where


def test_the_layer_of_a_spline_flow_is_named():
    broken = model("spline")
    with torch.no_grad():
        broken.flow.bias_in[1, 0] = 3e38
        broken.flow.weight_hidden[1, 0] = 100
    assert first_not_finite(broken, torch.randn(5, 6)) == "block 1, layer 1 (coupling)"


@pytest.mark.parametrize("coupling", ["affine", "spline"])
def test_a_good_model_has_nothing_to_name(coupling):
    context = torch.randn(5, 2)
    good = IIN(6, n_flows=2, hidden_dim=8, coupling=coupling, context_dim=2)
    good(torch.randn(64, 6), torch.randn(64, 2))
    assert first_not_finite(good, torch.randn(5, 6), context) == ""


@pytest.mark.parametrize("context", [None, "color"])
def test_a_training_names_the_place_and_keeps_the_model_before(context, latents, settings, tmp_path, monkeypatch):
    pairs = loop._Training._pairs

    def broken(self, step, own):
        za, *rest = pairs(self, step, own)
        return [za * 1e39 if step == 7 else za, *rest]

    monkeypatch.setattr(loop._Training, "_pairs", broken)
    options = settings(save_every=2, factors={"digit": 3}, context=context)
    expected = (
        r"not finite \(first: the latents, as the flow gets them\) after step 7 .*; the checkpoint of step 6 is intact"
    )
    with pytest.raises(FloatingPointError, match=expected):
        train(latents, tmp_path / "run", options, accelerator="cpu")
    told = () if context is None else (torch.eye(3)[latents.labels[:, 1]],)
    assert torch.isfinite(IIN.load(tmp_path / "run").log_prob(latents.z, *told)).all()


@pytest.mark.parametrize("coupling", ["affine", "spline"])
@pytest.mark.parametrize(("rate", "start"), [(100.0, "linear"), (100.0, "random")])
def test_a_learning_rate_that_is_far_too_large_is_noticed(latents, settings, tmp_path, coupling, rate, start):
    options = settings(
        coupling=coupling, steps=200, learning_rate=rate, start=start, save_every=5, preset="auto", patience=0
    )
    with pytest.raises(FloatingPointError, match=r"(is intact|no checkpoint was written yet). A lower learning_rate"):
        train(latents, tmp_path / "run", options, accelerator="cpu")
    if state.latest(tmp_path / "run"):  # what was kept had not diverged
        assert -IIN.load(tmp_path / "run").log_prob(latents.z).mean() / 8 < 1.5 + 10  # nats per dimension


def test_a_loss_that_ended_above_its_start_gives_a_note(latents, settings, tmp_path):
    run = tmp_path / "run"
    train(latents, run, settings(steps=20), accelerator="cpu")
    assert loss_rise(run) == "" == loss_rise(tmp_path)
    file = run / "logs" / "metrics.csv"
    head, *lines = file.read_text().splitlines()
    last = lines[-1].split(",")
    last[1] = str(float(lines[0].split(",")[1]) + 17)  # two latents of 8 features
    file.write_text("\n".join([head, *lines[:-1], ",".join(last)]) + "\n")
    assert "the learning rate (now 0.003) is too large" in loss_rise(run)


@pytest.mark.parametrize("rate", [1e-3, 3e-2])
def test_one_that_is_not_is_left_alone(latents, settings, tmp_path, rate):
    model = train(latents, tmp_path / "run", settings(steps=100, learning_rate=rate, preset="auto"), accelerator="cpu")
    assert model.log_prob(torch.as_tensor(latents.z).float()).isfinite().all() and loss_rise(tmp_path / "run") == ""
