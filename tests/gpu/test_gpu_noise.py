"""Votes, noise rates and event-parsing losses on a GPU: equal to the CPU, with little memory, and safe with NaN."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distav.data.modalities import MODALITIES
from distav.losses.event_parsing import modality_losses, segment_losses, video_losses
from distav.noise.calibration import VoteCalibrator
from distav.noise.class_agreement import class_agreement, pair_posterior
from distav.noise.correspondence import fit_mixture, gmm_correspondence
from distav.noise.label_correction import Correction, CorrectionPrior, correct_labels
from distav.noise.noise_rate import estimate_transition_matrix, uniform_transition_matrix
from distav.noise.tiling import TILE_ELEMENTS
from distav.noise.vote_search import FeatureSpace, VoteSearchSpace

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compute_tables(device: torch.device, num_samples: int = 9000, num_classes: int = 700) -> dict[str, Tensor]:
    """Return the results of all functions of complete tables."""
    labels = (torch.arange(num_samples) % num_classes).to(device)
    votes, visual = (
        (2 * draw(num_samples, num_classes, seed=seed) + 5 * F.one_hot(labels.cpu(), num_classes)).softmax(1).to(device)
        for seed in (0, 1)
    )
    usable = labels != 3
    calibrator = VoteCalibrator(labels, num_classes, usable)
    calibration = calibrator.calibrate(votes)
    agreement = class_agreement(visual, votes, usable)
    pairs = pair_posterior(visual, votes, agreement, agreement.rate_log_likelihood, usable)
    combined, weights = calibrator.fit_ensemble([votes, visual], calibration.error_distribution)
    errors = uniform_transition_matrix(1.0, num_classes).to(device)
    posterior, matrix = estimate_transition_matrix(visual, labels, 0.3, errors, 5)
    return {
        "log_likelihood": calibration.log_likelihood - calibration.log_likelihood.max(),
        "scores": torch.tensor([calibration.per_sample, calibration.entropy, calibrator.prior_log_likelihood()]),
        "error_distribution": calibration.error_distribution,
        "calibrated": calibration.calibrate(votes),
        "agreement": agreement.log_likelihood,
        "agreement_scores": torch.tensor([agreement.per_sample, agreement.entropy]),
        "correspondence": pairs.correspondence,
        "audio_probs": pairs.audio_probs,
        "combined": combined,
        "weights": torch.tensor(weights),
        "posterior": posterior,
        "matrix": matrix,
    }


def test_tables_are_equal_on_cpu_and_gpu():
    on_cpu, on_gpu = compute_tables(CPU), compute_tables(CUDA)
    for name, expected in on_cpu.items():
        torch.testing.assert_close(
            on_gpu[name].cpu(), expected, rtol=1e-4, atol=1e-5, msg=lambda message, name=name: f"{name}: {message}"
        )


def correct(device: torch.device, previous: Correction | None = None) -> Correction:
    sample = torch.arange(3000)
    true = sample % 10
    audio_class = torch.where(sample < 900, (true + 1 + sample // 10 % 9) % 10, true)
    visual, audio = (
        draw(10, 32, seed=seed)[classes] + 1.5 * draw(3000, 32, seed=seed + 2)
        for seed, classes in enumerate((true, audio_class))
    )
    given = torch.where(sample // 10 % 5 < 2, (true + 1 + sample // 50 % 7) % 10, true)
    spaces = [FeatureSpace("rows", visual.to(device), audio.to(device))]
    search_space = VoteSearchSpace((20, 60), (0, 20), (0.1, 0.3), (0.0, 0.5), 16)
    arguments = (
        given.to(device),
        10,
        sample.to(device),
        dict.fromkeys(MODALITIES, (sample != 7).to(device)),
        search_space,
    )
    if previous is None:
        return correct_labels(spaces, *arguments)
    visual_teacher, audio_teacher = (
        (3 * F.one_hot(classes, 10) + draw(3000, 10, seed=5)).softmax(1).to(device) for classes in (true, audio_class)
    )
    prior = CorrectionPrior(
        previous.held_out.to(device),
        previous.rate_log_likelihood.to(device),
        previous.rate_log_likelihood_credible.to(device),
    )
    return correct_labels(spaces, *arguments, prior, (visual_teacher, audio_teacher))


@pytest.mark.parametrize("with_prior", [False, True])
def test_corrections_are_equal_on_cpu_and_gpu(with_prior: bool):
    previous = correct(CPU) if with_prior else None
    on_cpu, on_gpu = correct(CPU, previous), correct(CUDA, previous)
    assert on_gpu.has_signal and on_cpu.has_signal
    for vote in ("visual", "audio", "joint", "cross_modal"):
        assert on_cpu.selected_votes[vote] == on_gpu.selected_votes[vote]
    for name in ("held_out", "posterior", "audio_held_out", "audio_posterior"):
        expected, actual = getattr(on_cpu, name), getattr(on_gpu, name).cpu()
        assert (expected.argmax(1) == actual.argmax(1)).double().mean() > 0.999, name
        assert (expected - actual).abs().mean() < 1e-4, name
    assert (on_cpu.correspondence - on_gpu.correspondence.cpu()).abs().mean() < 1e-4
    for name in ("label_rate", "pair_rate"):
        expected, actual = getattr(on_cpu, name), getattr(on_gpu, name)
        for figure in ("estimate", "ci95_low", "ci95_high"):
            assert getattr(actual, figure) == pytest.approx(getattr(expected, figure), abs=1e-3), (name, figure)
    torch.testing.assert_close(on_gpu.transition_matrix.cpu(), on_cpu.transition_matrix, rtol=1e-3, atol=1e-3)


def peak_growth(work: Callable[[], object]) -> int:
    """Return by how many bytes the peak of the GPU memory grows during some work."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_functions_take_little_more_memory_than_the_table_that_they_return():
    """Peak above the arguments <= 1.3 x returned tables + twelve float64 numbers per element of a tile."""
    num_samples, num_classes = 250_000, 700
    labels = torch.arange(num_samples, device=CUDA) % num_classes
    valid = torch.ones(num_samples, dtype=torch.bool, device=CUDA)
    votes, visual = (torch.rand(num_samples, num_classes, device=CUDA).pow_(4) for _ in range(2))
    for probs in (votes, visual):
        probs.div_(probs.sum(1, keepdim=True))
    errors = uniform_transition_matrix(1.0, num_classes).double().to(CUDA)
    calibrator, agreement = VoteCalibrator(labels, num_classes, valid), class_agreement(visual, votes, valid)
    calibration = calibrator.calibrate(votes)
    functions: dict[str, tuple[int, Callable[[], object]]] = {
        "class_agreement": (0, lambda: class_agreement(visual, votes, valid)),
        "pair_posterior": (1, lambda: pair_posterior(visual, votes, agreement, agreement.rate_log_likelihood, valid)),
        "VoteCalibrator.calibrate": (0, lambda: calibrator.calibrate(votes)),
        "Calibration.calibrate": (1, lambda: calibration.calibrate(votes)),
        "fit_ensemble": (1, lambda: calibrator.fit_ensemble([visual, votes], errors)),
        "estimate_transition_matrix": (1, lambda: estimate_transition_matrix(votes, labels, 0.4, errors)),
    }
    table, overhead = num_samples * num_classes * 4, 12 * TILE_ELEMENTS["cuda"] * 8
    measured = {name: (num_tables, peak_growth(work)) for name, (num_tables, work) in functions.items()}
    exceeding = {
        name: growth / table
        for name, (num_tables, growth) in measured.items()
        if growth > 1.3 * num_tables * table + overhead
    }
    assert not exceeding, f"tables: {exceeding}"


