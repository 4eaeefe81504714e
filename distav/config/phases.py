"""Settings of each kind of phase: type, default, bound, meaning and, where a paper fixed it, its source.

AVID is Morgado et al. 2021a, RAVID Morgado et al. 2021b, CC Li et al. 2021, CRCL Qin et al. 2023.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from distav.config.bounds import above, at_least, between, satisfies
from distav.config.registry import Registry
from distav.config.setting_types import FilePath


class Estimator(Enum):
    """Estimator of the correspondence probability of a pair (`distav.noise.correspondence`).

    scc: at each visit, from the pair's matching probabilities (CRCL). All others: once per epoch, from the memory bank.
    """

    gmm = "gmm"
    cdf = "cdf"
    category = "category"
    scc = "scc"
    none = "none"
    oracle = "oracle"


class InstanceLoss(Enum):
    """xid: weighted instance discrimination with soft targets (RAVID). acl: active complementary loss (CRCL)."""

    xid = "xid"
    acl = "acl"


class SoftTargetKind(Enum):
    """Distribution over the memory bank that softens the instance target (RAVID section 3.3)."""

    none = "none"
    bootstrapping = "bootstrapping"
    swapped = "swapped"
    neighbor = "neighbor"
    cycle = "cycle"


class NeighborSearch(Enum):
    """Search for the neighbors that vote.

    exact: all clips are compared. ivf: only clips in inverted lists near that of a clip are, so that some neighbors are
    missed; for hundreds of thousands of clips and more.
    """

    exact = "exact"
    ivf = "ivf"


class Targets(Enum):
    """Targets of the classifiers.

    given: the given labels. posterior: corrected labels; the given label has the weight that the noise rate implies.
    held_out: corrected labels to which a sample's own given label did not contribute, so that the features they train
    can be used for another correction round. hybrid: given and corrected label, weighted by their agreement. oracle:
    true labels, an upper bound.
    """

    given = "given"
    posterior = "posterior"
    held_out = "held_out"
    hybrid = "hybrid"
    oracle = "oracle"


NEED_CORRECTION = (Targets.posterior, Targets.held_out, Targets.hybrid)
"""Targets that need a label correction phase before them."""


@dataclass
class ContrastivePhase:
    """Phase 1: noise-tolerant contrastive training without labels."""

    kind: str = "contrastive"
    """Kind of phase."""
    epochs: int = field(default=40, metadata=at_least(1))
    """Passes over the training split."""
    lr_scale: float = field(default=1.0, metadata=at_least(0))
    """Factor on `optim.lr`."""
    reinitialize: bool = False
    """Start from newly initialized weights and memory bank, and keep the correspondence probabilities and corrected
    labels of earlier phases (the pieces of CRCL)."""
    loss: InstanceLoss = InstanceLoss.xid
    """Instance loss: xid or acl."""
    negatives_source: str = "memory_bank"
    """Contrastive objective, by its source of negatives: memory_bank, sampled or batch (CRCL: batch), or the name of an
    installed one. memory_bank with `num_negatives` above 0 is sampled. With gradient accumulation, batch is one
    micro-batch."""
    temperature: float = field(default=0.07, metadata=above(0))
    """Temperature of the instance loss (AVID: 0.07, CRCL: 0.05). With `model.learnable_temperature`, the learned one
    replaces it."""
    complementary_weight: float = field(default=5.0, metadata=at_least(0))
    """Weight lambda of the complementary part of acl (CRCL: 5)."""
    num_negatives: int = field(default=0, metadata=at_least(0))
    """Rows of the memory bank sampled per sample as negatives (AVID: 1024). 0 uses all rows, which is exact."""
    nce: bool = False
    """Use noise-contrastive estimation over the sampled negatives (AVID) instead of their softmax."""
    mask_uninitialized: bool = False
    """Exclude rows of the memory bank that were never written from the softmax; they are initialized at random."""
    within_modal_weight: float = field(default=0.0, metadata=at_least(0))
    """Weight of the within-modal instance discrimination loss (Joint-AVID). It preserves modality-specific information,
    which matters most on small or hard datasets, and adds two passes over the memory bank. 0 disables it."""
    soft_targets: SoftTargetKind = SoftTargetKind.cycle
    """Soft targets over the memory bank: none, bootstrapping, swapped, neighbor or cycle (RAVID: cycle)."""
    soft_target_weight: float = field(default=0.5, metadata=between(0, 1))
    """Maximum weight of the soft target. A sample gets this times (1 - correspondence probability) (RAVID: 0.5, in its
    sweep 0.25)."""
    soft_targets_for_all: bool = False
    """Give every sample the maximum weight (RAVID), whatever its correspondence probability."""
    soft_target_temperature: float = field(default=0.02, metadata=above(0))
    """Temperature of the similarities in the soft target (RAVID)."""
    cycle_temperature: float = field(default=0.07, metadata=above(0))
    """Temperature of the pair similarities in cycle-consistent targets (RAVID)."""
    soft_target_excludes_self: bool = False
    """Exclude the sample itself from its soft target."""
    correspondence_estimator: Estimator = Estimator.gmm
    """Estimator of correspondence probabilities: gmm, cdf, category, scc, oracle or none."""
    min_pair_weight: float = field(default=0.25, metadata=between(0, 1))
    """Loss weight of a pair with correspondence probability 0 (RAVID: 0.25)."""
    pair_weighting_start: float = field(default=0.35, metadata=between(0, 1))
    """Fraction of the phase after which pair weights and soft targets are enabled."""
    pair_weighting_ramp: float = field(default=0.05, metadata=at_least(0))
    """Fraction of the phase over which pair weights and soft targets ramp up."""
    correspondence_momentum: float = field(default=0.8, metadata=between(0, 1))
    """Momentum of the correspondence probability: weight of its previous value in each update (CRCL: 0.8)."""
    refinement_warmup_epochs: int = field(default=2, metadata=at_least(0))
    """Epochs before scc starts (CRCL: 2)."""
    correspondence_threshold: float = field(default=0.1, metadata=between(0, 1))
    """Correspondence probability below which scc treats a pair as mismatched (CRCL: 0.1)."""
    store_thresholded: bool = False
    """Store 0 for pairs below the threshold, as the code of CRCL does. Such a pair rarely recovers."""
    matching_reference_size: int = field(default=128, metadata=at_least(2))
    """Number of candidates for which scc states matching probabilities, whatever number was compared (CRCL: 128, its
    batch size). If any clip of a class matches as well as the paired one, use a third of the number of classes."""
    full_trust_quantile: float = field(default=0.0, metadata=between(0, 1))
    """Quantile of all correspondence probabilities from which scc fully trusts a pair; 0 requires a probability of 1
    (CRCL). Early in training all pairs match about equally well; a quantile then trusts most pairs instead of none."""
    category_weight: float = field(default=1.0, metadata=at_least(0))
    """Weight of the category-level contrastive loss (CC: 1)."""
    category_temperature: float = field(default=1.0, metadata=above(0))
    """Temperature of the category-level contrastive loss (CC: 1)."""
    category_memory_weight: float = field(default=0.0, metadata=at_least(0))
    """Weight of the category assignments stored in the memory bank, added to those of the batch in the category-level
    loss. Useful when the batch is smaller than five times the number of categories. 0 disables them."""
    category_warmup_fraction: float = field(default=0.1, metadata=at_least(0))
    """Fraction of the phase over which the category-level loss ramps up."""
    category_balance_weight: float = field(default=1.0, metadata=at_least(0))
    """Weight of the term that keeps categories equally used (CC: 1)."""
    category_entropy_weight: float = field(default=0.1, metadata=at_least(0))
    """Weight of the entropy of each sample's category distribution. It prevents the uniform solution."""


