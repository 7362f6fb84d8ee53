"""The demo: its data and pairs, how images are read, and a whole run of a few steps."""

import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("lightning_fabric")
pytest.importorskip("tensorboard")

import iin_fast
from iin_fast.data import load_latents
from iin_fast.demo import Plan, data, run_demo
from iin_fast.demo.data import PALETTE, ColoredPairs, colorize, draw_colors, jitter, load_digits, paint, read_color
from iin_fast.demo.first_stage import VAE, Judge, pair_latents

FEW = Plan(judge_steps=40, vae_steps=40, pairs=400, iin_steps=20, max_samples=150)  # shows that everything runs


def marked_digits(n):
    """Shapes of one inked pixel, whose column is the label."""
    labels = torch.arange(n) % 10
    shapes = torch.zeros(n, 1, 32, 32)
    shapes[torch.arange(n), 0, 0, labels] = 1
    return data.Digits(shapes, labels)


def read_mark(images):
    return images[:, :, 0].amax(1).argmax(1)


@pytest.fixture(scope="module")
def digits():
    return load_digits(0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "made" / "by the run"
    random_state = torch.get_rng_state()
    found, page = run_demo(out, seed=3, plan=FEW)
    assert torch.equal(torch.get_rng_state(), random_state)  # the caller's own draws are not disturbed
    assert page == out / "report.html"
    return out, found


def test_digits_are_split_by_image_with_every_digit_on_both_sides(digits):
    train, test = digits
    assert len(train) + len(test) == 1797
    assert train.shapes.shape[1:] == (1, 32, 32)
    assert train.shapes.min() == 0 and train.shapes.max() == 1
    for part in digits:
        assert part.labels.bincount(minlength=10).min() > 0.08 * len(part)
    again, _ = load_digits(0)
    assert torch.equal(again.shapes, train.shapes)
    assert not torch.equal(load_digits(1)[0].labels, train.labels)


def test_jitter_keeps_a_shape_readable_and_draws_anew(digits):
    shapes = digits[0].shapes[:64]
    generator = torch.Generator().manual_seed(0)
    first, second = jitter(shapes, generator), jitter(shapes, generator)
    assert first.shape == shapes.shape
    assert not torch.equal(first, second)
    assert (first.mean((1, 2, 3)) / shapes.mean((1, 2, 3)) - 1).abs().max() < 0.5


def test_pairs_share_exactly_one_concept(digits):
    a, b, shared = ColoredPairs(digits[0], seed=0).draw(300)
    assert (shared.sum(1) == 1).all()
    assert 0.35 < shared[:, 0].float().mean() < 0.65
    same_color = (read_color(a) - read_color(b)).abs().amax(1) < 0.2
    assert same_color[shared[:, 1]].float().mean() > 0.95
    assert same_color[shared[:, 0]].float().mean() < 0.2


def test_pairs_share_the_digit_they_say(monkeypatch):
    monkeypatch.setattr(data, "jitter", lambda shapes, generator: shapes)
    digits = marked_digits(200)
    a, b, shared = data.ColoredPairs(digits, seed=0).draw(500)
    assert torch.equal(read_mark(a) == read_mark(b), shared[:, 0])
    assert read_mark(a).unique().tolist() == read_mark(b).unique().tolist() == list(range(10))


def test_pairs_repeat_with_their_seed(digits):
    first, second = (ColoredPairs(digits[0], seed=5).draw(8) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert not torch.equal(ColoredPairs(digits[0], seed=6).draw(8)[0], first[0])


def test_color_is_read_as_it_was_painted(digits):
    shapes = digits[1].shapes
    colors = draw_colors(len(shapes), torch.Generator().manual_seed(0))
    assert colors.min() >= 0 and colors.max() <= 1 and colors.amax(1).min() >= 0.69
    assert (read_color(colorize(shapes, colors)) - colors).abs().mean() < 0.03
    assert torch.isfinite(read_color(torch.zeros(2, 3, 32, 32))).all()


def test_painted_digits_carry_their_labels():
    digits = marked_digits(200)
    images, labels = paint(digits, 2, torch.Generator().manual_seed(0))
    assert torch.equal(read_mark(images), labels[:, 0]) and len(images) == 400
    assert torch.equal(images.amax((2, 3)), PALETTE[labels[:, 1]])
    assert labels[:, 1].unique().tolist() == list(range(len(PALETTE)))


def test_the_palette_is_read_as_it_was_painted(digits):
    images, labels = paint(digits[1], 1, torch.Generator().manual_seed(0))
    judge = Judge().eval()
    found = judge.read(images)
    assert torch.equal(found["color"].argmax(1), labels[:, 1])
    for table in found.values():
        torch.testing.assert_close(table.sum(1), torch.ones(len(images)))


def test_latents_of_pairs_are_those_of_their_images(digits):
    """In parts: the same pairs as in one draw, with what is drawn from the posterior in between."""
    vae = VAE(dim=5, width=4).eval()
    za, zb, shared = pair_latents(vae, digits[0], 450, seed=7)
    assert za.shape == zb.shape == (450, 5) and shared.shape == (450, 2) and (shared.sum(1) == 1).all()
    a, b, first = ColoredPairs(digits[0], seed=7).draw(400)
    assert torch.equal(first, shared[:400])
    for z, images in ((za, a), (zb, b)):
        mean, std = vae.posterior(images)
        assert (((z[:400] - mean) / std).std() - 1).abs() < 0.1


def test_run_leaves_a_run_folder_with_its_latents(finished):
    out, found = finished
    assert json.loads((out / "evaluation.json").read_text()) == json.loads(json.dumps(found))
    assert found["samples"]["learned_on"] == 2 * 1347 and found["concepts"] == ["digit", "color"]
    assert 0 <= found["swap"]["iin"]["digit"]["both"] <= 1
    model = iin_fast.IIN.load(out)
    assert model.dim == 64 and model.concepts == ("digit", "color")
    assert load_latents(out / "latents.npz").kind == "pairs"
    held_out = load_latents(out / "held_out.npz")
    assert held_out.n == 900 and held_out.names == ("digit", "color")
    vae = VAE()
    vae.load_state_dict(torch.load(out / "vae.pt"))
    shown = vae.encode(torch.from_numpy(held_out.images).float() / 255)
    torch.testing.assert_close(shown, held_out.z, atol=0.05, rtol=0.05)  # images are bytes
    pictures = sorted(path.name for path in (out / "pictures").iterdir())
    assert pictures == ["interpolation.png", "swap_color.png", "swap_digit.png"]


def test_report_shows_swaps_and_metrics(finished):
    page = (finished[0] / "report.html").read_text()
    assert "<script" not in page and "http" not in page and "<link" not in page
    assert "There is no decoder" not in page and "Swap digit" in page and "linear IIN" in page


def test_a_second_run_takes_another_folder(finished):
    with pytest.raises(FileExistsError, match="holds a run already"):
        run_demo(finished[0], plan=FEW)


def test_output_folder_that_cannot_be_written_fails_at_once(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="out is .*file.*can't be written as a folder .*[Nn]ot a directory|File exists"):
        run_demo(blocked / "demo")


def test_seed_out_of_range_fails_at_once(tmp_path):
    with pytest.raises(ValueError, match="seed is -1"):
        run_demo(tmp_path, seed=-1)
