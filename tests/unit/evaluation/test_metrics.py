"""Retrieval against plain loops, and the confusion matrix of noise."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, top_k_accuracy_score

from distav.evaluation.metrics import NOISE_KINDS, class_scores, confusion, noise_kinds, retrieval


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_class_scores_equal_those_of_another_library(scale: float):
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 7, (200,), generator=generator)  # The last of eight classes has no clips.
    scores = scale * (F.one_hot(classes, 8) + torch.randn(200, 8, generator=generator))
    metrics, predicted, names = class_scores(scores, classes), scores.argmax(1), list(range(7))
    assert metrics["top1"] == pytest.approx(float((predicted == classes).float().mean()))
    assert metrics["top5"] == pytest.approx(top_k_accuracy_score(classes, scores, k=5, labels=range(8)))
    assert metrics["balanced"] == pytest.approx(balanced_accuracy_score(classes, predicted))
    assert metrics["f1_macro"] == pytest.approx(f1_score(classes, predicted, labels=names, average="macro"))
    precisions = [average_precision_score(classes == name, scores[:, name]) for name in names]
    assert metrics["map"] == pytest.approx(np.mean(precisions), abs=1e-6)
    one_class = class_scores(scores[:, :1], torch.zeros(200, dtype=torch.int64))
    assert one_class == {"top1": 1.0, "balanced": 1.0, "f1_macro": 1.0, "map": 1.0}
    assert (
        "top5" not in class_scores(scores[:, :3], classes.clamp(max=2)) and class_scores(scores[:0], classes[:0]) == {}
    )


def test_retrieval_metrics_equal_those_of_loops():
    generator = torch.Generator().manual_seed(0)
    visual, audio = (F.normalize(torch.randn(60, 5, generator=generator), dim=1) for _ in range(2))
    classes = torch.randint(0, 4, (60,), generator=generator)
    metrics = retrieval(visual, audio, classes)
    for direction, scores in (("v2a", visual @ audio.T), ("a2v", audio @ visual.T)):
        ranks = [int((row > row[number]).sum()) for number, row in enumerate(scores)]
        for k in (1, 5, 10):
            assert metrics[f"{direction}_recall@{k}"] == pytest.approx(np.mean([rank < k for rank in ranks]))
        precisions = [
            average_precision_score((classes == classes[number]).numpy(), row.numpy())
            for number, row in enumerate(scores)
        ]
        assert metrics[f"{direction}_map"] == pytest.approx(np.mean(precisions))
    recalls = [value for key, value in metrics.items() if "recall" in key]
    assert len(recalls) == 6 and metrics["rsum"] == pytest.approx(100 * sum(recalls))


def test_retrieval_of_identical_rows_and_of_none():
    rows = F.normalize(torch.eye(12), dim=1)
    metrics = retrieval(rows, rows, torch.arange(12))
    assert metrics.pop("rsum") == 600 and set(metrics.values()) == {1.0}
    constant = retrieval(torch.ones(20, 1), torch.ones(20, 1), torch.zeros(20, dtype=torch.int64))
    assert constant["v2a_recall@1"] == 0.05 and constant["a2v_recall@10"] == 0.5 and constant["v2a_map"] == 1
    assert retrieval(rows[:0], rows[:0], torch.arange(0)) == {}


def test_the_confusion_matrix_counts_each_kind_of_noise():
    wrong_label = np.array([0, 0, 1, 1, 1, 0], dtype=bool)
    wrong_pair = np.array([0, 1, 0, 1, 1, 0], dtype=bool)
    target, predicted = noise_kinds(wrong_label, wrong_pair), noise_kinds(wrong_label[::-1], wrong_pair)
    matrix = confusion(target, predicted, NOISE_KINDS)
    assert matrix["kinds"] == ["right", "wrong label", "wrong pair", "both wrong"]
    assert matrix["counts"] == [[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]]
