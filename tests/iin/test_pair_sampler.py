"""PairSampler: pairs share exactly one concept, evenly drawn, and a run resumes bit for bit."""

import io
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.utils.data import DataLoader

from iin_fast.iin import PairSampler, pairs


def partners(labels: np.ndarray) -> dict[tuple[int, int], set[int]]:
    """By the definition: (row, concept) to all rows that share that concept alone."""
    found: dict[tuple[int, int], set[int]] = {}
    for i, j in itertools.permutations(range(len(labels)), 2):
        same = np.flatnonzero(labels[i] == labels[j])
        if len(same) == 1:
            found.setdefault((i, int(same[0])), set()).add(j)
    return found


def equal(first, second) -> bool:
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


tables = st.tuples(st.integers(1, 30), st.integers(1, 4), st.integers(1, 5)).flatmap(
    lambda shape: arrays.arrays(np.int64, shape[:2], elements=st.integers(0, shape[2]))
)


@settings(deadline=None, max_examples=150)
@given(tables, st.integers(0, 2**40), st.sampled_from([0, 16]))
def test_every_pair_shares_exactly_one_concept(labels, seed, rounds):
    truth = partners(labels)
    weights = [float(any(concept == k for _, concept in truth)) for k in range(labels.shape[1])]
    if not truth:
        with pytest.raises(ValueError, match="no pair that shares concept '0'"):
            PairSampler(labels)
        return
    if 0.0 in weights:
        with pytest.raises(ValueError, match=f"no pair that shares concept '{weights.index(0.0)}'"):
            PairSampler(labels)
    sampler = PairSampler(labels, seed=seed, weights=weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "_ROUNDS", rounds)  # 0: every partner comes from the lists
        drawn = sampler.sample(64)
    assert all(t.dtype == torch.int64 for t in (drawn.a, drawn.b, drawn.factor)) and drawn.shared.dtype == torch.bool
    same = torch.from_numpy(labels)[drawn.a] == torch.from_numpy(labels)[drawn.b]
    assert torch.equal(same, drawn.shared)
    assert torch.equal(drawn.shared.int().argmax(1), drawn.factor)
    assert (drawn.shared.sum(1) == 1).all()
    assert all(
        j in truth[i, k] for i, j, k in zip(*(t.tolist() for t in (drawn.a, drawn.b, drawn.factor)), strict=True)
    )


@settings(deadline=None, max_examples=100)
@given(tables)
def test_partner_counts(labels):
    truth = partners(labels)
    weights = np.ones(labels.shape[1])
    expected = [[len(truth.get((i, k), ())) for k in range(labels.shape[1])] for i in range(len(labels))]
    cells, cell_of, size = np.unique(labels, axis=0, return_inverse=True, return_counts=True)
    counts = pairs._partner_counts(cells, size)
    assert counts[cell_of.reshape(-1)].tolist() == expected
    assert len(weights) == counts.shape[1]


def test_partner_counts_of_many_concepts_compare_cells():
    labels = np.random.default_rng(0).integers(5, size=(60, 20))
    truth = partners(labels)
    counts = pairs._partner_counts(labels, np.ones(60, dtype=np.int64))
    assert counts.tolist() == [[len(truth.get((i, k), ())) for k in range(20)] for i in range(60)]
    assert counts.any()


def test_too_many_combinations_are_refused_at_once():
    cells = np.broadcast_to(np.arange(10**7)[:, None], (10**7, 40))
    with pytest.raises(ValueError, match="10000000 different combinations of 40 concepts"):
        pairs._partner_counts(cells, np.broadcast_to(np.int64(1), 10**7))


@pytest.mark.parametrize("rounds", [0, 1, 16])
@pytest.mark.parametrize("concepts", [1, 2, 3])
def test_even(monkeypatch, rounds, concepts):
    """Concepts evenly, anchors evenly within a concept, partners evenly within an anchor: to 5 sigma."""
    monkeypatch.setattr(pairs, "_ROUNDS", rounds)
    labels = np.random.default_rng(3).integers(3, size=(12, concepts))
    truth = partners(labels)
    n = 60_000
    drawn = PairSampler(labels, seed=5).sample(n)
    triples = list(zip(*(t.tolist() for t in (drawn.a, drawn.b, drawn.factor)), strict=True))
    seen = {triple: triples.count(triple) for triple in set(triples)}
    for k in range(concepts):
        anchors = [i for i, concept in truth if concept == k]
        for i in anchors:
            for j in truth[i, k]:
                p = 1 / concepts / len(anchors) / len(truth[i, k])
                assert abs(seen.pop((i, j, k), 0) - n * p) < 5 * np.sqrt(n * p * (1 - p))
    assert not seen


