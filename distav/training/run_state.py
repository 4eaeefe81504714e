"""Progress of a run, and state that its phases pass to later phases and to the report; JSON in each checkpoint."""

from dataclasses import asdict, dataclass, field
from typing import Any, Self


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
        phase: number of the current phase; the number of phases if all are finished.
        step: optimizer steps done in the phase.
        total_steps: optimizer steps done in all phases.
        skipped_batches: batches of the phase that were skipped after loss spikes.
        extracted_batches: batches of a label correction whose features are extracted.
    """

    phase: int = 0
    step: int = 0
    total_steps: int = 0
    skipped_batches: int = 0
    extracted_batches: int = 0

    @property
    def name(self) -> str:
        """Name of the checkpoint; names sort by progress."""
        return f"step-{self.total_steps:09d}-{self.phase:03d}-{self.extracted_batches:06d}"


@dataclass
class CorrectionState:
    """Results of the label corrections of a run so far.

    Attributes:
        has_signal: whether the votes of the last correction predict the given labels better than class frequencies do.
        rate_log_likelihood, pair_rate_log_likelihood: log-likelihoods of the label-noise and mismatch rates from the
            first correction with a signal, see `distav.noise.correction.Correction`; None before it.
        visual_owner: fraction of the mismatched pairs whose label names the class of the frames, from that correction.
        label_rate_logits: [C, 8] rates of missing and wrong labels of each class from that correction on a multi-label
            dataset, see `distav.noise.multi_label_correction.ListCorrection`.
    """

    has_signal: bool
    rate_log_likelihood: list[float] | None = None
    pair_rate_log_likelihood: list[float] | None = None
    visual_owner: float = 1.0
    label_rate_logits: list[list[float]] | None = None


@dataclass
class CorrespondenceState:
    """State of the correspondence estimates in the memory bank.

    Attributes:
        is_estimated: whether the bank holds estimates, which the next ones are averaged with.
        first_refined_phase: number of the first phase with self-refinement; None before it.
        full_trust_threshold: matching probability from which on a pair is fully trusted.
    """

    is_estimated: bool = False
    first_refined_phase: int | None = None
    full_trust_threshold: float = 1.0


@dataclass
class CheckpointingStats:
    """Number of checkpoints, and seconds that training waited for them."""

    checkpoints: int = 0
    seconds: float = 0.0


@dataclass
class ReportFigures:
    """Figures that report.json contains as they are.

    Attributes:
        phases: one entry per finished phase.
        correspondence: one entry per contrastive phase.
        corrections: one entry per label correction.
        skipped_steps: steps skipped because of a non-finite loss or gradient.
        checkpointing: number and cost of checkpoints.
    """

    phases: list[dict[str, Any]] = field(default_factory=list)
    correspondence: list[dict[str, Any]] = field(default_factory=list)
    corrections: list[dict[str, Any]] = field(default_factory=list)
    skipped_steps: int = 0
    checkpointing: CheckpointingStats = field(default_factory=CheckpointingStats)


@dataclass
class RunState:
    """State of a run in addition to its weights, memory bank and progress; equal on all ranks.

    Attributes:
        seconds_in_phase: seconds spent in the current phase up to the last checkpoint.
        metrics_bytes: length of metrics.jsonl at the last checkpoint; only the main rank writes the file.
        quarantined: reason by number of the training sample.
        nce_partition: normalization constant of noise-contrastive estimation; None before it is estimated.
        given_labels_learned: whether a supervised phase trained the towers on the given labels.
        correction: None before the first label correction.
        correspondence: state of the correspondence estimates.
        report: figures for report.json.
    """

    seconds_in_phase: float = 0.0
    metrics_bytes: int = 0
    quarantined: dict[int, str] = field(default_factory=dict)
    nce_partition: float | None = None
    given_labels_learned: bool = False
    correction: CorrectionState | None = None
    correspondence: CorrespondenceState = field(default_factory=CorrespondenceState)
    report: ReportFigures = field(default_factory=ReportFigures)

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the state that `to_json` stored."""
        correction, report = values["correction"], values["report"]
        return cls(
            seconds_in_phase=values["seconds_in_phase"],
            metrics_bytes=values["metrics_bytes"],
            quarantined={int(sample): reason for sample, reason in values["quarantined"].items()},
            nce_partition=values["nce_partition"],
            given_labels_learned=values["given_labels_learned"],
            correction=None if correction is None else CorrectionState(**correction),
            correspondence=CorrespondenceState(**values["correspondence"]),
            report=ReportFigures(**{**report, "checkpointing": CheckpointingStats(**report["checkpointing"])}),
        )
