"""Mixtures of clips and of their targets."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from distav.data.pipeline.loader import Batch
from distav.training.phases.mixup import Mixture, Mixup

CPU = torch.device("cpu")


def batch(
    size: int = 4, visual: Tensor | None = None, audio: Tensor | None = None, valid: Tensor | None = None
) -> Batch:
    everywhere = torch.ones(size, dtype=torch.bool)
    valid = everywhere if valid is None else valid
    present = {
        "visual": valid if visual is None else visual & valid,
        "audio": valid if audio is None else audio & valid,
    }
    values = torch.tensor([0, 100, 255, 7]).repeat(-(-size // 4))[:size]
    frames = values.to(torch.uint8).view(size, 1, 1, 1, 1).expand(-1, 2, 3, 3, 3)
    media = {"frames": frames, "audio": (values / 100).view(size, 1).expand(-1, 5)}
    return Batch(torch.arange(size), valid, present, 17 * torch.arange(size), media)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 8.0])
def test_fractions_have_the_beta_distribution(alpha: float):
    fractions = Mixup(alpha, CPU).draw(batch(20_000)).fractions
    assert stats.kstest(fractions.numpy(), stats.beta(alpha, alpha).cdf).statistic < 0.015
    # Those of the two clips of a pair are independent.
    assert abs(torch.corrcoef(fractions.view(-1, 2).T)[0, 1]) < 0.03


def test_mixtures_do_not_depend_on_the_number_of_ranks():
    mixup, whole = Mixup(1.0, CPU), batch(12)
    mixture = mixup.draw(whole)
    assert mixture.partners.tolist() == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10]
    for rank in range(3):
        part = batch(4)
        part.seeds = whole.seeds[4 * rank : 4 * rank + 4]
        torch.testing.assert_close(mixup.draw(part).fractions, mixture.fractions[4 * rank : 4 * rank + 4])
    odd = mixup.draw(batch(5))
    assert odd.partners.tolist() == [1, 0, 3, 2, 4] and odd.fractions[4] == 1


def test_only_trained_clips_with_the_same_modalities_are_mixed():
    mask = torch.tensor([True] * 8)
    audio, valid, trained = mask.clone(), mask.clone(), mask.clone()
    audio[1] = False
    valid[2] = False
    trained[5] = False
    given = batch(8, audio=audio, valid=valid)
    mixture = Mixup(1.0, CPU).draw(given, trained)
    assert mixture.partners.tolist() == [0, 1, 2, 3, 4, 5, 7, 6]
    assert mixture.fractions[:6].tolist() == [1.0] * 6 and (mixture.fractions[6:] < 1).all()
    weights = torch.tensor([1.0, 0.5, 0.0, 1.0, 1.0, 0.0, 0.5, 0.4])
    torch.testing.assert_close(mixture.weights(weights), torch.tensor([1.0, 0.5, 0.0, 1.0, 1.0, 0.0, 0.2, 0.2]))
    media = mixture.batch(given).media
    for name, values in given.media.items():
        assert torch.equal(media[name][:6], values[:6]) and not torch.equal(media[name][6], values[6])


def test_frames_stay_integers_and_audio_is_mixed_exactly():
    mixture = Mixture(torch.tensor([0.25, 0.5, 1.0, 0.0]), torch.tensor([1, 0, 3, 2]))
    before = batch()
    media = mixture.batch(before).media
    assert media["frames"].dtype == torch.uint8 and media["frames"].shape == before.media["frames"].shape
    assert media["frames"][:, 0, 0, 0, 0].tolist() == [75, 50, 255, 255]
    torch.testing.assert_close(media["audio"][:, 0], torch.tensor([0.75, 0.5, 2.55, 2.55]))
    assert before.media["audio"][0, 0] == 0  # The given batch is not changed.


def test_the_loss_of_mixed_targets_is_the_mixture_of_the_losses():
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(4, 3, generator=generator).softmax(1)
    mixture = Mixture(torch.tensor([0.25, 0.5, 0.7, 0.1]), torch.tensor([1, 0, 3, 2]))
    log_probs = torch.randn(4, 3, generator=generator).log_softmax(1)
    mixed = mixture.targets(targets)
    own, other = -(targets * log_probs).sum(1), -(targets[mixture.partners] * log_probs).sum(1)
    expected = mixture.fractions * own + (1 - mixture.fractions) * other
    torch.testing.assert_close(-(mixed * log_probs).sum(1), expected)
    torch.testing.assert_close(mixed.sum(1), torch.ones(4))
