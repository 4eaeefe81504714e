"""Probabilities of the latent-variable model against an explicit enumeration of all latent variables."""

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from distav.noise.class_posterior import Posterior, posterior
from distav.noise.model_parameters import LabelNoise, Parameters, Votes
from distav.noise.vote_model import ClassProbs, agreement_ratios, class_probs, label_likelihood, match_probability

NUM_SAMPLES, NUM_CLASSES = 24, 4
RATE, MISMATCH, VISUAL_OWNER = 0.3, 0.35, 0.8
FREQUENCIES = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


def draw_logs(seed: int) -> Tensor:
    """Return the logarithms of a table of votes: [n, C] float64."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(NUM_SAMPLES, NUM_CLASSES, generator=generator, dtype=torch.float64)).log_softmax(1)


def make_votes(has_visual: Tensor | None = None, has_audio: Tensor | None = None) -> Votes:
    """Return two visual votes, one audio vote and one joint vote."""
    everywhere = torch.ones(NUM_SAMPLES, dtype=torch.bool)
    return Votes(
        [draw_logs(1), draw_logs(2)],
        [draw_logs(3)],
        [draw_logs(4)],
        everywhere if has_visual is None else has_visual,
        everywhere if has_audio is None else has_audio,
    )


def asymmetric_matrix(rate: float) -> Tensor:
    """Return T in which two thirds of the errors of a class are the next class: [C, C] float64."""
    identity = torch.eye(NUM_CLASSES, dtype=torch.float64)
    rest = (1 - identity - identity.roll(1, 1)) / (NUM_CLASSES - 2)
    return (1 - rate) * identity + rate * (2 * identity.roll(1, 1) + rest) / 3


def symmetric_matrix(rate: float) -> Tensor:
    identity = torch.eye(NUM_CLASSES, dtype=torch.float64)
    return (1 - rate) * identity + rate * (1 - identity) / (NUM_CLASSES - 1)


def make_parameters(asymmetric: bool, rates: tuple[float, ...] = (RATE,)) -> Parameters:
    """Return parameters with a different inverse temperature for each use of a vote."""
    votes = torch.tensor([[0.1, -0.3, 0.4, -0.2, 0.3, 0.0, 0.2, -1.0, -2.0, 0.5]], dtype=torch.float64)
    ones = torch.ones(len(rates), 1, dtype=torch.float64)
    matrices = torch.stack([asymmetric_matrix(rate) for rate in rates])[:, None].expand(-1, 2, -1, -1)
    noise = LabelNoise(torch.tensor(rates, dtype=torch.float64), matrices if asymmetric else None)
    half_votes = torch.tensor([[1.3, 0.6]], dtype=torch.float64) * ones
    return Parameters(votes * ones, MISMATCH * ones, VISUAL_OWNER * ones, FREQUENCIES * ones, noise, half_votes)


def given_labels() -> Tensor:
    return torch.arange(NUM_SAMPLES) % NUM_CLASSES


def known_probs(parameters: Parameters, votes: Votes) -> tuple[np.ndarray, ...]:
    """Return p_V, p_A, f, f_V and f_A at one noise rate by the formulas of the model: [n, C] float64 each."""
    scales = parameters.votes[0, :-3].exp().tolist()
    epsilon = (0.5 / (1 + np.exp(-parameters.votes[0, -3:].numpy()))).tolist()
    visual, audio, joint = ([table.numpy() for table in tables] for tables in (votes.visual, votes.audio, votes.joint))

    def probs(tables: list[np.ndarray], temperatures: list[float], weight: float) -> np.ndarray:
        product = np.exp(sum(scale * table for scale, table in zip(temperatures, tables, strict=True)))
        return (1 - weight) * product / product.sum(1, keepdims=True) + weight * FREQUENCIES.numpy()

    return (
        probs(visual, scales[:2], epsilon[0]),
        probs(audio, scales[2:3], epsilon[1]),
        probs([*visual, *audio, *joint], scales[3:], epsilon[2]),
        probs([*visual, *joint], [*scales[3:5], scales[6]], epsilon[2]),
        probs([*audio, *joint], scales[5:], epsilon[2]),
    )


@dataclass
class Enumeration:
    """P(v, a, matched, owner, y | votes) of one sample: [C, C, 2, 2, C]; owner 0 is the visual class."""

    joint: np.ndarray

    @classmethod
    def of(cls, probs: tuple[np.ndarray, ...], matrix: np.ndarray) -> "Enumeration":
        """Compute the probability of each combination from the class probabilities [C] of a sample."""
        visual, audio, fused, visual_owner, audio_owner = probs
        ratio = sum(visual[c] * audio[c] / float(FREQUENCIES[c]) for c in range(NUM_CLASSES))
        matched = (1 - MISMATCH) * ratio / ((1 - MISMATCH) * ratio + MISMATCH)
        joint = np.zeros((NUM_CLASSES, NUM_CLASSES, 2, 2, NUM_CLASSES))
        for v in range(NUM_CLASSES):
            for a in range(NUM_CLASSES):
                mismatched = (visual_owner[v] * audio[a], visual[v] * audio_owner[a])
                for owner, owner_prob, true in ((0, VISUAL_OWNER, v), (1, 1 - VISUAL_OWNER, a)):
                    for y in range(NUM_CLASSES):
                        classes = fused[v] if v == a else 0.0
                        joint[v, a, 1, owner, y] = matched * classes * owner_prob * matrix[true, y]
                        joint[v, a, 0, owner, y] = (1 - matched) * mismatched[owner] * owner_prob * matrix[true, y]
        return cls(joint)

    def class_tables(self, joint: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return P(class of the owner), P(v), P(a), normalized, from an array [C, C, 2, 2]: [C] each."""
        joint = joint / joint.sum()
        owner = joint[:, :, :, 0].sum((1, 2)) + joint[:, :, :, 1].sum((0, 2))
        return owner, joint.sum((1, 2, 3)), joint.sum((0, 2, 3))


