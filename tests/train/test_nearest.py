"""Swaps that networks take for right, and the nearest latents do not; and the directions that a default training learns on."""

import numpy as np
import pytest
import torch

pytest.importorskip("lightning_fabric")

from iin_fast import LinearIIN, PairSampler
from iin_fast.data import Latents
from iin_fast.train import Settings, split_rows, train
from iin_fast.train.judge import SwapJudge
from iin_fast.train.nearest import MOST_NEAR, NearestLatents


def verdicts(n=500, dim=320, seed=0):
    """Few rows in many dimensions. Whether a verdict is good depends on a word and on its negation; little else tells."""
    random = np.random.default_rng(seed)
    labels = np.stack([random.integers(6, size=n), *random.integers(2, size=(2, n))], 1)
    negation, verdict = 2.0 * labels[:, 1:].T - 1
    nouns = 1.5 * random.standard_normal((6, 5))
    told = np.stack([negation, negation * verdict, 0.3 * verdict], 1)
    z = np.concatenate([nouns[labels[:, 0]], told], 1) @ random.standard_normal((8, dim))
    rest = np.linalg.qr(random.standard_normal((dim, dim)))[0] / np.arange(1, dim + 1)[:, None] ** 0.7
    z += 0.5 * random.standard_normal((n, dim)) @ rest + 0.02 * random.standard_normal((n, dim))
    return Latents.of(z.astype(np.float32), labels, ["noun", "negation", "verdict"])


def judge_of(data):
    return SwapJudge(data, *split_rows(data, 0.1), data.names)


class ByHand:
    """What SwapJudge asks of a model."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, swap):
        self._swap = swap

    def swap(self, z, donor, name, context=None, donor_context=None):
        return self._swap(z, donor, name)


def test_what_fools_networks_does_not_fool_the_nearest_latents():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (600, 2), generator=generator)
    directions = torch.linalg.qr(torch.randn(60, 60, generator=generator)).Q
    parts = [12.0 * (labels - 0.5), torch.randn(600, 6, generator=generator)]
    z = torch.cat(parts, 1) @ directions[:8] + 0.01 * torch.randn(600, 60, generator=generator)
    data = Latents.of(z, labels, ["a", "b"])
    judge = judge_of(data)

    def right(z, donor, name):
        way = directions[data.names.index(name)]
        return z + ((donor - z) @ way)[:, None] * way

    def fooled(z, donor, name):
        """Where latents never vary, as far as the network of ``name`` needs to read the donor's class."""
        network, moved, outside = judge.networks[name], z.clone(), directions[8:]
        with torch.enable_grad():
            expected = network(judge._seen(donor)).argmax(1)
            for _ in range(200):
                logits = network(judge.inputs(moved.requires_grad_())[0])
                loss = torch.nn.functional.cross_entropy(logits, expected, reduction="sum")
                step = torch.autograd.grad(loss, moved)[0] @ outside.T @ outside
                wrong = (logits.argmax(1) != expected)[:, None]
                moved = (moved - wrong * step / step.norm(dim=1, keepdim=True).clamp(min=1e-9)).detach()
        return moved

    for swap in (right, fooled):
        for name in data.names:
            read = judge.networks[name](judge._seen(swap(z[judge.keepers[name]], z[judge.donors[name]], name)))
            assert (read.argmax(1) == judge.labels[name][judge.donors[name]]).float().mean() > 0.95
    good, bad = judge(ByHand(right)), judge(ByHand(fooled))
    assert good.mean() > 0.99 and judge.better(good, bad) and not judge.better(bad, good)
    assert bad.max() < 0.9  # of no swap does the nearest latent say that it is right
    judge.nearest = lambda z, wanted: (torch.zeros(len(z), dtype=torch.bool), torch.zeros(len(z), dtype=torch.bool))
    assert judge(ByHand(fooled)).mean() > 0.95  # as networks alone say


def test_as_many_latents_decide_as_there_are_of_a_kind():
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    kinds = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    z = torch.cat([corners[:3], 0.1 * torch.randn(6, 2, generator=torch.Generator().manual_seed(0))])
    labels = torch.cat([kinds[:3], torch.tensor([[0, 0]] * 5 + [[1, -1]])])
    nearest = NearestLatents(z, labels, np.array([1, 4]))
    right, said = nearest(corners + 0.1, kinds)
    assert said.tolist() == [True, True, True, False]  # no row is 1, 1
    assert right.tolist() == [True, True, True, False]  # of 0, 1 and of 1, 0 there is one each
    assert not nearest(corners[:1], kinds[1:2])[0].any()
    assert not nearest(corners[:1], torch.tensor([[0, -1]]))[1].any()
    assert len(nearest.labels) == 8 and MOST_NEAR > 1
    unknown = NearestLatents(z, torch.tensor([[0, -1]] * 9), np.arange(3))
    assert not torch.stack(unknown(corners, kinds)).any()


@pytest.mark.parametrize("scaled", [False, True])
def test_distances_are_measured_as_held_out_rows_ask_for(scaled):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (300, 1), generator=generator)
    z = torch.randn(300, 100, generator=generator)
    z[:, :3] += 4.0 * torch.nn.functional.one_hot(labels[:, 0])
    if scaled:  # a feature of another unit, which says nothing
        z = z[:, [0, 1, 2, 3]] * torch.tensor([1, 1, 1, 1000])
    else:  # what says nothing varies little
        z[:, 3:] *= 0.001
    nearest = NearestLatents(z, labels, np.arange(60))
    assert (nearest.scale.unique().numel() > 1) == scaled
    assert nearest(z[:60], labels[:60])[0].float().mean() > 0.9


def test_a_default_training_turns_what_two_words_decide(tmp_path):
    data = verdicts()
    judge = judge_of(data)
    assert judge.enough_variance() == 0.975
    model = train(data, tmp_path / "run", Settings(steps=300, held_out_every=50, n_flows=6), accelerator="cpu")
    rows = torch.from_numpy(split_rows(data, 0.1)[0])
    linear = LinearIIN.fit(data.z[rows], PairSampler(data.labels[rows], names=data.names, others="any"))
    shares = {}
    for name, keepers in judge.keepers.items():
        wanted = data.labels[keepers].clone()
        k = data.names.index(name)
        wanted[:, k] = data.labels[judge.donors[name], k]
        for who in (model, linear):
            found = who.swap(data.z[keepers], data.z[judge.donors[name]], name)
            right, said = judge.nearest(found.detach(), wanted)
            assert said.all()
            shares[name, who is model] = right.float().mean().item()
    assert shares["verdict", False] < 0.2 and min(shares[name, True] for name in data.names) > 0.9


def test_a_concept_in_a_direction_of_little_variance_is_not_left_out(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.stack([torch.randint(0, k, (600,), generator=generator) for k in (4, 2)], 1)
    large = torch.randn(4, 10, generator=generator)[labels[:, 0]] + torch.randn(600, 10, generator=generator)
    turn = torch.randn(10, 10, generator=generator)
    z = large @ turn
    small = 0.02 * (labels[:, 1] - 0.5)[:, None] + 0.001 * torch.randn(600, 1, generator=generator)
    z = torch.cat([z, z[:, :1] + z.std() * small], 1)  # only what two features differ by tells
    data = Latents.of(z, labels, ["large", "small"])
    judge = judge_of(data)
    chosen = judge.enough_variance()
    judge.keepers = {"large": judge.keepers["large"]}
    assert judge.enough_variance() <= 0.99 < chosen
