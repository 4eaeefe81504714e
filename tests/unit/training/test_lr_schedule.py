"""The learning rate schedule."""

import pytest

from distav.training.lr_schedule import lr_factor


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.05, 0.5), (0.1, 1.0), (0.55, 0.6), (1.0, 0.2), (0.325, 0.2 + 0.8 * 0.8535534)]
)
def test_linear_warmup_is_followed_by_cosine_decay(progress: float, expected: float):
    assert lr_factor(progress, warmup_fraction=0.1, min_fraction=0.2) == pytest.approx(expected, abs=1e-6)


def test_schedule_without_warmup_starts_at_the_full_rate():
    assert lr_factor(0.0, warmup_fraction=0.0, min_fraction=0.0) == 1.0
