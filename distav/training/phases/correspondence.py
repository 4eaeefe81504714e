"""Which pairs belong together, estimated while a contrastive phase trains: once an epoch, or at every visit."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distav.config.phases import ContrastivePhase, Estimator
from distav.evaluation.metrics import auroc, confusion
from distav.losses.active_complementary import rescale_matching_probability
from distav.memory.global_batch import GlobalBatch
from distav.noise.correspondence import SelfRefinement, cdf_correspondence, gmm_correspondence, sample_weights
from distav.training.run import Run

REFINED = "refined_correspondence"
"""The bank's column of averages that self-refinement keeps; `correspondence` has what is believed of them."""

PAIR_KINDS = ["matching", "mismatched"]
_FEWEST_SEEN, _HALF = 10, 0.5


class Refinement:
    """Self-refining correspondence correction, a sample at each of its visits (CRCL)."""

    def __init__(self, run: Run, settings: ContrastivePhase):
        """Go on from what an earlier phase refined."""
        self.run, self.settings = run, settings
        self.rule = _rule(settings)
        if REFINED not in run.bank.columns:
            run.bank.columns[REFINED] = torch.ones_like(run.bank.columns["correspondence"])

    def __call__(self, global_batch: GlobalBatch, matching: Tensor, candidates: Tensor | int) -> Tensor:
        """Take a batch's matching probabilities in; returns what is believed of its pairs: [b].

        Args:
            global_batch: the batch of all ranks.
            matching: [b] probabilities of this rank's samples.
            candidates: how many they were found among.
        """
        run = self.run
        state = run.state.correspondence  # Looked up at each visit: a rollback replaces it.
        if state.first_refined_phase is None:
            state.first_refined_phase = run.progress.phase
        first = state.first_refined_phase == run.progress.phase
        epoch = run.progress.step // run.sampler(run.progress.phase).steps_per_epoch
        stored = run.bank.fetch((REFINED,), global_batch.ids)[0]
        matching = rescale_matching_probability(matching, candidates, self.settings.matching_reference_size)
        full = state.full_trust_threshold
        believed, stored = self.rule.update(stored, matching, epoch, first, full)
        run.bank.write(REFINED, stored, global_batch.ids, global_batch.valid)
        run.bank.write("correspondence", self.rule.trusted(stored, full), global_batch.ids, global_batch.valid)
        return believed


def _rule(settings: ContrastivePhase) -> SelfRefinement:
    return SelfRefinement(
        settings.correspondence_momentum,
        settings.refinement_warmup_epochs,
        settings.correspondence_threshold,
        settings.store_thresholded,
    )


def _measure_trust(run: Run, settings: ContrastivePhase) -> None:
    """Find from which matching probability on a pair is believed wholly, and believe all by it."""
    if settings.full_trust_quantile:
        refined = run.bank.gather_column(REFINED)
        full = max(float(np.quantile(refined.cpu().numpy(), settings.full_trust_quantile)), 1e-6)
        run.state.correspondence.full_trust_threshold = full
        run.bank.set_correspondence(_rule(settings).trusted(refined, full))


