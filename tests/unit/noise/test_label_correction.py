from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distav.evaluation.metrics import auroc, expected_calibration_error, label_accuracy
from distav.noise import tiling
from distav.noise.calibration import Calibration, VoteCalibrator
from distav.noise.class_agreement import class_agreement, pair_posterior
from distav.noise.knn_vote import NeighborGraph, pca_whiten
from distav.noise.label_correction import (
    CorrectionPrior,
    FeatureSpace,
    VoteSearchSpace,
    correct_labels,
    fitting_neighbors,
)
from distav.noise.noise_rate import uniform_transition_matrix
from distav.noise.vote_search import VoteTask, select_label_vote
from distav.training.phases.correction_summary import calibration_error


def scene(noise: float, swapped: float, num: int = 1000, classes: int = 10, spread: float = 0.7):
    generator = torch.Generator().manual_seed(1)
    rng = np.random.default_rng(1)
    true = torch.arange(num) % classes
    heard = true.clone()
    mixed = torch.from_numpy(rng.permutation(num)[: int(swapped * num)])
    heard[mixed] = true[mixed.roll(1)]
    centres = torch.randn(2, classes, 32, generator=generator)
    visual, audio = (
        centres[side][which] + spread * torch.randn(num, 32, generator=generator)
        for side, which in ((0, true), (1, heard))
    )
    given = true.clone()
    flipped = torch.from_numpy(rng.permutation(num)[: int(noise * num)])
    given[flipped] = (true[flipped] + torch.from_numpy(rng.integers(1, classes, len(flipped)))) % classes
    return visual, audio, given, true, heard


def corrected(noise: float, swapped: float, **changes: float):
    visual, audio, given, true, heard = scene(noise, swapped, **changes)
    every = torch.ones(len(given), dtype=torch.bool)
    voting = VoteSearchSpace(num_neighbors=(20, 60), second_round_neighbors=(0, 20), vote_temperatures=(0.1, 0.3))
    found = correct_labels([FeatureSpace("rows", visual, audio)], given, 10, torch.arange(len(given)), every, voting)
    return found, given, true, heard


@pytest.mark.parametrize("noise", [0.2, 0.6])
def test_neighbors_set_most_labels_right_and_tell_how_many_were_wrong(noise: float):
    found, given, true, _ = corrected(noise, swapped=0.0)
    assert (given == true).float().mean() == pytest.approx(1 - noise)
    assert (found.posterior.argmax(1) == true).float().mean() > 0.97
    assert found.label_rate.ci95_low <= noise <= found.label_rate.ci95_high
    assert found.label_rate.estimate == pytest.approx(noise, abs=0.03)
    assert len(found.class_rates) == 10 and all(each.ci95_low < noise < each.ci95_high for each in found.class_rates)
    assert found.pair_rate.estimate < 0.03 and found.pair_rate.ci95_high < 0.2


def test_each_sound_gets_its_own_label_and_swaps_are_found():
    found, _, true, heard = corrected(noise=0.5, swapped=0.4)
    assert (found.posterior.argmax(1) == true).float().mean() > 0.95
    assert (found.audio_posterior.argmax(1) == heard).float().mean() > 0.95
    wrong = (true != heard).numpy()
    assert auroc(found.correspondence.numpy(), ~wrong) > 0.97
    assert found.pair_rate.estimate == pytest.approx(wrong.mean(), abs=0.04)


@pytest.mark.parametrize("spread", [0.7, 2.0, 2.8])
@pytest.mark.parametrize("noise", [0.2, 0.6])
def test_the_interval_of_the_pair_noise_holds_it_however_blunt_the_votes(noise: float, spread: float):
    found, _, true, heard = corrected(noise=noise, swapped=0.4, spread=spread)
    wrong = float((true != heard).float().mean())
    assert found.pair_rate.ci95_low - 0.03 <= wrong <= found.pair_rate.ci95_high + 0.03, found.pair_rate
    assert found.pair_rate.ci95_low <= found.pair_rate.estimate <= found.pair_rate.ci95_high