def enumerate_samples(parameters: Parameters, votes: Votes, matrix: Tensor) -> list[Enumeration]:
    return [Enumeration.of(rows, matrix.numpy()) for rows in zip(*known_probs(parameters, votes), strict=True)]


@pytest.mark.parametrize("asymmetric", [False, True])
def test_label_probabilities_equal_an_enumeration_of_the_latent_variables(asymmetric: bool):
    parameters, votes, labels = make_parameters(asymmetric), make_votes(), given_labels()
    probs = class_probs(parameters, votes)
    tables = (probs.visual, probs.audio, probs.fused, probs.owner_if_visual, probs.owner_if_audio)
    for table, expected in zip(tables, known_probs(parameters, votes), strict=True):
        np.testing.assert_allclose(table[0].T, expected, rtol=1e-10)
    label_probs = parameters.noise.probabilities(labels)
    likelihood = label_likelihood(parameters, probs, labels, label_probs, votes.paired)
    matrix = (asymmetric_matrix if asymmetric else symmetric_matrix)(RATE)
    for sample, enumeration in enumerate(enumerate_samples(parameters, votes, matrix)):
        joint = enumeration.joint
        assert joint.sum() == pytest.approx(1)
        assert float(likelihood.matched[0, sample]) == pytest.approx(joint[:, :, 1].sum())
        assert float(likelihood.owner[0, sample]) == pytest.approx(joint[..., labels[sample]].sum())


@pytest.mark.parametrize("asymmetric", [False, True])
def test_posterior_tables_equal_bayes_rule_by_enumeration(asymmetric: bool):
    parameters, votes, labels = make_parameters(asymmetric), make_votes(), given_labels()
    result = posterior(parameters, torch.ones(1, dtype=torch.float64), parameters, votes, labels)
    matrix = (asymmetric_matrix if asymmetric else symmetric_matrix)(RATE)
    for sample, enumeration in enumerate(enumerate_samples(parameters, votes, matrix)):
        held_out = enumeration.class_tables(enumeration.joint.sum(-1))
        given = enumeration.class_tables(enumeration.joint[..., labels[sample]])
        for names, tables in (
            (("owner_held_out", "visual_held_out", "audio_held_out"), held_out),
            (("owner", "visual", "audio"), given),
        ):
            for name, table in zip(names, tables, strict=True):
                np.testing.assert_allclose(getattr(result, name)[sample], table, rtol=1e-8, err_msg=name)


def probability_tables(result: Posterior) -> dict[str, Tensor]:
    return {field.name: getattr(result, field.name) for field in fields(result) if field.name != "correspondence"}


