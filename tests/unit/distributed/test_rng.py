import torch

from distav.distributed.rng import sample_seeds, uniform


def test_numbers_depend_on_the_sample_only():
    ids = torch.arange(10)
    expected = uniform(sample_seeds(3, 5, ids), 1, 7)
    part = uniform(sample_seeds(3, 5, ids[4:6]), 1, 7)
    assert torch.equal(expected[4:6], part)
    for other in (sample_seeds(4, 5, ids), sample_seeds(3, 6, ids)):
        assert not torch.isclose(uniform(other, 1, 7), expected).any(1).all()
    assert not torch.equal(uniform(sample_seeds(3, 5, ids), 2, 7), expected)


def test_numbers_are_uniform_and_uncorrelated():
    draws = uniform(sample_seeds(0, 0, torch.arange(2000)), 0, 50)
    assert 0 <= draws.min() and draws.max() < 1
    counts = torch.histc(draws, 20, 0, 1)
    assert ((counts - 5000) ** 2 / 5000).sum() < 44  # chi-squared with 19 degrees, p = 0.001
    correlation = torch.corrcoef(draws.T) - torch.eye(50)
    assert correlation.abs().max() < 0.12
