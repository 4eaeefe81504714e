"""Ways of voting, of which the one that foretells labels best, or in which both senses agree best, is taken.

Legend: N samples, n samples of this rank, C classes, E feature width, R noise rates.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distav.robust.calibration import Calibration, Judges
from distav.robust.pairing import Agreement, Pairing, agreement, pair_evidence
from distav.robust.votes import Election, Neighborhood, standardised
from distav.world import gather_ragged_rows

ALIKE = 0.05
"""Votes whose gain over chance differs by less than this share say as much."""
TORN = 0.15
"""The same where labels are found to be mistaken for particular others; see `by_labels`."""
CREDIBLE = 2.0
"""Of votes that say as much, those with at most so many times the least entropy tell how sure the noise rate is."""


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
class Problem:
    """What is voted on."""

    given: Tensor
    own: Tensor
    num_classes: int
    groups: Tensor
    valid: Tensor
    present: Tensor
    voting: Voting
    judges: Judges


def _neighborhoods(problem: Problem, features: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Neighborhood]]:
    """Search each kind of features at each power of whitening, for as many neighbours as any vote asks."""
    most = max(problem.voting.neighbors)
    for name, raw in features:
        for power in problem.voting.whitening:
            directions = standardised(raw, problem.present, problem.voting.width, power)
            yield f"{name}, whitening {power:g}", Neighborhood(directions, most, problem.groups, problem.valid)


@dataclass(frozen=True)
class Elected:
    """The way of voting that foretells labels best.

    Attributes:
        calibration: what the given labels say of its votes.
        name: the way in words.
        shares: [n, C] its calibrated votes.
        told: [R] log-likelihood of the noise rates, averaged over the ways that foretell labels about as well and are
            about as decided.
    """

    calibration: Calibration
    name: str
    shares: Tensor
    told: Tensor


def by_labels(problem: Problem, features: Iterator[tuple[str, Tensor]], prior: Tensor | None) -> Elected:
    """Let neighbours vote with `problem.given`, in every way, and take the way that foretells the judges' labels best.

    Of ways that do so about as well the most decided is taken: a vote torn between two classes and a sure one whose
    label is often mistaken for the other explain the labels alike, but a sample is of one class. The torn one even
    gains by every mistake that it repeats, so that sure votes with uneven mistakes may be further behind.
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
        gain = max(best - chance, 0.0)
        good = [each for each in good if each[0].per_sample >= best - (TORN if each[0].uneven else ALIKE) * gain]
    calibration, name, votes = min(good, key=lambda each: each[0].entropy)
    credible = [found.evidence for found, _, _ in good if found.entropy <= CREDIBLE * calibration.entropy]
    told = torch.stack(credible).log_softmax(1).logsumexp(0)
    return Elected(calibration, name, calibration.sharpened(votes), told)


@dataclass(frozen=True)
class _Sounds:
    """A way for sounds to vote: what it comes to, of which kind, by which name, and the votes of the given labels."""

    agreed: Agreement
    kind: str
    name: str
    labelled: Callable[[], list[Tensor]]


def by_sound(
    problem: Problem, spaces: Sequence[Space], shown: Tensor, teacher: Tensor | None
) -> tuple[Pairing, str, Tensor]:
    """Let sounds vote with what their pictures show, and take the way in which both modalities agree best.

    A teacher of sounds is one more way, alone and, with half the say, beside each vote. The share of mismatched pairs
    is told by the most decided of the ways that differ in the number of neighbours alone and agree at least half as
    well.

    The neighbours taken also vote with the given labels, for what these say of the noise that is heard: [R].
    """
    elected = gather_ragged_rows(shown.argmax(1))

    def candidates() -> Iterator[_Sounds]:
        for name, near in _neighborhoods(problem, ((space.name, space.audio) for space in spaces)):
            for k, temperature in itertools.product(problem.voting.neighbors, problem.voting.temperatures):
                votes = near.election(elected, problem.num_classes, k, temperature).shares
                kind = f"{name}, temperature {temperature:g}"
                labelled = partial(_labelled, problem, near, k, temperature)
                yield _Sounds(agreement(shown, votes, problem.present), kind, f"{kind}, k {k}", labelled)
                if teacher is not None:
                    both = (votes.clamp_min(1e-6) * teacher.clamp_min(1e-6)).sqrt()
                    agreed = agreement(shown, both / both.sum(1, keepdim=True), problem.present)
                    kind += ", and the teacher"
                    yield _Sounds(agreed, kind, f"{kind}, k {k}", labelled)
        if teacher is not None:
            agreed = agreement(shown, teacher, problem.present)
            yield _Sounds(agreed, "the teacher", "the teacher", partial(list[Tensor], [teacher]))

    best: _Sounds | None = None
    told: list[tuple[str, float, float, Tensor]] = []
    for each in candidates():
        told.append((each.kind, each.agreed.per_sample, each.agreed.entropy, each.agreed.evidence))
        best = each if best is None or each.agreed.per_sample > best.agreed.per_sample else best
    assert best is not None
    enough = best.agreed.per_sample - abs(best.agreed.per_sample) / 2
    kin = [(entropy, evidence) for kind, agree, entropy, evidence in told if kind == best.kind and agree >= enough]
    _, evidence = min(kin, key=lambda each: each[0])
    judged = [problem.judges.calibrate(votes) for votes in best.labelled()]
    heard = max(judged, key=lambda each: each.per_sample).evidence
    return pair_evidence(shown, best.agreed, evidence, problem.present), best.name, heard


def _labelled(problem: Problem, near: Neighborhood, k: int, temperature: float) -> list[Tensor]:
    """Return the votes of the given labels in a neighbourhood."""
    election = near.election(problem.given, problem.num_classes, k, temperature)
    return [votes for _, votes in _votes(problem, election, k)]


def _votes(problem: Problem, election: Election, k: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the votes of an election of k and of every second vote over it, with the number of second voters."""
    for voters in (each for each in problem.voting.second if each <= k):
        yield voters, election.second_vote(problem.own, voters) if voters else election.shares


def together(problem: Problem, spaces: Sequence[Space], correspondence: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Put picture and sound side by side; a doubtful pair's sound counts less: f_v.f_v' + c c' f_a.f_a'."""
    width, power = problem.voting.width, problem.voting.whitening[-1]
    for space in spaces:
        seen, heard = (standardised(each, problem.present, width, power) for each in (space.visual, space.audio))
        yield space.name, torch.cat([seen, correspondence[:, None] * heard], dim=1)
