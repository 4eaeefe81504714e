"""Correction of label lists: rates of missing and wrong labels, posteriors, and the same result on several ranks."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from distav.distributed.collectives import local_shard
from distav.noise.multi_label_correction import ListCorrection, correct_label_lists
from distav.noise.multi_label_model import LabelVotes, fit_model, frequency_log_likelihood
from distav.noise.multi_label_votes import ListVoteSearch
from tests.helpers.spawn import on_ranks
from tests.unit.noise.multi_label_scenes import MultiLabelScene, multi_label_scene

SEARCH = ListVoteSearch([40], [0.2], [0.0], 16)


def correct(scene: MultiLabelScene, earlier_rates: Tensor | None = None) -> ListCorrection:
    spaces = {name: (local_shard(visual), local_shard(audio)) for name, (visual, audio) in scene.spaces.items()}
    return correct_label_lists(spaces, scene.given, scene.groups, scene.has_modality, SEARCH, 10.0, earlier_rates)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The tensors are too small for several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scene() -> MultiLabelScene:
    return multi_label_scene(1200)


@pytest.fixture(scope="module")
def correction(scene: MultiLabelScene) -> ListCorrection:
    return correct(scene)


def test_rates_of_missing_and_wrong_labels_are_estimated(scene: MultiLabelScene, correction: ListCorrection):
    missing = float((scene.true & ~scene.given).sum() / scene.true.sum())
    wrong = float((scene.given & ~scene.true).sum() / (~scene.true).sum())
    assert correction.has_signal and correction.log_likelihood_gain > 1000
    assert correction.missing_rate.estimate == pytest.approx(missing, abs=0.02)
    assert correction.wrong_rate.estimate == pytest.approx(wrong, abs=0.01)
    assert correction.missing_rate.ci95_low < missing < correction.missing_rate.ci95_high
    assert correction.wrong_rate.ci95_low < wrong < correction.wrong_rate.ci95_high


def test_rates_of_each_class_are_estimated(scene: MultiLabelScene, correction: ListCorrection):
    estimates = [rate.estimate for rate in correction.class_missing_rates]
    np.testing.assert_allclose(estimates, scene.missing_rates, atol=0.08)
    assert np.corrcoef(estimates, scene.missing_rates)[0, 1] > 0.95
    np.testing.assert_allclose([rate.estimate for rate in correction.class_wrong_rates], scene.wrong_rates, atol=0.02)


def test_corrected_lists_are_closer_to_the_true_ones(scene: MultiLabelScene, correction: ListCorrection):
    given_errors = (scene.given != scene.true).float().mean()
    held_out_errors = ((correction.held_out > 0.5) != scene.true).float().mean()
    posterior_errors = ((correction.posterior > 0.5) != scene.true).float().mean()
    assert posterior_errors < held_out_errors < 0.5 * given_errors
    # Of the pairs with a posterior of about 0.8, about 80 % have the class.
    bins = (correction.posterior.flatten() * 10).long().clamp_max(9)
    surplus = torch.zeros(10).index_add(0, bins, correction.posterior.flatten() - scene.true.flatten().float())
    assert surplus.abs().sum() / len(bins) < 0.01


def test_held_out_probabilities_do_not_depend_on_the_own_label(scene: MultiLabelScene):
    small = multi_label_scene(300)
    sample = 7
    changed = small.given.clone()
    changed[sample] = ~changed[sample]
    first, second = correct(small), correct(replace(small, given=changed))
    # The label changes the parameters of all samples a little, but its own held-out vote no more than those of others.
    differences = (first.held_out - second.held_out).abs().amax(1)
    assert differences[sample] <= differences.quantile(0.95) + 1e-6
    assert (first.posterior - second.posterior).abs()[sample].max() > 0.05


def test_random_features_have_no_signal_and_labels_are_kept(scene: MultiLabelScene):
    noise = torch.Generator().manual_seed(1)
    visual, audio = torch.randn(2, 400, 16, generator=noise)
    small = multi_label_scene(400)
    correction = correct(replace(small, spaces={"towers": (visual, audio)}))
    assert not correction.has_signal and correction.log_likelihood_gain < 10
    assert correction.missing_rate.ci95_low == 0 and correction.missing_rate.ci95_high == 1
    assert torch.equal(correction.posterior > 0.5, small.given) and torch.equal(correction.held_out > 0.5, small.given)


def test_clean_labels_have_small_rates_and_are_kept():
    clean = multi_label_scene(600, missing=(0.0,) * 6, wrong=(0.0,) * 6)
    correction = correct(clean)
    assert correction.missing_rate.estimate < 0.015 and correction.wrong_rate.estimate < 0.005
    assert correction.missing_rate.ci95_low == 0 == correction.wrong_rate.ci95_low
    assert ((correction.posterior > 0.5) != clean.true).float().mean() < 0.003


def test_clips_without_a_modality_are_corrected_by_the_other_one(scene: MultiLabelScene):
    has = {name: torch.ones(1200, dtype=torch.bool) for name in ("visual", "audio")}
    has["visual"][:300], has["audio"][200:500] = False, False
    correction = correct(replace(scene, has_modality=has))
    nothing, single = slice(200, 300), slice(0, 200)
    assert torch.equal(correction.posterior[nothing], scene.given[nothing].float())
    errors = ((correction.posterior[single] > 0.5) != scene.true[single]).float().mean()
    assert errors < 0.6 * (scene.given[single] != scene.true[single]).float().mean()


def test_later_corrections_keep_the_rates_of_the_first(scene: MultiLabelScene, correction: ListCorrection):
    # Features that reproduce the given labels would suggest that none is wrong.
    reproduced = scene.given.float() @ torch.eye(6, 16) + 0.2 * torch.randn(
        1200, 16, generator=torch.Generator().manual_seed(2)
    )
    memorized = replace(scene, spaces={"towers": (reproduced, reproduced)})
    without, later = correct(memorized), correct(memorized, correction.rate_logits)
    assert without.missing_rate.estimate < 0.03
    assert later.missing_rate.estimate == pytest.approx(correction.missing_rate.estimate, abs=0.05)
    width = correction.missing_rate.ci95_high - correction.missing_rate.ci95_low
    assert later.missing_rate.ci95_high - later.missing_rate.ci95_low > 0.5 * width


def results(num_clips: int) -> tuple[np.ndarray, dict[str, float]]:
    correction = correct(multi_label_scene(num_clips))
    return correction.posterior.numpy(), correction.missing_rate.as_dict()


def test_two_ranks_compute_the_result_of_one():
    posterior, rate = results(301)
    first, second = on_ranks(2, results, 301)
    np.testing.assert_allclose(np.concatenate([first[0], second[0]]), posterior, atol=1e-4)
    assert first[1] == second[1] == pytest.approx(rate, abs=1e-3)


def test_fitted_parameters_maximize_the_posterior():
    generator = torch.Generator().manual_seed(0)
    votes = 2 * torch.randn(400, 2, 1, generator=generator)
    probs = 0.05 + 0.75 * (votes[..., 0].double() * 1.5).sigmoid()
    given = torch.rand(400, 2, generator=generator) < probs
    observed = LabelVotes(votes, given, torch.zeros(2, dtype=torch.float64))
    parameters = fit_model(observed, num_rounds=0).parameters
    log_likelihood, gradient, information = observed.evaluate(parameters)
    step = 1e-5
    for index in range(4):
        shifted = parameters.clone()
        shifted[:, index] += step
        numeric = (observed.evaluate(shifted)[0] - log_likelihood) / step
        torch.testing.assert_close(numeric, gradient[:, index], atol=1e-2, rtol=1e-2)
    assert torch.linalg.eigvalsh(information).min() > -1e-9


def test_log_likelihood_of_frequencies():
    given = torch.tensor([[True, False], [True, True], [False, False], [True, False]])
    expected = 3 * np.log(0.75) + np.log(0.25) + np.log(0.25) + 3 * np.log(0.75)
    assert frequency_log_likelihood(given) == pytest.approx(expected)