def test_the_share_of_mismatches_is_told_by_sure_votes_where_the_best_are_blunt():
    found, _, true, heard = corrected(noise=0.6, swapped=0.4, spread=2.8)
    assert found.pair_rate.estimate == pytest.approx(float((true != heard).float().mean()), abs=0.15)
    seen, heard = torch.arange(400) % 10, torch.arange(400) % 10
    heard[300:] += torch.randint(1, 10, (100,), generator=torch.Generator().manual_seed(1))
    picture, sure = (torch.lerp(torch.tensor(0.1), F.one_hot(each % 10, 10).float(), 0.98) for each in (seen, heard))
    every = torch.ones(400, dtype=torch.bool)
    one, other = (class_agreement(picture, torch.lerp(torch.tensor(0.1), sure, by), every) for by in (0.05, 1.0))
    assert other.entropy < one.entropy and other.per_sample > one.per_sample > 0
    told, alone = (pair_posterior(picture, one, each.rate_log_likelihood, every) for each in (other, one))
    assert told.mismatch_rate.estimate == pytest.approx(100 / 360, abs=0.08) and alone.mismatch_rate.estimate < 0.1
    assert told.correspondence[300:].max() < 0.7 < 0.9 < told.correspondence[:300].min()
    assert alone.correspondence[300:].min() > 0.9


def test_fractions_are_calibrated():
    found, _, true, _ = corrected(noise=0.6, swapped=0.2, spread=2.0)
    for shares in (found.held_out, found.posterior):
        accuracy = float((shares.argmax(1) == true).float().mean())
        assert 0.6 < accuracy < 0.98
        assert expected_calibration_error(shares.numpy(), true.numpy()) < 0.08


def test_features_that_know_nothing_leave_the_labels_alone():
    found, given, _, _ = corrected(noise=0.4, swapped=0.0, spread=100.0)
    assert not found.has_signal
    assert torch.equal(found.posterior.argmax(1), given)


def test_groups_of_pictures_that_wrong_labels_outvote_are_put_right_by_their_sounds():
    """Pictures of a class come in eight groups of 25, of which the labels of some speak for another class."""
    _, audio, given, true, _ = scene(0.7, 0.4, num=2000, spread=1.0)
    generator = torch.Generator().manual_seed(4)
    group = torch.randint(0, 8, (2000,), generator=generator)
    visual = torch.randn(10, 8, 32, generator=generator)[true, group] + torch.randn(2000, 32, generator=generator)
    every = torch.ones(2000, dtype=torch.bool)
    voting = VoteSearchSpace(num_neighbors=(20, 60), second_round_neighbors=(0, 20), vote_temperatures=(0.1, 0.3))
    found = correct_labels([FeatureSpace("rows", visual, audio)], given, 10, torch.arange(2000), every, voting)
    assert (found.posterior.argmax(1) == true).float().mean() > 0.95
    assert "across" in found.selected_votes["pooled"] and "across 0.0" not in found.selected_votes["pooled"]


def test_experts_are_weighed_as_far_as_labels_tell_them_apart():
    shares = []
    for noise in (0.2, 0.87):
        _, _, given, true, _ = scene(noise, 0.0)
        judges = VoteCalibrator(given, 10, torch.ones(len(given), dtype=torch.bool))
        better, worse, guessing = (opinion(true, right, seed) for right, seed in ((0.7, 5), (0.5, 6), (0.0, 7)))
        _, weights = judges.fit_ensemble([better, worse, guessing], uniform_transition_matrix(1.0, 10))
        shares.append([weight / sum(weights) for weight in weights])
    assert all(one > two > three for one, two, three in shares)
    assert shares[0][0] > shares[1][0] and shares[0][2] < shares[1][2]


def opinion(of: torch.Tensor, right: float, seed: int) -> torch.Tensor:
    """Shares of a teacher that is right so often, and knows nothing of labels."""
    generator = torch.Generator().manual_seed(seed)
    guess = torch.randint(0, 10, of.shape, generator=generator)
    held = torch.where(torch.rand(of.shape, generator=generator) < right, of, guess)
    return (2.5 * F.one_hot(held, 10) + 0.5 * torch.randn(len(of), 10, generator=generator)).softmax(1)