def test_weights():
    labels = {"digit": [0, 0, 1, 1], "color": [0, 1, 0, 1]}
    n = 20_000
    share = PairSampler(labels, weights=[3, 1]).sample(n).shared.float().mean(0)
    assert abs(share[0] - 0.75) < 0.02
    assert torch.equal(PairSampler(labels, weights={"color": 1, "digit": 3}).sample(n).shared.float().mean(0), share)
    assert PairSampler(labels, weights={"color": 0, "digit": 1}).sample(n).shared[:, 0].all()


def test_concept_without_pairs():
    labels = {"digit": [0, 0, 1, 1], "shade": [0, 1, 2, 3]}
    with pytest.raises(ValueError, match="no pair that shares concept 'shade' and differs in all others"):
        PairSampler(labels)
    assert PairSampler(labels, weights=[1, 0]).sample(50).shared[:, 0].all()


def test_kinds_of_labels_agree():
    array = np.random.default_rng(0).integers(4, size=(50, 2))
    expected = PairSampler(array, seed=3).sample(20)
    for labels in (
        torch.from_numpy(array),
        array.astype(np.uint8),
        array.tolist(),
        {"x": array[:, 0], "y": torch.from_numpy(array[:, 1])},
        array * 1000 + 7,  # only which labels are equal counts
        array.astype(np.int64) * 2**50,
    ):
        assert equal(PairSampler(labels, seed=3).sample(20), expected)
    assert PairSampler({"x": array[:, 0], "y": array[:, 1]}).names == ("x", "y")
    assert PairSampler(array, names=["p", "q"]).names == ("p", "q")
    assert PairSampler(array > 1).sample(20).shared.sum() == 20


@pytest.fixture
def sampler() -> PairSampler:
    return PairSampler(np.random.default_rng(0).integers(4, size=(200, 3)), seed=11)


def test_seed(sampler):
    labels = np.random.default_rng(0).integers(4, size=(200, 3))
    first, second = sampler.sample(40), sampler.sample(40)
    again = PairSampler(labels, seed=11)
    assert equal(again.sample(40), first) and equal(again.sample(40), second)
    assert not torch.equal(first.a, second.a)
    assert not torch.equal(PairSampler(labels, seed=12).sample(40).a, first.a)


def test_global_random_state_is_left_alone(sampler):
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.get_rng_state(), np.random.get_state()[1].tolist()
    sampler.sample(10)
    assert torch.equal(torch.get_rng_state(), expected[0]) and np.random.get_state()[1].tolist() == expected[1]


def through_json(state):
    return json.loads(json.dumps(state))


def through_torch(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("store", [dict, through_json, through_torch])
def test_resume_bit_for_bit(sampler, store):
    for _ in range(3):
        sampler.sample(16)
    state = store(sampler.state_dict())
    expected = [sampler.sample(16) for _ in range(3)]
    other = PairSampler(np.random.default_rng(0).integers(4, size=(200, 3)), seed=0)
    other.load_state_dict(state)
    assert all(equal(other.sample(16), pairs) for pairs in expected)


def test_bad_state(sampler):
    with pytest.raises(ValueError, match="keys"):
        sampler.load_state_dict({"step": 3})
    with pytest.raises(ValueError, match="other labels"):
        sampler.load_state_dict({**sampler.state_dict(), "labels": 1})
    with pytest.raises(ValueError, match=r"state\['step'\] is -1"):
        sampler.load_state_dict({**sampler.state_dict(), "step": -1})
    assert sampler.state_dict()["step"] == 0


def test_batches(sampler):
    expected = [sampler.sample(16) for _ in range(6)]
    batches = sampler.batches(16, 4, start=2)
    assert len(batches) == 4
    assert all(equal(x, y) for x, y in zip(batches, expected[2:], strict=True))
    assert equal(batches[1], expected[3])
    assert equal(sampler.batches(16, 1)[0], sampler.sample(16))  # from where the sampler stands
    with pytest.raises(IndexError, match="index is 4, expected 0 to 3"):
        batches[4]


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(sampler, workers):
    loader = DataLoader(sampler.batches(16, 5), batch_size=None, num_workers=workers)
    loaded = list(loader)
    assert len(loaded) == 5
    assert all(equal(pairs, sampler.sample(16)) for pairs in loaded)


def test_many_rows_of_one_label_need_no_luck():
    """One partner among 1e5 rows of the same digit: found from the lists, not by chance."""
    digit = np.zeros(100_000, dtype=np.int64)
    color = np.zeros(100_000, dtype=np.int64)
    color[77] = 1
    sampler = PairSampler({"digit": digit, "color": color}, weights=[1, 0])
    pairs = sampler.sample(500)
    assert ((pairs.a == 77) ^ (pairs.b == 77)).all()


LABELS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])


