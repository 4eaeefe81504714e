"""The settings of each kind of phase: type, default, meaning and, where a paper fixed it, its source.

AVID is Morgado et al. 2021a, RAVID Morgado et al. 2021b, CC Li et al. 2021.
"""

from dataclasses import dataclass
from enum import Enum


class Estimator(Enum):
    """How the correspondence of a pair is estimated from the bank (`distav.robust.correspondence`)."""

    gmm = "gmm"
    cdf = "cdf"
    category = "category"
    none = "none"
    oracle = "oracle"


class SoftTargets(Enum):
    """Which distribution over the bank softens the instance target (RAVID section 3.3)."""

    none = "none"
    bootstrapping = "bootstrapping"
    swapped = "swapped"
    neighbour = "neighbour"
    cycle = "cycle"


class Vote(Enum):
    """How neighbours vote: one vote over both modalities, or one for each with the pair's agreement as gate."""

    joint = "joint"
    gated = "gated"


class Features(Enum):
    """Which features neighbours are looked for in: tower outputs, or their projections."""

    backbone = "backbone"
    projected = "projected"


@dataclass
class ContrastivePhase:
    """Phase 1: noise-tolerant contrastive training without labels."""

    kind: str = "contrastive"
    """The kind of phase."""
    epochs: int = 40
    """Passes over the training split."""
    lr_scale: float = 1.0
    """Factor on `optim.lr`."""
    temperature: float = 0.07
    """Divides the similarities of the instance loss (AVID: 0.07); where `model.learn_temperature`, the model's does."""
    negatives: int = 0
    """Rows drawn for each sample in place of the whole bank (AVID: 1024); 0 uses all, and is exact."""
    mask_unvisited: bool = False
    """Leave rows that were never written out of the softmax; they start as random directions."""
    soft_targets: SoftTargets = SoftTargets.cycle
    """Soft targets over the bank (RAVID keeps cycle)."""
    soft_weight: float = 0.5
    """Largest share of the soft target; a sample gets this times (1 - correspondence)."""
    soft_temperature: float = 0.02
    """Divides the similarities that make the soft target (RAVID)."""
    cycle_temperature: float = 0.07
    """Divides the pair similarities inside cycle-consistent targets (RAVID)."""
    soft_excludes_self: bool = False
    """Leave the sample itself out of its soft target."""
    estimator: Estimator = Estimator.gmm
    """Estimator of the correspondence of pairs."""
    weight_min: float = 0.25
    """Loss weight of a pair surely mismatched (RAVID: 0.25)."""
    trust_after: float = 0.35
    """Share of the phase after which weights and soft targets are switched on."""
    trust_ramp: float = 0.05
    """Share of the phase over which they fade in."""
    correspondence_momentum: float = 0.8
    """Share of the old correspondence kept at each estimate."""
    category_weight: float = 1.0
    """Weight of the category-level loss (CC: 1)."""
    category_temperature: float = 1.0
    """Divides the similarities of the category-level loss (CC: 1)."""
    category_memory: float = 0.0
    """Weight of the bank's stored categories beside the batch's in the category-level loss, for batches below five
    times the categories; 0 leaves them out."""
    category_ramp: float = 0.1
    """Share of the phase over which the category-level loss fades in."""
    balance_weight: float = 1.0
    """Weight of the term that keeps categories equally used (CC: 1)."""
    sharpen_weight: float = 0.1
    """Weight of the entropy of each sample's category, against the uniform plateau."""


@dataclass
class CorrectionPhase:
    """Between the phases: every sample's label, voted for by its neighbours."""

    kind: str = "correction"
    """The kind of phase."""
    neighbors: int = 100
    """Neighbours of the first vote."""
    refine_neighbors: int = 20
    """Neighbours of the second vote, over the labels of the first; 0 leaves it out."""
    temperature: float = 0.07
    """Divides the similarity in a neighbour's weight."""
    class_prior: float = 0.0
    """Exponent of the correction for class frequency; 0 for balanced sets, 1 for imbalanced ones."""
    features: Features = Features.backbone
    """Features in which neighbours are looked for."""
    vote: Vote = Vote.joint
    """joint; or gated, for doubtful pairs: needs classes that each modality can tell alone."""


@dataclass
class HybridPhase:
    """Phase 2: supervised training on given and corrected labels, the bank kept as regulariser."""

    kind: str = "hybrid"
    """The kind of phase."""
    epochs: int = 24
    """Passes over the training split."""
    lr_scale: float = 1.0
    """Factor on `optim.lr`."""
    tower_lr_scale: float = 0.1
    """Further factor for the towers; the heads learn at the full rate."""
    mismatch_below: float = 0.5
    """Correspondence below which each modality learns its own corrected label."""
    instance_weight: float = 0.1
    """Weight of the instance loss against the bank; 0 leaves it out."""
    temperature: float = 0.07
    """Divides the similarities of that loss."""


PhaseSettings = ContrastivePhase | CorrectionPhase | HybridPhase
PHASE_KINDS: dict[str, type[ContrastivePhase] | type[CorrectionPhase] | type[HybridPhase]] = {
    "contrastive": ContrastivePhase,
    "correction": CorrectionPhase,
    "hybrid": HybridPhase,
}