def test_teachers_have_a_vote_each_and_none_that_know_nothing():
    # Blunt features, half of the labels wrong, a third of the sounds foreign.
    visual, audio, given, true, heard = scene(0.5, 0.3, spread=2.5)
    every, groups = torch.ones(len(given), dtype=torch.bool), torch.arange(len(given))
    voting = VoteSearchSpace(num_neighbors=(20, 60), second_round_neighbors=(0, 20), vote_temperatures=(0.1, 0.3))
    spaces = [FeatureSpace("rows", visual, audio)]
    knowing = opinion(true, 0.7, 5), opinion(heard, 0.7, 6)
    guessing = opinion(true, 0.0, 7), opinion(heard, 0.0, 8)
    alone, told, guessed = (
        correct_labels(spaces, given, 10, groups, every, voting, None, teachers)
        for teachers in (None, knowing, guessing)
    )

    def right(found, which: str, of: torch.Tensor) -> float:
        return float((getattr(found, which).argmax(1) == of).float().mean())

    assert right(told, "posterior", true) > right(alone, "posterior", true) + 0.1
    assert right(told, "audio_posterior", heard) > right(alone, "audio_posterior", heard) + 0.1
    matched = (heard == true).numpy()
    pairs = [auroc(each.correspondence.numpy(), matched) for each in (alone, told, guessed)]
    assert pairs[1] > pairs[0] + 0.05 and pairs[2] > pairs[0] - 0.03
    assert right(guessed, "posterior", true) > right(alone, "posterior", true) - 0.02
    assert "teacher of sounds" in told.selected_votes["pooled"] and "teacher" in told.selected_votes["sounds"]


def test_teachers_are_heard_where_neighbours_know_nothing():
    _, _, given, true, heard = scene(0.5, 0.0)
    nothing = torch.randn(2, len(given), 32, generator=torch.Generator().manual_seed(3))
    every, groups = torch.ones(len(given), dtype=torch.bool), torch.arange(len(given))
    teachers = opinion(true, 0.8, 5), opinion(heard, 0.8, 6)
    voting = VoteSearchSpace(num_neighbors=(20, 60), second_round_neighbors=(0,), vote_temperatures=(0.1, 0.3))
    found = correct_labels([FeatureSpace("rows", *nothing)], given, 10, groups, every, voting, None, teachers)
    assert found.has_signal and (found.posterior.argmax(1) == true).float().mean() > 0.85
    assert found.label_rate.ci95_low - 0.02 <= 0.5 <= found.label_rate.ci95_high


@pytest.mark.parametrize("seed", range(4))
def test_few_samples_whose_votes_are_worse_than_chance_keep_their_labels(seed: int):
    torch.manual_seed(seed)
    given, everyone = torch.randint(0, 4, (60,)), torch.ones(60, dtype=torch.bool)
    space = FeatureSpace("noise", torch.randn(60, 8), torch.randn(60, 8))
    found = correct_labels(
        [space],
        given,
        4,
        torch.arange(60),
        everyone,
        VoteSearchSpace(num_neighbors=(6, 12), second_round_neighbors=(0, 6)),
    )
    assert not found.has_signal and torch.equal(found.posterior.argmax(1), given)


def test_a_label_never_reaches_its_own_vote():
    """Changing the label of one sample leaves its own held-out votes as they were, and moves others."""
    visual, _, given, _, _ = scene(0.6, 0.0, num=300, spread=2.0)
    every = torch.ones(300, dtype=torch.bool)
    near = NeighborGraph(pca_whiten(visual, every, 16, 0.5), 30, torch.arange(300), every)
    moved = {0: 0, 10: 0}
    for sample in range(0, 300, 3):
        other = given.clone()
        other[sample] = (given[sample] + 3) % 10
        elections = [near.vote(each, 10, 30, 0.2) for each in (given, other)]
        for voters in (0, 10):
            votes = [
                election.second_round(each, voters) if voters else election.shares
                for election, each in zip(elections, (given, other), strict=True)
            ]
            torch.testing.assert_close(votes[0][sample], votes[1][sample], rtol=1e-5, atol=1e-6)
            moved[voters] += not torch.allclose(*votes, rtol=1e-5, atol=1e-6)
    assert moved[0] == 100 and moved[10] > 50


