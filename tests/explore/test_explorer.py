"""The explorer without its page: changes of a sample, what they look like, and the Python that makes them."""

import numpy as np
import pytest
import torch

import iin_fast
from iin_fast.data import class_context, load_latents, save_arrays
from iin_fast.explore import Explorer, axes_of, principal_axes

HELD_OUT = np.arange(60, 100)


@pytest.fixture
def explorer(run):
    made = Explorer(run)
    made.choose(70)
    return made


@pytest.fixture
def z(run):
    return load_latents(run.parent / "latents.npz").z


def test_a_swap_is_that_of_the_model(explorer, z):
    explorer.give("shape", 81)
    assert torch.allclose(explorer.z, explorer.model.swap(z[[70]], z[[81]], "shape"), atol=1e-5)


def test_all_factors_of_another_sample_are_that_sample(explorer, z):
    for factor in explorer.axes:
        explorer.give(factor, 81)
    assert torch.allclose(explorer.z, z[[81]], atol=1e-5)


def test_shares_walk_the_way_of_interpolate(explorer, z):
    way = explorer.model.interpolate(z[[70]], z[[81]], 5, "color")[:, 0]
    for share, expected in zip((0, 0.25, 0.5, 0.75, 1), way, strict=True):
        explorer.give("color", 81, share)
        assert torch.allclose(explorer.z[0], expected, atol=1e-5)


def test_a_class_axis_is_that_of_the_model(explorer, run, z):
    labels = load_latents(run.parent / "latents.npz").labels[HELD_OUT, 0]
    usual = z[HELD_OUT]
    expected = explorer.model.axis(usual[labels == 2], usual[labels != 2], "shape")
    assert torch.allclose(explorer.axes["shape"]["to shape 2"].direction, expected, atol=1e-5)
    explorer.move("shape", "to shape 2", 0.5)
    assert torch.allclose(explorer.z, explorer.model.traverse(z[[70]], expected, [0.5])[0], atol=1e-5)


def test_axes_stay_inside_their_factor(explorer):
    places = {"shape": slice(0, 3), "color": slice(3, 5), "residual": slice(5, 8)}
    for factor, axes in explorer.axes.items():
        for axis in axes.values():
            outside = axis.direction.clone()
            outside[places[factor]] = 0
            assert axis.direction.norm() > 0 and outside.norm() == 0
    assert [name for name in explorer.axes["residual"]] == ["direction 1", "direction 2", "direction 3"]


def test_principal_axes_are_singular_vectors_in_standard_deviations():
    part = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    part = part * torch.tensor([1.0, 5.0, 2.0])
    factors = iin_fast.Factors({"a": torch.zeros(50, 2, dtype=torch.float64), "b": part})
    axes = principal_axes(factors, "b")
    assert (axes[:, :2] == 0).all()
    _, values, vectors = torch.linalg.svd(part - part.mean(0), full_matrices=False)
    for axis, value, vector in zip(axes[:, 2:], values, vectors, strict=True):
        assert axis.norm() == pytest.approx(value / 49**0.5)
        assert (axis @ vector).abs() == pytest.approx(axis.norm())
        assert axis[axis.abs().argmax()] > 0


def test_the_ten_most_frequent_classes_have_an_axis():
    codes = torch.arange(12).repeat_interleave(torch.tensor([1, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 1]))
    factors = iin_fast.Factors({"a": torch.randn(len(codes), 2)})
    names = list(axes_of(factors, "a", codes))
    assert names == [*(f"to a {code}" for code in range(1, 11)), "direction 1", "direction 2"]
    assert list(axes_of(factors, "a", torch.zeros_like(codes))) == ["direction 1", "direction 2"]  # one class


def test_class_axes_have_the_names_of_the_classes(run):
    data = load_latents(run.parent / "latents.npz")
    texts = np.array(["", "disc", "bar", "arc"])[
        data.labels[:, 0] + 1
    ]  # codes of texts are in the order of the alphabet
    save_arrays(run.parent / "named.npz", {"z": data.z, "shape": texts, "color": data.labels[:, 1]})
    explorer = Explorer(run, run.parent / "named.npz")
    classes = [name for name in explorer.axes["shape"] if name.startswith("to ")]
    assert classes == ["to shape arc", "to shape bar", "to shape disc"]
    assert [name for name in explorer.axes["color"] if name.startswith("to ")] == ["to color 0", "to color 1"]
    arc, z = data.labels[:, 0] == 2, data.z
    expected = explorer.model.axis(z[arc], z[~arc & (data.labels[:, 0] >= 0)], "shape")
    assert torch.allclose(explorer.axes["shape"]["to shape arc"].direction, expected, atol=1e-5)
    explorer.choose(3)
    explorer.move("shape", "to shape arc", 0.5)
    found = {}
    exec(explorer.code(), found)
    assert torch.allclose(found["edited"], explorer.z, atol=1e-5)


def test_the_nearest_of_many_samples_are_found_block_by_block(run, monkeypatch):
    explorer = Explorer(run, run.parent / "texts.npz")
    whole = explorer.shown.distances(explorer.shown.z[:3])
    sizes, cdist = [], torch.cdist
    monkeypatch.setattr("iin_fast.report.samples.BLOCK", 8 * 9)
    monkeypatch.setattr(torch, "cdist", lambda a, b: (sizes.append(len(b)), cdist(a, b))[1])
    assert torch.allclose(explorer.shown.distances(explorer.shown.z[:3]), whole)
    assert max(sizes) == 9 and sum(sizes) == len(whole[0])


