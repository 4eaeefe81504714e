"""Label correction phase: extracts the features of all clips and corrects the labels with k-NN votes."""

import torch
from torch import Tensor

from distav.config.phases import LabelCorrectionPhase
from distav.console import show_progress
from distav.data.modalities import MODALITIES
from distav.distributed.collectives import all_gather_variable_rows, local_shard
from distav.noise.correction import Correction, CorrectionPrior, identity_correction
from distav.noise.label_correction import correct_labels
from distav.noise.vote_search import VoteSearchSpace
from distav.training.feature_extraction import extract_features
from distav.training.phases.correction_summary import build_summary, gather_result, log_correction, write_labels_table
from distav.training.phases.multi_label_correction import run_multi_label_correction
from distav.training.run import Run
from distav.training.run_state import CorrectionState

CORRECTION_COLUMNS = (
    "held_out",
    "posterior",
    "visual_held_out",
    "visual_posterior",
    "audio_held_out",
    "audio_posterior",
    "correspondence",
)
"""Columns of the memory bank with the class probabilities of a correction; see `Correction`."""


def run_correction(run: Run, name: str, config: LabelCorrectionPhase) -> None:
    """Correct the labels, store the result in the memory bank, and write the table `labels/<phase>.parquet`."""
    if run.data.shards.multi_label:
        run_multi_label_correction(run, name, config)
        return
    correction = compute_correction(run, name, config)
    store_correction(run, correction)
    result = gather_result(run, correction, config.min_change_odds)
    summary = build_summary(name, run.data.labels, correction, result)
    run.state.report.corrections.append(summary)
    if run.world.is_main:
        write_labels_table(run, name, result)
    log_correction(run, correction, result, summary, config.min_log_likelihood_gain)


def compute_correction(run: Run, name: str, config: LabelCorrectionPhase) -> Correction:
    """Extract the features and correct the labels; labels are kept if the features only reproduce the given labels."""
    labels, previous = run.data.labels, run.state.correction
    given = torch.from_numpy(labels.given).to(run.world.device)
    if run.state.given_labels_learned:
        if previous is not None and not previous.has_signal:
            if config.pseudo_labels:
                _warn(
                    run,
                    f"phase={name} the teachers of pseudo_labels={config.pseudo_labels} are not used, because a phase "
                    "trained on the given labels after a correction without label signal. Set pseudo_labels in the "
                    "phase of that correction.",
                )
            # A vote in features that were trained on the given labels would reproduce the wrong ones.
            return identity_correction(given, len(labels.classes))
        if previous is None or previous.rate_log_likelihood is None:
            _warn(
                run,
                f"phase={name} the features were trained on the given labels: their votes reproduce wrong labels, and "
                "the noise rate is underestimated. Add a label_correction phase before the first supervised phase on "
                "given labels.",
            )
    spaces, present = extract_features(run)
    run.enforce_quarantine_limit()
    search_space = VoteSearchSpace(
        num_neighbors=config.num_neighbors,
        second_round_neighbors=config.second_round_neighbors,
        vote_temperatures=config.vote_temperatures,
        whitening_powers=config.whitening_powers,
        num_components=config.num_components,
        min_log_likelihood_gain=config.min_log_likelihood_gain,
        num_probes=config.probes,
    )
    with show_progress(None, "clips", f"{name}: correcting labels"):
        return correct_labels(
            spaces,
            given,
            len(labels.classes),
            groups=torch.from_numpy(run.data.train.source_codes).to(run.world.device),
            has_modality={modality: all_gather_variable_rows(rows.float()) > 0 for modality, rows in present.items()},
            search_space=search_space,
            prior=_correction_prior(run),
            teachers=_teacher_probs(run, name, config),
        )


def _warn(run: Run, text: str) -> None:
    if run.world.is_main:
        run.logger.warn(text)


def _correction_prior(run: Run) -> CorrectionPrior | None:
    """Return the results of earlier corrections; None if the last one had no signal."""
    state, device = run.state.correction, run.world.device
    if state is None or not state.has_signal:
        return None
    return CorrectionPrior(
        held_out=run.bank.columns["held_out"],
        rate_log_likelihood=torch.tensor(state.rate_log_likelihood, dtype=torch.float64, device=device),
        pair_rate_log_likelihood=torch.tensor(state.pair_rate_log_likelihood, dtype=torch.float64, device=device),
        visual_owner=state.visual_owner,
    )


def _teacher_probs(run: Run, name: str, config: LabelCorrectionPhase) -> tuple[Tensor, Tensor] | None:
    """Return the class probabilities of the visual and the audio teacher for this rank's samples: [n, C] each."""
    scores = run.data.teacher_probs(name, config)
    if scores is None:
        return None
    probs = local_shard(torch.from_numpy(scores)).to(run.world.device)
    return probs[:, MODALITIES.index("visual")], probs[:, MODALITIES.index("audio")]


def store_correction(run: Run, correction: Correction) -> None:
    """Store the result in the memory bank and the run state, for checkpoints and later phases."""
    for name in CORRECTION_COLUMNS:
        run.bank.store_column(name, getattr(correction, name))
    state = run.state.correction or CorrectionState(correction.has_signal)
    state.has_signal = correction.has_signal
    if state.rate_log_likelihood is None and correction.has_signal:
        state.rate_log_likelihood = correction.rate_log_likelihood.tolist()
        state.pair_rate_log_likelihood = correction.pair_rate_log_likelihood.tolist()
        state.visual_owner = correction.visual_owner
    run.state.correction = state
