"""Self-refined correspondences, compared with the published schedule of CRCL."""

import numpy as np
import pytest
import torch

from distav.noise.correspondence import SelfRefinement


def trusted_after_visits(rule: SelfRefinement, stored: float, matching: float, num_visits: int) -> list[float]:
    average, trusted = torch.tensor([stored]), []
    for _ in range(num_visits):
        value, average = rule.update(average, torch.tensor([matching]), rule.warmup_epochs, first=False)
        trusted.append(value.item())
    return trusted


def test_mismatched_pair_is_rejected_after_twelve_visits():
    expected = [0.804, 0.647, 0.522, 0.421, 0.341, 0.277, 0.226, 0.184, 0.152, 0.125, 0.104, 0.0]
    assert trusted_after_visits(SelfRefinement(), 1.0, 0.02, 12) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("matching", [0.15, 0.5, 0.9])
def test_average_converges_to_the_matching_probability(matching: float):
    assert trusted_after_visits(SelfRefinement(), 1.0, matching, 80)[-1] == pytest.approx(matching, abs=1e-6)


def test_only_a_stored_zero_prevents_recovery():
    stores_zero = SelfRefinement(store_thresholded=True)
    assert trusted_after_visits(stores_zero, 0.0, 0.45, 50)[-1] == 0
    assert trusted_after_visits(stores_zero, 0.0, 0.51, 50)[-1] == pytest.approx(0.51, abs=1e-3)
    assert trusted_after_visits(SelfRefinement(), 0.0, 0.45, 50)[-1] == pytest.approx(0.45, abs=1e-3)


def published_schedule(matching: np.ndarray, phases: list[int], warmup: int) -> np.ndarray:
    """Correspondences of one pair that the loss uses at each visit, over all phases, as in CRCL's code."""
    y, used, visit = 1.0, [], 0
    for phase, epochs in enumerate(phases):
        for epoch in range(epochs):
            p = matching[visit]
            visit += 1
            if phase == 0 and epoch < warmup:
                used.append(1.0)
                if epoch == warmup - 1:
                    y = p
            elif epoch < warmup:
                used.append(y)
            else:
                y = 0.8 * y + 0.2 * p
                y = 0.0 if y < 0.1 else y
                used.append(y)
    return np.array(used)


@pytest.mark.parametrize("warmup", [1, 2])
def test_phases_follow_the_published_schedule(warmup: int):
    rng, phases = np.random.default_rng(2), [4, 4, 9]
    for high in (0.1, 0.3, 1.0):
        matching = rng.uniform(0, high, sum(phases))
        rule, stored, used, visit = SelfRefinement(0.8, warmup, 0.1, True), torch.ones(1), [], 0
        for phase, epochs in enumerate(phases):
            for epoch in range(epochs):
                trusted, stored = rule.update(stored, torch.tensor([matching[visit]]).float(), epoch, phase == 0)
                used.append(trusted.item())
                visit += 1
        expected = published_schedule(matching, phases, warmup)
        expected[expected < 0.1] = 0  # The first estimate is stored as it is and used from the next phase on.
        np.testing.assert_allclose(used, expected, atol=1e-6)
