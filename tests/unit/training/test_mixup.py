"""Mixtures of clips and of their targets."""

import pytest
import torch
from scipy import stats

from distav.data.pipeline.loader import Batch
from distav.training.phases.mixup import Mixture, Mixup

CPU = torch.device("cpu")


@pytest.mark.parametrize("alpha", [0.5, 1.0, 8.0])
def test_shares_have_the_beta_distribution(alpha: float):
    shares = Mixup(alpha, CPU).draw(torch.arange(20_000)).shares
    assert stats.kstest(shares.numpy(), stats.beta(alpha, alpha).cdf).statistic < 0.015
    # Neighbors are independent.
    assert abs(torch.corrcoef(shares.view(-1, 2).T)[0, 1]) < 0.03


def test_clips_are_mixed_with_their_neighbor_whatever_the_number_of_ranks():
    mixup, seeds = Mixup(1.0, CPU), torch.arange(12) * 17
    whole = mixup.draw(seeds)
    assert whole.partners.tolist() == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10]
    parts = [mixup.draw(part) for part in seeds.split(4)]
    torch.testing.assert_close(torch.cat([part.shares for part in parts]), whole.shares)
    assert mixup.draw(seeds[:5]).partners.tolist() == [1, 0, 3, 2, 4]


def batch() -> Batch:
    frames = torch.tensor([0, 100, 255, 7], dtype=torch.uint8).view(4, 1, 1, 1, 1).expand(4, 2, 3, 3, 3)
    audio = torch.tensor([0.0, 1.0, -0.5, 0.25]).view(4, 1).expand(4, 5)
    present = {name: torch.ones(4, dtype=torch.bool) for name in ("visual", "audio")}
    ids = torch.arange(4)
    return Batch(ids, present["visual"], present, ids, {"frames": frames, "audio": audio})


def test_frames_stay_integers_and_audio_is_mixed_exactly():
    mixture = Mixture(torch.tensor([0.25, 0.5, 1.0, 0.0]), torch.tensor([1, 0, 3, 2]))
    before = batch()
    media = mixture.batch(before).media
    assert media["frames"].dtype == torch.uint8 and media["frames"].shape == before.media["frames"].shape
    assert media["frames"][:, 0, 0, 0, 0].tolist() == [75, 50, 255, 255]
    torch.testing.assert_close(media["audio"][:, 0], torch.tensor([0.75, 0.5, -0.5, -0.5]))
    assert before.media["audio"][0, 0] == 0  # The given batch is not changed.


def test_the_loss_of_mixed_targets_is_the_mixture_of_the_losses():
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(4, 3, generator=generator).softmax(1)
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0])
    mixture = Mixture(torch.tensor([0.25, 0.5, 0.7, 0.1]), torch.tensor([1, 0, 3, 2]))
    log_probs = torch.randn(4, 3, generator=generator).log_softmax(1)
    mixed, mixed_weights = mixture.targets(targets, weights)
    own, other = -(targets * log_probs).sum(1), -(targets[mixture.partners] * log_probs).sum(1)
    expected = mixture.shares * weights * own + (1 - mixture.shares) * weights[mixture.partners] * other
    torch.testing.assert_close(mixed_weights * -(mixed * log_probs).sum(1), expected)
    torch.testing.assert_close(mixed.sum(1), torch.ones(4))
    # The third clip has no weight, and its partner's target is not changed by it.
    torch.testing.assert_close(mixed[3], targets[3])


def test_clips_without_weight_keep_their_targets():
    targets = torch.eye(2)
    mixed, weights = Mixture(torch.tensor([0.3, 0.3]), torch.tensor([1, 0])).targets(targets, torch.zeros(2))
    assert torch.equal(mixed, targets) and torch.equal(weights, torch.zeros(2))
