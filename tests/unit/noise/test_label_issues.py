"""Label correction of NumPy arrays."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import entropy

import distav
from distav.config.errors import UserError
from distav.noise.label_issues import RANKINGS
from tools.examples.correct_embeddings import main as example
from tools.examples.correct_embeddings import make_embeddings

SIZE, CLASSES = 600, 4


@pytest.fixture(scope="module")
def problem() -> dict[str, np.ndarray]:
    """Separable embeddings of both modalities, 25 % wrong labels."""
    rng = np.random.default_rng(3)
    true = rng.integers(CLASSES, size=SIZE)
    given = np.where(rng.random(SIZE) < 0.25, (true + rng.integers(1, CLASSES, SIZE)) % CLASSES, true)
    centers = 1.5 * rng.normal(size=(2, CLASSES, 16))
    features = centers[:, true] + rng.normal(size=(2, SIZE, 16))
    return {"true": true, "given": given, "visual": features[0], "audio": features[1]}


@pytest.fixture(scope="module")
def corrected(problem: dict[str, np.ndarray]) -> distav.CorrectedLabels:
    return distav.correct_labels(problem["visual"], problem["given"])


def test_embeddings_of_one_network_yield_labels_and_the_noise_rate(
    problem: dict[str, np.ndarray], corrected: distav.CorrectedLabels
):
    wrong = problem["given"] != problem["true"]
    assert (corrected.corrected == problem["true"]).mean() > 0.98 and corrected.has_signal
    assert corrected.label_noise_rate.ci95_low <= wrong.mean() <= corrected.label_noise_rate.ci95_high
    assert corrected.pair_mismatch_rate is None and (corrected.correspondence == 1).all()
    assert set(corrected.label_noise_rate_by_class) == set(range(CLASSES))
    np.testing.assert_allclose(corrected.pred_probs.sum(1), 1, rtol=1e-4)
    self_confidence = corrected.pred_probs[np.arange(SIZE), problem["given"]]
    np.testing.assert_allclose(corrected.self_confidence, self_confidence, rtol=1e-5)
    table = corrected.table().to_pydict()
    assert table["is_issue"] == [a != b for a, b in zip(table["given_label"], table["corrected_label"], strict=True)]


def test_texts_groups_and_the_name_of_the_modality_change_nothing(
    problem: dict[str, np.ndarray], corrected: distav.CorrectedLabels
):
    names = np.array(["bark", "clap", "rain", "wind"])
    result = distav.correct_labels(
        {"visual": problem["visual"].tolist()},
        names[problem["given"]].tolist(),
        groups=[f"video {number}" for number in range(SIZE)],
    )
    assert (result.corrected == names[corrected.corrected]).all() and result.classes.tolist() == names.tolist()
    np.testing.assert_allclose(result.confidence, corrected.confidence, rtol=1e-5)


def test_rows_of_nan_lack_the_modality(problem: dict[str, np.ndarray]):
    visual, audio = problem["visual"].copy(), problem["audio"].copy()
    visual[:200], audio[100:300] = np.nan, np.nan
    result = distav.correct_labels({"visual": visual, "audio": audio}, problem["given"])
    assert result.pair_mismatch_rate is not None and np.isfinite(result.pred_probs).all()
    assert (result.corrected[:100] == problem["true"][:100]).mean() > 0.9  # by audio alone
    assert (result.corrected[100:200] == problem["given"][100:200]).all()  # no modality at all
    assert (result.corrected[200:] == problem["true"][200:]).mean() > 0.95


def test_features_without_signal_change_no_label(problem: dict[str, np.ndarray]):
    noise = np.random.default_rng(0).normal(size=(SIZE, 8))
    with pytest.warns(UserWarning, match=f"labels are unchanged, .*: {SIZE} samples are too few, or the features"):
        result = distav.correct_labels(noise, problem["given"])
    assert repr(result) == f"CorrectedLabels({SIZE} samples, 4 classes: no label signal)"
    assert not result.has_signal and not result.is_issue.any() and not result.label_noise_rate_by_class
    assert result.label_noise_rate.ci95_width > 0.7


def test_tiny_datasets_are_accepted():
    labels = np.arange(12) % 3
    with pytest.warns(UserWarning, match="12 samples are too few"):
        result = distav.correct_labels(np.eye(3)[labels], labels)
    assert (result.corrected == labels).all()


def test_the_result_is_described_in_one_line(corrected: distav.CorrectedLabels):
    rate = corrected.label_noise_rate
    assert repr(corrected) == (
        f"CorrectedLabels({SIZE} samples, 4 classes: {corrected.is_issue.sum()} labels changed, label noise rate "
        f"{rate.estimate:.1%} (95 % interval {rate.ci95_low:.1%} to {rate.ci95_high:.1%}))"
    )


def test_issues_are_a_mask_or_ranked_indices(problem: dict[str, np.ndarray], corrected: distav.CorrectedLabels):
    arguments = problem["given"], problem["visual"]
    assert (distav.find_label_issues(*arguments) == corrected.is_issue).all()
    for ranking in RANKINGS:
        ranked = distav.find_label_issues(*arguments, return_indices_ranked_by=ranking)
        assert sorted(ranked) == np.flatnonzero(corrected.is_issue).tolist()
        given = corrected.self_confidence[ranked]
        others = corrected.pred_probs[ranked].copy()
        others[np.arange(len(ranked)), problem["given"][ranked]] = -1
        scores = {
            "self_confidence": given,
            "normalized_margin": given - others.max(1),
            "confidence_weighted_entropy": given / entropy(corrected.pred_probs[ranked], axis=1),
        }[ranking]
        assert (np.diff(scores) >= 0).all()


def test_the_example_finds_the_noise_that_it_makes(capsys: pytest.CaptureFixture[str]):
    result = example()
    assert result.label_noise_rate.ci95_low < 0.3 < result.label_noise_rate.ci95_high
    assert result.pair_mismatch_rate is not None
    assert result.pair_mismatch_rate.ci95_low < 0.2 * 5 / 6 < result.pair_mismatch_rate.ci95_high
    assert "labels: " in capsys.readouterr().out and make_embeddings(50)["visual"].shape == (50, 32)


GOOD = np.ones((4, 2))


@pytest.mark.parametrize(
    ("features", "labels", "options", "message"),
    [
        (GOOD, [0, 1, 0], {}, r"features: shape \(4, 2\); allowed: \(3, E\)"),
        ({"video": GOOD}, [0, 1, 0, 1], {}, r"features: keys \['video'\]; allowed: visual and audio"),
        ({}, [0, 1, 0, 1], {}, r"features: keys \[\]"),
        ({"audio": [["a"]] * 4}, [0, 1, 0, 1], {}, r"features\['audio'\]: not an array of numbers"),
        (
            [[1, np.inf]] * 4,
            [0, 1, 0, 1],
            {},
            r"features: row 0 has values that are not finite in float32 \(4 such rows\)",
        ),
        ([[1, np.nan]] * 4, [0, 1, 0, 1], {}, r"NaN in the whole row"),
        (GOOD * np.nan, [0, 1, 0, 1], {}, r"every row is NaN"),
        (GOOD, [0, 0, 0, 0], {}, r"labels: all 4 labels are 0"),
        (GOOD, [0.5, 1.0, 0.0, 1.0], {}, r"labels: 0.5 in row 0; allowed: \[N\] integers or texts"),
        (GOOD, [np.nan, "a", "b", "a"], {}, r"labels: nan in row 0; allowed"),
        (GOOD, [1, "a", "b", "a"], {}, r"labels: some are texts and others are integers"),
        (GOOD, ["a", "b", "c", "d"], {}, r"labels: each of the 4 labels occurs once; give the classes"),
        (GOOD, None, {}, r"labels: shape \(\); allowed"),
        (GOOD, np.eye(4), {}, r"labels: shape \(4, 4\); .* use distav.correct_label_lists"),
        (GOOD, [["a"], ["a", "b"], [], []], {}, r"labels: \['a'\] in row 0; .* use distav.correct_label_lists"),
        (GOOD, ["a", None, "b", "a"], {}, r"labels: None in row 1; allowed: .* one label per sample"),
        (np.ones((0, 2)), np.zeros(0, int), {}, r"labels: empty"),
        (GOOD, [0, 1, 0, 1], {"groups": [1, 2]}, r"groups: shape \(2,\); allowed: \(4,\)"),
        (GOOD, [0, 1, 0, 1], {"groups": ["a", None, "b", "b"]}, r"groups: None in row 1; allowed: an identifier"),
        (GOOD, [0, 1, 0, 1], {"groups": [1.0, 2.0, np.nan, 3.0]}, r"groups: nan in row 2"),
        (GOOD, [0, 1, 0, 1], {"num_neighbors": []}, r"num_neighbors=\[\]"),
        (GOOD, [0, 1, 0, 1], {"num_neighbors": 20}, r"num_neighbors=20: allowed: a list of integers"),
        (GOOD, [0, 1, 0, 1], {"num_neighbors": [10.5]}, r"num_neighbors=\[10.5\]"),
        (GOOD, [0, 1, 0, 1], {"num_neighbors": "20"}, r"num_neighbors='20'"),
        (GOOD * 1e300, [0, 1, 0, 1], {}, r"features: row 0 has values that are not finite in float32"),
        (GOOD * 1j, [0, 1, 0, 1], {}, r"features: not an array of numbers, but of type complex128"),
        ({"visual": GOOD, "audio": None}, [0, 1, 0, 1], {}, r"features\['audio'\]: shape \(\)"),
        (GOOD, [0, 1, 0, 1], {"min_change_odds": "2"}, r"min_change_odds='2': allowed: a number"),
        (GOOD, [0, 1, 0, 1], {"num_neighbors": [0]}, r"num_neighbors=\[0\]"),
        (GOOD, [0, 1, 0, 1], {"min_change_odds": 0.5}, r"min_change_odds=0.5: allowed: a number, 1 or more"),
    ],
)
def test_invalid_arguments_are_named(features: Any, labels: Any, options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        distav.correct_labels(features, labels, **options)


def test_an_unknown_ranking_is_named():
    with pytest.raises(UserError, match="return_indices_ranked_by='margin': allowed: None"):
        distav.find_label_issues([0, 1], GOOD[:2], return_indices_ranked_by="margin")  # pyright: ignore[reportArgumentType]
