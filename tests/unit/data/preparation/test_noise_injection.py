import numpy as np
import pytest

from distav.config.errors import UserError
from distav.data.preparation.noise_injection import LabelNoise, flip_labels, mismatch_pairs

LABELS = np.repeat(np.arange(5), 40)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_flipped_labels_are_stratified_and_always_wrong(kind: str):
    given = flip_labels(LABELS, 5, LabelNoise(kind, 0.4), np.random.default_rng(0))
    for label in range(5):
        assert (given[LABELS == label] != label).sum() == 16
    if kind == "asymmetric":
        assert set(((given - LABELS) % 5).tolist()) == {0, 1}
    else:
        assert set(((given - LABELS) % 5).tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 1.0])
def test_mismatched_pairs_are_a_derangement_of_a_fraction_of_the_clips(rate: float):
    pair = mismatch_pairs(100, rate, np.random.default_rng(1))
    assert sorted(pair) == list(range(100))
    assert (pair != np.arange(100)).sum() == round(100 * rate)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_cross_class_pairs_are_spread_over_all_classes(rate: float):
    pair = mismatch_pairs(200, rate, np.random.default_rng(1), LABELS)
    swapped = pair != np.arange(200)
    assert sorted(pair) == list(range(200)) and swapped.sum() == round(200 * rate)
    assert (LABELS[pair[swapped]] != LABELS[swapped]).all()
    if rate == 1:
        table = np.histogram2d(LABELS, LABELS[pair], bins=5)[0]
        assert (np.diag(table) == 0).all() and table[~np.eye(5, dtype=bool)].min() >= 3


def test_a_majority_class_cannot_be_mismatched_with_other_classes():
    with pytest.raises(UserError, match="--cross-class-only: more than half of the 10 clips"):
        mismatch_pairs(10, 1.0, np.random.default_rng(0), np.array([0] * 6 + [1] * 4))
    pair = mismatch_pairs(10, 1.0, np.random.default_rng(0), np.array([0] * 5 + [1] * 5))
    assert sorted(pair[:5]) == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("text", ["symetric:0.4", "symmetric", "symmetric:2", "symmetric:x"])
def test_invalid_specifications_are_reported(text: str):
    with pytest.raises(UserError, match=text):
        LabelNoise.parse(text)
    assert LabelNoise.parse("") is None
    assert LabelNoise.parse("asymmetric:0.25") == LabelNoise("asymmetric", 0.25)
