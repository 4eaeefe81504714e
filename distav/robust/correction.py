"""Label correction: what a sample's neighbours say that it shows, and how far to believe them.

Every choice (features, whitening, neighbours, temperature, one vote or two, one sense or both) is made by how well
held-out votes foretell the given labels (`distav.robust.calibration`); true labels are never asked.
Legend: N samples, n samples of this rank, C classes, E feature width.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.robust.calibration import Calibration, Judges
from distav.robust.noise_rate import RateEstimate, class_rates, estimate_rate, noise_matrix, rates
from distav.robust.pairing import Pairing, checked_rate, gated, pair_evidence
from distav.robust.votes import Election, Neighborhood, standardised
from distav.world import gather_ragged_rows, row_range

ALIKE = 0.05
"""Votes whose gain over chance differs by less than this share say as much."""


@dataclass(frozen=True)
class Voting:
    """The votes to choose among.

    Attributes:
        neighbors: k of the first vote; those that the set is too small for are left out.
        second: voters of a second vote over what the first elected; 0 for one vote alone.
        temperatures: divide the similarity in a neighbour's weight.
        whitening: powers by which principal axes of the features are evened out.
        width: principal axes kept.
        signal_nats: votes that make the given labels likelier than their frequencies do by less are not believed.
    """

    neighbors: Sequence[int] = (50, 200, 400)
    second: Sequence[int] = (0, 20, 100)
    temperatures: Sequence[float] = (0.07, 0.2, 0.4)
    whitening: Sequence[float] = (0.0, 0.5)
    width: int = 48
    signal_nats: float = 10.0


@dataclass(frozen=True)
class Space:
    """Features that neighbours can be looked for in, [n, E] of each modality."""

    name: str
    visual: Tensor
    audio: Tensor


@dataclass(frozen=True)
class Correction:
    """What the votes say of this rank's samples.

    Attributes:
        held_out: [n, C] class shares in which the sample's own label had no part; where votes know nothing, the label.
        posterior: [n, C] with the own label weighed by how often labels are wrong.
        audio_held_out, audio_posterior: [n, C] the same for the class of the sound, its own where a pair is mismatched.
        correspondence: [n] probability that sound and picture show one class.
        evidence: [R] log-likelihood of the noise rates, the prior of a correction to come.
        label_rate: share of wrong labels.
        noise_matrix: [C, C + 1] how each class is labelled, P(given | true), and in the last column its samples.
        pair_rate: share of mismatched pairs.
        nats: by how much the votes make the labels likelier than their frequencies do.
        has_signal: whether that is enough to believe them.
        chosen: the votes that won, by what they vote on, with weights.
    """

    held_out: Tensor
    posterior: Tensor
    audio_held_out: Tensor
    audio_posterior: Tensor
    correspondence: Tensor
    evidence: Tensor
    label_rate: RateEstimate
    noise_matrix: Tensor
    pair_rate: RateEstimate
    nats: float
    has_signal: bool
    chosen: dict[str, str]

    @property
    def class_rates(self) -> list[RateEstimate]:
        """Share of wrong labels of each class."""
        return class_rates(self.noise_matrix)


@dataclass(frozen=True)
class _Problem:
    given: Tensor
    own: Tensor
    num_classes: int
    groups: Tensor
    valid: Tensor
    present: Tensor
    voting: Voting
    judges: Judges


def correct(
    spaces: Sequence[Space],
    given: Tensor,
    num_classes: int,
    groups: Tensor,
    valid: Tensor,
    voting: Voting,
    before: tuple[Tensor, Tensor] | None = None,
) -> Correction:
    """Vote on the class of each sample among its neighbours in feature space.

    Pictures vote among pictures on the given labels. Sounds vote among sounds on what their pictures were found to
    show, so that each sound gets a class of its own; how far both agree tells mismatched pairs. Clips vote in both
    senses together. The three are pooled by what each adds.

    Args:
        spaces: features of this rank's ids, `row_range(N)`.
        given: [N] int64 labels.
        num_classes: C.
        groups: [N] int64; samples of one group do not vote for each other.
        valid: [N] bool; samples without features neither vote nor are voted on, they keep their label.
        voting: the votes to choose among.
        before: what an earlier correction held out [n, C], one more voice, and its evidence [R] on the noise rate.
            Later features were trained on votes that every label had a small part in, so the first correction's
            estimate of the rate is the soundest.
    """
    own_rows = row_range(len(given))
    own, present = given[own_rows.start : own_rows.stop], valid[own_rows.start : own_rows.stop]
    fitting = [k for k in voting.neighbors if k < len(given)]
    voting = replace(voting, neighbors=fitting, second=[each for each in voting.second if each <= max(fitting)] or [0])
    judges = Judges(own, num_classes, present)
    problem = _Problem(given, own, num_classes, groups, valid, present, voting, judges)
    prior = before[1] if before else None

    seen, seen_name, seen_votes = _by_labels(problem, ((s.name, s.visual) for s in spaces), prior)
    pictures = seen.sharpened(seen_votes)
    rate = _rate(seen, num_classes)
    shown, _ = noise_matrix(pictures, own, rate.rate, seen.confusion)
    pairing, heard_name, heard = _by_sound(problem, spaces, shown)
    joint, joint_name, joint_votes = _by_labels(problem, _together(problem, spaces, pairing.correspondence), prior)

    fused = (pictures * gated(pairing.shares, pairing.correspondence)).clamp_min(1e-30)
    experts = [fused / fused.sum(1, keepdim=True), joint.sharpened(joint_votes), pictures]
    names = ["fused", "joint", "pictures"]
    if before:
        experts.append(before[0])
        names.append("before")
    pooled, weights = judges.pool(experts, seen.confusion, rate.rate if before else None)
    soundest = min((seen, joint), key=lambda found: _width(_rate(found, num_classes)))
    outcome = judges.calibrate(pooled, soundest.evidence if prior is None else prior)
    held_out = outcome.sharpened(pooled)
    label_rate = _rate(outcome, num_classes)
    posterior, matrix = noise_matrix(held_out, own, label_rate.rate, outcome.confusion)
    without_label, with_label = (_sound(pairing, each) for each in (held_out, posterior))
    nats = (max(seen.per_sample, joint.per_sample) - judges.chance()) * outcome.judges

    kept = F.one_hot(own, num_classes).to(held_out.dtype)
    has_signal = nats > voting.signal_nats
    if not has_signal:
        present = torch.zeros_like(present)
    shares = [torch.where(present[:, None], each, kept) for each in (held_out, posterior, without_label, with_label)]
    pooled_as = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(names, weights, strict=True))
    return Correction(
        *shares,
        correspondence=torch.where(present, pairing.correspondence, torch.ones_like(pairing.correspondence)),
        evidence=outcome.evidence,
        label_rate=label_rate,
        noise_matrix=matrix,
        pair_rate=checked_rate(pairing.rate, seen.evidence, heard, num_classes),
        nats=nats,
        has_signal=has_signal,
        chosen={"pictures": seen_name, "sounds": heard_name, "joint": joint_name, "pooled": pooled_as},
    )


def nothing_known(given: Tensor, num_classes: int) -> Correction:
    """Return the correction that leaves all labels and pairs as they are and tells nothing of the noise.

    Args:
        given: [N] int64 labels.
        num_classes: C.
    """
    rows = row_range(len(given))
    kept = F.one_hot(given[rows.start : rows.stop], num_classes).float()
    evidence = torch.zeros_like(rates(num_classes), device=given.device)
    rate = estimate_rate(evidence, rates(num_classes).to(given.device))
    return Correction(
        held_out=kept,
        posterior=kept.clone(),
        audio_held_out=kept.clone(),
        audio_posterior=kept.clone(),
        correspondence=torch.ones_like(kept[:, 0]),
        evidence=evidence,
        label_rate=rate,
        noise_matrix=kept.new_zeros(num_classes, num_classes + 1),
        pair_rate=rate,
        nats=0.0,
        has_signal=False,
        chosen={},
    )


def _rate(calibration: Calibration, num_classes: int) -> RateEstimate:
    return estimate_rate(calibration.evidence, rates(num_classes).to(calibration.evidence.device))


def _width(rate: RateEstimate) -> float:
    return rate.high - rate.low


def _neighborhoods(problem: _Problem, features: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Neighborhood]]:
    """Search each kind of features at each power of whitening, for as many neighbours as any vote asks."""
    most = max(problem.voting.neighbors)
    for name, raw in features:
        for power in problem.voting.whitening:
            directions = standardised(raw, problem.present, problem.voting.width, power)
            yield f"{name}, whitening {power:g}", Neighborhood(directions, most, problem.groups, problem.valid)


def _by_labels(
    problem: _Problem, features: Iterator[tuple[str, Tensor]], prior: Tensor | None
) -> tuple[Calibration, str, Tensor]:
    """Let neighbours vote with their given labels, in every way, and take the way that foretells labels best.

    Of ways that do so about as well the most decided is taken: a vote torn between two classes and a sure one whose
    label is often mistaken for the other explain the labels alike, but a sample is of one class.
    """
    voting, labels = problem.voting, problem.given

    def candidates() -> Iterator[tuple[str, Tensor]]:
        for name, near in _neighborhoods(problem, features):
            for k, temperature in itertools.product(voting.neighbors, voting.temperatures):
                election = near.election(labels, problem.num_classes, k, temperature)
                for voters, votes in _votes(problem, election, k):
                    yield f"{name}, k {k}, temperature {temperature:g}, second vote of {voters}", votes

    chance = problem.judges.chance()
    good: list[tuple[Calibration, str, Tensor]] = []
    for name, votes in candidates():
        good.append((problem.judges.calibrate(votes, prior), name, votes))
        best = max(found.per_sample for found, _, _ in good)
        enough = best - ALIKE * max(best - chance, 0.0)
        good = [each for each in good if each[0].per_sample >= enough]
    return min(good, key=lambda each: each[0].entropy)


def _by_sound(problem: _Problem, spaces: Sequence[Space], shown: Tensor) -> tuple[Pairing, str, Tensor]:
    """Let sounds vote with what their pictures show, and take the way in which both modalities agree best.

    The same neighbours also vote with the given labels, for what these say of the noise that is heard: [R].
    """
    elected = gather_ragged_rows(shown.argmax(1))

    def candidates() -> Iterator[tuple[Pairing, str, Neighborhood, int, float]]:
        for name, near in _neighborhoods(problem, ((space.name, space.audio) for space in spaces)):
            for k, temperature in itertools.product(problem.voting.neighbors, problem.voting.temperatures):
                votes = near.election(elected, problem.num_classes, k, temperature).shares
                found = pair_evidence(shown, votes, problem.present)
                yield found, f"{name}, k {k}, temperature {temperature:g}", near, k, temperature

    found, name, near, k, temperature = max(candidates(), key=lambda each: each[0].per_sample)
    labelled = near.election(problem.given, problem.num_classes, k, temperature)
    judged = [problem.judges.calibrate(votes) for _, votes in _votes(problem, labelled, k)]
    return found, name, max(judged, key=lambda each: each.per_sample).evidence


def _votes(problem: _Problem, election: Election, k: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the votes of an election of k and of every second vote over it, with the number of second voters."""
    for voters in (each for each in problem.voting.second if each <= k):
        yield voters, election.second_vote(problem.own, voters) if voters else election.shares


def _together(problem: _Problem, spaces: Sequence[Space], correspondence: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Put picture and sound side by side; a doubtful pair's sound counts less: f_v.f_v' + c c' f_a.f_a'."""
    width, power = problem.voting.width, problem.voting.whitening[-1]
    for space in spaces:
        seen, heard = (standardised(each, problem.present, width, power) for each in (space.visual, space.audio))
        yield space.name, torch.cat([seen, correspondence[:, None] * heard], dim=1)


def _sound(pairing: Pairing, picture: Tensor) -> Tensor:
    """Return the class of the sound: its own votes, and the picture's as far as they belong together."""
    both = (pairing.shares * gated(picture, pairing.correspondence)).clamp_min(1e-30)
    return both / both.sum(1, keepdim=True)
