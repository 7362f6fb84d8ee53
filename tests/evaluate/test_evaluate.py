"""The whole evaluation: of a small IIN that learned to undo a rotation, against what does without it."""

import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from known_latents import NAMES, draw_labels, joined, perfect_factors, rotation

import iin_fast
from iin_fast.evaluate import (
    evaluate,
    gaussian_nats_per_dim,
    invertibility_error,
    nats_per_dim,
    normal_nats_per_dim,
    write_evaluation,
)

SIZES = {"shape": 3, "color": 4}


def latents(n, seed):
    labels = draw_labels(n, seed)
    z = joined(perfect_factors(labels, seed, noise=0.1)) @ rotation(10, seed=3)
    return torch.from_numpy(z).float(), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def trained():
    """A model of a few seconds of training, training data, held-out data."""
    z, labels = latents(1500, 20)
    generator = torch.Generator().manual_seed(0)
    model = iin_fast.IIN(10, SIZES, n_flows=4, hidden_dim=32, hidden_depth=1, generator=generator)
    sampler = iin_fast.PairSampler(labels, seed=0, names=NAMES)
    loss = iin_fast.FactorLoss(0.95)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.5, 0.9))
    for _ in range(400):
        pairs = sampler.sample(128)
        adam.zero_grad()
        loss(model, z[pairs.a], z[pairs.b], pairs.shared).backward()
        adam.step()
    return model, z, labels, *latents(900, 21)


@pytest.fixture(scope="module")
def result(trained):
    model, train_z, train_labels, z, labels = trained
    stages = []
    found = evaluate(
        model, z, labels, NAMES, train_z=train_z, train_labels=train_labels, max_samples=900, progress=stages.append
    )
    assert stages[0] == "factors" and len(stages) == 10
    return found


def test_result_is_plain_json_and_complete(result):
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result) == {
        *("format", "version", "seed", "samples", "concepts", "classes", "factors", "swap", "information", "dci"),
        *("mig", "sap", "leak", "likelihood", "correlation", "invertibility", "verdict"),
    }
    assert set(result["swap"]) == {"judge", "chance", "iin", "mean_shift", "linear_iin", "raw", "pca"}
    for metric in ("information", "dci", "mig", "sap", "leak", "correlation"):
        assert set(result[metric]) == {"iin", "linear_iin", "raw", "pca"}, metric
    assert result["samples"] == {"scored": 900, "learned_on": 900 + 600, "source": "training samples", "most": 900}
    assert result["classes"] == {"shape": 3, "color": 4}


def test_a_trained_network_beats_what_does_without(result):
    assert min(result["swap"]["judge"].values()) > 0.95
    for name in NAMES:
        ours = result["swap"]["iin"][name]["both"]
        assert ours > 0.8 and ours > result["swap"]["raw"][name]["both"] + 0.2
        same = {factor: row[name] for factor, row in result["correlation"]["iin"]["same"].items()}
        own = same.pop(name)
        assert own > 0.5 and own > max(map(abs, same.values())) + 0.3
        assert result["leak"]["iin"][name]["linear"] < result["leak"]["raw"][name]["linear"]
    assert result["mig"]["iin"]["mig"] > result["mig"]["raw"]["mig"] + 0.2
    assert result["sap"]["iin"]["sap"] > result["sap"]["raw"]["sap"]
    assert result["dci"]["iin"]["disentanglement"] > result["dci"]["raw"]["disentanglement"] + 0.2
    assert result["likelihood"]["iin"] < result["likelihood"]["normal"]
    assert result["invertibility"]["median"] <= result["invertibility"]["max"] < 1e-3


def test_the_linear_iin_is_exact_where_concepts_add_up_and_the_verdict_says_so(result):
    for name in NAMES:
        assert result["swap"]["linear_iin"][name]["both"] > 0.95
        verdict = result["verdict"][name]
        both = {who: result["swap"][who][name]["both"] for who in ("iin", "mean_shift", "linear_iin")}
        assert both[verdict["rival"]] == max(both["mean_shift"], both["linear_iin"])
        assert verdict["difference"] == pytest.approx(both["iin"] - both[verdict["rival"]])
        assert verdict["verdict"] == ("worse" if verdict["high"] < 0 else "equal")
        assert result["leak"]["linear_iin"][name]["linear"] < 0.1


def test_a_seed_repeats(trained):
    model, _, _, z, labels = trained
    first = evaluate(model, z, labels, NAMES, max_samples=150, seed=3)
    assert first == evaluate(model, z, labels, NAMES, max_samples=150, seed=3)
    assert first["samples"]["source"] == "half of the held-out samples"
    assert first["samples"]["scored"] == first["samples"]["learned_on"] == 450


def test_a_judge_of_the_user_sees_what_the_decoder_makes(trained):
    model, train_z, train_labels, z, labels = trained
    back = torch.from_numpy(rotation(10, seed=3).T).float()
    shapes = []

    def judge(factors):
        shapes.append(factors.shape)
        return {"shape": factors[:, :3], "color": factors[:, 3:7]}  # the largest is the class

    data = {"train_z": train_z[:300], "train_labels": train_labels[:300], "max_samples": 300}
    found = evaluate(model, z[:300], labels[:300], NAMES, decoder=lambda z: z @ back, judge=judge, **data)
    assert found["swap"]["judge"]["shape"] > 0.95 and found["swap"]["iin"]["shape"]["both"] > 0.8
    assert set(shapes) == {(300, 10)}


