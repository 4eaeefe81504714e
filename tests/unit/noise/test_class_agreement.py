"""Mismatch rate and correspondence probabilities from class probabilities."""

import pytest
import torch
import torch.nn.functional as F

from distav.noise.class_agreement import class_agreement, pair_posterior


def test_confident_votes_determine_the_mismatch_rate_of_diffuse_ones():
    visual_class, audio_class = torch.arange(400) % 10, torch.arange(400) % 10
    audio_class[300:] += torch.randint(1, 10, (100,), generator=torch.Generator().manual_seed(1))
    uniform, valid = torch.tensor(0.1), torch.ones(400, dtype=torch.bool)
    visual, confident = (
        torch.lerp(uniform, F.one_hot(classes % 10, 10).float(), 0.98) for classes in (visual_class, audio_class)
    )
    diffuse = torch.lerp(uniform, confident, 0.05)
    agreement, reference = class_agreement(visual, diffuse, valid), class_agreement(visual, confident, valid)
    assert reference.entropy < agreement.entropy and reference.per_sample > agreement.per_sample > 0
    informed, alone = (
        pair_posterior(visual, diffuse, agreement, source.rate_log_likelihood, valid)
        for source in (reference, agreement)
    )
    assert informed.mismatch_rate.estimate == pytest.approx(100 / 360, abs=0.08)
    assert alone.mismatch_rate.estimate < 0.1
    assert informed.correspondence[300:].max() < 0.7 < 0.9 < informed.correspondence[:300].min()
    assert alone.correspondence[300:].min() > 0.9
