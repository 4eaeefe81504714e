"""Corrected labels and noise estimates of synthetic datasets with known noise."""

import pytest
import torch
import torch.nn.functional as F

from distav.data.modalities import MODALITIES
from distav.evaluation.metrics import auroc, expected_calibration_error
from distav.noise import model_fit, tiling
from distav.noise.correction import CorrectionPrior
from distav.noise.label_correction import correct_labels
from distav.noise.noise_rate import cautious_odds_factor
from distav.noise.vote_search import FeatureSpace, VoteSearchSpace, feasible_num_neighbors
from tests.unit.noise.scenes import NUM_CLASSES, accuracy, flip_to_next_class, make_scene, teacher_probs

long = pytest.mark.long


@pytest.mark.parametrize("noise", [0.2, 0.6])
def test_most_labels_are_corrected_and_the_noise_rate_is_estimated(noise: float):
    scene = make_scene(noise, mismatched=0.0)
    correction = scene.correct()
    assert (scene.given == scene.true).float().mean() == pytest.approx(1 - noise)
    assert accuracy(correction.posterior, scene.true) > 0.97
    assert correction.label_rate.ci95_low <= noise <= correction.label_rate.ci95_high
    assert correction.label_rate.estimate == pytest.approx(noise, abs=0.04)
    assert len(correction.class_rates) == 10
    assert all(rate.ci95_low < noise < rate.ci95_high for rate in correction.class_rates)
    assert correction.pair_rate.estimate < 0.03 and correction.pair_rate.ci95_high < 0.2


def test_audio_gets_its_own_label_and_mismatched_pairs_are_detected():
    scene = make_scene(0.5, mismatched=0.4)
    correction = scene.correct()
    assert accuracy(correction.posterior, scene.true) > 0.95
    assert accuracy(correction.audio_posterior, scene.audio_class) > 0.95
    assert auroc(correction.correspondence.numpy(), ~scene.mismatched) > 0.97
    assert correction.pair_rate.estimate == pytest.approx(scene.mismatched.mean(), abs=0.04)
    assert correction.caution == 1


@long
def test_mismatch_rate_of_the_first_correction_is_a_prior_of_later_ones():
    """In later rounds both modalities were trained on the same votes and agree where they do not match."""
    scene = make_scene(0.5, mismatched=0.4)
    correction = scene.correct()
    prior = CorrectionPrior(
        correction.held_out, correction.rate_log_likelihood, correction.pair_rate_log_likelihood, 1.0
    )
    scene.audio = torch.where(
        torch.rand(1000, 1, generator=torch.Generator().manual_seed(2)) < 0.5, scene.visual, scene.audio
    )
    alone, later = scene.correct().pair_rate, scene.correct(prior=prior).pair_rate
    assert later.estimate - alone.estimate > 0.05


@pytest.mark.parametrize(
    ("noise", "spread"),
    [
        (0.2, 2.0),
        *(pytest.param(*case, marks=long) for case in ((0.6, 0.7), (0.2, 0.7), (0.2, 2.8), (0.6, 2.0), (0.6, 2.8))),
    ],
)
def test_interval_of_the_mismatch_rate_covers_it_for_confident_and_diffuse_votes(noise: float, spread: float):
    scene = make_scene(noise, mismatched=0.4, spread=spread)
    rate, mismatched = scene.correct().pair_rate, scene.mismatched.mean()
    assert rate.ci95_low - 0.03 <= mismatched <= rate.ci95_high + 0.03, rate
    assert rate.ci95_low <= rate.estimate <= rate.ci95_high


@long
def test_mismatch_rate_is_estimated_with_diffuse_votes():
    scene = make_scene(0.6, mismatched=0.4, spread=2.8)
    assert scene.correct().pair_rate.estimate == pytest.approx(scene.mismatched.mean(), abs=0.15)


def test_class_probabilities_are_calibrated():
    scene = make_scene(0.6, mismatched=0.2, spread=2.0)
    correction = scene.correct()
    for probs in (correction.held_out, correction.posterior):
        assert 0.6 < accuracy(probs, scene.true) < 0.98
        assert expected_calibration_error(probs.numpy(), scene.true.numpy()) < 0.08


def test_labels_are_unchanged_without_class_information_in_the_features():
    scene = make_scene(0.4, mismatched=0.0, spread=100.0)
    correction = scene.correct()
    assert not correction.has_signal
    assert torch.equal(correction.posterior.argmax(1), scene.given)
    assert correction.label_rate.ci95_width > 0.8 and correction.pair_rate.ci95_width > 0.8


