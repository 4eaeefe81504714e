"""Retrieval and noise confusion against plain loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from distav.evaluation.metrics import NOISE_KINDS, confusion, noise_kinds, retrieval


def test_retrieval_is_what_loops_find():
    generator = torch.Generator().manual_seed(0)
    visual, audio = (F.normalize(torch.randn(60, 5, generator=generator), dim=1) for _ in range(2))
    classes = torch.randint(0, 4, (60,), generator=generator)
    found = retrieval(visual, audio, classes)
    for direction, scores in (("v2a", visual @ audio.T), ("a2v", audio @ visual.T)):
        places = [int((row > row[number]).sum()) for number, row in enumerate(scores)]
        for k in (1, 5, 10):
            assert found[f"{direction}_recall@{k}"] == pytest.approx(np.mean([place < k for place in places]))
        precisions = [
            average_precision_score((classes == classes[number]).numpy(), row.numpy())
            for number, row in enumerate(scores)
        ]
        assert found[f"{direction}_map"] == pytest.approx(np.mean(precisions))
    recalls = [value for key, value in found.items() if "recall" in key]
    assert len(recalls) == 6 and found["rsum"] == pytest.approx(100 * sum(recalls))


def test_retrieval_of_the_same_and_of_nothing():
    rows = F.normalize(torch.eye(12), dim=1)
    found = retrieval(rows, rows, torch.arange(12))
    assert found.pop("rsum") == 600 and set(found.values()) == {1.0}
    alike = retrieval(torch.ones(20, 1), torch.ones(20, 1), torch.zeros(20, dtype=torch.int64))
    assert alike["v2a_recall@1"] == 0.05 and alike["a2v_recall@10"] == 0.5 and alike["v2a_map"] == 1
    assert retrieval(rows[:0], rows[:0], torch.arange(0)) == {}


def test_noise_confusion_counts_each_kind_of_wrong():
    wrong_label = np.array([0, 0, 1, 1, 1, 0], dtype=bool)
    wrong_pair = np.array([0, 1, 0, 1, 1, 0], dtype=bool)
    kinds, told = noise_kinds(wrong_label, wrong_pair), noise_kinds(wrong_label[::-1], wrong_pair)
    found = confusion(kinds, told, NOISE_KINDS)
    assert found["kinds"] == ["right", "wrong label", "wrong pair", "both wrong"]
    assert found["counts"] == [[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]]