@dataclass
class LabelCorrectionPhase:
    """Label correction by held-out k-NN votes; the vote configuration with the highest likelihood is selected."""

    kind: str = "label_correction"
    """Kind of phase."""
    num_neighbors: list[int] = field(default_factory=lambda: [50, 200, 400], metadata=at_least(1))
    """Candidate numbers of neighbors of the first vote; noisier labels need more. Numbers that are too large for the
    dataset are skipped."""
    second_round_neighbors: list[int] = field(default_factory=lambda: [0, 20, 100], metadata=at_least(0))
    """Candidate numbers of neighbors of a second vote over the results of the first; 0 omits the second vote."""
    vote_temperatures: list[float] = field(default_factory=lambda: [0.07, 0.2, 0.4], metadata=above(0))
    """Candidate temperatures of the similarity in a neighbor's weight."""
    whitening_powers: list[float] = field(default_factory=lambda: [0.0, 0.5], metadata=between(0, 1))
    """Candidate whitening exponents: each principal component of the features is divided by its standard deviation to
    this power; 0 keeps the scales, 1 whitens fully. The joint vote of both modalities uses the last one."""
    num_components: int = field(default=48, metadata=at_least(1))
    """Number of principal components of the features that are kept."""
    neighbor_search: NeighborSearch = NeighborSearch.exact
    """Search for neighbors: exact, or ivf, an approximate search in inverted lists. There are 4 sqrt(N) lists for N
    clips, so ivf finds all neighbors among at most (num_probes / 4)^2 clips."""
    num_probes: int = field(default=128, metadata=at_least(1))
    """Lists that ivf searches for each clip; more find more of the neighbors and take longer."""
    pseudo_labels: FilePath = ""
    """Output directory of tools/pseudo_label.py, whose teachers give each modality another vote; empty for none."""
    min_log_likelihood_gain: float = field(default=10.0, metadata=at_least(0))
    """Minimum log-likelihood gain, in nats over all clips, of the votes over class frequencies in predicting the given
    labels. Below it, labels stay unchanged. Random features reach about 1."""
    min_change_odds: float = field(default=2.0, metadata=at_least(1))
    """A label changes if another class is at least this many times as probable as the given one: a right label that is
    changed costs as much as this many wrong ones that stay. Targets of supervised phases do not depend on it, nor do
    lists of labels."""

    @property
    def probes(self) -> int | None:
        """Lists that are probed; None for the exact search."""
        return self.num_probes if self.neighbor_search is NeighborSearch.ivf else None


