"""Votes, noise rates and parsing losses on a GPU: as on the CPU, in little memory, and NaN ends nothing."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distav.losses.event_parsing import modality_losses, segment_losses, video_losses
from distav.noise.calibration import VoteCalibrator
from distav.noise.class_agreement import class_agreement, pair_posterior
from distav.noise.correspondence import fit_mixture, gmm_correspondence
from distav.noise.label_correction import Correction, CorrectionPrior, FeatureSpace, VoteSearchSpace, correct_labels
from distav.noise.noise_rate import estimate_transition_matrix, uniform_transition_matrix
from distav.noise.tiling import TILE_NUMBERS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def everything(device: torch.device, num: int = 9000, classes: int = 700) -> dict[str, Tensor]:
    """What every function that takes whole tables returns."""
    labels = (torch.arange(num) % classes).to(device)
    votes, pictures = (
        (2 * random(num, classes, seed=seed) + 5 * F.one_hot(labels.cpu(), classes)).softmax(1).to(device)
        for seed in (0, 1)
    )
    usable = labels != 3
    judges = VoteCalibrator(labels, classes, usable)
    found = judges.calibrate(votes)
    agreed = class_agreement(pictures, votes, usable)
    pairing = pair_posterior(pictures, agreed, agreed.rate_log_likelihood, usable)
    pooled, weights = judges.fit_ensemble([votes, pictures], found.error_distribution)
    posterior, matrix = estimate_transition_matrix(
        pictures, labels, 0.3, uniform_transition_matrix(1.0, classes).to(device), 5
    )
    return {
        "likelihood": found.likelihood - found.likelihood.max(),
        "calibration": torch.tensor([found.per_sample, found.entropy, judges.prior_log_likelihood()]),
        "confusion": found.error_distribution,
        "sharpened": found.inverse_temperature(votes),
        "agreement": agreed.likelihood,
        "agreed": torch.tensor([agreed.per_sample, agreed.entropy]),
        "correspondence": pairing.correspondence,
        "sounds": pairing.shares,
        "pooled": pooled,
        "weights": torch.tensor(weights),
        "posterior": posterior,
        "matrix": matrix,
    }


def test_tables_are_the_same_on_both():
    here, there = everything(torch.device("cpu")), everything(DEVICE)
    for name, each in here.items():
        torch.testing.assert_close(
            there[name].cpu(), each, rtol=1e-4, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}"
        )


def correction(device: torch.device, before: Correction | None = None) -> Correction:
    true = torch.arange(3000) % 10
    heard = torch.where(torch.arange(3000) < 900, (true + 1 + torch.arange(3000) // 10 % 9) % 10, true)
    visual, audio = (
        random(10, 32, seed=side)[which] + 1.5 * random(3000, 32, seed=side + 2)
        for side, which in enumerate((true, heard))
    )
    given = torch.where(torch.arange(3000) // 10 % 5 < 2, (true + 1 + torch.arange(3000) // 50 % 7) % 10, true)
    spaces = [FeatureSpace("rows", visual.to(device), audio.to(device))]
    valid = torch.arange(3000) != 7
    voting = VoteSearchSpace((20, 60), (0, 20), (0.1, 0.3), (0.0, 0.5), 16)
    arguments = given.to(device), 10, torch.arange(3000, device=device), valid.to(device), voting
    if before is None:
        return correct_labels(spaces, *arguments)
    teachers = [(3 * F.one_hot(each, 10) + random(3000, 10, seed=5)).softmax(1).to(device) for each in (true, heard)]
    known = CorrectionPrior(
        *(
            each.to(device)
            for each in (before.held_out, before.rate_log_likelihood, before.rate_log_likelihood_credible)
        )
    )
    return correct_labels(spaces, *arguments, known, (teachers[0], teachers[1]))


@pytest.mark.parametrize("again", [False, True])
def test_corrections_are_the_same_on_both(again: bool):
    before = correction(torch.device("cpu")) if again else None
    here, there = correction(torch.device("cpu"), before), correction(DEVICE, before)
    assert there.has_signal and here.has_signal
    ways = [{name: way for name, way in found.selected_votes.items() if name != "pooled"} for found in (here, there)]
    assert ways[0] == ways[1]
    for name in ("held_out", "posterior", "audio_held_out", "audio_posterior"):
        one, other = getattr(here, name), getattr(there, name).cpu()
        assert (one.argmax(1) == other.argmax(1)).double().mean() > 0.999, name
        assert (one - other).abs().mean() < 1e-4, name
    assert (here.correspondence - there.correspondence.cpu()).abs().mean() < 1e-4
    for name in ("label_rate", "pair_rate"):
        one, other = getattr(here, name), getattr(there, name)
        assert [other.rate, other.low, other.high] == pytest.approx([one.rate, one.low, one.high], abs=1e-3)
    torch.testing.assert_close(there.transition_matrix.cpu(), here.transition_matrix, rtol=1e-3, atol=1e-3)


def growth(work: Callable[[], object]) -> int:
    """By how many bytes the peak of the GPU's memory grows while something is done."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_functions_take_little_more_than_the_table_that_they_return():
    """Peak above the arguments <= 1.3 x the tables returned + twelve float64 numbers for each of a tile."""
    num, classes = 250_000, 700
    labels, every = torch.arange(num, device=DEVICE) % classes, torch.ones(num, dtype=torch.bool, device=DEVICE)
    votes, pictures = (torch.rand(num, classes, device=DEVICE).pow_(4) for _ in range(2))
    for each in (votes, pictures):
        each.div_(each.sum(1, keepdim=True))
    even = uniform_transition_matrix(1.0, classes).double().to(DEVICE)
    judges, agreed = VoteCalibrator(labels, classes, every), class_agreement(pictures, votes, every)
    calibration = judges.calibrate(votes)
    works: dict[str, tuple[int, Callable[[], object]]] = {
        "agreement": (0, lambda: class_agreement(pictures, votes, every)),
        "pair_evidence": (1, lambda: pair_posterior(pictures, agreed, agreed.rate_log_likelihood, every)),
        "calibrate": (0, lambda: judges.calibrate(votes)),
        "sharpened": (1, lambda: calibration.inverse_temperature(votes)),
        "pool": (1, lambda: judges.fit_ensemble([pictures, votes], even)),
        "noise_matrix": (1, lambda: estimate_transition_matrix(votes, labels, 0.4, even)),
    }
    table, beside = num * classes * 4, 12 * TILE_NUMBERS["cuda"] * 8
    grown = {name: (returned, growth(work)) for name, (returned, work) in works.items()}
    too_much = {
        name: each / table for name, (returned, each) in grown.items() if each > 1.3 * returned * table + beside
    }
    assert not too_much, f"tables: {too_much}"


