"""Between trainings: clean features of every clip, exact neighbours over all ranks, and a vote on every label."""

from dataclasses import fields

import torch

from distav.config.phases import LabelCorrectionPhase
from distav.data.modalities import MODALITIES
from distav.distributed.collectives import all_gather_variable_rows, shard_range
from distav.noise.label_correction import (
    Correction,
    CorrectionPrior,
    VoteSearchSpace,
    correct_labels,
    identity_correction,
)
from distav.training.feature_extraction import extract_features
from distav.training.phases.correction_summary import summarize_correction
from distav.training.run import Run
from distav.training.run_state import CorrectionState


def run_correction(run: Run, name: str, settings: LabelCorrectionPhase) -> None:
    """Vote on every label, keep the votes beside the bank, and write the table `labels/<phase>.parquet`."""
    before = run.state.correction
    if run.state.given_labels_learned and before is not None and not before.has_signal:
        # Such features hold the given labels, right and wrong; votes among them would only repeat these.
        if settings.pseudo_labels and run.world.is_main:
            run.logger.warn(
                f"phase={name} its teachers are not heard, since given labels were learnt after a correction that knew "
                "nothing; let them vote in that one"
            )
        given = torch.from_numpy(run.data.labels.given).to(run.world.device)
        found = identity_correction(given, len(run.data.labels.classes))
    else:
        first = before is None or before.rate_log_likelihood is None
        if run.state.given_labels_learned and first and run.world.is_main:
            run.logger.warn(
                f"phase={name} votes among features that have learnt the given labels agree with them more than they "
                "should, and tell too little noise; put a correction before the first training on labels"
            )
        found = vote(run, name, settings)
    store_correction(run, found)
    summarize_correction(run, name, found)


def vote(run: Run, name: str, settings: LabelCorrectionPhase) -> Correction:
    """Extract features and let neighbours vote, and teachers where they were asked."""
    spaces, present = extract_features(run)
    run.enforce_quarantine_limit()
    labels, split, device = run.data.labels, run.data.train, run.world.device
    valid = all_gather_variable_rows(present.float()) > 0
    voting = VoteSearchSpace(**{each.name: getattr(settings, each.name) for each in fields(VoteSearchSpace)})
    given = torch.from_numpy(labels.given).to(device)
    groups = torch.from_numpy(split.source_codes).to(device)
    before, state = None, run.state.correction
    if state is not None and state.has_signal:
        before = CorrectionPrior(
            run.bank.columns["held_out"],
            torch.tensor(state.rate_log_likelihood, dtype=torch.float64, device=device),
            torch.tensor(state.rate_log_likelihood_credible, dtype=torch.float64, device=device),
        )
    teachers, held = None, run.data.teacher_probs(name, settings)
    if held is not None:
        own = shard_range(len(split))
        shares = torch.from_numpy(held[own.start : own.stop]).to(device)
        teachers = shares[:, MODALITIES.index("visual")], shares[:, MODALITIES.index("audio")]
    return correct_labels(spaces, given, len(labels.classes), groups, valid, voting, before, teachers)


def store_correction(run: Run, found: Correction) -> None:
    """Store the votes beside the bank's rows, where checkpoints and the next phases find them."""
    for name in ("held_out", "posterior", "audio_held_out", "audio_posterior", "correspondence"):
        run.bank.store_column(name, getattr(found, name))
    state = run.state.correction or CorrectionState(found.has_signal)
    state.has_signal = found.has_signal
    if state.rate_log_likelihood is None and found.has_signal:
        state.rate_log_likelihood = found.rate_log_likelihood.tolist()
        state.rate_log_likelihood_credible = found.rate_log_likelihood_credible.tolist()
    run.state.correction = state