@dataclass
class SupervisedPhase:
    """Phase 2: supervised training on given and corrected labels; on given labels alone, the usual baselines."""

    kind: str = "supervised"
    """Kind of phase."""
    epochs: int = field(default=12, metadata=at_least(1))
    """Passes over the training split."""
    lr_scale: float = field(default=1.0, metadata=at_least(0))
    """Factor on `optim.lr`."""
    tower_lr_scale: float = field(default=1.0, metadata=at_least(0))
    """Additional factor for the towers; 0 trains the classifiers alone, a linear probe."""
    targets: Targets = Targets.posterior
    """Targets: given, posterior, held_out, hybrid or oracle."""
    loss: str = "ce"
    """Loss: ce (cross-entropy), gce (generalized cross-entropy), elr (early-learning regularization), sop (sparse
    over-parameterization), bce (binary cross-entropy of each class), asymmetric (asymmetric loss), or the name of an
    installed one. Datasets with several labels per clip need bce or asymmetric. If the targets are corrected labels and
    the correction had no label signal, the given labels are used, with gce if clips have one label."""
    gce_q: float = field(default=0.7, metadata=above(0))
    """Exponent q of generalized cross-entropy (Zhang and Sabuncu 2018: 0.7)."""
    elr_weight: float = field(default=3.0, metadata=at_least(0))
    """Weight of early-learning regularization (Liu et al. 2020: 3 on CIFAR-10)."""
    elr_momentum: float = field(default=0.7, metadata=between(0, 1))
    """Momentum of the stored predictions: weight of the previous value in each update (Liu et al. 2020: 0.7 on
    CIFAR-10)."""
    sop_lr_u: float = field(default=10.0, metadata=above(0))
    """Learning rate of the variables u of sparse over-parameterization (Liu et al. 2022: 10 on CIFAR-10, 1 on
    CIFAR-100)."""
    sop_lr_v: float = field(default=10.0, metadata=above(0))
    """Learning rate of its variables v (Liu et al. 2022: 10 for symmetric noise, 100 for asymmetric noise)."""
    asymmetric_gamma_negative: float = field(default=4.0, metadata=at_least(0))
    """Focusing exponent of absent classes in the asymmetric loss (Ridnik et al. 2021: 4)."""
    asymmetric_gamma_positive: float = field(default=0.0, metadata=at_least(0))
    """Focusing exponent of present classes in the asymmetric loss (Ridnik et al. 2021: 0)."""
    asymmetric_clip: float = field(default=0.05, metadata=satisfies(lambda clip: 0 <= clip < 1, "0 or more, below 1"))
    """Probability up to which an absent class has no loss in the asymmetric loss (Ridnik et al. 2021: 0.05)."""
    mixup: float = field(default=0.0, metadata=at_least(0))
    """Parameter alpha of mixup: clips and their targets are mixed with others, in fractions from Beta(alpha, alpha)
    (Zhang et al. 2018: 0.1 to 0.4 on ImageNet, 1 on CIFAR-10, 8 where labels are wrong). 0 disables it. Not for the
    losses elr and sop, which store predictions of single clips, nor with `instance_weight`."""
    class_balance: float = field(default=0.0, metadata=between(0, 1))
    """Balanced sampling: a class with n clips is drawn with probability proportional to n^(1 - class_balance). 0 draws
    every clip once per epoch, 0.5 is square-root sampling, and 1 draws all classes equally often (Kang et al. 2020).
    Classes are those of `targets`."""
    logit_adjustment: float = field(default=0.0, metadata=at_least(0))
    """Factor tau of logit adjustment: tau * log(class prior) is added to the logits in the loss (Menon et al. 2021: 1).
    The prior is that of `targets` as `class_balance` draws them. 0 disables it."""
    instance_weight: float = field(default=0.0, metadata=at_least(0))
    """Weight of instance discrimination against the memory bank as a regularizer; 0 disables it."""
    temperature: float = field(default=0.07, metadata=above(0))
    """Temperature of that instance loss."""