def test_a_correction_does_not_hang_on_the_size_of_tiles(monkeypatch: pytest.MonkeyPatch):
    visual, audio, given, _, _ = scene(0.4, 0.3, num=300, spread=1.5)
    valid = torch.arange(300) != 5
    teachers = opinion(given, 0.6, 5), opinion(given, 0.5, 6)
    found = []
    for numbers in (2**17, 1000):
        monkeypatch.setitem(tiling.TILE_NUMBERS, "cpu", numbers)
        voting = VoteSearchSpace((20,), (0, 20), (0.1, 0.3))
        found.append(
            correct_labels(
                [FeatureSpace("rows", visual, audio)], given, 10, torch.arange(300), valid, voting, None, teachers
            )
        )
    assert found[0].chosen == found[1].chosen
    for name in (
        "held_out",
        "posterior",
        "audio_held_out",
        "audio_posterior",
        "correspondence",
        "noise_matrix",
        "told",
    ):
        torch.testing.assert_close(getattr(found[1], name), getattr(found[0], name), rtol=1e-4, atol=1e-5, msg=name)


class _Scripted(VoteCalibrator):
    """Judges whose findings on one way after the other are known."""

    def calibrate(self, votes: torch.Tensor, prior: torch.Tensor | None = None) -> Calibration:
        found = replace(super().calibrate(votes, prior), per_sample=self.found[0][0], entropy=self.found[0][1])
        self.found = self.found[1:]
        return found

    def chance(self) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("found", "wins"),
    [
        ([(0.56, 1.0), (0.58, 1.1), (0.60, 1.2), (0.1, 0.1)], 1),  # The first leads until the third leaves it behind.
        ([(0.56, 1.0), (0.58, 1.2), (0.60, 1.1), (0.1, 0.1)], 2),
        ([(0.56, 1.3), (0.58, 1.2), (0.1, 0.1), (0.59, 1.1)], 3),
        ([(0.60, 1.0), (0.58, 1.1), (0.1, 0.1), (0.1, 0.1)], 0),
    ],
)
def test_votes_that_were_given_up_are_counted_again_where_they_win(found: list[tuple[float, float]], wins: int):
    visual, audio, given, _, _ = scene(0.4, 0.0, num=300, spread=1.5)
    every, groups = torch.ones(300, dtype=torch.bool), torch.arange(300)
    judges = _Scripted(given, 10, every)
    judges.found = found
    voting = VoteSearchSpace((20,), (0, 20), (0.1,), (0.0, 0.5))
    problem = VoteTask(given, given, 10, groups, every, every, voting, judges)
    elected, votes = select_label_vote(problem, [FeatureSpace("rows", visual, audio)], lambda space: space.visual, None)
    whitening, second = ((0.0, 0), (0.0, 20), (0.5, 0), (0.5, 20))[wins]
    assert elected.name == f"rows, whitening {whitening:g}, k 20, temperature 0.1, second vote of {second}"
    election = NeighborGraph(pca_whiten(visual, every, voting.num_components, whitening), 20, groups, every).vote(
        given, 10, 20, 0.1
    )
    expected = election.second_round(given, 20) if second else election.shares
    torch.testing.assert_close(
        votes, VoteCalibrator(given, 10, every).calibrate(expected).inverse_temperature(expected)
    )


def test_whitening_evens_out_the_axes():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 6, generator=generator) * torch.tensor([100.0, 10.0, 1.0, 1.0, 1.0, 1.0]) + 5
    every = torch.ones(4000, dtype=torch.bool)
    assert pca_whiten(rows, every, 6, 0.0)[:, 0].square().mean() > 0.9
    even = pca_whiten(rows, every, 6, 1.0)
    torch.testing.assert_close(even.square().mean(0), torch.full((6,), 1 / 6), rtol=0.1, atol=0)
    torch.testing.assert_close(even.norm(dim=1), torch.ones(4000))


def test_samples_without_features_keep_their_label():
    visual, audio, given, _, _ = scene(0.4, 0.0)
    valid = torch.ones(1000, dtype=torch.bool)
    valid[5] = False
    visual[5] = audio[5] = 0
    found = correct_labels(
        [FeatureSpace("rows", visual, audio)], given, 10, torch.arange(1000), valid, VoteSearchSpace((50,), (0, 20))
    )
    assert found.posterior[5].tolist() == F.one_hot(given[5], 10).tolist()
    torch.testing.assert_close(found.posterior.sum(1), torch.ones(1000))