@pytest.mark.parametrize(
    "labels, options, error, message",
    [
        (np.zeros((0, 2), int), {}, ValueError, r"labels is empty, of shape \[0, 2\]"),
        (np.zeros((3, 0), int), {}, ValueError, r"labels is empty, of shape \[3, 0\]"),
        ([], {}, ValueError, "labels is empty"),
        ({}, {}, ValueError, "labels are empty"),
        ({"digit": []}, {}, ValueError, r"labels\['digit'\] is empty"),
        (LABELS.astype(float), {}, TypeError, "labels is float64, expected integers"),
        (np.where(LABELS, np.nan, 0.0), {}, TypeError, "labels is float64"),
        (LABELS.astype(complex), {}, TypeError, "labels is complex128"),
        (torch.rand(4, 2), {}, TypeError, "labels is float32"),
        (LABELS - 2, {}, ValueError, "value -2, expected none below 0 but -1 for unknown"),
        (LABELS, {"unlabelled": 0.5}, ValueError, "unlabelled is 0.5, expected 0 where every row has a label"),
        (LABELS, {"unlabelled": 1.5}, ValueError, "unlabelled is 1.5, expected a number from 0 to 1"),
        (LABELS, {"unlabelled": "half"}, TypeError, "unlabelled is 'half'"),
        (np.full((4, 2), -1), {}, ValueError, "no pair that shares concept '0'"),
        (LABELS[:, 0], {}, ValueError, r"shape \[4\], expected \[n, concepts\]"),
        (
            {"a": [0, 1], "b": [0, 1, 2]},
            {},
            ValueError,
            r"labels\['b'\] has shape \[3\], expected \[2\] like labels\['a'\]",
        ),
        ({"a": LABELS, "b": LABELS}, {}, ValueError, r"labels\['a'\] has shape \[4, 2\], expected \[n\]"),
        ({3: [0, 1]}, {}, TypeError, "names has 3"),
        ({"a": [0, 1]}, {"names": ["a"]}, ValueError, "names is given"),
        (LABELS, {"names": ["a"]}, ValueError, "names has 1 names, expected 2"),
        (LABELS, {"names": ["a", "a"]}, ValueError, "names has one twice"),
        (LABELS, {"weights": [1]}, ValueError, r"weights has shape \[1\], expected \[2\]"),
        (LABELS, {"weights": [-1, 1]}, ValueError, "weights are"),
        (LABELS, {"weights": [0, 0]}, ValueError, "not all 0"),
        (LABELS, {"weights": [np.nan, 1]}, ValueError, "finite"),
        (LABELS, {"weights": [1e308, 1e308]}, ValueError, "of a finite sum"),
        (LABELS, {"weights": ["much", 1]}, TypeError, r"weights are \['much', 1\], expected numbers"),
        (LABELS, {"weights": {"0": "much", "1": 1}}, TypeError, r"weights are \['much', 1\], expected numbers"),
        (
            LABELS.astype(np.uint64) - 1,
            {},
            ValueError,
            "value 18446744073709551615, expected less than 9223372036854775807",
        ),
        (LABELS + np.iinfo(np.int64).max - 1, {}, ValueError, "value 9223372036854775807, expected less than"),
        (LABELS, {"weights": {"0": 1, "x": 1}}, ValueError, "weights has the names"),
        (LABELS, {"seed": -1}, ValueError, "seed is -1"),
        (LABELS, {"seed": 0.5}, TypeError, "seed is 0.5"),
        (LABELS, {"seed": 2**64}, ValueError, "seed is 18446744073709551616, expected an integer below"),
        (np.zeros((5, 2), int), {}, ValueError, "no pair that shares concept '0'"),
    ],
)
def test_bad_input(labels, options, error, message):
    with pytest.raises(error, match=message):
        PairSampler(labels, **options)