def test_missing_labels_other_concepts_and_unsupervised_models(trained):
    model, _, _, z, labels = trained
    more = torch.cat([labels, torch.zeros(len(z), 1, dtype=torch.int64)], 1)
    more[::5, 0] = -1
    with pytest.raises(ValueError, match="'still' hold only the class 0, expected two classes at least; leave"):
        evaluate(model, z, more, [*NAMES, "still"])
    more[:, 2] = torch.arange(len(z)) % 2
    found = evaluate(model, z, more, [*NAMES, "still"], concepts=["shape", "still"], max_samples=150)
    assert found["concepts"] == ["shape", "still"]
    assert list(found["swap"]["iin"]) == ["shape"] and list(found["mig"]["iin"]["gaps"]) == ["shape", "still"]
    assert list(found["swap"]["iin"]["shape"]["keep"]) == ["still", "color"]  # what is not asked for is kept, too
    more[:, 2] = 0  # one class says nothing of what is kept
    found = evaluate(model, z, more, [*NAMES, "still"], concepts=["shape"], max_samples=150)
    assert list(found["swap"]["iin"]["shape"]["keep"]) == ["color"]
    plain = iin_fast.IIN(10, n_flows=1, hidden_dim=8, generator=torch.Generator().manual_seed(1))
    plain(z)  # starts its ActNorm
    found = evaluate(plain, z, labels, NAMES, max_samples=150)
    assert "swap" not in found and found["factors"] == {"residual": 10}


def test_what_does_not_fit_is_refused(trained):
    model, train_z, _, z, labels = trained
    with pytest.raises(TypeError, match="model is a Linear"):
        evaluate(torch.nn.Linear(2, 2), z, labels, NAMES)
    with pytest.raises(ValueError, match=r"z has shape \[900, 9\], expected \[n, 10\]"):
        evaluate(model, z[:, :9], labels, NAMES)
    with pytest.raises(ValueError, match="train_z and train_labels are needed together"):
        evaluate(model, z, labels, NAMES, train_z=train_z)
    with pytest.raises(ValueError, match="max_samples is 0, expected a positive integer"):
        evaluate(model, z, labels, NAMES, max_samples=0)
    with pytest.raises(ValueError, match=r"concepts is \['size'\]"):
        evaluate(model, z, labels, NAMES, concepts=["size"])


def test_the_extra_is_named_where_it_is_missing(trained, monkeypatch):
    model, _, _, z, labels = trained
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else found(name))
    with pytest.raises(ImportError, match=r"scikit-learn: pip install 'iin-fast\[evaluate\]'"):
        evaluate(model, z, labels, NAMES)


def test_file_holds_the_result(trained, tmp_path):
    pytest.importorskip("safetensors")
    model, _, _, z, labels = trained
    model.save(tmp_path)
    found = write_evaluation(tmp_path, z, labels, NAMES, max_samples=120)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "evaluation.json", "model.safetensors"]


def test_likelihoods_of_known_distributions(trained):
    random = np.random.default_rng(0)
    train, z = random.standard_normal((2, 4000, 6))
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    assert normal_nats_per_dim(z) == pytest.approx(entropy, abs=0.02)
    assert gaussian_nats_per_dim(z, train) == pytest.approx(entropy, abs=0.02)
    assert gaussian_nats_per_dim(10 * z + 3, 10 * train + 3) == pytest.approx(entropy + math.log(10), abs=0.02)
    turned = np.linalg.qr(random.standard_normal((6, 6)))[0] * [1, 2, 3, 4, 5, 6] @ random.standard_normal((6, 6))
    expected = entropy + np.linalg.slogdet(turned)[1] / 6
    assert gaussian_nats_per_dim(z @ turned, train @ turned) == pytest.approx(expected, abs=0.1)
    assert normal_nats_per_dim(z @ turned) > gaussian_nats_per_dim(z @ turned, train @ turned)

    model, _, _, held_out, _ = trained
    with torch.no_grad():
        assert nats_per_dim(model, held_out, batch=70) == pytest.approx(
            -model.log_prob(held_out).mean().item() / 10, rel=1e-5
        )


def test_the_gaussian_has_the_scale_of_the_latents():
    z = np.random.default_rng(0).standard_normal((400, 8))
    wanted = gaussian_nats_per_dim(z[:40], z[40:])
    for scale in (1e-5, 1e-8, 1e-20):
        found = gaussian_nats_per_dim(scale * z[:40], scale * z[40:])
        assert abs(found - np.log(scale) - wanted) < 1e-9
    assert np.isfinite(gaussian_nats_per_dim(np.ones((4, 2)), np.ones((4, 2))))
    assert np.isfinite(gaussian_nats_per_dim(np.zeros((4, 2)), np.zeros((4, 2))))


def test_invertibility_error_is_that_of_the_round_trip(trained):
    model, _, _, z, _ = trained

    class Off:
        """Comes back off by a known amount."""

        dim, device, dtype = 10, model.device, model.dtype

        def encode(self, z, context):
            return z

        def decode(self, z, context):
            return z + torch.arange(10) / 8

    assert invertibility_error(Off(), z, batch=100) == pytest.approx({"max": 9 / 8, "median": 0.5}, abs=1e-5)
    with pytest.raises(ValueError, match=r"shape \[10\], expected \[n, 10\]"):
        invertibility_error(model, z[0])
