"""Ways of voting, of which the one that foretells labels best, or in which both modalities agree best, is taken.

Legend: N samples, n samples of this rank, C classes, E feature width, R noise rates.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distav.distributed.collectives import all_gather_variable_rows
from distav.noise.calibration import Calibration, VoteCalibrator
from distav.noise.class_agreement import ClassAgreement, PairPosterior, class_agreement, pair_posterior
from distav.noise.knn_vote import NeighborGraph, pca_whiten
from distav.noise.tiling import in_tiles, normalized

GAIN_TOLERANCE = 0.05
"""Votes whose gain over chance differs by less than this share say as much."""
ASYMMETRIC_GAIN_TOLERANCE = 0.15
"""The same where labels are found to be mistaken for particular others; see `by_labels`."""
MAX_ENTROPY_RATIO = 2.0
"""Of votes that say as much, those with at most so many times the least entropy tell how sure the noise rate is."""


@dataclass(frozen=True)
class VoteSearchSpace:
    """The votes to choose among.

    Attributes:
        neighbors: k of the first vote; those that the set is too small for are left out.
        second: voters of a second vote over what the first elected; 0 for one vote alone.
        temperatures: divide the similarity in a neighbour's weight.
        whitening: powers by which principal axes of the features are evened out.
        width: principal axes kept.
        signal_nats: votes that make the given labels likelier than their frequencies do by less are not believed.
    """

    num_neighbors: Sequence[int] = (50, 200, 400)
    second_round_neighbors: Sequence[int] = (0, 20, 100)
    vote_temperatures: Sequence[float] = (0.07, 0.2, 0.4)
    whitening_powers: Sequence[float] = (0.0, 0.5)
    num_components: int = 48
    min_log_likelihood_gain: float = 10.0


@dataclass(frozen=True)
class FeatureSpace:
    """Features that neighbours can be looked for in, [n, E] of each modality."""

    name: str
    visual: Tensor
    audio: Tensor


@dataclass(frozen=True)
class VoteTask:
    """What is voted on."""

    given: Tensor
    own: Tensor
    num_classes: int
    groups: Tensor
    valid: Tensor
    present: Tensor
    search_space: VoteSearchSpace
    calibrator: VoteCalibrator


FeaturesOf = Callable[[FeatureSpace], Tensor]
"""Returns the features [n, E] of a space that neighbours are searched by."""


@dataclass(frozen=True, eq=False)
class VoteConfig:
    """How neighbours vote: all that is needed to count the same votes again.

    Attributes:
        space: where neighbours are looked for.
        whitening: power by which the principal axes are evened out.
        k: voters of the first vote.
        temperature: divides the similarity in a neighbour's weight.
        second: voters of the second vote; 0 for one vote alone.
    """

    space: FeatureSpace
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


def _neighborhood(problem: VoteTask, features_of: FeaturesOf, space: FeatureSpace, whitening: float) -> NeighborGraph:
    """Search for as many neighbours as any vote asks."""
    voting = problem.search_space
    directions = pca_whiten(features_of(space), problem.present, voting.num_components, whitening)
    return NeighborGraph(directions, max(voting.num_neighbors), problem.groups, problem.valid)


def _count(problem: VoteTask, near: NeighborGraph, way: VoteConfig) -> Tensor:
    """Count the votes of one way: [n, C]."""
    election = near.vote(problem.given, problem.num_classes, way.k, way.temperature)
    return election.second_round(problem.own, way.second) if way.second else election.shares


def _votes(
    problem: VoteTask, near: NeighborGraph, space: FeatureSpace, whitening: float
) -> Iterator[tuple[VoteConfig, Tensor]]:
    """Yield every way to vote in a neighbourhood, with its votes."""
    voting = problem.search_space
    for k, temperature in itertools.product(voting.num_neighbors, voting.vote_temperatures):
        election = near.vote(problem.given, problem.num_classes, k, temperature)
        for second in (each for each in voting.second_round_neighbors if each <= k):
            way = VoteConfig(space, whitening, k, temperature, second)
            yield way, election.second_round(problem.own, second) if second else election.shares


@dataclass(frozen=True)
class SelectedVote:
    """The way of voting that foretells labels best.

    Attributes:
        calibration: what the given labels say of its votes.
        name: the way in words.
        told: [R] log-likelihood of the noise rates, averaged over the ways that foretell labels about as well and are
            about as decided.
    """

    calibration: Calibration
    name: str
    rate_log_likelihood_credible: Tensor


def select_label_vote(
    problem: VoteTask, spaces: Sequence[FeatureSpace], features_of: FeaturesOf, prior: Tensor | None
) -> tuple[SelectedVote, Tensor]:
    """Let neighbours vote with `problem.given`, in every way, and take the way that foretells the judges' labels best.

    Of ways that do so about as well the most decided is taken: a vote torn between two classes and a sure one whose
    label is often mistaken for the other explain the labels alike, but a sample is of one class. The torn one even
    gains by every mistake that it repeats, so that sure votes with uneven mistakes may be further behind.

    Only the votes of the way that leads so far are kept. A way may come to lead after its votes were dropped, when a
    better one leaves the leader behind; its votes are then counted again.

    Returns:
        The way with its calibration, and its calibrated votes [n, C].
    """
    chance = problem.calibrator.prior_log_likelihood()
    good: list[tuple[Calibration, VoteConfig]] = []
    held: tuple[VoteConfig, Tensor] | None = None

    def leader() -> tuple[Calibration, VoteConfig]:
        return min(good, key=lambda each: each[0].entropy)

    for space, whitening in itertools.product(spaces, problem.search_space.whitening_powers):
        near = _neighborhood(problem, features_of, space, whitening)
        for way, votes in _votes(problem, near, space, whitening):
            good.append((problem.calibrator.calibrate(votes, prior), way))
            best = max(found.per_sample for found, _ in good)
            gain = max(best - chance, 0.0)
            good = [
                each
                for each in good
                if each[0].per_sample
                >= best - (ASYMMETRIC_GAIN_TOLERANCE if each[0].is_asymmetric else GAIN_TOLERANCE) * gain
            ]
            if leader()[1] is way:
                held = way, votes
            del votes
        del near
    calibration, way = leader()
    if held is None or held[0] is not way:
        held = None
        held = way, _count(problem, _neighborhood(problem, features_of, way.space, way.whitening), way)
    credible = [
        found.rate_log_likelihood for found, _ in good if found.entropy <= MAX_ENTROPY_RATIO * calibration.entropy
    ]
    told = torch.stack(credible).log_softmax(1).logsumexp(0)
    return SelectedVote(calibration, str(way), told), calibration.inverse_temperature(held[1])


@dataclass(frozen=True)
class _Sounds:
    """A way for sounds to vote: of which kind, by which name, how far it agrees with the pictures."""

    kind: str
    name: str
    agreed: ClassAgreement


def select_audio_vote(
    problem: VoteTask, spaces: Sequence[FeatureSpace], shown: Tensor, teacher: Tensor | None
) -> tuple[PairPosterior, str, Tensor]:
    """Let sounds vote with what their pictures show, and take the way in which both modalities agree best.

    A teacher of sounds is one more way, alone and, with half the say, beside each vote. The share of mismatched pairs
    is told by the most decided of the ways that differ in the number of neighbours alone and agree at least half as
    well.

    The neighbours taken also vote with the given labels, for what these say of the noise that is heard: [R].
    """
    voting, judges = problem.search_space, problem.calibrator
    elected = replace(
        problem,
        given=all_gather_variable_rows(shown.argmax(1)),
        search_space=replace(voting, second_round_neighbors=(0,)),
    )
    told: list[tuple[str, float, float, Tensor]] = []
    best: _Sounds | None = None

    def leads(kind: str, name: str, votes: Tensor) -> bool:
        nonlocal best
        agreed = class_agreement(shown, votes, problem.present)
        told.append((kind, agreed.per_sample, agreed.entropy, agreed.rate_log_likelihood))
        if best is not None and agreed.per_sample <= best.agreed.per_sample:
            return False
        best = _Sounds(kind, name, agreed)
        return True

    def heard_of(labelled: Iterable[Tensor]) -> Tensor:
        return max(
            (judges.calibrate(votes) for votes in labelled), key=lambda each: each.per_sample
        ).rate_log_likelihood

    heard: Tensor | None = None
    for space, whitening in itertools.product(spaces, voting.whitening_powers):
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
            alone = replace(voting, num_neighbors=(leading.k,), vote_temperatures=(leading.temperature,))
            heard = heard_of(votes for _, votes in _votes(replace(problem, search_space=alone), near, space, whitening))
        del near
    if teacher is not None and leads("the teacher", "the teacher", teacher):
        heard = heard_of([teacher])
    assert best is not None and heard is not None
    enough = best.agreed.per_sample - abs(best.agreed.per_sample) / 2
    kin = [(entropy, evidence) for kind, agree, entropy, evidence in told if kind == best.kind and agree >= enough]
    _, evidence = min(kin, key=lambda each: each[0])
    return pair_posterior(shown, best.agreed, evidence, problem.present), best.name, heard


def _halfway(one: Tensor, other: Tensor) -> Tensor:
    """Give two votes half the say each: [t, C] twice -> [t, C]."""
    return normalized((one.clamp_min(1e-6) * other.clamp_min(1e-6)).sqrt_())


def joint_features(problem: VoteTask, correspondence: Tensor, space: FeatureSpace) -> Tensor:
    """Put picture and sound side by side; a doubtful pair's sound counts less: f_v.f_v' + c c' f_a.f_a'."""
    width, power = problem.search_space.num_components, problem.search_space.whitening_powers[-1]
    seen, heard = (pca_whiten(each, problem.present, width, power) for each in (space.visual, space.audio))
    return torch.cat([seen, correspondence[:, None] * heard], dim=1)
