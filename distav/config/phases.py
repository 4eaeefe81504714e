"""The settings of each kind of phase: type, default, meaning and, where a paper fixed it, its source.

AVID is Morgado et al. 2021a, RAVID Morgado et al. 2021b, CC Li et al. 2021, CRCL Qin et al.
2023.
"""

from dataclasses import dataclass, field
from enum import Enum


class Estimator(Enum):
    """How the correspondence of a pair is estimated (`distav.noise.correspondence`).

    scc: at each visit from how it matches (CRCL). The others: once an epoch from the bank.
    """

    gmm = "gmm"
    cdf = "cdf"
    category = "category"
    scc = "scc"
    none = "none"
    oracle = "oracle"


class InstanceLoss(Enum):
    """xid: telling each pair from others, weighted and with soft targets (RAVID). acl: active complementary (CRCL)."""

    xid = "xid"
    acl = "acl"


class NegativesSource(Enum):
    """What a pair is told from: rows of the bank, or the batch over all ranks."""

    memory_bank = "bank"
    batch = "batch"


class SoftTargetKind(Enum):
    """Which distribution over the bank softens the instance target (RAVID section 3.3)."""

    none = "none"
    bootstrapping = "bootstrapping"
    swapped = "swapped"
    neighbor = "neighbour"
    cycle = "cycle"


class Targets(Enum):
    """What the classifiers learn.

    given: the labels as they came. posterior: corrected labels, the given one weighed by how often labels are wrong.
    held_out: corrected labels in which a sample's own given label had no part, so that the features that come of it
    can be voted in again. mixed: given and corrected label, weighed by how far they agree. truth: an upper bound.
    """

    given = "given"
    posterior = "posterior"
    held_out = "held_out"
    hybrid = "mixed"
    oracle = "truth"


NEED_CORRECTION = (Targets.posterior, Targets.held_out, Targets.hybrid)
"""Targets that a correction has to make."""


class ClassLoss(Enum):
    """ce: cross-entropy. gce: generalised cross-entropy. elr: cross-entropy with early-learning regularisation."""

    ce = "ce"
    gce = "gce"
    elr = "elr"


@dataclass
class ContrastivePhase:
    """Phase 1: noise-tolerant contrastive training without labels."""

    kind: str = "contrastive"
    """The kind of phase."""
    epochs: int = 40
    """Passes over the training split."""
    lr_scale: float = 1.0
    """Factor on `optim.lr`."""
    reinitialize: bool = False
    """Begin with new weights and rows, and keep what earlier phases found of pairs and labels (CRCL's pieces)."""
    loss: InstanceLoss = InstanceLoss.xid
    """xid or acl."""
    negatives_source: NegativesSource = NegativesSource.memory_bank
    """bank or batch (CRCL: batch); with accumulation, a micro-batch."""
    temperature: float = 0.07
    """Divides the similarities of the instance loss (AVID: 0.07, CRCL: 0.05); where `model.learnable_temperature`, the
    model's does."""
    complementary_weight: float = 5.0
    """Weight lambda of the complementary part of acl (CRCL: 5)."""
    num_negatives: int = 0
    """Rows drawn for each sample in place of the whole bank (AVID: 1024); 0 uses all, and is exact."""
    nce: bool = False
    """Tell the own row from the drawn ones by noise-contrastive estimation (AVID), in place of their softmax."""
    mask_uninitialized: bool = False
    """Leave rows that were never written out of the softmax; they start as random directions."""
    within_modal_weight: float = 0.0
    """Weight of telling instances apart within each modality too (Joint-AVID); it learns what the other modality cannot
    teach, which is much where clips are few or hard, and costs two more passes over the bank."""
    soft_targets: SoftTargetKind = SoftTargetKind.cycle
    """Soft targets over the bank (RAVID keeps cycle)."""
    soft_target_weight: float = 0.5
    """Largest share of the soft target; a sample gets this times (1 - correspondence) (RAVID: 0.5, sweep 0.25)."""
    soft_targets_for_all: bool = False
    """Give every sample that largest share (RAVID), doubted or not."""
    soft_target_temperature: float = 0.02
    """Divides the similarities that make the soft target (RAVID)."""
    cycle_temperature: float = 0.07
    """Divides the pair similarities inside cycle-consistent targets (RAVID)."""
    soft_target_excludes_self: bool = False
    """Leave the sample itself out of its soft target."""
    correspondence_estimator: Estimator = Estimator.gmm
    """Estimator of the correspondence of pairs."""
    min_pair_weight: float = 0.25
    """Loss weight of a pair surely mismatched (RAVID: 0.25)."""
    pair_weighting_start: float = 0.35
    """Share of the phase after which weights and soft targets are switched on."""
    pair_weighting_ramp: float = 0.05
    """Share of the phase over which they fade in."""
    correspondence_momentum: float = 0.8
    """Share of the old correspondence kept at each estimate (CRCL: 0.8)."""
    refinement_warmup_epochs: int = 2
    """Epochs before scc begins (CRCL: 2)."""
    correspondence_threshold: float = 0.1
    """Correspondence below which scc holds a pair for mismatched (CRCL: 0.1)."""
    store_thresholded: bool = False
    """Whether scc forgets what lies below (CRCL's code does), so that a pair hardly comes back."""
    matching_reference_size: int = 128
    """Candidates that scc's matching probabilities are stated for, whatever number they were found among (CRCL: 128,
    its batch). Where any clip of a class matches as well as the right one, take a third of the number of classes."""
    full_trust_quantile: float = 0.0
    """Quantile of all pairs' correspondences from which scc believes a pair wholly; 0: a probability of 1 (CRCL). Where
    a network has learnt little yet, all pairs match about alike, and this believes them all instead of none."""
    category_weight: float = 1.0
    """Weight of the category-level loss (CC: 1)."""
    category_temperature: float = 1.0
    """Divides the similarities of the category-level loss (CC: 1)."""
    category_memory_weight: float = 0.0
    """Weight of the bank's stored categories beside the batch's in the category-level loss, for batches below five
    times the categories; 0 leaves them out."""
    category_warmup_fraction: float = 0.1
    """Share of the phase over which the category-level loss fades in."""
    category_balance_weight: float = 1.0
    """Weight of the term that keeps categories equally used (CC: 1)."""
    category_entropy_weight: float = 0.1
    """Weight of the entropy of each sample's category, against the uniform plateau."""