@long
def test_mismatch_rate_is_unknown_if_one_modality_has_no_class_information():
    scene = make_scene(0.3, mismatched=0.0)
    scene.audio = torch.randn(scene.audio.shape, generator=torch.Generator().manual_seed(3))
    correction = scene.correct()
    assert correction.has_signal and accuracy(correction.posterior, scene.true) > 0.9
    assert correction.pair_rate.ci95_low == 0 and correction.pair_rate.ci95_width > 0.8
    assert 1 < correction.caution == cautious_odds_factor(correction.rate_log_likelihood, NUM_CLASSES)
    guessing, informative = (teacher_probs(scene.audio_class, skill, 5) for skill in (0.0, 0.9))
    assert scene.correct(teachers=(guessing, informative)).pair_rate.ci95_width < 0.3


@long
def test_visual_clusters_with_a_wrong_majority_are_corrected_by_their_audio():
    """Each class has eight visual clusters of 25 clips, in some of which wrong labels form a majority."""
    scene = make_scene(0.7, 0.4, num_samples=2000, spread=1.0)
    generator = torch.Generator().manual_seed(4)
    cluster = torch.randint(0, 8, (2000,), generator=generator)
    centers = torch.randn(10, 8, 32, generator=generator)
    scene.visual = centers[scene.true, cluster] + torch.randn(2000, 32, generator=generator)
    correction = scene.correct()
    assert accuracy(correction.posterior, scene.true) > 0.8


@long
def test_informative_teachers_improve_the_correction_and_uninformative_ones_do_not_harm_it():
    scene = make_scene(0.5, 0.3, spread=2.5)
    informative = teacher_probs(scene.true, 0.7, 5), teacher_probs(scene.audio_class, 0.7, 6)
    guessing = teacher_probs(scene.true, 0.0, 7), teacher_probs(scene.audio_class, 0.0, 8)
    alone, taught, guessed = (scene.correct(teachers=teachers) for teachers in (None, informative, guessing))
    without = accuracy(alone.posterior, scene.true)
    assert accuracy(taught.posterior, scene.true) > without + 0.1
    assert accuracy(guessed.posterior, scene.true) > without - 0.02
    audio_accuracies = [accuracy(correction.audio_posterior, scene.audio_class) for correction in (alone, taught)]
    assert audio_accuracies[1] > audio_accuracies[0] + 0.05
    pairs = [auroc(correction.correspondence.numpy(), ~scene.mismatched) for correction in (alone, taught, guessed)]
    assert pairs[1] > pairs[0] + 0.05 and pairs[2] > pairs[0] - 0.03


def test_teachers_correct_labels_where_neighbors_have_no_class_information():
    scene = make_scene(0.5, 0.0)
    scene.visual, scene.audio = torch.randn(2, len(scene.given), 32, generator=torch.Generator().manual_seed(3))
    teachers = teacher_probs(scene.true, 0.8, 5), teacher_probs(scene.audio_class, 0.8, 6)
    search_space = VoteSearchSpace(num_neighbors=(20, 60), second_round_neighbors=(0,), vote_temperatures=(0.1, 0.3))
    correction = scene.correct(search_space, teachers=teachers)
    assert correction.has_signal and accuracy(correction.posterior, scene.true) > 0.85
    assert correction.label_rate.ci95_low - 0.02 <= 0.5 <= correction.label_rate.ci95_high


@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=long), pytest.param(3, marks=long)])
def test_few_samples_with_votes_worse_than_chance_keep_their_labels(seed: int):
    torch.manual_seed(seed)
    given, valid = torch.randint(0, 4, (60,)), torch.ones(60, dtype=torch.bool)
    space = FeatureSpace("noise", torch.randn(60, 8), torch.randn(60, 8))
    search_space = VoteSearchSpace(num_neighbors=(6, 12), second_round_neighbors=(0, 6))
    correction = correct_labels([space], given, 4, torch.arange(60), dict.fromkeys(MODALITIES, valid), search_space)
    assert not correction.has_signal and torch.equal(correction.posterior.argmax(1), given)


def test_correction_does_not_depend_on_the_tile_size(monkeypatch: pytest.MonkeyPatch):
    scene = make_scene(0.4, 0.3, num_samples=300, spread=1.5)
    teachers = teacher_probs(scene.given, 0.6, 5), teacher_probs(scene.given, 0.5, 6)
    monkeypatch.setattr(model_fit, "STEPS", 2)
    corrections = []
    for elements in (2**17, 1000):
        monkeypatch.setitem(tiling.TILE_ELEMENTS, "cpu", elements)
        search_space = VoteSearchSpace((20,), (0, 20), (0.1, 0.3))
        corrections.append(scene.correct(search_space, teachers=teachers, valid=torch.arange(300) != 5))
    large, small = corrections
    assert large.selected_votes == small.selected_votes
    for name in (
        "held_out",
        "posterior",
        "audio_held_out",
        "audio_posterior",
        "correspondence",
        "transition_matrix",
        "rate_log_likelihood",
        "pair_rate_log_likelihood",
    ):
        torch.testing.assert_close(getattr(small, name), getattr(large, name), rtol=1e-4, atol=1e-5, msg=name)


