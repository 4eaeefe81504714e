import pytest
import torch

from distav.noise import correspondence
from distav.noise.correspondence import cdf_correspondence, fit_mixture, gmm_correspondence, sample_weights


def mixture(rate: float, num: int = 20000) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    wrong = torch.arange(num) < rate * num
    noise = torch.randn(num, generator=generator)
    return torch.where(wrong, 0.02 + 0.10 * noise, 0.55 + 0.12 * noise), wrong


@pytest.mark.parametrize("rate", [0.2, 0.4, 0.8])
def test_gmm_finds_both_kinds_and_their_shares(rate: float):
    similarity, wrong = mixture(rate)
    found = fit_mixture(similarity)
    assert found.means == pytest.approx((0.02, 0.55), abs=0.01)
    assert found.weights[0] == pytest.approx(rate, abs=0.01)
    correspondence, _ = gmm_correspondence(similarity)
    assert correspondence[wrong].mean() < 0.05 and correspondence[~wrong].mean() > 0.95
    order = similarity.argsort()
    assert (correspondence[order].diff() >= -1e-6).all()


def test_gmm_takes_clean_data_for_clean():
    similarity, _ = mixture(0.0)
    assert (gmm_correspondence(similarity)[0] == 1).all()


@pytest.mark.parametrize("kappa", [0.25, 0.5, 2.0])
def test_cdf_weights_have_mean_0_625_for_gaussian_similarity(kappa: float):
    weights = sample_weights(cdf_correspondence(mixture(0.0)[0], kappa=kappa), 0.25)
    assert weights.mean().item() == pytest.approx(0.625, abs=0.005)
    assert weights.min() >= 0.25 and weights.max() <= 1


@pytest.mark.parametrize(("rate", "carried"), [(0.2, 0.078), (0.4, 0.192), (0.6, 0.378), (0.8, 0.656)])
def test_cdf_weights_lessen_the_share_of_wrong_pairs_as_known(rate: float, carried: float):
    similarity, wrong = mixture(rate)
    weights = sample_weights(cdf_correspondence(similarity), 0.25)
    assert (weights[wrong].sum() / weights.sum()).item() == pytest.approx(carried, abs=0.01)


def test_more_pairs_than_torch_quantile_takes_are_fitted_alike(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(correspondence, "NUM_ITERATIONS", 1)
    some = mixture(0.4, num=2**17)[0]
    many = torch.cat([some.repeat(2**24 // len(some)), some[:: len(some) // 4]])
    assert len(many) > 2**24
    few, found = gmm_correspondence(some), gmm_correspondence(many)
    for name in ("means", "variances", "shares"):
        assert getattr(found[1], name) == pytest.approx(getattr(few[1], name), rel=1e-5)
    torch.testing.assert_close(found[0][-len(some) - 4 : -4], few[0], rtol=0, atol=1e-4)
