"""Votes on classes from votes on labels that are mixtures of two."""

import torch

import distav
from distav.noise.model_parameters import Votes
from distav.noise.vote_score import log_votes
from distav.noise.vote_unmixing import VoteUnmixing

SIZE, CLASSES, VOTERS = 1200, 6, 40


def noisy_votes(generator: torch.Generator, off: float = 0.45) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes [n], and the shares [n, C] of 40 labels of each class, of which many are of the next class."""
    true = torch.randint(0, CLASSES, (SIZE,), generator=generator)
    wrong = torch.rand(SIZE, VOTERS, generator=generator) < off
    labels = (true[:, None] + wrong) % CLASSES
    return true, torch.nn.functional.one_hot(labels, CLASSES).float().mean(1)


def test_mixtures_identify_classes_that_the_largest_share_does_not():
    true, shares = noisy_votes(torch.Generator().manual_seed(0))
    everywhere = torch.ones(SIZE, dtype=torch.bool)
    table = log_votes(shares)
    teacher = log_votes(torch.eye(CLASSES)[true])
    votes = Votes([table, teacher], [], [table], everywhere, everywhere, visual_halves=[table, table])
    unmixing = VoteUnmixing.fit(votes)
    assert unmixing.audio is None and unmixing.names_classes
    assert unmixing.visual is not None
    expected = 0.55 * torch.eye(CLASSES) + 0.45 * torch.eye(CLASSES).roll(1, 1)
    torch.testing.assert_close(unmixing.visual, expected, atol=0.03, rtol=0)
    result = unmixing.apply(votes)
    assert (shares.argmax(1) == true).float().mean() < 0.8
    for unmixed in (result.visual[0], result.joint[0], *result.visual_halves):
        assert (unmixed.argmax(1) == true).float().mean() > 0.99
    assert result.visual[1] is teacher and not result.audio


def test_missing_votes_stay_uniform():
    _, shares = noisy_votes(torch.Generator().manual_seed(1))
    shares[:100] = 1 / CLASSES
    present = torch.arange(SIZE) >= 100
    votes = Votes([log_votes(shares)], [], [], present, torch.zeros(SIZE, dtype=torch.bool))
    unmixed = VoteUnmixing.fit(votes).apply(votes).visual[0]
    torch.testing.assert_close(unmixed[:100], votes.visual[0][:100])
    assert torch.isfinite(unmixed).all()


def test_mixtures_without_names_are_rejected():
    visual, joint = torch.eye(CLASSES), torch.eye(CLASSES).roll(1, 0)
    assert VoteUnmixing(visual, None, None).names_classes
    assert not VoteUnmixing(visual, None, joint).names_classes


def test_joint_votes_of_samples_with_one_modality_count():
    true, shares = noisy_votes(torch.Generator().manual_seed(2))
    has_visual, none = torch.ones(SIZE, dtype=torch.bool), torch.zeros(SIZE, dtype=torch.bool)
    unmixing = VoteUnmixing.fit(Votes([log_votes(shares)], [], [log_votes(shares)], has_visual, none))
    assert unmixing.visual is not None and unmixing.joint is not None
    torch.testing.assert_close(unmixing.joint, unmixing.visual)


def test_labels_that_are_often_those_of_the_next_class_are_corrected():
    """The few neighbors of a sample often name the wrong class, but their mixtures of labels are distinct."""
    generator = torch.Generator().manual_seed(4)
    true = torch.randint(0, CLASSES, (SIZE,), generator=generator)
    given = (true + (torch.rand(SIZE, generator=generator) < 0.4)) % CLASSES
    centers = 1.2 * torch.randn(2, CLASSES, 16, generator=generator)
    visual, audio = (center[true] + torch.randn(SIZE, 16, generator=generator) for center in centers)
    result = distav.correct_labels(
        {"visual": visual.numpy(), "audio": audio.numpy()}, given.numpy(), num_neighbors=[20]
    )
    rate = (given != true).float().mean()
    assert result.label_noise_rate.ci95_low <= rate <= result.label_noise_rate.ci95_high
    assert result.label_noise_rate.ci95_width < 0.25
    assert (result.corrected == true.numpy()).mean() > 0.95
