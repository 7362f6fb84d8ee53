"""The demo: its data and pairs, how swaps are judged, and a whole run of a few steps."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("safetensors")

from iin_fast.demo import data, run_demo
from iin_fast.demo.data import ColoredPairs, colorize, draw_colors, jitter, load_digits
from iin_fast.demo.evaluate import HeldOut, MeanShift, score_swaps
from iin_fast.demo.first_stage import VAE
from iin_fast.demo.judge import read_color

PICTURES = ["swap_digit.png", "swap_color.png", "interpolation.png", "samples.png", "loss.png"]
SWAPS = ["swap_digit_accuracy", "swap_digit_color_error", "swap_color_accuracy", "swap_color_error"]


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
    metrics = run_demo(out, seed=3, quick=True)
    assert torch.equal(torch.get_rng_state(), random_state)  # the caller's own draws are not disturbed
    return out, metrics


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


def test_scores_tell_a_swap_of_nothing_from_a_swap_of_everything():
    digits = marked_digits(100)
    images = colorize(digits.shapes, draw_colors(100, torch.Generator().manual_seed(0)))
    held_out = HeldOut(images, digits.labels, images[:, :, 0].amax(2), z=images.flatten(1))
    vae = SimpleNamespace(decode=lambda z: z.unflatten(1, images.shape[1:]))
    judge = SimpleNamespace(read=read_mark)

    def scores(swap):
        return tuple(score_swaps(swap, held_out, vae, judge, seed=0)[name] for name in SWAPS)

    digit_read, color_changed, digit_kept, color_missed = scores(lambda factor, keeper, donor: held_out.z[keeper])
    assert (digit_read, color_changed, digit_kept) == (0, 0, 1) and color_missed > 0.1
    digit_read, color_changed, digit_kept, color_missed = scores(lambda factor, keeper, donor: held_out.z[donor])
    assert (digit_read, digit_kept, color_missed) == (1, 0, 0) and color_changed > 0.1


def test_mean_shift_moves_means_onto_means(digits):
    vae = VAE(width=4).eval()
    train = HeldOut.of(vae, digits[0].take(torch.arange(200)), seed=0)
    shift = MeanShift(train).on(train)
    threes, eights = ((train.labels == digit).nonzero()[:, 0] for digit in (3, 8))
    moved = shift("digit", threes, eights[:1].expand(len(threes)))
    torch.testing.assert_close(moved.mean(0), train.z[eights].mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(shift("color", threes, threes), train.z[threes])


def test_run_leaves_all_its_results(finished):
    out, metrics = finished
    for name in PICTURES:
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((out / "metrics.json").read_text()) == metrics
    for key in SWAPS:
        for name in (key, f"baseline_{key}"):
            assert 0 <= metrics[name] <= 1, name
    assert 0 <= metrics["judge_accuracy"] <= 1
    assert list(metrics["factor_dims"]) == ["digit", "color", "residual"]
    assert sum(metrics["factor_dims"].values()) == 64 and min(metrics["factor_dims"].values()) > 0
    assert metrics["invertibility_error"] < 1e-3
    throughput = json.loads((out / "throughput.json").read_text())
    for name in ("forward", "inverse", "training_step"):
        for who in ("published_eager", "iin_fast"):
            times = throughput[name][who]
            assert 0 < times["min_ms"] <= times["median_ms"] <= times["max_ms"]


def test_report_is_one_page_that_needs_nothing_else(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(PICTURES)
    assert "<script" not in page and "http" not in page and "<link" not in page


def test_trained_model_loads(finished):
    import iin_fast

    out, metrics = finished
    model = iin_fast.IIN.load(out / "iin")
    assert model.sizes == metrics["factor_dims"]


def test_output_folder_that_cannot_be_written_fails_at_once(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="out is .*file.*can't be written as a folder .*[Nn]ot a directory|File exists"):
        run_demo(blocked / "demo")


def test_seed_out_of_range_fails_at_once(tmp_path):
    with pytest.raises(ValueError, match="seed is -1"):
        run_demo(tmp_path, seed=-1)