@dataclass
class EventParsingPhase:
    """Audio-visual event parsing from features or clips: audible and visible events per segment (HAN and VALOR)."""

    kind: str = "parsing"
    """Kind of phase."""
    epochs: int = field(default=60, metadata=at_least(1))
    """Passes over the training split (VALOR: 60, HAN: 40)."""
    lr_scale: float = field(default=1.0, metadata=at_least(0))
    """Factor on `optim.lr`."""
    tower_lr_scale: float = field(default=1.0, metadata=at_least(0))
    """Additional factor for the towers, if the dataset stores clips and not features."""
    pseudo_labels: FilePath = ""
    """Pseudo-labels of teachers: an output directory of tools/pseudo_label.py or a table of events; empty to train on
    weak labels alone."""
    weak_label_weight: float = field(default=1.0, metadata=at_least(0))
    """Weight of the loss on the clip's weak labels, predicted by both modalities together."""
    modality_weight: float = field(default=0.0, metadata=at_least(0))
    """Weight of the loss on the same labels, predicted by each modality alone (HAN: 1, VALOR: 0)."""
    segment_weight: float = field(default=1.0, metadata=at_least(0))
    """Weight of the loss on the pseudo-labels of each segment (VALOR: 1)."""
    audio_smoothing: float = field(default=0.0, metadata=between(0, 1))
    """Label smoothing of the audio loss (HAN: 0)."""
    visual_smoothing: float = field(default=0.1, metadata=between(0, 1))
    """Label smoothing of the visual loss (HAN: 0.1)."""


PhaseConfig = ContrastivePhase | LabelCorrectionPhase | SupervisedPhase | EventParsingPhase
PHASE_KINDS: Registry[type[Any]] = Registry(
    "phases.*.kind",
    "distav.phases",
    {
        "contrastive": ContrastivePhase,
        "label_correction": LabelCorrectionPhase,
        "supervised": SupervisedPhase,
        "parsing": EventParsingPhase,
    },
)
"""Config dataclasses by kind of phase; `distav.training.phases.registry` has the function of each."""