@pytest.mark.parametrize("asymmetric", [False, True])
def test_posterior_tables_sum_to_1_and_are_averages_over_the_noise_rates(asymmetric: bool):
    has_visual, has_audio = torch.arange(NUM_SAMPLES) % 3 != 0, torch.arange(NUM_SAMPLES) % 3 != 1
    votes, labels = make_votes(has_visual, has_audio), given_labels()
    rates, weights = (0.1, 0.4, 0.6), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    pair = make_parameters(asymmetric)
    result = posterior(make_parameters(asymmetric, rates), weights, pair, votes, labels)
    one = torch.ones(1, dtype=torch.float64)
    parts = [posterior(make_parameters(asymmetric, (rate,)), one, pair, votes, labels) for rate in rates]
    for name, table in probability_tables(result).items():
        assert bool((table >= 0).all()), name
        torch.testing.assert_close(table.sum(1), torch.ones(NUM_SAMPLES, dtype=torch.float64))
        expected = sum(weight * getattr(part, name) for weight, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(table, expected, rtol=1e-9, atol=1e-12)
    assert bool(((result.correspondence >= 0) & (result.correspondence <= 1)).all())


@pytest.mark.parametrize("asymmetric", [False, True])
def test_exchanged_modalities_give_exchanged_results(asymmetric: bool):
    has_visual, has_audio = torch.arange(NUM_SAMPLES) != 5, torch.arange(NUM_SAMPLES) % 7 != 1
    votes, labels = make_votes(has_visual, has_audio), given_labels()
    parameters, one = make_parameters(asymmetric), torch.ones(1, dtype=torch.float64)
    exchanged_votes = Votes(votes.audio, votes.visual, votes.joint, has_audio, has_visual)
    order = [2, 0, 1, 5, 3, 4, 6, 8, 7, 9]
    exchanged = replace(parameters, votes=parameters.votes[:, order], visual_owner=1 - parameters.visual_owner)
    result = posterior(parameters, one, parameters, votes, labels)
    swapped = posterior(exchanged, one, exchanged, exchanged_votes, labels)
    for name, other in (
        ("owner", "owner"),
        ("visual", "audio"),
        ("audio", "visual"),
        ("owner_held_out", "owner_held_out"),
        ("visual_held_out", "audio_held_out"),
        ("audio_held_out", "visual_held_out"),
        ("correspondence", "correspondence"),
    ):
        torch.testing.assert_close(getattr(swapped, name), getattr(result, other), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(result.visual, result.audio, atol=0.05)


@pytest.mark.parametrize("missing", ["visual", "audio"])
def test_samples_with_one_modality_have_no_pair(missing: str):
    everywhere = torch.ones(NUM_SAMPLES, dtype=torch.bool)
    votes = make_votes(**{f"has_{missing}": ~everywhere})
    uniform = torch.full((NUM_SAMPLES, NUM_CLASSES), -np.log(NUM_CLASSES), dtype=torch.float64)
    votes = replace(votes, **{missing: [uniform for _ in getattr(votes, missing)]})
    parameters, labels = make_parameters(asymmetric=True), given_labels()
    probs = class_probs(parameters, votes)
    torch.testing.assert_close(getattr(probs, missing)[0].T, FREQUENCIES.expand(NUM_SAMPLES, -1))
    likelihood = label_likelihood(parameters, probs, labels, parameters.noise.probabilities(labels), votes.paired)
    fused = known_probs(parameters, votes)[2]
    by_label = asymmetric_matrix(RATE).numpy()[:, labels].T
    np.testing.assert_allclose(likelihood.owner[0], (fused * by_label).sum(1), rtol=1e-10)
    result = posterior(parameters, torch.ones(1, dtype=torch.float64), parameters, votes, labels)
    expected = fused * by_label / (fused * by_label).sum(1, keepdims=True)
    for name, table in probability_tables(result).items():
        np.testing.assert_allclose(table, fused if name.endswith("held_out") else expected, rtol=1e-8, err_msg=name)
    assert bool((result.correspondence == 1).all())


def test_correspondence_is_1_for_equal_certain_votes_and_0_for_different_ones():
    certain = (20 * torch.eye(NUM_CLASSES, dtype=torch.float64)).log_softmax(1).repeat(NUM_SAMPLES // NUM_CLASSES, 1)
    shifted = torch.where(torch.arange(NUM_SAMPLES)[:, None] < 12, certain, certain.roll(1, 0))
    both = torch.ones(NUM_SAMPLES, dtype=torch.bool)
    parameters = make_parameters(asymmetric=False)
    votes = torch.tensor([[0.0, 0.0, 0.0, 0.0, -20.0, -20.0, -20.0]], dtype=torch.float64)
    parameters = replace(parameters, votes=votes)
    one = torch.ones(1, dtype=torch.float64)
    result = posterior(parameters, one, parameters, Votes([certain], [shifted], [], both, both), given_labels())
    assert bool((result.correspondence[:12] > 0.999).all()) and bool((result.correspondence[12:] < 0.001).all())
    assert torch.equal(result.visual[12:].argmax(1), certain[12:].argmax(1))
    assert torch.equal(result.audio[12:].argmax(1), shifted[12:].argmax(1))


def test_likelihood_and_bayes_of_symmetric_noise_equal_those_of_its_matrix():
    rates = (0.0, 0.2, 0.75)
    symmetric = LabelNoise(torch.tensor(rates, dtype=torch.float64))
    matrices = torch.stack([symmetric_matrix(rate) for rate in rates])[:, None].expand(-1, 2, -1, -1)
    explicit, labels = replace(symmetric, matrices=matrices), given_labels()
    probs = draw_logs(6).exp().T.expand(3, -1, -1)
    label_probs = explicit.probabilities(labels)
    assert symmetric.probabilities(labels) is None and label_probs is not None
    torch.testing.assert_close(label_probs, explicit.probabilities(labels, given_labels() % 2))
    torch.testing.assert_close(
        symmetric.likelihood(probs, labels, None), explicit.likelihood(probs, labels, label_probs)
    )
    torch.testing.assert_close(symmetric.bayes(probs, labels, None), explicit.bayes(probs, labels, label_probs))


def test_label_probabilities_of_a_fold_come_from_the_matrix_of_that_fold():
    matrices = torch.stack([symmetric_matrix(0.1), asymmetric_matrix(0.5)])[None]
    noise = LabelNoise(torch.tensor([0.3], dtype=torch.float64), matrices)
    labels, fold = given_labels(), torch.arange(NUM_SAMPLES) // 5 % 2
    by_fold, average = noise.probabilities(labels, fold), noise.probabilities(labels)
    assert by_fold is not None and average is not None
    for sample in range(NUM_SAMPLES):
        expected = matrices[0, fold[sample], :, labels[sample]]
        torch.testing.assert_close(by_fold[0, :, sample], expected)
        torch.testing.assert_close(average[0, :, sample], matrices[0, :, :, labels[sample]].mean(0))


def test_rows_select_samples_of_all_votes():
    votes = make_votes(has_audio=torch.arange(NUM_SAMPLES) < 9)
    part = votes.rows(slice(8, 11))
    assert part.paired.tolist() == [True, False, False]
    assert torch.equal(part.visual[1], votes.visual[1][8:11]) and torch.equal(part.joint[0], votes.joint[0][8:11])
    parameters = make_parameters(asymmetric=True)
    complete, partial = class_probs(parameters, votes), class_probs(parameters, part)
    for field in fields(ClassProbs):
        torch.testing.assert_close(getattr(partial, field.name), getattr(complete, field.name)[..., 8:11])


def test_votes_of_disjoint_halves_determine_the_ratios():
    votes, parameters = make_votes(), make_parameters(asymmetric=False)
    halves = [draw_logs(seed) for seed in (5, 6, 7, 8)]
    votes = replace(votes, visual_halves=halves[:2], audio_halves=halves[2:])
    ratios = agreement_ratios(parameters, votes)
    for ratio, visual, audio in zip(ratios, halves[:2], (halves[3], halves[2]), strict=True):
        visual, audio = (1.3 * visual).softmax(1), (0.6 * audio).softmax(1)
        expected = (visual * audio * FREQUENCIES / (visual.mean(0) * audio.mean(0))).sum(1)
        torch.testing.assert_close(ratio[0], expected)
        # The mean over all combinations of a visual and an audio part is that of independent classes.
        combinations = visual[:, None] * audio[None] * FREQUENCIES / (visual.mean(0) * audio.mean(0))
        assert float(combinations.sum(-1).mean()) == pytest.approx(1)
    matched = match_probability(parameters.mismatch, ratios, votes.paired)
    expected = [(1 - MISMATCH) * ratio / ((1 - MISMATCH) * ratio + MISMATCH) for ratio in ratios]
    torch.testing.assert_close(matched, (expected[0] + expected[1]) / 2)
