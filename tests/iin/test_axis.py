"""Directions of factor space, and outlier scores."""

import math

import pytest
import torch

from iin_fast.iin import IIN


@pytest.fixture
def model(make) -> IIN:
    return make()


def latents(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_axis_is_the_difference_of_means(model):
    with_, without = latents(5, 0) + 1, latents(7, 1)
    axis = model.axis(with_, without)
    expected = model.encode(with_).tensor.mean(0) - model.encode(without).tensor.mean(0)
    torch.testing.assert_close(axis, expected)
    color = model.axis(with_, without, "color")
    torch.testing.assert_close(color[3:5], expected[3:5])
    assert not color[:3].any() and not color[5:].any()
    torch.testing.assert_close(model.axis(with_, without, ["digit", "color", "residual"]), expected)


def test_traverse_moves_along_it(model):
    with_, without = latents(5, 0) + 1, latents(7, 1)
    axis = model.axis(with_, without, "digit")
    line = model.traverse(without, axis, [-1, 0, 0.25, 1])
    assert line.shape == (4, 7, 8)
    torch.testing.assert_close(line[1], without, rtol=1e-8, atol=1e-8)
    start = model.encode(without)
    for position, z in zip((-1, 0, 0.25, 1), line, strict=True):
        torch.testing.assert_close(model.encode(z).tensor, start.tensor + position * axis, rtol=1e-7, atol=1e-7)
    # one whole axis leads from mean to mean, in the factor and there alone
    end = model.encode(line[3])
    torch.testing.assert_close(end["digit"].mean(0), model.encode(with_)["digit"].mean(0), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(end["color"], start["color"], rtol=1e-7, atol=1e-7)
    each = model.traverse(without, axis.expand(7, 8), torch.tensor([1.0]))
    torch.testing.assert_close(each[0], line[3])


def test_gradient_reaches_axis_and_model(model):
    axis = model.axis(latents(3, 0), latents(3, 1), "digit")
    model.traverse(latents(3, 2), axis, [0.5]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_outlier_score_is_the_share_of_likelier_ones(model):
    held_in, z = latents(50, 0), latents(20, 1)
    usual, own = model.log_prob(held_in), model.log_prob(z)
    expected = (usual[None] > own[:, None]).double().sum(1) / 51
    torch.testing.assert_close(model.outlier_score(z, held_in), expected)
    torch.testing.assert_close(model.outlier_score(z, usual.detach()), expected)
    assert not model.outlier_score(z, held_in).requires_grad
    assert model.outlier_score(held_in[usual.argmax()][None], held_in) == 0
    assert model.outlier_score(1e3 * z[:1], held_in) == 50 / 51
    nan = torch.full((1, 8), torch.nan, dtype=torch.float64)
    assert model.outlier_score(nan, held_in) == 50 / 51


def test_outlier_score_is_calibrated(make):
    """Of latents from the distribution of held_in, at most α score 1 - α or more, on average over draws; even untrained."""
    model = make(dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    above = []
    for _ in range(200):
        drawn = torch.randn(59, 8, generator=generator)
        above.append(model.outlier_score(drawn[:40], drawn[40:]) >= 0.9)
    share = torch.stack(above).float().mean().item()
    assert 0.07 < share < 0.12  # exactly 0.1 in expectation: 2 of 20 places


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, z: m.axis(z[:0], z), ValueError, "with_ is empty"),
        (lambda m, z: m.axis(z, z[:0]), ValueError, "without is empty"),
        (lambda m, z: m.axis(z, z[:, :3]), ValueError, r"without has shape \[6, 3\], expected \[6, 8\]"),
        (lambda m, z: m.axis(z, z, "shape"), ValueError, "IIN.axis: factor names 'shape'"),
        (lambda m, z: m.traverse(z, z[0, :3], [1]), ValueError, r"axis has shape \[3\], expected \[8\] or \[6, 8\]"),
        (lambda m, z: m.traverse(z, "digit", [1]), TypeError, "axis is a str"),
        (lambda m, z: m.traverse(z, z[0], 1.0), ValueError, r"positions has shape \[\]"),
        (lambda m, z: m.traverse(z, z[0], []), ValueError, "positions has shape"),
        (lambda m, z: m.traverse(z, z[0], ["a"]), TypeError, "positions is"),
        (lambda m, z: m.traverse(z, z[0], [0, math.nan]), ValueError, "positions is .*, expected finite numbers"),
        (lambda m, z: m.outlier_score(z, z[:0]), ValueError, "held_in has shape"),
        (lambda m, z: m.outlier_score(z, 3), TypeError, "held_in is a int"),
        (lambda m, z: m.outlier_score(z, z[:, :3]), ValueError, r"z has shape \[6, 3\]"),
        (lambda m, z: m.outlier_score(z, torch.tensor([0.0, torch.nan])), ValueError, "held_in has NaN"),
        (lambda m, z: m.outlier_score(z, torch.arange(3)), TypeError, "held_in has dtype int64"),
    ],
)
def test_bad_calls(model, call, error, message):
    with pytest.raises(error, match=message):
        call(model, latents(6, 0))
