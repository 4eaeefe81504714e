"""Votes, noise rates and event-parsing losses on a GPU: equal to the CPU, with little memory, and safe with NaN."""

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distav.data.modalities import MODALITIES
from distav.losses.event_parsing import modality_losses, segment_losses, video_losses
from distav.noise import label_model, model_fit
from distav.noise.class_posterior import posterior
from distav.noise.correction import Correction, CorrectionPrior
from distav.noise.correspondence import fit_mixture, gmm_correspondence
from distav.noise.knn_vote import NeighborGraph
from distav.noise.label_correction import correct_labels
from distav.noise.label_model import fit_label_model
from distav.noise.model_fit import PairAssumption
from distav.noise.model_parameters import LabelNoise, Parameters, Votes
from distav.noise.noise_rate import transition_matrix
from distav.noise.tiling import TILE_ELEMENTS
from distav.noise.vote_model import class_probs
from distav.noise.vote_score import VoteScorer, log_votes
from distav.noise.vote_search import FeatureSpace, VoteSearchSpace

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_votes(num_samples: int, num_classes: int, device: torch.device) -> tuple[Votes, Tensor]:
    """Return votes of both modalities, some of which are missing, and labels of which a third is wrong."""
    sample = torch.arange(num_samples)
    visual_class = sample % num_classes
    audio_class = torch.where(sample // num_classes % 5 == 0, (visual_class + 1) % num_classes, visual_class)
    given = torch.where(sample // num_classes % 3 == 0, (visual_class + 1 + sample // 7) % num_classes, visual_class)
    visual, audio = (
        log_votes((2 * draw(num_samples, num_classes, seed=seed) + 5 * F.one_hot(classes, num_classes)).softmax(1))
        for seed, classes in enumerate((visual_class, audio_class))
    )
    has_visual, has_audio = sample % 11 != 3, sample % 13 != 4
    votes = Votes([visual], [audio], [(visual + audio).log_softmax(1)], has_visual, has_audio)
    return votes.map(lambda table: table.to(device)), given.to(device)


def make_parameters(votes: Votes, num_classes: int, device: torch.device) -> Parameters:
    """Return parameters at three noise rates, with asymmetric noise."""
    rates = torch.tensor([0.1, 0.3, 0.5], device=device)
    identity = torch.eye(num_classes, device=device)
    matrices = (1 - rates)[:, None, None] * identity + rates[:, None, None] * identity.roll(1, 1)
    num_single = len(votes.visual) + len(votes.audio)
    variables = draw(3, 2 * num_single + len(votes.joint) + 3, seed=7).mul_(0.3).to(device)
    return Parameters(
        variables,
        torch.full_like(rates, 0.3)[:, None],
        torch.full_like(rates, 0.7)[:, None],
        torch.full_like(matrices[:, 0], 1 / num_classes),
        LabelNoise(rates, matrices[:, None].expand(-1, 2, -1, -1)),
        torch.ones(3, 2, device=device),
    )


def compute_tables(device: torch.device, num_samples: int = 3000, num_classes: int = 300) -> dict[str, Tensor]:
    """Return the results of all functions of complete tables."""
    votes, labels = draw_votes(num_samples, num_classes, device)
    usable = labels != 3
    scorer = VoteScorer(labels, num_classes, usable)
    probs = votes.visual[0].exp()
    parameters = make_parameters(votes, num_classes, device)
    weights, pair = torch.tensor([0.2, 0.5, 0.3], device=device), parameters.select(torch.tensor([1]))
    result = posterior(parameters, weights, pair, votes, labels)
    classes = class_probs(parameters, votes)
    return {
        "scores": torch.tensor([scorer.score(probs), scorer.score(votes.audio[0].exp())]),
        "log_votes": log_votes(probs),
        "transition_matrix": transition_matrix(probs, labels),
        **{f"probs {field.name}": getattr(classes, field.name) for field in fields(classes)},
        **{f"posterior {field.name}": getattr(result, field.name) for field in fields(result)},
    }


def test_tables_are_equal_on_cpu_and_gpu():
    on_cpu, on_gpu = compute_tables(CPU), compute_tables(CUDA)
    for name, expected in on_cpu.items():
        torch.testing.assert_close(
            on_gpu[name].cpu(), expected, rtol=1e-4, atol=1e-5, msg=lambda message, name=name: f"{name}: {message}"
        )


@pytest.mark.parametrize("asymmetric", [False, True])
def test_fitted_models_are_equal_on_cpu_and_gpu(asymmetric: bool):
    models = []
    for device in (CPU, CUDA):
        votes, given = draw_votes(1500, 6, device)
        if asymmetric:
            sample = torch.arange(1500, device=device)
            given = torch.where(sample // 6 % 3 == 0, (sample + 1) % 6, sample % 6)
        models.append(fit_label_model(votes, given, 6, torch.ones(1500, device=device), PairAssumption(0.97)))
        assert models[-1].posterior(votes, given).owner.device.type == device.type
    on_cpu, on_gpu = models
    assert on_gpu.gain == pytest.approx(on_cpu.gain, rel=1e-3)
    assert float(on_gpu.pair.visual_owner) == pytest.approx(float(on_cpu.pair.visual_owner), abs=2e-2)
    for name in ("label_rate", "pair_rate"):
        assert getattr(on_gpu, name).estimate == pytest.approx(getattr(on_cpu, name).estimate, abs=5e-3), name
    assert all(not parameters.votes.is_cuda for parameters in on_gpu.parameters) and not on_gpu.pair.votes.is_cuda


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
    has_modality: dict[str, Tensor] = {name: (sample != 7).to(device) for name in MODALITIES}
    arguments = given.to(device), 10, sample.to(device), has_modality, search_space
    if previous is None:
        return correct_labels(spaces, *arguments)
    visual_teacher, audio_teacher = (
        (3 * F.one_hot(classes, 10) + draw(3000, 10, seed=5)).softmax(1).to(device) for classes in (true, audio_class)
    )
    prior = CorrectionPrior(
        previous.held_out.to(device),
        previous.rate_log_likelihood.to(device),
        previous.pair_rate_log_likelihood.to(device),
        previous.visual_owner,
    )
    return correct_labels(spaces, *arguments, prior, (visual_teacher, audio_teacher))


@pytest.mark.parametrize("with_prior", [False, True])
def test_corrections_are_equal_on_cpu_and_gpu(with_prior: bool):
    previous = correct(CPU) if with_prior else None
    on_cpu, on_gpu = correct(CPU, previous), correct(CUDA, previous)
    assert on_gpu.has_signal and on_cpu.has_signal
    for vote in ("visual", "audio", "joint"):
        assert on_cpu.selected_votes[vote] == on_gpu.selected_votes[vote]
    for name in (
        "held_out",
        "posterior",
        "visual_held_out",
        "visual_posterior",
        "audio_held_out",
        "audio_posterior",
    ):
        expected, actual = getattr(on_cpu, name), getattr(on_gpu, name).cpu()
        assert (expected.argmax(1) == actual.argmax(1)).double().mean() > 0.995, name
        assert (expected - actual).abs().mean() < 1e-3, name
    assert (on_cpu.correspondence - on_gpu.correspondence.cpu()).abs().mean() < 2e-3
    for name in ("label_rate", "pair_rate"):
        expected, actual = getattr(on_cpu, name), getattr(on_gpu, name)
        for figure in ("estimate", "ci95_low", "ci95_high"):
            assert getattr(actual, figure) == pytest.approx(getattr(expected, figure), abs=1e-2), (name, figure)
    torch.testing.assert_close(on_gpu.transition_matrix.cpu(), on_cpu.transition_matrix, rtol=1e-2, atol=1e-2)


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
    votes = torch.rand(num_samples, num_classes, device=CUDA).pow_(4)
    votes.div_(votes.sum(1, keepdim=True))
    scorer = VoteScorer(labels, num_classes, valid)
    features = torch.randn(num_samples, 16, device=CUDA)
    graph = NeighborGraph(features, 10, torch.arange(num_samples, device=CUDA) // 3, valid)
    vote = graph.vote(labels, num_classes, 10, 0.2)
    functions: dict[str, tuple[int, Callable[[], object]]] = {
        "VoteScorer.score": (0, lambda: scorer.score(votes)),
        "transition_matrix": (0, lambda: transition_matrix(votes, labels)),
        "vote": (1, vote.table),
        "second_round": (1, lambda: vote.table(10)),
    }
    table, overhead = num_samples * num_classes * 4, 12 * TILE_ELEMENTS["cuda"] * 8
    measured = {name: (num_tables, peak_growth(work)) for name, (num_tables, work) in functions.items()}
    exceeding = {
        name: growth / table
        for name, (num_tables, growth) in measured.items()
        if growth > 1.3 * num_tables * table + overhead
    }
    assert not exceeding, f"tables: {exceeding}"


def test_correction_holds_three_tables_of_votes_and_the_six_of_its_result(monkeypatch: pytest.MonkeyPatch):
    """Peak above the arguments <= 9 tables + half a table + thirty float32 numbers per element of a tile."""
    num_samples, num_classes = 150_000, 350
    monkeypatch.setattr(label_model, "GRID", (0.2, 0.4))
    monkeypatch.setattr(label_model, "COARSE_GRID", (0.2, 0.4))
    monkeypatch.setattr(label_model, "MISMATCH_GRID", (0.05, 0.3))
    monkeypatch.setattr(model_fit, "MIN_FIT_SAMPLES", 300)
    monkeypatch.setattr(model_fit, "MAX_FIT_SAMPLES", 300)
    sample = torch.arange(num_samples)
    true = sample % num_classes
    given = torch.where(sample // num_classes % 3 == 0, (true + 1) % num_classes, true).to(CUDA)
    visual, audio = (
        (4 * draw(num_classes, 16, seed=seed)[true] + draw(num_samples, 16, seed=seed + 2)).to(CUDA) for seed in (0, 1)
    )
    has_modality: dict[str, Tensor] = {name: (sample >= 0).to(CUDA) for name in MODALITIES}
    search_space = VoteSearchSpace((8,), (0, 8), (0.2,), (0.0,), 16)
    spaces = [FeatureSpace("rows", visual, audio)]
    arguments = spaces, given, num_classes, sample.to(CUDA), has_modality, search_space
    growth, table = peak_growth(lambda: correct_labels(*arguments)), num_samples * num_classes * 4
    allowed = 9.5 * table + 30 * TILE_ELEMENTS["cuda"] * 4
    assert growth <= allowed, f"{growth / table:.2f} tables, allowed {allowed / table:.2f}"


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