@dataclass
class LabelCorrectionPhase:
    """Every sample's label, voted for by its neighbours; the way of voting is the one that foretells labels best."""

    kind: str = "label_correction"
    """The kind of phase."""
    num_neighbors: list[int] = field(default_factory=lambda: [50, 200, 400])
    """Neighbours of the first vote, to choose among; more for noisier labels. Those that the set is too small
    for are left out."""
    second_round_neighbors: list[int] = field(default_factory=lambda: [0, 20, 100])
    """Voters of a second vote over what the first elected, to choose among; 0: one vote alone."""
    vote_temperatures: list[float] = field(default_factory=lambda: [0.07, 0.2, 0.4])
    """Divide the similarity in a neighbour's weight, to choose among."""
    whitening_powers: list[float] = field(default_factory=lambda: [0.0, 0.5])
    """Powers by which the principal axes of features are evened out, to choose among; both modalities together are voted
    in with the last."""
    num_components: int = 48
    """Principal axes of the features that are kept."""
    pseudo_labels: str = ""
    """Folder that tools/pseudo_label.py wrote, whose teachers then have a vote too; empty for none."""
    min_log_likelihood_gain: float = 10.0
    """Votes that do not make the given labels likelier than their frequencies do by this much are not believed; random
    features come to 1."""


@dataclass
class SupervisedPhase:
    """Phase 2: supervised training on given and corrected labels; on given labels alone, the usual baselines."""

    kind: str = "supervised"
    """The kind of phase."""
    epochs: int = 12
    """Passes over the training split."""
    lr_scale: float = 1.0
    """Factor on `optim.lr`."""
    tower_lr_scale: float = 1.0
    """Further factor for the towers; 0 trains the classifiers alone, a linear probe."""
    targets: Targets = Targets.posterior
    """given, posterior, held_out, mixed or truth."""
    loss: ClassLoss = ClassLoss.ce
    """ce, gce or elr; gce where corrected labels are asked for and the correction found no signal."""
    gce_q: float = 0.7
    """Exponent of generalised cross-entropy (Zhang and Sabuncu 2018: 0.7)."""
    elr_weight: float = 3.0
    """Weight of early-learning regularisation (Liu et al. 2020: 3 on CIFAR-10)."""
    elr_momentum: float = 0.7
    """Share of the remembered prediction kept at each visit (Liu et al. 2020: 0.7 on CIFAR-10)."""
    instance_weight: float = 0.0
    """Weight of the instance loss against the bank, as a regulariser; 0 leaves it out."""
    temperature: float = 0.07
    """Divides the similarities of that loss."""


@dataclass
class EventParsingPhase:
    """Learning which events are heard and which are seen, and when (HAN and VALOR), from features or from clips."""

    kind: str = "parsing"
    """The kind of phase."""
    epochs: int = 60
    """Passes over the training split (VALOR: 60, HAN: 40)."""
    lr_scale: float = 1.0
    """Factor on `optim.lr`."""
    tower_lr_scale: float = 1.0
    """Further factor for the towers, where clips and not features are stored."""
    pseudo_labels: str = ""
    """What teachers pseudo_labels: the folder that tools/pseudo_label.py wrote, or a table of events; empty for weak
    labels alone."""
    weak_label_weight: float = 1.0
    """Weight of the classes of a whole clip, told by both modalities together."""
    modality_weight: float = 0.0
    """Weight of the same classes asked of sound and of picture alike (HAN: 1, VALOR: 0)."""
    segment_weight: float = 1.0
    """Weight of the harvested events of each second (VALOR: 1)."""
    audio_smoothing: float = 0.0
    """Label smoothing of what is asked of sound (HAN: 0)."""
    visual_smoothing: float = 0.1
    """Label smoothing of what is asked of pictures (HAN: 0.1)."""


PhaseConfig = ContrastivePhase | LabelCorrectionPhase | SupervisedPhase | EventParsingPhase
PHASE_KINDS: dict[
    str, type[ContrastivePhase] | type[LabelCorrectionPhase] | type[SupervisedPhase] | type[EventParsingPhase]
] = {
    "contrastive": ContrastivePhase,
    "label_correction": LabelCorrectionPhase,
    "supervised": SupervisedPhase,
    "parsing": EventParsingPhase,
}
