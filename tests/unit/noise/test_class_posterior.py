"""Labels that follow from class probabilities."""

import pytest
import torch

from distav.noise.class_posterior import corrected_labels


@pytest.mark.parametrize(("min_odds", "expected"), [(1.0, [0, 1, 1, 2]), (2.0, [0, 0, 1, 2]), (10.0, [0, 0, 0, 2])])
def test_labels_change_if_another_class_is_probable_enough(min_odds: float, expected: list[int]):
    posterior = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.6, 0.0], [0.2, 0.7, 0.1], [0.0, 0.2, 0.8]])
    assert corrected_labels(posterior, torch.zeros(4, dtype=torch.int64), min_odds).tolist() == expected


def test_corrected_labels_have_the_least_expected_cost():
    """The cost of a wrong label is 1, that of a right one that is changed 2; the true classes follow the posterior."""
    generator = torch.Generator().manual_seed(0)
    posterior = (2 * torch.randn(20_000, 4, generator=generator)).softmax(1)
    given, true = (
        torch.randint(4, (20_000,), generator=generator),
        posterior.multinomial(1, generator=generator).squeeze(1),
    )
    costs = {}
    for min_odds in (1.0, 1.5, 2.0, 3.0, 5.0):
        labels = corrected_labels(posterior, given, min_odds)
        costs[min_odds] = float(((labels != true).float() + ((given == true) & (labels != true)).float()).mean())
    assert min(costs, key=costs.__getitem__) == 2.0, costs
