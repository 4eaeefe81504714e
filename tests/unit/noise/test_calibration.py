"""Weights of the vote ensemble."""

import torch

from distav.noise.calibration import VoteCalibrator
from distav.noise.noise_rate import uniform_transition_matrix
from tests.unit.noise.scenes import make_scene, teacher_probs


def test_ensemble_weights_follow_the_accuracy_as_far_as_the_labels_determine_it():
    fractions = []
    for noise in (0.2, 0.87):
        scene = make_scene(noise, 0.0)
        calibrator = VoteCalibrator(scene.given, 10, torch.ones(len(scene.given), dtype=torch.bool))
        members = [teacher_probs(scene.true, right, seed) for right, seed in ((0.7, 5), (0.5, 6), (0.0, 7))]
        _, weights = calibrator.fit_ensemble(members, uniform_transition_matrix(1.0, 10))
        fractions.append([weight / sum(weights) for weight in weights])
    assert all(better > worse > guessing for better, worse, guessing in fractions)
    assert fractions[0][0] > fractions[1][0] and fractions[0][2] < fractions[1][2]