def test_mixtures_are_the_same_on_both_and_any_number_of_pairs_is_fitted():
    wrong = torch.arange(20_000) < 8000
    similarity = torch.where(wrong, 0.02, 0.55) + 0.1 * random(20_000, seed=0)
    (here, fitted), (there, found) = gmm_correspondence(similarity), gmm_correspondence(similarity.to(DEVICE))
    torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=1e-6)
    many = fit_mixture(similarity.to(DEVICE).repeat(2**24 // 20_000 + 1))
    for each in (found, many):
        assert each.means == pytest.approx(fitted.means, rel=1e-5)
        assert each.shares == pytest.approx(fitted.shares, rel=1e-5)


def test_nan_in_parsing_makes_a_loss_nan_and_leaves_the_gpu_usable():
    probability, weak = torch.full((3, 2, 4), 0.4), torch.ones(3, 4, device=DEVICE)
    probability[1, 0, 2] = torch.nan
    probability = probability.to(DEVICE).requires_grad_()
    for losses in (modality_losses(probability, weak), video_losses(probability[:, 0], weak)):
        assert torch.isnan(losses).tolist() == [False, True, False]
    logits = probability[:, :, None].expand(3, 2, 5, 4)
    assert torch.isnan(segment_losses(logits, torch.ones(3, 2, 5, 4, device=DEVICE))).tolist() == [False, True, False]
    modality_losses(probability, weak).sum().backward()
    torch.cuda.synchronize()
    assert probability.grad is not None
    assert torch.isnan(probability.grad).nonzero().tolist() == [[1, 0, 2]]
    expected = F.binary_cross_entropy(torch.full((4,), 0.4), torch.ones(4))
    torch.testing.assert_close(video_losses(probability.detach()[:, 1], weak).cpu(), expected.expand(3))
