"""Label correction of NumPy arrays with several labels per sample."""

from typing import Any

import numpy as np
import pytest

import distav
from distav.config.errors import UserError
from distav.noise.multi_label_issues import _label_matrix
from tests.unit.noise.multi_label_scenes import MultiLabelScene, multi_label_scene

NAMES = ["bark", "clap", "rain", "siren", "speech", "wind"]


@pytest.fixture(scope="module")
def scene() -> MultiLabelScene:
    return multi_label_scene()


@pytest.fixture(scope="module")
def features(scene: MultiLabelScene) -> dict[str, np.ndarray]:
    return dict(zip(("visual", "audio"), (table.numpy() for table in scene.spaces["towers"]), strict=True))


@pytest.fixture(scope="module")
def corrected(scene: MultiLabelScene, features: dict[str, np.ndarray]) -> distav.CorrectedLabelLists:
    return distav.correct_label_lists(features, scene.given.numpy(), classes=NAMES)


def test_missing_and_wrong_labels_are_found_and_counted(scene: MultiLabelScene, corrected: distav.CorrectedLabelLists):
    true, given = scene.true.numpy(), scene.given.numpy()
    right_before, right_after = (given == true).mean(), (corrected.corrected == true).mean()
    assert corrected.has_signal and right_before < 0.92 and right_after > 0.97
    missing, wrong = (true & ~given).sum() / true.sum(), (given & ~true).sum() / (~true).sum()
    for rate, expected in ((corrected.missing_label_rate, missing), (corrected.wrong_label_rate, wrong)):
        assert rate.ci95_low <= expected <= rate.ci95_high and rate.ci95_width < 0.1
    held = [
        rates[name].ci95_low <= float(expected) <= rates[name].ci95_high
        for rates, by_class in (
            (corrected.missing_label_rate_by_class, scene.missing_rates),
            (corrected.wrong_label_rate_by_class, scene.wrong_rates),
        )
        for name, expected in zip(NAMES, by_class, strict=True)
    ]
    assert sum(held) >= 10  # of 12


def test_the_table_lists_classes(corrected: distav.CorrectedLabelLists):
    table = corrected.table().to_pydict()
    for row in (0, 1, 700):
        assert table["given_label"][row] == [NAMES[column] for column in np.flatnonzero(corrected.given[row])]
        assert table["corrected_label"][row] == [NAMES[column] for column in np.flatnonzero(corrected.corrected[row])]
    assert table["is_issue"] == [a != b for a, b in zip(table["given_label"], table["corrected_label"], strict=True)]
    assert 0.5 <= min(table["confidence"]) and max(table["confidence"]) <= 1
    assert repr(corrected).startswith(f"CorrectedLabelLists(1500 samples, 6 classes: {corrected.is_issue.sum()} lists")


def test_lists_are_the_same_as_a_matrix(
    scene: MultiLabelScene, features: dict[str, np.ndarray], corrected: distav.CorrectedLabelLists
):
    lists = [[NAMES[column] for column in np.flatnonzero(row)] for row in scene.given.numpy()]
    result = distav.correct_label_lists(features, lists, groups=[f"video {row}" for row in range(len(lists))])
    assert result.classes == NAMES and (result.given == corrected.given).all()
    np.testing.assert_allclose(result.probabilities, corrected.probabilities, atol=1e-6)


def test_features_without_signal_change_no_label(scene: MultiLabelScene):
    noise = np.random.default_rng(0).normal(size=(1500, 8))
    with pytest.warns(UserWarning, match="labels are unchanged"):
        result = distav.correct_label_lists(noise, scene.given.numpy())
    assert not result.has_signal and not result.is_issue.any() and not result.wrong_label_rate_by_class
    assert repr(result) == "CorrectedLabelLists(1500 samples, 6 classes: no label signal)"


GOOD = np.ones((3, 2))


class Frame:
    """An array with named columns, as pandas has."""

    def __init__(self, values: np.ndarray, columns: list[str]):
        self.values, self.columns = values, columns

    def __len__(self) -> int:
        return len(self.values)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.values


def test_arrays_of_other_libraries_are_accepted(scene: MultiLabelScene, corrected: distav.CorrectedLabelLists):
    matrix = scene.given.numpy()
    lists = np.empty(len(matrix), dtype=object)
    lists[:] = [[NAMES[column] for column in np.flatnonzero(row)] for row in matrix]
    for labels in (Frame(matrix.astype(int), NAMES), lists):
        names, given = _label_matrix(labels, None)
        assert names == NAMES and (given == corrected.given).all()
    names, given = _label_matrix(scene.given.int(), None)
    assert names == list(range(6)) and (given == corrected.given).all()


@pytest.mark.parametrize(
    ("features", "labels", "options", "message"),
    [
        (GOOD, [], {}, "labels: empty"),
        (GOOD, [[], [], []], {}, "none of the 3 samples has a label"),
        (GOOD, np.zeros((3, 2)), {}, "none of the 3 samples has a label"),
        (GOOD, ["dog", "cat", "dog"], {}, r"labels: 'dog' in row 0; allowed: a list of classes"),
        (GOOD, [["dog"], [None], []], {}, r"labels: \[None\] in row 1; allowed"),
        (GOOD, [["dog"], [1], []], {}, "some classes are texts and others are integers"),
        (GOOD, [["dog"], ["dgo"], []], {"classes": ["dog", "cat"]}, r"class 'dgo' in row 1 .* Did you mean 'dog'\?"),
        (GOOD, [["dog"], [], []], {"classes": ["dog", "dog"]}, "classes: dog, dog; allowed: one or more classes, each"),
        (GOOD, None, {}, "labels: NoneType; allowed: a list of classes per sample"),
        (GOOD, (name for name in "abc"), {}, "labels: generator; allowed"),
        (GOOD, "abc", {}, "labels: str; allowed"),
        (GOOD, [1, 2, 3], {}, "labels: 1 in row 0; allowed"),
        (
            GOOD,
            [[0, 0, 1], [1, 0, 0], [0, 1, 1]],
            {},
            r"row 0 has a class twice; .* Rows of 0 and 1 have",
        ),
        (GOOD, [[True, False]] * 3, {}, r"labels: \[True, False\] in row 0; allowed"),
        (GOOD, [["dog"], [], []], {"classes": []}, "classes: empty; allowed: one or more classes"),
        (GOOD, [["dog"], [], []], {"classes": {"dog"}}, "classes: set; allowed: a list of classes"),
        (GOOD, [["dog"], [], []], {"min_log_likelihood_gain": None}, "min_log_likelihood_gain=None: allowed: a number"),
        (GOOD, np.array([0, 1, 2]), {}, r"labels: shape \(3,\), .* use distav.correct_labels"),
        (GOOD, np.array([[0, 2]] * 3), {}, r"labels: shape \(3, 2\), type int64; allowed"),
        (GOOD, np.eye(3), {"classes": ["dog"]}, "classes: 1 classes for 3 columns"),
        (GOOD[:2], [["dog"], [], []], {}, r"features: shape \(2, 2\); allowed: \(3, E\)"),
        (GOOD, [["dog"], [], []], {"groups": [1]}, r"groups: shape \(1,\)"),
        (GOOD, [["dog"], [], []], {"num_neighbors": [0]}, r"num_neighbors=\[0\]"),
    ],
)
def test_invalid_arguments_are_named(features: Any, labels: Any, options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        distav.correct_label_lists(features, labels, **options)