@pytest.mark.parametrize("name", ["run", "conditional"])
@pytest.mark.parametrize("decoder", [False, True])
def test_the_code_makes_what_is_shown(run, name, decoder):
    where = f"{run.parent / 'decoder.py'}:decode" if decoder else None
    explorer = Explorer(run.parent / name, decoder=where)
    explorer.choose(70)
    for change in (
        lambda: None,
        lambda: explorer.give("shape", 81),
        lambda: explorer.give("color", 95, 0.3),
        lambda: explorer.move("shape", "to shape 1", 0.75),
        lambda: explorer.move("shape", "direction 2", -1.5),
        lambda: explorer.move("residual", "direction 1", 2.0),
    ):
        change()
        found = {}
        exec(explorer.code(), found)
        assert torch.allclose(found["edited"], explorer.z, atol=1e-5)
        assert ("picture" in found) == decoder


def test_the_code_of_other_latents_takes_all_of_them(run):
    explorer = Explorer(run, run.parent / "texts.npz")
    explorer.choose(3)
    explorer.move("shape", "direction 1", 1.0)
    found = {}
    exec(explorer.code(), found)
    assert "held_out" not in explorer.code()
    assert torch.allclose(found["edited"], explorer.z, atol=1e-5)


def test_likelihood_and_outlier_score_are_those_of_the_model(explorer, z):
    explorer.give("shape", 81)
    view = explorer.view()
    assert view.log_prob == pytest.approx(explorer.model.log_prob(explorer.z).item(), abs=1e-4)
    expected = explorer.model.outlier_score(explorer.z, z[HELD_OUT]).item()
    assert view.outlier_score == pytest.approx(expected)


def test_a_conditional_model_keeps_its_context(run):
    explorer = Explorer(run.parent / "conditional")
    data = load_latents(run.parent / "latents.npz")
    context = class_context("", data.labels, data.names, "color")
    row, donor = 70, int(next(i for i in HELD_OUT if data.labels[i, 1] != data.labels[70, 1]))
    explorer.choose(row)
    explorer.give("shape", donor)
    options = {"context": context[[row]], "donor_context": context[[donor]]}
    expected = explorer.model.swap(data.z[[row]], data.z[[donor]], "shape", **options)
    assert torch.allclose(explorer.z, expected, atol=1e-5)


def test_without_a_decoder_the_nearest_samples_are_shown(run, z):
    explorer = Explorer(run, run.parent / "texts.npz")
    explorer.choose(3)
    view = explorer.view()
    assert view.picture is None
    assert [near.distance for near in view.neighbours] == sorted(near.distance for near in view.neighbours)
    assert (view.neighbours[0].row, view.neighbours[0].text, view.neighbours[0].distance) == (3, "text 3", 0)
    second = view.neighbours[1]
    others = torch.cat([z[:3], z[4:]])
    assert second.distance == pytest.approx((others - z[3]).norm(dim=1).min().item(), rel=1e-5)
    for factor in explorer.axes:
        explorer.give(factor, 44)
    assert explorer.view().neighbours[0].text == "text 44"


def test_pictures_follow_the_change(run):
    explorer = Explorer(run, decoder=f"{run.parent / 'decoder.py'}:decode")
    before = explorer.view().picture
    assert before.startswith("data:image/png;base64,") and before == explorer.picture_of(explorer.sample)
    explorer.move("shape", "to shape 1", 1.0)
    assert explorer.view().picture != before
    explorer.move("shape", "to shape 1", 0.0)
    assert explorer.view().picture == before


def test_explorers_of_two_visitors_are_apart(explorer):
    other = explorer.fresh()
    other.give("shape", 81)
    assert explorer.given == {} and explorer.sample == 70 and other.sample == 60


def test_only_held_out_samples_are_shown(explorer):
    assert sorted(explorer.rows) == HELD_OUT.tolist()
    assert sorted(explorer.draw(1000)) == sorted(explorer.rows)
    assert explorer.draw(5, 1) != explorer.draw(5, 2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda e: e.choose(3), "row is 3, expected one of the 40 rows that are shown: 60, 61"),
        (lambda e: e.give("shape", 3), "donor is 3"),
        (lambda e: e.give("size", 70), "factor is 'size', expected one of"),
        (lambda e: e.give("shape", 70, 1.5), "share is 1.5, expected 0 to 1"),
        (lambda e: e.move("shape", "up", 1.0), "axis is 'up', expected one of"),
        (lambda e: e.move("shape", "direction 1", float("nan")), "position is nan"),
    ],
)
def test_what_is_not_there_is_refused(explorer, call, message):
    with pytest.raises(ValueError, match=message):
        call(explorer)
    assert not explorer.given and not explorer.moved


def test_latents_that_are_gone_are_named(run, tmp_path):
    iin_fast.IIN(8, n_flows=1, hidden_dim=4).save(tmp_path)
    with pytest.raises(FileNotFoundError, match="the latents that it was trained on are not there"):
        Explorer(tmp_path)