def test_mixtures_are_equal_on_cpu_and_gpu_for_any_number_of_pairs():
    mismatched = torch.arange(20_000) < 8000
    similarity = torch.where(mismatched, 0.02, 0.55) + 0.1 * draw(20_000, seed=0)
    on_cpu, mixture = gmm_correspondence(similarity)
    on_gpu, gpu_mixture = gmm_correspondence(similarity.to(CUDA))
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-5, atol=1e-6)
    repeated_mixture = fit_mixture(similarity.to(CUDA).repeat(2**24 // 20_000 + 1))
    for fitted in (gpu_mixture, repeated_mixture):
        assert fitted.means == pytest.approx(mixture.means, rel=1e-5)
        assert fitted.weights == pytest.approx(mixture.weights, rel=1e-5)


def test_nan_in_event_parsing_makes_a_loss_nan_and_leaves_the_gpu_usable():
    probability, weak = torch.full((3, 2, 4), 0.4), torch.ones(3, 4, device=CUDA)
    probability[1, 0, 2] = torch.nan
    probability = probability.to(CUDA).requires_grad_()
    for losses in (modality_losses(probability, weak), video_losses(probability[:, 0], weak)):
        assert torch.isnan(losses).tolist() == [False, True, False]
    logits = probability[:, :, None].expand(3, 2, 5, 4)
    assert torch.isnan(segment_losses(logits, torch.ones(3, 2, 5, 4, device=CUDA))).tolist() == [False, True, False]
    modality_losses(probability, weak).sum().backward()
    torch.cuda.synchronize()
    assert probability.grad is not None
    assert torch.isnan(probability.grad).nonzero().tolist() == [[1, 0, 2]]
    expected = F.binary_cross_entropy(torch.full((4,), 0.4), torch.ones(4))
    torch.testing.assert_close(video_losses(probability.detach()[:, 1], weak).cpu(), expected.expand(3))
