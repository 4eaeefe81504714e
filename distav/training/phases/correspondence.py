"""Correspondence of pairs in a contrastive phase: estimated once per epoch, or refined at each visit of a sample."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distav.config.phases import ContrastivePhase, Estimator
from distav.evaluation.metrics import MISMATCH_THRESHOLD, auroc, confusion
from distav.losses.active_complementary import rescale_matching_probability
from distav.memory.global_batch import GlobalBatch
from distav.noise.correspondence import SelfRefinement, cdf_correspondence, gmm_correspondence, sample_weights
from distav.training.run import Run

REFINED = "refined_correspondence"
"""Bank column of the averages that self-refinement maintains; `correspondence` holds the trusted values."""

PAIR_KINDS = ["matching", "mismatched"]
MIN_VISITED = 10
"""Smallest number of visited pairs for an estimate."""


class Refinement:
    """Self-refining correspondence correction, applied to a sample at each of its visits (CRCL)."""

    def __init__(self, run: Run, config: ContrastivePhase):
        """Continue with the averages of an earlier phase, if there are any."""
        self.run, self.config = run, config
        self.rule = _refinement_rule(config)
        if REFINED not in run.bank.columns:
            run.bank.store_column(REFINED, torch.ones_like(run.bank.columns["correspondence"]))

    def __call__(self, global_batch: GlobalBatch, matching: Tensor, num_candidates: Tensor | int) -> Tensor:
        """Update the averages with a batch's matching probabilities; return the trusted correspondence: [b].

        Args:
            global_batch: batch of all ranks.
            matching: [b] matching probabilities of this rank's samples.
            num_candidates: number of candidates they refer to; [b] or one number for all.
        """
        run = self.run
        state = run.state.correspondence  # Read at each visit: a rollback replaces it.
        if state.first_refined_phase is None:
            state.first_refined_phase = run.progress.phase
        first = state.first_refined_phase == run.progress.phase
        epoch = run.progress.step // run.sampler(run.progress.phase).steps_per_epoch
        stored = run.bank.fetch((REFINED,), global_batch.ids)[0]
        matching = rescale_matching_probability(matching, num_candidates, self.config.matching_reference_size)
        threshold = state.full_trust_threshold
        trusted, stored = self.rule.update(stored, matching, epoch, first, threshold)
        run.bank.write(REFINED, stored, global_batch.ids, global_batch.paired)
        stored_trusted = self.rule.trusted(stored, threshold)
        run.bank.write("correspondence", stored_trusted, global_batch.ids, global_batch.paired)
        return trusted


def _refinement_rule(config: ContrastivePhase) -> SelfRefinement:
    return SelfRefinement(
        config.correspondence_momentum,
        config.refinement_warmup_epochs,
        config.correspondence_threshold,
        config.store_thresholded,
    )


def _update_full_trust_threshold(run: Run, config: ContrastivePhase) -> None:
    """Set the matching probability from which pairs are fully trusted, and recompute all trusted values from it."""
    if config.full_trust_quantile:
        refined = run.bank.gather_column(REFINED)
        threshold = max(float(np.quantile(refined.cpu().numpy(), config.full_trust_quantile)), 1e-6)
        run.state.correspondence.full_trust_threshold = threshold
        run.bank.set_correspondence(_refinement_rule(config).trusted(refined, threshold))


def estimate_correspondence(run: Run, config: ContrastivePhase, store: bool) -> dict[str, Any]:
    """Estimate the correspondence of all pairs from the memory bank and log it.

    Stored estimates are averaged with earlier ones; the first is stored as it is. With the estimator scc, which stores
    at each visit, this function only logs.

    Args:
        run: the run.
        config: settings of the phase.
        store: whether to store the estimate in the memory bank, for weights and soft targets.

    Returns:
        Logged values by TensorBoard tag; empty if too few pairs have been visited.
    """
    similarity, step = run.bank.pair_similarity(), run.progress.total_steps
    visited = torch.isfinite(similarity)
    run.logger.histogram("correspondence/similarity", similarity, step)
    if int(visited.sum()) < MIN_VISITED:
        return {}
    record: dict[str, Any] = {"correspondence/similarity_mean": float(similarity[visited].mean())}
    is_refined = config.correspondence_estimator is Estimator.scc
    if is_refined:
        _update_full_trust_threshold(run, config)
    estimate, estimator_record = _estimate_from_bank(run, config.correspondence_estimator, similarity, visited)
    record |= estimator_record
    if store and not is_refined:
        if run.state.correspondence.is_estimated:
            estimate = torch.lerp(estimate, run.bank.gather_column("correspondence"), config.correspondence_momentum)
        run.state.correspondence.is_estimated = True
        run.bank.set_correspondence(estimate)
    if store or is_refined:
        run.logger.histogram("correspondence/correspondence", estimate, step)
        weights = sample_weights(estimate, config.min_pair_weight)
        run.logger.histogram("correspondence/weight", weights, step)
        record |= {
            "correspondence/weight_mean": float(weights.mean()),
            "correspondence/correspondence_mean": float(estimate.mean()),
        }
    record |= _ground_truth_metrics(run, config.correspondence_estimator, similarity, estimate)
    run.logger.log_metrics(step, record)
    return record


def _estimate_from_bank(
    run: Run, estimator: Estimator, similarity: Tensor, visited: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Return the correspondence of all pairs [N], 1 for unvisited ones, and values of the estimator to log."""
    if estimator is Estimator.scc:
        return run.bank.gather_column("correspondence"), {}
    estimate, record = torch.ones_like(similarity), {}
    mismatched = run.data.labels.mismatched()
    if estimator is Estimator.gmm:
        estimate[visited], mixture = gmm_correspondence(similarity[visited])
        for side, mean, fraction in zip(("low", "high"), mixture.means, mixture.weights, strict=True):
            record |= {f"correspondence/gmm_mean_{side}": mean, f"correspondence/gmm_fraction_{side}": fraction}
    elif estimator is Estimator.cdf:
        estimate[visited] = cdf_correspondence(similarity[visited])
    elif estimator is Estimator.category:
        estimate[visited] = run.bank.gather_column("category_agreement")[visited]
    elif estimator is Estimator.oracle and mismatched is not None:
        estimate = torch.from_numpy(~mismatched).float().to(estimate.device)
    return estimate, record