def estimate_correspondence(run: Run, settings: ContrastivePhase, trusted: bool) -> dict[str, Any]:
    """Estimate which pairs correspond from the bank, and store it once weights and soft targets are to be trusted.

    Estimates are averaged over epochs; the first one counts whole. What is refined at every visit is only told of.

    Returns:
        What was told, by its name on TensorBoard.
    """
    similarity, step = run.bank.pair_similarity(), run.progress.total_steps
    seen = torch.isfinite(similarity)
    run.logger.histogram("correspondence/similarity", similarity, step)
    if int(seen.sum()) < _FEWEST_SEEN:
        return {}
    record: dict[str, Any] = {"correspondence/similarity_mean": float(similarity[seen].mean())}
    refined = settings.correspondence_estimator is Estimator.scc
    if refined:
        _measure_trust(run, settings)
    estimate, told = _from_bank(run, settings.correspondence_estimator, similarity, seen)
    record |= told
    if trusted and not refined:
        if run.state.correspondence.is_estimated:
            estimate = torch.lerp(estimate, run.bank.gather_column("correspondence"), settings.correspondence_momentum)
        run.state.correspondence.is_estimated = True
        run.bank.set_correspondence(estimate)
    if trusted or refined:
        run.logger.histogram("correspondence/correspondence", estimate, step)
        weights = sample_weights(estimate, settings.min_pair_weight)
        run.logger.histogram("correspondence/weight", weights, step)
        record |= {
            "correspondence/weight_mean": float(weights.mean()),
            "correspondence/correspondence_mean": float(estimate.mean()),
        }
    record |= _ground_truth_metrics(run, settings.correspondence_estimator, similarity, estimate)
    run.logger.log_metrics(step, record)
    return record


def _from_bank(run: Run, estimator: Estimator, similarity: Tensor, seen: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Return the correspondence of all pairs [N], 1 where never seen, and what else there is to tell."""
    if estimator is Estimator.scc:
        return run.bank.gather_column("correspondence"), {}
    estimate, told = torch.ones_like(similarity), {}
    wrong = run.data.labels.mismatched()
    if estimator is Estimator.gmm:
        estimate[seen], mixture = gmm_correspondence(similarity[seen])
        for side, mean, share in zip(("low", "high"), mixture.means, mixture.weights, strict=True):
            told |= {f"correspondence/gmm_mean_{side}": mean, f"correspondence/gmm_fraction_{side}": share}
    elif estimator is Estimator.cdf:
        estimate[seen] = cdf_correspondence(similarity[seen])
    elif estimator is Estimator.category:
        estimate[seen] = run.bank.gather_column("category_agreement")[seen]
    elif estimator is Estimator.oracle and wrong is not None:
        estimate = torch.from_numpy(~wrong).float().to(estimate.device)
    return estimate, told


def _ground_truth_metrics(run: Run, estimator: Estimator, similarity: Tensor, estimate: Tensor) -> dict[str, Any]:
    """Return how well scores tell pairs of other classes, and all swapped ones, where the set knows them."""
    labels, wrong = run.data.labels, run.data.labels.mismatched()
    if wrong is None or labels.pair_id is None or not wrong.any():
        return {}
    scores = {"similarity": similarity.nan_to_num(), "category_agreement": run.bank.gather_column("category_agreement")}
    if estimator is not Estimator.none:
        scores["correspondence"] = run.bank.gather_column(REFINED) if estimator is Estimator.scc else estimate
    swapped, found = labels.pair_id != np.arange(len(wrong)), {}
    for name, each in scores.items():
        values = each.cpu().numpy()
        found[f"correspondence/auroc_{name}"] = auroc(values, ~wrong)
        found[f"correspondence/auroc_{name}_swapped"] = auroc(values, ~swapped)
    return found


def summarize_correspondence(run: Run, name: str, settings: ContrastivePhase) -> None:
    """At the end of a phase, estimate once more and note for the report what came of it."""
    told = estimate_correspondence(run, settings, trusted=True)
    summary: dict[str, Any] = {"phase": name, "estimator": settings.correspondence_estimator.name}
    summary |= {key.removeprefix("correspondence/"): value for key, value in told.items()}
    wrong = run.data.labels.mismatched()
    if wrong is not None and settings.correspondence_estimator is not Estimator.none:
        kinds = wrong.astype(np.int64)
        told_kinds = (run.bank.gather_column("correspondence") < _HALF).cpu().numpy().astype(np.int64)
        summary["confusion"] = confusion(kinds, told_kinds, PAIR_KINDS)
        run.logger.confusion(
            "correspondence/true_vs_predicted", kinds, told_kinds, PAIR_KINDS, run.progress.total_steps
        )
    run.state.report.correspondence.append(summary)