@pytest.mark.parametrize("batch_size, error", [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bad_batch_size(sampler, batch_size, error):
    with pytest.raises(error, match="batch_size is"):
        sampler.sample(batch_size)
    with pytest.raises(error, match="batch_size is"):
        sampler.batches(batch_size, 3)


@settings(deadline=None, max_examples=60)
@given(tables, st.integers(0, 2**40))
def test_others_free(labels, seed):
    """Partners share the drawn concept, and ``shared`` marks all that agree; every row with a partner comes up."""
    sizes = [[int((labels[:, k] == value).sum()) for value in labels[:, k]] for k in range(labels.shape[1])]
    weights = [float(max(size) > 1) for size in sizes]
    if not any(weights):
        with pytest.raises(ValueError, match="no pair that shares concept '0';"):
            PairSampler(labels, others="any")
        return
    drawn = PairSampler(labels, seed=seed, weights=weights, others="any").sample(200)
    assert torch.equal(drawn.shared, torch.from_numpy(labels)[drawn.a] == torch.from_numpy(labels)[drawn.b])
    assert drawn.shared[torch.arange(200), drawn.factor].all()
    assert (drawn.a != drawn.b).all()


def test_others_free_are_independent():
    """With two binary concepts, pairs that share one agree in the other half of the time."""
    labels = np.random.default_rng(0).integers(2, size=(400, 3))
    drawn = PairSampler(labels, seed=1, others="any").sample(4000)
    agree = drawn.shared[drawn.factor == 0, 1].float().mean().item()
    assert abs(agree - 0.5) < 0.06
    with pytest.raises(ValueError, match="others is 'free', expected 'differ', 'any' or 'agree'"):
        PairSampler(labels, others="free")


with_gaps = st.tuples(st.integers(1, 30), st.integers(1, 4), st.integers(1, 3)).flatmap(
    lambda shape: arrays.arrays(np.int64, shape[:2], elements=st.integers(-1, shape[2]))
)


def unknown_apart(labels: np.ndarray) -> np.ndarray:
    """By the definition: each unknown label is a value of its own."""
    apart = labels.copy()
    apart[labels == -1] = 1000 + np.arange((labels == -1).sum())
    return apart


@settings(deadline=None, max_examples=100)
@given(with_gaps, st.integers(0, 2**40), st.sampled_from(["differ", "any", "agree"]), st.sampled_from([0, 16]))
def test_partners_with_unknown_labels(labels, seed, others, rounds):
    """Each way to draw, against its definition pair by pair; rows without labels share nothing."""
    n, concepts = labels.shape
    apart = unknown_apart(labels)
    same = apart[:, None] == apart[None]  # [n, n, concepts]
    truth = np.zeros((n, n, concepts), dtype=bool)
    for k in range(concepts):
        rest = np.delete(same, k, axis=2)
        known = (labels[:, k] >= 0)[:, None] & (labels[:, k] >= 0)[None]
        truth[..., k] = {
            "any": same[..., k],
            "differ": same[..., k] & ~rest.any(2),
            "agree": ~same[..., k] & rest.all(2) & known,
        }[others]
        np.fill_diagonal(truth[..., k], False)
    weights = [float(truth[..., k].any()) for k in range(concepts)]
    if not any(weights):
        with pytest.raises(ValueError, match="no pair that"):
            PairSampler(labels, others=others)
        return
    sampler = PairSampler(labels, seed=seed, weights=weights, others=others)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "_ROUNDS", rounds)
        drawn = sampler.sample(128)
    a, b, factor = drawn.a.numpy(), drawn.b.numpy(), drawn.factor.numpy()
    labelled = factor >= 0
    assert truth[a[labelled], b[labelled], factor[labelled]].all()
    assert torch.equal(drawn.shared[labelled], torch.from_numpy(same[a, b])[labelled])
    empty = (labels == -1).all(1)
    assert labelled.all() == (not empty.any())
    assert empty[a[~labelled]].all() and empty[b[~labelled]].all() and not drawn.shared[~labelled].any()


def test_agree_names_a_concept_by_its_change():
    labels = {"digit": [0, 0, 1, 1], "color": [0, 1, 0, 1], "size": [0, 0, 0, 0]}
    drawn = PairSampler(labels, seed=1, others="agree", weights=[1, 1, 0]).sample(400)
    assert torch.equal(~drawn.shared, torch.nn.functional.one_hot(drawn.factor, 3).bool())
    assert set(drawn.factor.tolist()) == {0, 1}
    with pytest.raises(ValueError, match="no pair that differs in concept 'size' and shares all others"):
        PairSampler(labels, others="agree")


def test_share_of_unlabelled_rows():
    labels = np.full((1000, 2), -1)
    labels[:40] = np.random.default_rng(0).integers(3, size=(40, 2))
    for asked, expected in ((None, 0.5), (0.2, 0.2), (1.0, 1.0), (0, 0.0)):
        sampler = PairSampler(labels, seed=2, unlabelled=asked)
        share = (sampler.sample(4000).factor < 0).float().mean().item()
        assert abs(share - expected) < 0.04
    rows = PairSampler(labels, seed=2, unlabelled=1.0).sample(20_000)
    assert set(torch.cat([rows.a, rows.b]).tolist()) == set(range(40, 1000))


def test_unknown_labels_change_nothing_for_full_tables():
    """The same seed gives the same pairs as before labels could be missing."""
    labels = np.random.default_rng(0).integers(4, size=(200, 3))
    drawn = PairSampler(labels, seed=11).sample(6)
    assert drawn.a.tolist() == [109, 88, 132, 14, 108, 27] and drawn.b.tolist() == [194, 198, 165, 127, 103, 78]