def test_samples_without_features_keep_their_label(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model_fit, "STEPS", 2)
    scene = make_scene(0.4, 0.0)
    valid = torch.arange(1000) != 5
    scene.visual[5] = scene.audio[5] = 0
    correction = scene.correct(VoteSearchSpace((50,), (0, 20)), valid=valid)
    assert correction.posterior[5].tolist() == F.one_hot(scene.given[5], 10).tolist()
    torch.testing.assert_close(correction.posterior.sum(1), torch.ones(1000))


@pytest.mark.parametrize(
    ("spread", "mismatched", "min_accuracy"), [(1.0, 0.0, 0.9), pytest.param(1.5, 0.4, 0.95, marks=long)]
)
def test_asymmetric_noise_is_not_taken_for_samples_of_two_classes(
    spread: float, mismatched: float, min_accuracy: float
):
    scene = make_scene(0.0, mismatched, num_samples=2000, spread=spread)
    scene.given = flip_to_next_class(scene.true, 0.25)
    correction = scene.correct()
    assert accuracy(correction.posterior, scene.true) > min_accuracy
    assert correction.label_rate.ci95_low <= 0.25 <= correction.label_rate.ci95_high
    to_next_class = correction.transition_matrix[torch.arange(10), (torch.arange(10) + 1) % 10]
    assert (to_next_class > 0.15).all() and (to_next_class < 0.35).all()


@pytest.mark.parametrize(
    ("is_asymmetric", "spread", "max_width"),
    [
        (False, 1.2, 0.16),
        *(pytest.param(*case, marks=long) for case in ((True, 2.4, 0.25), (False, 2.4, 0.25), (True, 1.2, 0.16))),
    ],
)
def test_interval_of_the_noise_rate_covers_it_for_confident_and_diffuse_votes(
    is_asymmetric: bool, spread: float, max_width: float
):
    scene = make_scene(0.0 if is_asymmetric else 0.4, 0.4, num_samples=1500, spread=spread)
    if is_asymmetric:
        scene.given = flip_to_next_class(scene.true, 0.2)
    first = scene.correct()
    wrong = scene.given != scene.true
    wrong_by_class = [float(wrong[scene.true == label].double().mean()) for label in range(10)]
    prior = CorrectionPrior(
        first.held_out, first.rate_log_likelihood, first.pair_rate_log_likelihood, first.visual_owner
    )
    for correction in (first, scene.correct(prior=prior)):
        overall = correction.label_rate
        assert overall.ci95_low <= wrong.double().mean() <= overall.ci95_high
        covered = [
            estimate.ci95_low <= fraction <= estimate.ci95_high
            for estimate, fraction in zip(correction.class_rates, wrong_by_class, strict=True)
        ]
        assert sum(covered) >= 9, (correction.class_rates, wrong_by_class)
    assert first.label_rate.ci95_width < max_width


def test_small_datasets_try_fewer_neighbors_down_to_half_the_class_size():
    assert feasible_num_neighbors([50, 200, 400], 2700, 10) == [50, 200, 400]
    assert feasible_num_neighbors([50, 200, 400], 67, 4) == [6, 12, 25, 50]
    assert feasible_num_neighbors([6, 12], 96, 6) == [6, 12]
    assert feasible_num_neighbors([50], 60, 30) == [1, 3, 6, 12, 25, 50]


@pytest.mark.parametrize("missing", ["visual", pytest.param("audio", marks=long)])
def test_labels_are_corrected_with_one_modality(missing: str):
    scene = make_scene(0.4, 0.0)
    present = {name: torch.full((1000,), name != missing) for name in MODALITIES}
    correction = scene.correct(has_modality=present)
    assert accuracy(correction.posterior, scene.true) > 0.95
    assert abs(correction.label_rate.estimate - 0.4) < 0.05
    assert bool((correction.correspondence == 1).all()) and correction.caution == 1


def test_features_of_a_missing_modality_have_no_effect():
    scene = make_scene(0.4, 0.3, num_samples=600)
    present = {"visual": torch.arange(600) % 3 != 0, "audio": torch.arange(600) % 3 != 1}
    first = scene.correct(has_modality=present)
    for name, features in (("visual", scene.visual), ("audio", scene.audio)):
        features[~present[name]] = 3 * features[~present[name]] + 1
    second = scene.correct(has_modality=present)
    torch.testing.assert_close(second.posterior, first.posterior)
    assert accuracy(first.posterior, scene.true) > 0.85
    single = ~(present["visual"] & present["audio"])
    assert bool((first.correspondence[single] == 1).all()) and float(first.correspondence[~single].min()) < 0.5


def test_equal_features_carry_no_signal():
    scene = make_scene(0.2, 0.0, num_samples=200)
    scene.visual, scene.audio = torch.ones(200, 8), torch.ones(200, 8)
    correction = scene.correct()
    assert not correction.has_signal and torch.equal(correction.posterior.argmax(1), scene.given)