@pytest.mark.parametrize(
    ("spread", "swapped", "least", "off"),
    [(0.7, 0.0, 0.97, 0.1), (0.7, 0.4, 0.97, 0.1), (2.0, 0.0, 0.93, 0.1), (2.0, 0.4, 0.89, 0.15)],
)
def test_asymmetric_noise_is_seen_as_such_and_not_as_samples_of_two_classes(
    spread: float, swapped: float, least: float, off: float
):
    visual, audio, _, true, heard = scene(0.0, swapped, num=2000, spread=spread)
    flipped = torch.rand(2000, generator=torch.Generator().manual_seed(3)) < 0.4
    given = torch.where(flipped, (true + 1) % 10, true)
    every = torch.ones(2000, dtype=torch.bool)
    voting = VoteSearchSpace(num_neighbors=(20, 60), second_round_neighbors=(0, 20), vote_temperatures=(0.1, 0.3))
    found = correct_labels([FeatureSpace("rows", visual, audio)], given, 10, torch.arange(2000), every, voting)
    assert (found.posterior.argmax(1) == true).float().mean() > least
    assert found.label_rate.estimate == pytest.approx(0.4, abs=0.03)
    assert found.pair_rate.estimate == pytest.approx(10 / 9 * float((true != heard).float().mean()), abs=0.05)
    following = found.transition_matrix[torch.arange(10), (torch.arange(10) + 1) % 10]
    assert (following > 0.4 - off).all() and (following < 0.4 + off).all()


@pytest.mark.parametrize("rate", [0.2, 0.4])
@pytest.mark.parametrize("spread", [1.2, 2.4])
def test_the_interval_of_the_label_noise_is_as_wide_as_ways_to_vote_differ(spread: float, rate: float):
    visual, audio, _, true, _ = scene(0.0, 0.4, num=2000, spread=spread)
    given = torch.where(torch.rand(2000, generator=torch.Generator().manual_seed(3)) < rate, (true + 1) % 10, true)
    every = torch.ones(2000, dtype=torch.bool)
    voting = VoteSearchSpace(num_neighbors=(20, 60), second_round_neighbors=(0, 20), vote_temperatures=(0.1, 0.3))
    spaces = [FeatureSpace("rows", visual, audio)]
    first = correct_labels(spaces, given, 10, torch.arange(2000), every, voting)
    before = CorrectionPrior(first.held_out, first.rate_log_likelihood, first.rate_log_likelihood_credible)
    later = correct_labels(spaces, given, 10, torch.arange(2000), every, voting, before)
    wrong = given != true
    for found in (first, later):
        assert found.label_rate.ci95_low <= wrong.double().mean() <= found.label_rate.ci95_high
        assert (found.label_rate.ci95_high - found.label_rate.ci95_low < 0.08) == (spread == 1.2)
        assert found.label_rate.ci95_low <= found.label_rate.estimate <= found.label_rate.ci95_high
        each = [float(wrong[true == c].double().mean()) for c in range(10)]
        held = [told.ci95_low <= one <= told.ci95_high for told, one in zip(found.class_rates, each, strict=True)]
        assert sum(held) >= 9, (found.class_rates, each)


def test_calibration_error_of_known_shares():
    shares = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    assert expected_calibration_error(shares, np.array([0, 1, 0, 1])) == pytest.approx((2 * 0.4 + 2 * 0.4) / 4)
    assert expected_calibration_error(np.eye(3), np.arange(3)) == 0
    assert calibration_error(torch.from_numpy(shares), np.array([0, 1, 0, 1])) == pytest.approx(0.4)


def test_auroc_and_label_accuracy():
    scores, positive = np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True])
    assert auroc(scores, positive) == pytest.approx(3.5 / 4)
    assert np.isnan(auroc(scores, np.ones(4, bool)))
    given, corrected, true = np.array([0, 1, 1, 2]), np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])
    expected = {"given": 0.75, "corrected": 0.75, "wrong_labels_fixed": 1.0, "right_labels_broken": 1 / 3}
    assert label_accuracy(given, corrected, true) == pytest.approx(expected)


def test_small_sets_try_fewer_neighbours_until_half_a_class_has_as_many():
    assert fitting_neighbors([50, 200, 400], 2700, 10) == [50, 200, 400]
    assert fitting_neighbors([50, 200, 400], 67, 4) == [6, 12, 25, 50]
    assert fitting_neighbors([6, 12], 96, 6) == [6, 12]
    assert fitting_neighbors([50], 60, 30) == [1, 3, 6, 12, 25, 50]
