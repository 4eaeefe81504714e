"""Fusion of classifiers that is fitted to noisy labels, also of mismatched pairs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distav.evaluation.fusion import CLASSIFIERS, Fusion, classifier_log_probs, fit_fusion
from distav.evaluation.inference import clip_logits

NUM_CLASSES = 8


def simulated_logits(classes: Tensor, accuracy: float, generator: torch.Generator) -> Tensor:
    """Return logits that are confident of the right class at a rate, and of a random class otherwise: [n, C]."""
    right = torch.rand(len(classes), generator=generator) < accuracy
    predicted = torch.where(right, classes, torch.randint(NUM_CLASSES, classes.shape, generator=generator))
    return 7.0 * F.one_hot(predicted, NUM_CLASSES) + torch.randn(len(classes), NUM_CLASSES, generator=generator)


def simulated_clips(
    num_clips: int, accuracies: tuple[float, float], mismatch: float, noise: float, seed: int
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return outputs of classifiers, given labels and true classes; the joint one trusts the video more than the audio.

    Args:
        num_clips: number of clips.
        accuracies: of the visual and the audio classifier, beside guessed classes.
        mismatch: rate of pairs whose audio has a random class.
        noise: rate of labels that are replaced by random ones.
        seed: seed of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(NUM_CLASSES, (num_clips,), generator=generator)
    random_classes = torch.randint(NUM_CLASSES, (num_clips,), generator=generator)
    mismatched = torch.rand(num_clips, generator=generator) < mismatch
    visual = simulated_logits(classes, accuracies[0], generator)
    audio = simulated_logits(torch.where(mismatched, random_classes, classes), accuracies[1], generator)
    wrong = torch.rand(num_clips, generator=generator) < noise
    labels = torch.where(wrong, torch.randint(NUM_CLASSES, (num_clips,), generator=generator), classes)
    outputs = {"logits": 1.2 * visual + 0.8 * audio, "visual_logits": visual, "audio_logits": audio}
    return outputs, labels, classes


def accuracy(logits: Tensor, classes: Tensor) -> float:
    return float((logits.argmax(1) == classes).double().mean())


@pytest.mark.parametrize("num_clips", [150, 1000])
@pytest.mark.parametrize("accuracies", [(0.9, 0.99), (0.4, 0.85), (0.0, 0.9)])
def test_fused_is_as_accurate_as_the_better_modality(accuracies: tuple[float, float], num_clips: int):
    outputs, labels, _ = simulated_clips(num_clips, accuracies, mismatch=0.0, noise=0.2, seed=0)
    fusion = fit_fusion(classifier_log_probs(outputs), labels)
    test_outputs, _, classes = simulated_clips(20_000, accuracies, mismatch=0.0, noise=0.0, seed=1)
    joint, visual, audio = (accuracy(test_outputs[name], classes) for name in CLASSIFIERS.values())
    assert joint < audio - 0.05, "the joint classifier has to be the worse one"
    assert accuracy(fusion(test_outputs), classes) >= max(visual, audio) - 0.003, fusion


def test_mismatched_pairs_do_not_count_as_errors_of_the_audio():
    accuracies = (0.9, 0.99)
    outputs, labels, _ = simulated_clips(2000, accuracies, mismatch=0.4, noise=0.4, seed=0)
    log_probs = classifier_log_probs(outputs)
    test_outputs, _, classes = simulated_clips(20_000, accuracies, mismatch=0.0, noise=0.0, seed=1)
    audio = accuracy(test_outputs["audio_logits"], classes)
    fused = {
        mean: accuracy(fit_fusion(log_probs, labels, mismatch_prior=(mean, 0.05))(test_outputs), classes)
        for mean in (-0.6, -6.0)
    }
    assert fused[-0.6] >= audio - 0.003 > fused[-6.0] + 0.05, fused


def test_labels_of_the_audio_do_not_count_as_errors_of_the_video():
    outputs, labels, _ = simulated_clips(1000, (0.9, 0.9), mismatch=0.0, noise=0.0, seed=0)
    # In 40 % of the pairs the video has another class than the audio, and the label is that of the audio.
    mismatched = torch.arange(1000) % 5 < 2
    visual = torch.where(mismatched[:, None], outputs["visual_logits"].roll(1, 1), outputs["visual_logits"])
    outputs = {**outputs, "visual_logits": visual, "logits": visual + outputs["audio_logits"]}
    weights = {
        owner: fit_fusion(classifier_log_probs(outputs), labels, mismatch_prior=(-0.4, 0.1), visual_owner=owner)
        for owner in (0.0, 1.0)
    }
    assert weights[0.0].visual / weights[0.0].audio > 2 * weights[1.0].visual / weights[1.0].audio, weights


def test_class_dependent_noise_needs_its_transition_matrix():
    outputs, _, classes = simulated_clips(1000, (0.95, 0.3), mismatch=0.0, noise=0.0, seed=0)
    swapped = torch.where(torch.rand(1000, generator=torch.Generator().manual_seed(2)) < 0.45, classes ^ 1, classes)
    matrix = 0.55 * torch.eye(NUM_CLASSES) + 0.45 * torch.eye(NUM_CLASSES)[torch.arange(NUM_CLASSES) ^ 1]
    fusion = fit_fusion(classifier_log_probs(outputs), swapped, matrix)
    test_outputs, _, test_classes = simulated_clips(20_000, (0.95, 0.3), mismatch=0.0, noise=0.0, seed=1)
    assert accuracy(fusion(test_outputs), test_classes) >= accuracy(test_outputs["visual_logits"], test_classes) - 0.003
    assert fusion.visual > fusion.audio


def test_a_fit_is_deterministic_and_does_not_change_gradients():
    outputs, labels, _ = simulated_clips(200, (0.8, 0.8), mismatch=0.2, noise=0.2, seed=0)
    log_probs = classifier_log_probs(outputs)
    with torch.no_grad():
        first = fit_fusion(log_probs, labels)
    assert first == fit_fusion(log_probs.clone(), labels) and not log_probs.requires_grad
    weights = (first.both, first.visual, first.audio)
    assert all(weight > 0 and round(weight, 6) == weight for weight in weights)


def test_clips_with_one_modality_have_the_logits_of_its_classifier():
    outputs, _, _ = simulated_clips(4, (0.9, 0.9), mismatch=0.0, noise=0.0, seed=0)
    present = {"visual": torch.tensor([True, True, False, True]), "audio": torch.tensor([True, False, True, True])}
    fusion = Fusion(both=0.5, visual=0.25, audio=2.0)
    logits = clip_logits(outputs, present, fusion)
    probs = [
        weight * outputs[name].log_softmax(1)
        for weight, name in zip((0.5, 0.25, 2.0), CLASSIFIERS.values(), strict=True)
    ]
    torch.testing.assert_close(logits[[0, 3]], torch.stack(probs).sum(0)[[0, 3]])
    assert torch.equal(logits[1], outputs["visual_logits"][1]) and torch.equal(logits[2], outputs["audio_logits"][2])
    assert torch.equal(clip_logits(outputs, present)[[0, 3]], outputs["logits"][[0, 3]])


def test_a_description_without_a_fusion_has_none():
    weights = {"both": 0.5, "visual": 0.1, "audio": 0.2}
    assert Fusion.from_description({"fusion": weights}) == Fusion(**weights)
    assert Fusion.from_description({"fusion": None}) is None
