"""Ways of voting, of which the one that foretells labels best, or in which both senses agree best, is taken.

Legend: N samples, n samples of this rank, C classes, E feature width, R noise rates.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distav.distributed.collectives import gather_ragged_rows
from distav.noise.calibration import Calibration, Judges
from distav.noise.class_agreement import Agreement, Pairing, agreement, pair_evidence
from distav.noise.knn_vote import Neighborhood, standardised
from distav.noise.tiling import in_tiles, normalized

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


FeaturesOf = Callable[[Space], Tensor]
"""Returns the features [n, E] of a space that neighbours are searched by."""


@dataclass(frozen=True, eq=False)
class Way:
    """How neighbours vote: all that is needed to count the same votes again.

    Attributes:
        space: where neighbours are looked for.
        whitening: power by which the principal axes are evened out.
        k: voters of the first vote.
        temperature: divides the similarity in a neighbour's weight.
        second: voters of the second vote; 0 for one vote alone.
    """

    space: Space
    whitening: float
    k: int
    temperature: float
    second: int

    @property
    def features(self) -> str:
        """The features in words."""
        return f"{self.space.name}, whitening {self.whitening:g}"

    def __str__(self) -> str:
        return f"{self.features}, k {self.k}, temperature {self.temperature:g}, second vote of {self.second}"


def _neighborhood(problem: Problem, features_of: FeaturesOf, space: Space, whitening: float) -> Neighborhood:
    """Search for as many neighbours as any vote asks."""
    voting = problem.voting
    directions = standardised(features_of(space), problem.present, voting.width, whitening)
    return Neighborhood(directions, max(voting.neighbors), problem.groups, problem.valid)


def _count(problem: Problem, near: Neighborhood, way: Way) -> Tensor:
    """Count the votes of one way: [n, C]."""
    election = near.election(problem.given, problem.num_classes, way.k, way.temperature)
    return election.second_vote(problem.own, way.second) if way.second else election.shares


def _votes(problem: Problem, near: Neighborhood, space: Space, whitening: float) -> Iterator[tuple[Way, Tensor]]:
    """Yield every way to vote in a neighbourhood, with its votes."""
    voting = problem.voting
    for k, temperature in itertools.product(voting.neighbors, voting.temperatures):
        election = near.election(problem.given, problem.num_classes, k, temperature)
        for second in (each for each in voting.second if each <= k):
            way = Way(space, whitening, k, temperature, second)
            yield way, election.second_vote(problem.own, second) if second else election.shares


@dataclass(frozen=True)
class Elected:
    """The way of voting that foretells labels best.

    Attributes:
        calibration: what the given labels say of its votes.
        name: the way in words.
        told: [R] log-likelihood of the noise rates, averaged over the ways that foretell labels about as well and are
            about as decided.
    """

    calibration: Calibration
    name: str
    told: Tensor


def by_labels(
    problem: Problem, spaces: Sequence[Space], features_of: FeaturesOf, prior: Tensor | None
) -> tuple[Elected, Tensor]:
    """Let neighbours vote with `problem.given`, in every way, and take the way that foretells the judges' labels best.

    Of ways that do so about as well the most decided is taken: a vote torn between two classes and a sure one whose
    label is often mistaken for the other explain the labels alike, but a sample is of one class. The torn one even
    gains by every mistake that it repeats, so that sure votes with uneven mistakes may be further behind.

    Only the votes of the way that leads so far are kept. A way may come to lead after its votes were dropped, when a
    better one leaves the leader behind; its votes are then counted again.

    Returns:
        The way with its calibration, and its calibrated votes [n, C].
    """
    chance = problem.judges.chance()
    good: list[tuple[Calibration, Way]] = []
    held: tuple[Way, Tensor] | None = None

    def leader() -> tuple[Calibration, Way]:
        return min(good, key=lambda each: each[0].entropy)

    for space, whitening in itertools.product(spaces, problem.voting.whitening):
        near = _neighborhood(problem, features_of, space, whitening)
        for way, votes in _votes(problem, near, space, whitening):
            good.append((problem.judges.calibrate(votes, prior), way))
            best = max(found.per_sample for found, _ in good)
            gain = max(best - chance, 0.0)
            good = [each for each in good if each[0].per_sample >= best - (TORN if each[0].uneven else ALIKE) * gain]
            if leader()[1] is way:
                held = way, votes
            del votes
        del near
    calibration, way = leader()
    if held is None or held[0] is not way:
        held = None
        held = way, _count(problem, _neighborhood(problem, features_of, way.space, way.whitening), way)
    credible = [found.evidence for found, _ in good if found.entropy <= CREDIBLE * calibration.entropy]
    told = torch.stack(credible).log_softmax(1).logsumexp(0)
    return Elected(calibration, str(way), told), calibration.sharpened(held[1])


@dataclass(frozen=True)
class _Sounds:
    """A way for sounds to vote: of which kind, by which name, how far it agrees with the pictures."""

    kind: str
    name: str
    agreed: Agreement


def by_sound(
    problem: Problem, spaces: Sequence[Space], shown: Tensor, teacher: Tensor | None
) -> tuple[Pairing, str, Tensor]:
    """Let sounds vote with what their pictures show, and take the way in which both modalities agree best.

    A teacher of sounds is one more way, alone and, with half the say, beside each vote. The share of mismatched pairs
    is told by the most decided of the ways that differ in the number of neighbours alone and agree at least half as
    well.

    The neighbours taken also vote with the given labels, for what these say of the noise that is heard: [R].
    """
    voting, judges = problem.voting, problem.judges
    elected = replace(problem, given=gather_ragged_rows(shown.argmax(1)), voting=replace(voting, second=(0,)))
    told: list[tuple[str, float, float, Tensor]] = []
    best: _Sounds | None = None

    def leads(kind: str, name: str, votes: Tensor) -> bool:
        nonlocal best
        agreed = agreement(shown, votes, problem.present)
        told.append((kind, agreed.per_sample, agreed.entropy, agreed.evidence))
        if best is not None and agreed.per_sample <= best.agreed.per_sample:
            return False
        best = _Sounds(kind, name, agreed)
        return True

    def heard_of(labelled: Iterable[Tensor]) -> Tensor:
        return max((judges.calibrate(votes) for votes in labelled), key=lambda each: each.per_sample).evidence

    heard: Tensor | None = None
    for space, whitening in itertools.product(spaces, voting.whitening):
        near, leading = _neighborhood(problem, lambda each: each.audio, space, whitening), None
        for way, votes in _votes(elected, near, space, whitening):
            kind = f"{way.features}, temperature {way.temperature:g}"
            if leads(kind, f"{kind}, k {way.k}", votes):
                leading = way
            if teacher is not None:
                kind += ", and the teacher"
                if leads(kind, f"{kind}, k {way.k}", in_tiles(problem.num_classes, _halfway, votes, teacher)):
                    leading = way
            del votes
        if leading is not None:
            alone = replace(voting, neighbors=(leading.k,), temperatures=(leading.temperature,))
            heard = heard_of(votes for _, votes in _votes(replace(problem, voting=alone), near, space, whitening))
        del near
    if teacher is not None and leads("the teacher", "the teacher", teacher):
        heard = heard_of([teacher])
    assert best is not None and heard is not None
    enough = best.agreed.per_sample - abs(best.agreed.per_sample) / 2
    kin = [(entropy, evidence) for kind, agree, entropy, evidence in told if kind == best.kind and agree >= enough]
    _, evidence = min(kin, key=lambda each: each[0])
    return pair_evidence(shown, best.agreed, evidence, problem.present), best.name, heard


def _halfway(one: Tensor, other: Tensor) -> Tensor:
    """Give two votes half the say each: [t, C] twice -> [t, C]."""
    return normalized((one.clamp_min(1e-6) * other.clamp_min(1e-6)).sqrt_())


def together(problem: Problem, correspondence: Tensor, space: Space) -> Tensor:
    """Put picture and sound side by side; a doubtful pair's sound counts less: f_v.f_v' + c c' f_a.f_a'."""
    width, power = problem.voting.width, problem.voting.whitening[-1]
    seen, heard = (standardised(each, problem.present, width, power) for each in (space.visual, space.audio))
    return torch.cat([seen, correspondence[:, None] * heard], dim=1)
