"""Correspondence probabilities from pair similarities."""

import pytest
import torch
from torch import Tensor

from distav.noise import correspondence
from distav.noise.correspondence import cdf_correspondence, fit_mixture, gmm_correspondence, sample_weights


def draw_similarity(mismatch_rate: float, num_pairs: int = 20000) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mismatched = torch.arange(num_pairs) < mismatch_rate * num_pairs
    noise = torch.randn(num_pairs, generator=generator)
    return torch.where(mismatched, 0.02 + 0.10 * noise, 0.55 + 0.12 * noise), mismatched


@pytest.mark.parametrize("rate", [0.2, 0.4, 0.8])
def test_gmm_recovers_both_components_and_their_weights(rate: float):
    similarity, mismatched = draw_similarity(rate)
    mixture = fit_mixture(similarity)
    assert mixture.means == pytest.approx((0.02, 0.55), abs=0.01)
    assert mixture.weights[0] == pytest.approx(rate, abs=0.01)
    correspondence, _ = gmm_correspondence(similarity)
    assert correspondence[mismatched].mean() < 0.05 and correspondence[~mismatched].mean() > 0.95
    assert (correspondence[similarity.argsort()].diff() >= -1e-6).all()


def test_gmm_finds_no_mismatched_pairs_in_clean_data():
    similarity, _ = draw_similarity(0.0)
    assert (gmm_correspondence(similarity)[0] == 1).all()


@pytest.mark.parametrize("kappa", [0.25, 0.5, 2.0])
def test_mean_cdf_weight_is_0_625_for_gaussian_similarity(kappa: float):
    weights = sample_weights(cdf_correspondence(draw_similarity(0.0)[0], kappa=kappa), 0.25)
    assert weights.mean().item() == pytest.approx(0.625, abs=0.005)
    assert weights.min() >= 0.25 and weights.max() <= 1


@pytest.mark.parametrize(("rate", "weight"), [(0.2, 0.078), (0.4, 0.192), (0.6, 0.378), (0.8, 0.656)])
def test_cdf_weights_reduce_the_total_weight_of_mismatched_pairs(rate: float, weight: float):
    similarity, mismatched = draw_similarity(rate)
    weights = sample_weights(cdf_correspondence(similarity), 0.25)
    assert (weights[mismatched].sum() / weights.sum()).item() == pytest.approx(weight, abs=0.01)


def test_mixture_of_more_pairs_than_torch_quantile_accepts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(correspondence, "NUM_ITERATIONS", 1)
    similarity = draw_similarity(0.4, num_pairs=2**17)[0]
    repeated = torch.cat([similarity.repeat(2**24 // len(similarity)), similarity[:: len(similarity) // 4]])
    assert len(repeated) > 2**24
    (expected, few), (actual, many) = gmm_correspondence(similarity), gmm_correspondence(repeated)
    for name in ("means", "variances", "weights"):
        assert getattr(many, name) == pytest.approx(getattr(few, name), rel=1e-5)
    torch.testing.assert_close(actual[-len(similarity) - 4 : -4], expected, rtol=0, atol=1e-4)