def _ground_truth_metrics(run: Run, estimator: Estimator, similarity: Tensor, estimate: Tensor) -> dict[str, Any]:
    """Return the AUROC of each score for cross-class pairs and for all swapped pairs; empty without ground truth."""
    labels, mismatched = run.data.labels, run.data.labels.mismatched()
    if mismatched is None or labels.pair_id is None or not mismatched.any():
        return {}
    scores = {"similarity": similarity.nan_to_num(), "category_agreement": run.bank.gather_column("category_agreement")}
    if estimator is not Estimator.none:
        scores["correspondence"] = run.bank.gather_column(REFINED) if estimator is Estimator.scc else estimate
    swapped = labels.pair_id != np.arange(len(mismatched))
    metrics: dict[str, Any] = {}
    for name, score in scores.items():
        values = score.cpu().numpy()
        metrics[f"correspondence/auroc_{name}"] = auroc(values, ~mismatched)
        metrics[f"correspondence/auroc_{name}_swapped"] = auroc(values, ~swapped)
    return metrics


def summarize_correspondence(run: Run, name: str, config: ContrastivePhase) -> None:
    """Estimate the correspondence at the end of a phase, and add a summary to the report."""
    record = estimate_correspondence(run, config, store=True)
    summary: dict[str, Any] = {"phase": name, "estimator": config.correspondence_estimator.name}
    summary |= {tag.removeprefix("correspondence/"): value for tag, value in record.items()}
    mismatched = run.data.labels.mismatched()
    if mismatched is not None and config.correspondence_estimator is not Estimator.none:
        true = mismatched.astype(np.int64)
        correspondence = run.bank.gather_column("correspondence")
        predicted = (correspondence < MISMATCH_THRESHOLD).cpu().numpy().astype(np.int64)
        summary["confusion"] = confusion(true, predicted, PAIR_KINDS)
        run.logger.confusion("correspondence/true_vs_predicted", true, predicted, PAIR_KINDS, run.progress.total_steps)
    run.state.report.correspondence.append(summary)
