"""Pairs from a change that a function makes."""

import pytest
import torch

from iin_fast import LinearIIN
from iin_fast.data import augmentation_pairs

X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0)).double()
TURN = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double())[0]


def shift(x, style):
    """The first two numbers are those of the style."""
    own = torch.randn(2, generator=torch.Generator().manual_seed(style)).double()
    return torch.cat([own.expand(len(x), 2), x[:, 2:]], 1)


def test_pairs_share_the_style_or_the_content():
    pairs = augmentation_pairs(lambda x: x @ TURN, X, shift, styles=5, n=1001, name="tone", rest="rest", seed=1)
    a, b = pairs.za @ TURN.T, pairs.zb @ TURN.T
    same = torch.stack([(a[:, :2] - b[:, :2]).abs().amax(1) < 1e-9, (a[:, 2:] - b[:, 2:]).abs().amax(1) < 1e-9], 1)
    assert torch.equal(same, pairs.shared) and pairs.names == ("tone", "rest")
    assert pairs.shared.sum(0).tolist() == [501, 500] and torch.equal(pairs.factor, pairs.shared.int().argmax(1))
    again = augmentation_pairs(lambda x: x @ TURN, X, shift, styles=5, n=1001, seed=1)
    assert torch.equal(again.za, pairs.za)
    linear = LinearIIN.fit_pairs(pairs.za, pairs.zb, pairs.shared, pairs.names)
    assert linear.sizes["tone"] == 2


def test_what_is_wrong_is_named():
    for options, message in (
        ({"x": X[:1]}, "x has 1 samples"),
        ({"styles": 1}, "styles is 1"),
        ({"rest": "style"}, "rest is 'style'"),
        ({"augment": lambda x, style: x[style:]}, r"augment\(x, 1\) gives 59 samples, expected 60"),
    ):
        with pytest.raises(ValueError, match=message):
            augmentation_pairs(**{"adapter": lambda x: x, "x": X, "augment": shift, **options})
