import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distav.evaluate import auroc, label_accuracy
from distav.robust.correction import Voting, correct
from distav.robust.correspondence import cdf_correspondence, fit_mixture, gmm_correspondence, sample_weights


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
    assert found.shares[0] == pytest.approx(rate, abs=0.01)
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


def scene(noise: float, swapped: float, num: int = 1000, classes: int = 10):
    generator = torch.Generator().manual_seed(1)
    rng = np.random.default_rng(1)
    true = torch.arange(num) % classes
    heard = true.clone()
    mixed = torch.from_numpy(rng.permutation(num)[: int(swapped * num)])
    heard[mixed] = true[mixed.roll(1)]
    centres = torch.randn(2, classes, 32, generator=generator)
    visual, audio = (
        centres[side][which] + 0.7 * torch.randn(num, 32, generator=generator)
        for side, which in ((0, true), (1, heard))
    )
    given = true.clone()
    flipped = torch.from_numpy(rng.permutation(num)[: int(noise * num)])
    given[flipped] = (true[flipped] + torch.from_numpy(rng.integers(1, classes, len(flipped)))) % classes
    return visual, audio, given, true, heard


def vote(gated: bool, noise: float, swapped: float):
    visual, audio, given, true, heard = scene(noise, swapped)
    voting = Voting(60, 20, 0.07, 0.0, gated)
    every = torch.ones(1000, dtype=torch.bool)
    return correct(visual, audio, given, 10, torch.arange(1000), every, voting), given, true, heard


@pytest.mark.parametrize("gated", [False, True])
def test_neighbors_set_most_labels_right(gated: bool):
    found, given, true, _ = vote(gated, noise=0.6, swapped=0.0)
    assert (given == true).float().mean() == pytest.approx(0.4)
    assert (found.labels.argmax(1) == true).float().mean() > 0.97


def test_gated_voting_gives_each_sound_its_own_label_and_finds_swaps():
    found, _, true, heard = vote(True, noise=0.5, swapped=0.4)
    assert (found.labels.argmax(1) == true).float().mean() > 0.95
    assert (found.audio.argmax(1) == heard).float().mean() > 0.9
    wrong = (true != heard).numpy()
    assert auroc(found.pairing.numpy(), ~wrong) > 0.95


def test_samples_without_features_keep_their_label():
    visual, audio, given, _, _ = scene(0.4, 0.0)
    valid = torch.ones(1000, dtype=torch.bool)
    valid[5] = False
    visual[5] = 0
    found = correct(visual, audio, given, 10, torch.arange(1000), valid, Voting(50, 0, 0.07, 0.0, True))
    assert found.labels[5].tolist() == F.one_hot(given[5], 10).tolist()
    torch.testing.assert_close(found.labels.sum(1), torch.ones(1000))


def test_auroc_and_label_accuracy():
    scores, positive = np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True])
    assert auroc(scores, positive) == pytest.approx(3.5 / 4)
    assert np.isnan(auroc(scores, np.ones(4, bool)))
    given, corrected, true = np.array([0, 1, 1, 2]), np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])
    expected = {"given": 0.75, "corrected": 0.75, "flipped_recovered": 1.0, "clean_damaged": 1 / 3}
    assert label_accuracy(given, corrected, true) == pytest.approx(expected)
